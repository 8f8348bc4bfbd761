"""Which videos an experiment consists of. Never imports torch, so it answers at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import itemgetter
from typing import Any

from baselines.base import Method, Request
from experiments.cell import Cell, canonical_json, cell_inputs, content_key
from experiments.config import Config, Experiment, ModelConfig, Setting, build, method_name
from experiments.errors import UserError, one_line
from experiments.match import Match, Matches, match_key, matched, require_knob
from experiments.prompts import Prompt, stand_ins
from experiments.store import Store

Place = tuple[int, int, int, int]  # indices of model, task, prompt, seed: the order of a plan
DTYPES = ("float32", "bfloat16", "float16")
ABOUT = ("version", "implementation", "paper", "source")  # what every method says of itself
CAPTIONS = "experiments.embedded.prompts"  # which only the embedded model knows


@dataclass(frozen=True)
class Plan:
    """The cells of an experiment, each once: by model, then task, then prompt, then setting.

    Prompts come before settings, so that a part of the plan already compares all settings.

    Attributes:
        notes: which settings are left out because nobody has searched for their target runtime,
            what is out of date, what a model's results are worth, where `limit` cuts the prompts.
        unreached: of the settings that are left out because they do not meet their target.
        matched_on: machines on which those that have a target were searched.
    """

    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    unreached: tuple[Match, ...] = ()
    matched_on: frozenset[str] = frozenset()

    def missing(self, store: Store) -> list[Cell]:
        return [cell for cell in self.cells if not store.has(cell.key)]

    def stored(self, store: Store) -> list[Cell]:
        return [cell for cell in self.cells if store.has(cell.key)]

    def by_setting(self) -> dict[tuple[str, str], list[Cell]]:
        """(task, label) -> cells, in the order of the plan."""
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(cell.setting, []).append(cell)
        return groups


def plan(experiment: Experiment, count_only: bool = False, neutral: bool = False) -> Plan:
    """Expand an experiment and check everything that can be checked without loading a model.

    Args:
        count_only: let cells without a text stand in for those of a suite that is not installed;
            a note says so. They have other keys than the real ones.
        neutral: methods skip nothing, so that what they have to know of a model can be missing.

    Raises:
        UserError: a setting that cannot run.
    """
    _refuse_ambiguous(experiment.settings)
    _check_counts(experiment.config)
    builder = _Builder(count_only, neutral)
    cells: dict[str, tuple[Place, Cell]] = {}
    references: dict[str, tuple[Place, Cell]] = {}
    for setting in experiment.settings:
        source = builder.source(setting)
        reference = builder.source(setting.reference) if setting.reference else None
        for place in source.places():
            cell = source.cell(place)
            if cell.key in cells:
                other = cells[cell.key][1].label
                raise UserError(f"grid: {other!r} and {cell.label!r} are the same setting")
            if reference:
                target = reference.cell(place)
                references[target.key] = place, target
                cell = replace(cell, reference_key=target.key)
            cells[cell.key] = place, cell
    if not cells:
        reasons = [*builder.notes, *map(str, builder.unreached)]
        reason = "; ".join(reasons) or "tasks and seeds need one entry or more"
        raise UserError(f"nothing to make: {reason}")
    ordered = sorted((references | cells).values(), key=itemgetter(0))
    unreached, matched_on = tuple(builder.unreached), frozenset(builder.matched_on)
    return Plan(tuple(cell for _, cell in ordered), builder.notes, unreached, matched_on)


def _refuse_ambiguous(settings: Sequence[Setting]) -> None:
    """Tables know a setting by its label."""
    known: dict[str, Config] = {}
    references = [setting.reference for setting in settings if setting.reference]
    for setting in [*settings, *references]:
        if known.setdefault(setting.label, setting.config) != setting.config:
            raise UserError(f"grid: two settings are called {setting.label!r}; give one a label")


def _check_counts(config: Config) -> None:
    """Of the whole run."""
    timing, bench, seeds = config.timing, config.bench, config.seeds
    _require(timing.repeats >= 0, "timing.repeats", timing.repeats, "0 or more")
    _require(timing.prompts >= 1, "timing.prompts", timing.prompts, "1 or more")
    _require(bench.repeats >= 1, "bench.repeats", bench.repeats, "1 or more")
    _require(len({*seeds}) == len(seeds), "seeds", seeds, "each once")


def _check_finite(key: str, node: Any) -> None:
    """What is not a number has no key in a store."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            _check_finite(f"{key}.{name}", value)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            _check_finite(key, value)
    elif isinstance(node, float):
        _require(math.isfinite(node), key, node, "a finite number")


