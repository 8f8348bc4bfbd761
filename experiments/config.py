"""Configuration: what a run consists of, with its types. The only place that builds objects.

Hydra composes the groups; values are set afterwards, whether they come from the command line or
from a grid, so that both give the same errors and a grid of hundreds composes each choice once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError, one_line

GROUPS = ("model", "method", "prompts", "metric", "engine", "logger", "experiment")
Values = dict[str, Any]  # key with dots -> value


@dataclass
class RequestConfig:
    """Sizes in pixels, `num_frames` as decoded."""

    height: int = MISSING
    width: int = MISSING
    num_frames: int = MISSING
    fps: int = MISSING
    guidance_scale: float = MISSING
    negative_prompt: str = MISSING
    max_sequence_length: int = MISSING


@dataclass
class LimitsConfig:
    """What a model can make, known without loading it."""

    tasks: list[str] = MISSING
    size_multiple: int = MISSING
    frame_stride: int = MISSING
    max_size: int = MISSING
    max_frames: int = MISSING


@dataclass
class ModelConfig:
    name: str = MISSING
    dtype: str = MISSING
    path: str | None = None
    load: dict[str, Any] = MISSING
    identity: dict[str, Any] = MISSING
    request: RequestConfig = field(default_factory=RequestConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass
class ScheduleConfig:
    steps: int = MISSING


@dataclass
class TimingConfig:
    repeats: int = MISSING
    prompts: int = MISSING


@dataclass
class Config:
    """The root of `conf/config.yaml`, without the grid and reference that `Experiment` expands."""

    name: str = MISSING
    results_dir: str = MISSING
    store: str = MISSING
    label: str | None = None
    tasks: list[str] = MISSING
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    seeds: list[int] = MISSING
    limit: int | None = None
    shard: str | None = None
    timing: TimingConfig = field(default_factory=TimingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = MISSING
    prompts: dict[str, Any] = MISSING
    metric: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING

    @property
    def out_dir(self) -> Path:
        return Path(self.results_dir) / self.name


@dataclass(frozen=True)
class Setting:
    """One point of a grid: a complete configuration and what to call it.

    `reference` is the setting that its fidelity is measured against: the same in everything but
    the method. None for the reference itself, or where the experiment has none.
    """

    label: str
    config: Config
    reference: Setting | None = None


@dataclass(frozen=True)
class Experiment:
    """A composed command line: what holds for the whole run, and the points of its grid."""

    config: Config
    settings: tuple[Setting, ...]


def load_experiment(
    overrides: Sequence[str] = (), multirun: bool = False, config_dir: str | None = None
) -> Experiment:
    """Compose `conf` with overrides in Hydra's grammar and expand the grid.

    Args:
        multirun: allow sweeps such as `method.threshold=0.1,0.2`; they multiply the grid.
        config_dir: a folder with more groups, searched beside `conf`.

    Raises:
        UserError: an override that does not fit, in one line.
    """
    try:
        with _hydra(config_dir) as composer:
            return composer.experiment(_parse(overrides), multirun)
    except MissingConfigException as error:
        group, _, name = error.missing_cfg_file.rpartition("/")
        raise UserError(f"{group}={name}: choose {', '.join(error.options or [])}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def build(node: Mapping[str, Any], key: str) -> Any:
    """The object that a node with `_target_` describes.

    Raises:
        UserError: the target refuses its arguments; `key` says which part of the configuration.
    """
    try:
        return instantiate(node, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if cause is not None and not isinstance(cause, (ValueError, TypeError, OSError)):
            raise
        raise UserError(f"{key}: {one_line(cause or error)}") from error


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[_Composer]:
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        yield _Composer(config_dir)


class _Composer:
    """Configurations from group choices and values; composes every set of choices once."""

    def __init__(self, config_dir: str | None):
        self._hydra_overrides = []
        if config_dir:
            if not Path(config_dir).is_dir():
                raise UserError(f"--config-dir {config_dir}: no such folder")
            self._hydra_overrides = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
        self._composed: dict[str, DictConfig] = {}
        self._settings: dict[str, Setting] = {}

    def experiment(self, overrides: Sequence[Override], multirun: bool) -> Experiment:
        fixed, sweep = _split(overrides, multirun)
        root = self._compose(fixed)
        written = OmegaConf.to_container(root)  # its interpolations belong to the settings
        entries = [entry | sweep for entry in _entries(written["grid"])]
        _refuse_hidden(fixed, entries)
        points = [_over(fixed, point) for entry in entries for point in _points(entry)]
        settings = (self._with_reference(values, written["reference"]) for values in points)
        return Experiment(_typed(root), tuple(settings))

    def _with_reference(self, values: Values, reference: Values | None) -> Setting:
        setting = self._setting(values)
        if reference is None:
            return setting
        shared = {key: value for key, value in values.items() if key != "label"}
        return replace(setting, reference=self._setting(_over(shared, reference)))

    def _setting(self, values: Values) -> Setting:
        signature = repr(sorted(values.items()))
        if signature not in self._settings:
            config = _typed(self._compose(values))
            label = config.label or _default_label(config, values)
            self._settings[signature] = Setting(label, config)
        return self._settings[signature]

    def _compose(self, values: Values) -> DictConfig:
        choices = {key: value for key, value in values.items() if key in GROUPS}
        overrides = sorted(f"{group}={_choice(value)}" for group, value in choices.items())
        signature = " ".join(overrides)
        if signature not in self._composed:
            self._composed[signature] = compose("config", overrides + self._hydra_overrides)
        config = self._composed[signature].copy()
        for key in values.keys() - choices.keys():
            _set(config, key, values[key])
        return config


def _choice(value: Any) -> str:
    """A group's value in Hydra's grammar; several choices of one group are a list."""
    if isinstance(value, list):
        return f"[{','.join(map(_choice, value))}]"
    if not isinstance(value, str):
        raise UserError(f"{value!r}: not the name of a configuration file")
    return value


def _parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def _split(overrides: Sequence[Override], multirun: bool) -> tuple[Values, Values]:
    """Values for the whole run, and lists of values that multiply the grid."""
    fixed, sweep = {}, {}
    for override in overrides:
        key = override.get_key_element()
        if override.type is not OverrideType.CHANGE:
            raise UserError(f"{override.input_line}: only key=value changes a configuration")
        if not override.is_sweep_override():
            fixed[key] = override.value()
        elif multirun:
            sweep[key] = [_plain(value) for value in override.sweep_iterator()]
        else:
            raise UserError(f"{override.input_line}: several values need -m")
    return fixed, sweep


def _plain(value: Any) -> Any:
    """A swept value without Hydra's own type for quoted strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.text if isinstance(value, QuotedString) else value


