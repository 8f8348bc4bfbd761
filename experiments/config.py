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

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from experiments.errors import UserError, one_line

GROUPS = ("model", "method", "prompts", "metric", "figure", "engine", "logger", "experiment")
SWEPT = frozenset({"model", "method", "prompts"})  # groups that a grid may choose from
UNREFERENCED = {"label": None, "target": None}  # of a setting, not of its reference
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
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of the pipeline


@dataclass
class LimitsConfig:
    """What a model can make, known without loading it."""

    tasks: list[str] = MISSING
    size_multiple: int = MISSING
    frame_stride: int = MISSING
    max_size: int = MISSING
    max_frames: int = MISSING


@dataclass
class TransformerConfig:
    """Shape of a model's transformer: what a plan reckons with before anything is loaded.

    `token` is what one video token stands for: frames, rows and columns of pixels. `audio_width`
    is the width of the attention between video and audio; 0: there is no audio.
    """

    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    ffn: int = MISSING
    token: list[int] = MISSING
    audio_width: int = 0


@dataclass
class ModelConfig:
    name: str = MISSING
    dtype: str = MISSING
    path: str | None = None
    weights: dict[str, Any] | None = None  # finds what must be downloaded; None: nothing
    load: dict[str, Any] = MISSING
    identity: dict[str, Any] = MISSING
    request: RequestConfig = field(default_factory=RequestConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    transformer: TransformerConfig | None = None
    note: str | None = None  # what every table of this model has to say


@dataclass
class ScheduleConfig:
    steps: int = MISSING


@dataclass
class TimingConfig:
    repeats: int = MISSING
    prompts: int = MISSING


@dataclass
class BenchConfig:
    sizes: list[str] = MISSING
    shares: list[float] = MISSING
    repeats: int = MISSING


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
    target: float | None = None
    matched: str = MISSING
    shard: str | None = None
    timing: TimingConfig = field(default_factory=TimingConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = MISSING
    prompts: dict[str, Any] = MISSING
    metric: dict[str, dict[str, Any]] = field(default_factory=dict)
    figure: dict[str, dict[str, Any]] = field(default_factory=dict)
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
    with _hydra(config_dir) as search:
        try:
            return _expand(overrides, multirun, search)
        except yaml.YAMLError as error:
            raise UserError(f"not a configuration file: {one_line(error)}") from error
        except MissingConfigException as error:
            group, _, name = error.missing_cfg_file.rpartition("/")
            loader = GlobalHydra.instance().config_loader()
            options = error.options or loader.get_group_options(group)
            raise UserError(f"{group}={name}: choose {', '.join(options)}") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(one_line(error)) from error


def group_choices(group: str) -> list[str]:
    """Names of the configuration files of a group."""
    with initialize_config_module("conf", version_base="1.3"):
        return GlobalHydra.instance().config_loader().get_group_options(group)


def build(node: Mapping[str, Any], key: str) -> Any:
    """The object that a node with `_target_` describes.

    Raises:
        UserError: the target refuses its arguments; `key` says which part of the configuration.
    """
    try:
        return instantiate(node, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if cause is not None and not isinstance(
            cause, (ValueError, TypeError, OSError, ImportError)
        ):
            raise
        raise UserError(f"{key}: {one_line(cause or error)}") from error


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[list[str]]:
    """Hydra on `conf`; yields what every composition needs to search the user's folder too."""
    if config_dir and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        yield [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []


def _expand(overrides: Sequence[str], multirun: bool, search: list[str]) -> Experiment:
    fixed, sweep = _split([_parse(override) for override in overrides], multirun)
    swept = SWEPT & sweep.keys()  # what is said of these groups holds for each of their choices
    sweep |= {key: [fixed.pop(key)] for key in [*fixed] if key.split(".")[0] in swept}
    chosen = [
        f"{key}={_choice(value, several=key not in SWEPT)}"
        for key, value in fixed.items()
        if key in GROUPS
    ]
    root = compose("config", chosen + search)
    _apply(root, {key: value for key, value in fixed.items() if key not in GROUPS})
    grid, reference = _cut(root)
    entries = [entry | sweep for entry in grid]
    _refuse_hidden(fixed, entries)
    points = [point for entry in entries for point in _points(entry)]
    expander = _Expander(root, _told(fixed), _nodes([*points, reference or {}], search))
    settings = tuple(expander.setting(point, reference) for point in points)
    return Experiment(_typed(root), settings)


class _Expander:
    """Settings from the points of a grid, each composed once."""

    def __init__(self, root: DictConfig, named: Values, nodes: Mapping[tuple[str, str], Any]):
        """`named`: what labels tell beside the point's own values."""
        self._root, self._named, self._nodes = root, named, nodes
        self._settings: dict[str, Setting] = {}

    def setting(self, point: Values, reference: Values | None) -> Setting:
        setting = self._setting(point)
        if reference is None:
            return setting
        return replace(setting, reference=self._setting(_over(point | UNREFERENCED, reference)))

    def _setting(self, point: Values) -> Setting:
        signature = repr(sorted(point.items()))
        if signature not in self._settings:
            config = self._root.copy()
            for group in SWEPT & point.keys():
                config[group] = self._nodes[group, point[group]]
            _apply(config, {key: value for key, value in point.items() if key not in SWEPT})
            typed = _typed(config)
            label = typed.label or _default_label(typed, _over(self._named, point))
            self._settings[signature] = Setting(label, typed)
        return self._settings[signature]


def _nodes(points: Sequence[Values], search: list[str]) -> dict[tuple[str, str], Any]:
    """(group, name) -> configuration of every choice in a grid, all composed at once."""
    pairs = [(group, point[group]) for point in points for group in SWEPT & point.keys()]
    chosen = list(dict.fromkeys(pairs))
    loads = [f"+{group}@node{i}={_choice(name)}" for i, (group, name) in enumerate(chosen)]
    composed = compose(overrides=loads + search)
    return {pair: composed[f"node{i}"] for i, pair in enumerate(chosen)}


def _cut(root: DictConfig) -> tuple[list[Values], Values | None]:
    """Take grid and reference out, as written: their interpolations belong to the settings."""
    written = OmegaConf.to_container(root)
    with open_dict(root):
        del root["grid"], root["reference"]
    grid, reference = written["grid"], written["reference"]
    if not (isinstance(grid, list) and grid and all(isinstance(entry, dict) for entry in grid)):
        raise UserError(f"grid={grid}: not a list of mappings from keys to values")
    if not isinstance(reference, dict | None):
        raise UserError(f"reference={reference}: not a mapping from keys to values, nor null")
    return grid, reference


def _choice(value: Any, several: bool = False) -> str:
    """A group's value in Hydra's grammar; several choices of one group are a list."""
    if isinstance(value, list) and several:
        return f"[{','.join(map(_choice, value))}]"
    if not isinstance(value, str):
        raise UserError(
            f"{value!r}: not the name of a configuration file; several are swept with -m"
        )
    return value


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"{text[:60]!r}: not key=value; quote what has blanks or commas") from error


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


def _points(entry: Values) -> Iterator[Values]:
    """Every combination of the values that are lists."""
    axes = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in product(*axes):
        yield dict(zip(entry, values, strict=True))


def _over(values: Values, point: Values) -> Values:
    """The point's values over others; choosing a group resets the keys of that group."""
    chosen = tuple(f"{group}." for group in GROUPS if group in point)
    return {key: value for key, value in values.items() if not key.startswith(chosen)} | point


def _told(values: Values) -> Values:
    """Of the values for the whole run, those that labels tell."""
    return {key: v for key, v in values.items() if key.split(".")[0] in ("method", "target")}


def _refuse_hidden(fixed: Values, entries: Sequence[Values]) -> None:
    """A value that every setting of the grid replaces would have no effect."""
    for key, value in fixed.items():
        group = key.split(".")[0]
        if all(key in entry or (group in GROUPS and group in entry) for entry in entries):
            raise UserError(f"{key}={value} has no effect: every setting of the grid replaces it")


def _apply(config: DictConfig, values: Values) -> None:
    """Replace existing values; keys are never made up."""
    for key, value in values.items():
        node: Any = config
        *parents, _ = names = key.split(".")
        for depth, name in enumerate(names):
            if not isinstance(node, DictConfig) or name not in node.keys():
                where = ".".join(parents[:depth]) or "config"
                choices = ", ".join(map(str, node)) if isinstance(node, DictConfig) else "none"
                raise UserError(f"{key}={value}: no key {name!r} in {where}; choices: {choices}")
            if depth < len(parents):
                node = node[name]
        OmegaConf.update(config, key, value, merge=False)


def _typed(config: DictConfig) -> Config:
    """Check types, resolve interpolations, refuse missing values."""
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: missing, say {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    values["model"].pop("constants", None)  # methods have taken theirs
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        key, reason = error.full_key, str(error).splitlines()[0]
        where = f"{key}={OmegaConf.select(config, key)}: " if key else ""
        raise UserError(f"{where}{reason}") from error


def _default_label(config: Config, values: Values) -> str:
    """The method and what was changed, as in: teacache threshold=0.1, or teacache target=0.5."""
    changed = [
        f"{key.split('.')[-1]}={str(value).replace(' ', '')}"
        for key, value in values.items()
        if key.startswith(("method.", "schedule.", "model.")) or (key == "target" and value)
    ]
    return " ".join([values.get("method", method_name(config)), *changed])


def method_name(config: Config) -> str:
    """Name of a method's module: `baselines.teacache.TeaCache` is teacache.

    Raises:
        UserError: the method's yaml does not say where it is.
    """
    target = config.method.get("_target_")
    if not isinstance(target, str) or "." not in target:
        raise UserError(f"method._target_={target}: choose module.Class, such as baselines.hsa.HSA")
    return target.split(".")[-2]