class _Builder:
    """What the cells of settings are made of; equal parts of the configuration are built once."""

    def __init__(self, count_only: bool, neutral: bool) -> None:
        self._count_only, self._neutral = count_only, neutral
        self._remarks: dict[str, None] = {}  # on models and prompts, each once
        self.unreached: list[Match] = []
        self.matched_on: set[str] = set()
        self._unmatched: list[str] = []
        self._stale = 0
        self._built: dict[str, Any] = {}
        self._matches: dict[str, Matches] = {}
        self._models: dict[str, int] = {}
        self._sources: dict[int, _Source] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        notes = list(self._remarks)
        if self._unmatched:
            shown = ", ".join(self._unmatched[:3]) + (", ..." if len(self._unmatched) > 3 else "")
            notes.append(
                f"left out, {len(self._unmatched)} without a match for their target: {shown}; "
                "`hsa-bench calibrate` with the same arguments finds it"
            )
        if self._stale:
            notes.append(
                f"{self._stale} settings were matched with other weights or an older version of "
                "their method; calibrate again"
            )
        if len(self._models) > 1:
            notes.append(
                f"{len(self._models)} models in one table, whose runtimes and differences to flow "
                "matching it mixes; a run for each keeps them apart"
            )
        return tuple(notes)

    def source(self, setting: Setting) -> _Source:
        if id(setting) not in self._sources:
            config = setting.config
            _check_finite("method", config.method)
            _check_finite("model", asdict(config.model))
            model = canonical_json(asdict(config.model))
            identity = self._build("model.identity", config.model.identity)
            if config.model.note:
                self._remarks[config.model.note] = None
            self._sources[id(setting)] = _Source(
                setting,
                self._models.setdefault(model, len(self._models)),
                self._methods(setting, identity),
                identity,
                self._prompts(config),
                self._neutral,
            )
        return self._sources[id(setting)]

    def _prompts(self, config: Config) -> Sequence[Prompt]:
        limit = config.limit
        _require(limit is None or limit > 0, "limit", limit, "a number from 1, or null")
        if config.prompts.get("_target_") == CAPTIONS and config.model.name != "embedded":
            self._remarks[f"{config.model.name} on the embedded model's captions of shapes"] = None
        try:
            prompts = self._build("prompts", config.prompts)
        except UserError as error:
            size = config.prompts.get("size")
            if not (self._count_only and size):
                raise
            self._remarks[f"counted, but cannot be made: {error}"] = None
            prompts = stand_ins(size)
        if limit is not None and limit < len(prompts):
            note = f"subset: the first {limit} of {len(prompts)} prompts (limit={limit})"
            self._remarks[note] = None
        return prompts[:limit]

    def _methods(self, setting: Setting, identity: Mapping[str, Any]) -> dict[str, Method]:
        """The method for each task; without those tasks where it cannot meet its target."""
        config, label = setting.config, setting.label
        method = self._build("method", config.method)
        missing = [name for name in ABOUT if not hasattr(method, name)]
        if missing or not isinstance(method, Method):
            what = f"without {', '.join(missing)}" if missing else "no Method"
            raise UserError(f"method._target_={config.method['_target_']}: {what}")
        if config.target is None:
            return dict.fromkeys(config.tasks, method)
        require_knob(method, label, config.target)
        if config.model.name not in self._matches:
            self._matches[config.model.name] = Matches.of(config)
        found, methods = self._matches[config.model.name], {}
        for task in config.tasks:
            match = found.get(match_key(setting, method, task))
            if match is None:
                self._unmatched.append(f"{label} ({task})")
                continue
            self._stale += not match.made_with(weights=identity, version=method.version)
            self.matched_on.add(match.provenance["machine"])
            if match.reached:
                methods[task] = matched(method, match)
            else:
                self.unreached.append(match)
        return methods

    def _build(self, key: str, node: Mapping[str, Any]) -> Any:
        signature = canonical_json([key, node])
        if signature not in self._built:
            self._built[signature] = build(node, key)
        return self._built[signature]


