"""Which videos an experiment consists of. Never imports torch, so it answers at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baselines.base import Method, Request
from experiments.cell import Cell, canonical_json, cell_inputs, content_key
from experiments.config import Config, Experiment, ModelConfig, Setting, build, method_name
from experiments.errors import UserError, one_line
from experiments.prompts import Prompt
from experiments.store import Store

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """The cells of an experiment, each once: by model, then task, then prompt, then setting.

    Prompts come before settings, so that a part of the plan already compares all settings.
    """

    cells: tuple[Cell, ...]

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


def plan(experiment: Experiment) -> Plan:
    """Expand an experiment and check everything that can be checked without loading a model.

    Raises:
        UserError: a setting that cannot run.
    """
    builder = _Builder()
    cells: dict[str, tuple[tuple[int, ...], Cell]] = {}
    references: dict[str, tuple[tuple[int, ...], Cell]] = {}
    _refuse_ambiguous(experiment.settings)
    for setting in experiment.settings:
        for order, reference, cell in builder.cells(setting):
            if cell.key in cells:
                other = cells[cell.key][1].label
                raise UserError(f"grid: {other!r} and {cell.label!r} are the same setting")
            cells[cell.key] = order, cell
            if reference is not None:
                references[reference.key] = order, reference
    ordered = sorted((references | cells).values(), key=lambda entry: entry[0])
    return Plan(tuple(cell for _, cell in ordered))


def _refuse_ambiguous(settings: Sequence[Setting]) -> None:
    """Tables know a setting by its label."""
    known: dict[str, Config] = {}
    references = [setting.reference for setting in settings if setting.reference]
    for setting in [*settings, *references]:
        if known.setdefault(setting.label, setting.config) != setting.config:
            raise UserError(f"grid: two settings are called {setting.label!r}; give one a label")


class _Builder:
    """Cells of settings; prompts and model identities are read once."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}
        self._models: dict[str, int] = {}

    def cells(self, setting: Setting) -> Iterator[tuple[tuple[int, ...], Cell | None, Cell]]:
        """Each cell with its place in the plan and the cell of its reference."""
        config = setting.config
        prompts = self._prompts(config)
        model = self._models.setdefault(canonical_json(asdict(config.model)), len(self._models))
        for t, task in enumerate(config.tasks):
            for p, prompt in enumerate(prompts):
                for s, seed in enumerate(config.seeds):
                    reference = None
                    if setting.reference:
                        reference = self._cell(setting.reference, task, prompt, seed)
                    cell = self._cell(setting, task, prompt, seed, reference)
                    yield (model, t, p, s), reference, cell

    def _cell(
        self, setting: Setting, task: str, prompt: Prompt, seed: int, reference: Cell | None = None
    ) -> Cell:
        config = setting.config
        method = self._once("method", config.method)
        request = _request(config, method, task, prompt, seed)
        _check(method, request, prompt, config.model)
        identity = self._once("model.identity", config.model.identity)
        name = method_name(config)
        inputs = cell_inputs(config.model, identity, name, method, request, prompt)
        key = content_key(inputs)
        return Cell(
            key=key,
            label=setting.label,
            inputs=inputs,
            config=config,
            method=method,
            request=request,
            reference_key=reference.key if reference else key,
        )

    def _prompts(self, config: Config) -> list[Prompt]:
        prompts = self._once("prompts", config.prompts)[: config.limit]
        if not prompts:
            raise UserError(f"prompts: there are none (limit={config.limit})")
        for id, count in Counter(prompt.id for prompt in prompts).items():
            if count > 1:
                raise UserError(f"prompts: {count} have the id {id!r}")
        return prompts

    def _once(self, key: str, node: Mapping[str, Any]) -> Any:
        signature = canonical_json([key, node])
        if signature not in self._built:
            self._built[signature] = build(node, key)
        return self._built[signature]


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