def _entries(grid: Any) -> list[Values]:
    if not isinstance(grid, list) or not all(isinstance(entry, dict) for entry in grid):
        raise UserError(f"grid={grid}: not a list of mappings from keys to values")
    return grid


def _points(entry: Values) -> Iterator[Values]:
    """Every combination of the values that are lists."""
    axes = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in product(*axes):
        yield dict(zip(entry, values, strict=True))


def _over(values: Values, point: Values) -> Values:
    """The point's values over others; choosing a group resets the keys of that group."""
    chosen = tuple(f"{group}." for group in GROUPS if group in point)
    return {key: value for key, value in values.items() if not key.startswith(chosen)} | point


def _refuse_hidden(fixed: Values, entries: Sequence[Values]) -> None:
    """A value that every setting of the grid replaces would have no effect."""
    for key, value in fixed.items():
        group = key.split(".")[0]
        if all(key in entry or (group in GROUPS and group in entry) for entry in entries):
            raise UserError(f"{key}={value} has no effect: every setting of the grid replaces it")


def _set(config: DictConfig, key: str, value: Any) -> None:
    """Replace an existing value; keys are never made up."""
    *parents, _ = key.split(".")
    node: Any = config
    for depth, name in enumerate(key.split(".")):
        if not isinstance(node, DictConfig) or name not in node.keys():
            path = ".".join(parents[:depth])
            choices = ", ".join(map(str, node)) if isinstance(node, DictConfig) else "none"
            raise UserError(
                f"{key}={value}: no key {name!r} in {path or 'config'}; choices: {choices}"
            )
        if depth < len(parents):
            node = node[name]
    OmegaConf.update(config, key, value, merge=False)


def _typed(config: DictConfig) -> Config:
    """Check types, resolve interpolations, refuse missing values."""
    values = OmegaConf.masked_copy(config, [k for k in config if k not in ("grid", "reference")])
    for key in sorted(OmegaConf.missing_keys(values)):
        raise UserError(f"{key}: missing, say {key}=...")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {message}" if error.full_key else message) from error


def _default_label(config: Config, values: Values) -> str:
    """The method and what was changed of it: teacache threshold=0.1."""
    changed = [
        f"{key.split('.', 1)[1]}={_short(value)}"
        for key, value in values.items()
        if key.startswith(("method.", "schedule."))
    ]
    return " ".join([values.get("method", method_name(config)), *changed])


def method_name(config: Config) -> str:
    """Name of a method's module: `baselines.teacache.TeaCache` is teacache."""
    return config.method["_target_"].split(".")[-2]


def _short(value: Any) -> str:
    return str(value).replace(" ", "")