class _Source:
    """The cells of one setting, by their place."""

    def __init__(
        self,
        setting: Setting,
        model: int,
        methods: Mapping[str, Method],
        identity: Mapping[str, Any],
        prompts: Sequence[Prompt],
        neutral: bool,
    ):
        self._setting, self._model, self._identity = setting, model, identity
        self._methods = methods  # task -> method
        self._prompts, self._neutral = prompts, neutral
        self._cells: dict[Place, Cell] = {}
        _require_prompts(self._prompts)

    def places(self) -> Iterator[Place]:
        config = self._setting.config
        tasks = [i for i, task in enumerate(config.tasks) if task in self._methods]
        return product([self._model], tasks, range(len(self._prompts)), range(len(config.seeds)))

    def cell(self, place: Place) -> Cell:
        """The cell at a place; it is its own reference."""
        if place not in self._cells:
            self._cells[place] = self._cell(place)
        return self._cells[place]

    def _cell(self, place: Place) -> Cell:
        config, (_, task, prompt, seed) = self._setting.config, place
        found, method = self._prompts[prompt], self._methods[config.tasks[task]]
        request = _request(config, method, config.tasks[task], found, config.seeds[seed])
        if self._neutral:
            method = method.neutral(request)
        _check(method, request, found, config.model)
        inputs = cell_inputs(
            config.model, self._identity, method_name(config), method, request, found
        )
        key = content_key(inputs)
        return Cell(key, self._setting.label, inputs, config, method, request, key)


def _require_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise UserError("prompts: there are none")
    for id, count in Counter(prompt.id for prompt in prompts).items():
        if count > 1:
            raise UserError(f"prompts: {count} have the id {id!r}")


def _request(config: Config, method: Method, task: str, prompt: Prompt, seed: int) -> Request:
    made = config.model.request
    return Request(
        task=task,
        prompt=prompt.text,
        negative_prompt=made.negative_prompt,
        seed=seed,
        steps=config.schedule.steps if method.steps is None else method.steps,
        guidance_scale=made.guidance_scale,
        height=made.height,
        width=made.width,
        num_frames=made.num_frames,
        max_sequence_length=made.max_sequence_length,
        image=prompt.image if task == "i2v" else None,
        extra=made.extra,
    )


def _check(method: Method, request: Request, prompt: Prompt, model: ModelConfig) -> None:
    """Refuse what the model or the method cannot do, naming key, value and choices."""
    limits = model.limits
    _require(model.dtype in DTYPES, "model.dtype", model.dtype, ", ".join(DTYPES))
    _require(request.task in limits.tasks, "tasks", request.task, ", ".join(limits.tasks))
    for side in ("height", "width"):
        size = getattr(request, side)
        _require(
            0 < size <= limits.max_size and size % limits.size_multiple == 0,
            f"model.request.{side}",
            size,
            f"multiples of {limits.size_multiple} up to {limits.max_size}",
        )
    frames = request.num_frames
    _require(
        0 < frames <= limits.max_frames and (frames - 1) % limits.frame_stride == 0,
        "model.request.num_frames",
        frames,
        f"1 + multiples of {limits.frame_stride} up to {limits.max_frames}",
    )
    for grid in ("sigmas", "timesteps"):
        _require(
            grid not in request.extra,
            f"model.request.extra.{grid}",
            request.extra.get(grid),
            "schedule.steps, whose grid is the scheduler's",
        )
    guidance = request.guidance_scale
    _require(math.isfinite(guidance), "model.request.guidance_scale", guidance, "a finite number")
    _require(bool(request.prompt.strip()), f"prompt {prompt.id}", request.prompt, "a text")
    if request.task == "i2v":
        _require(request.image is not None, f"prompt {prompt.id}", "no image", "one for task i2v")
    try:
        method.validate(request)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    _require(request.steps >= 1, "schedule.steps", request.steps, "1 or more")


def _require(valid: bool, key: str, value: Any, choices: str) -> None:
    if not valid:
        raise UserError(f"{key}={value!r}: choose {choices}")
