"""Fits what a method needs to know about a model, and searches the setting that meets a runtime."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from importlib import import_module
from statistics import fmean
from typing import Any

import numpy as np

from baselines.base import Method
from experiments import provenance
from experiments.cell import Cell
from experiments.config import Experiment, Setting, build
from experiments.errors import UserError, one_line
from experiments.execute import Video, Worker, sample
from experiments.match import (
    Match,
    Matches,
    Timed,
    match_key,
    require_knob,
    search,
    turned_fields,
    with_steps,
)
from experiments.plan import plan


def calibrate(
    cells: Sequence[Cell], worker: Worker
) -> tuple[dict[str, Any], dict[str, int | float]]:
    """What `calibrate(pipe, requests, ...)` in the method's module finds on the cells' requests.

    Further parameters of that function are fields of the method. Of its findings those are
    returned that are fields too, and the numbers among the others.

    Raises:
        UserError: the method has nothing to fit, or the cells are of several methods or tasks.
    """
    method, task = cells[0].method, cells[0].task
    if any(cell.method != method or cell.task != task for cell in cells):
        raise UserError(
            "calibrate takes one setting of one task, as in method=teacache tasks=[t2v]"
        )
    fit = getattr(import_module(type(method).__module__), "calibrate", None)
    if fit is None:
        raise UserError(
            f"{cells[0].label} has nothing to calibrate; choose one like teacache, or give a target"
        )
    _, _, *needed = inspect.signature(fit).parameters
    pipe = worker.model(cells[0].config.model).pipeline(task)
    found = fit(
        pipe, [cell.request for cell in cells], **{name: getattr(method, name) for name in needed}
    )
    names = {entry.name for entry in fields(method)}
    constants = {name: value for name, value in found.items() if name in names}
    numbers = {
        name: value
        for name, value in found.items()
        if name not in names and isinstance(value, (int, float))
    }
    return constants, numbers


def match(experiment: Experiment, worker: Worker) -> Iterator[Match | UserError]:
    """Meet the target of every setting, in each of its tasks; yields each match when it is stored.

    What is stored already, for the same weights and version and on this machine, is yielded as it
    is. For a setting that cannot run, or has no knob or reference, the error is yielded and the
    others go on.
    """
    runs: dict[str, _Runs] = {}  # targets of one method share what was run
    for setting in experiment.settings:
        for task in setting.config.tasks if setting.config.target is not None else ():
            config = replace(setting.config, target=None, label=None, tasks=[task])
            signature = repr(config)
            try:
                if signature not in runs:
                    runs[signature] = _Runs(replace(setting, config=config), worker)
                yield _match(setting, runs[signature])
            except (UserError, ValueError) as error:
                yield UserError(f"{setting.label} ({task}): {one_line(error)}")


def _match(setting: Setting, runs: _Runs) -> Match:
    """Search and store, unless that was done before."""
    config, target, method = setting.config, setting.config.target, runs.method
    require_knob(method, setting.label, target)
    key, matches = match_key(setting, method, runs.task), Matches.of(config)
    known = matches.get(key)
    now = runs.provenance
    decisive = {name: now[name] for name in ("weights", "version", "machine")}
    if known and known.made_with(**decisive):
        return known
    value, timed = search(target, method.knob[1:], runs.work, runs.time, 0.5 / runs.steps)
    found = Match(
        key=key,
        label=setting.label,
        task=runs.task,
        target=target,
        fields=turned_fields(method, value),
        reached=timed.meets(target),
        at_end=value in method.knob[1:],
        work=runs.work(value),
        provenance=runs.provenance,
        **asdict(timed),
    )
    matches.add(found)
    return found


class _Runs:
    """Runs of one method for one task, at any value of its knob, and of its reference beside it."""

    def __init__(self, setting: Setting, worker: Worker):
        if setting.reference is None:
            raise UserError(f"{setting.label}: no reference whose runtime it could have a share of")
        if setting.config.timing.repeats < 1:
            raise UserError(
                f"timing.repeats={setting.config.timing.repeats}: choose 1 or more to meet a target"
            )
        config = self._config = setting.config
        self._cells = plan(Experiment(config, (replace(setting, reference=None),))).cells
        self._reference = build(setting.reference.config.method, "reference.method")
        self._worker = worker
        self._work: dict[float, float] = {}
        self._ratios: dict[float, list[float]] = defaultdict(list)
        self._warm = False
        self.method = self._cells[0].method
        self.task = self._cells[0].task
        self.steps = config.schedule.steps

    @property
    def provenance(self) -> dict[str, Any]:
        config, code = self._config, provenance.code()
        return {
            "weights": build(config.model.identity, "model.identity"),
            "version": self.method.version,
            "prompts": config.prompts | {"limit": config.limit},
            "timing": asdict(config.timing),
            "machine": provenance.machine().name,
            "commit": code.commit,
            "changed": bool(code.patch),
            "date": provenance.now(),
        }

    def work(self, value: float) -> float:
        """Block rows computed, as a share of the reference's: the mean over all prompts."""
        if value not in self._work:
            method = self.method.turned(value)
            self._work[value] = fmean(
                video.trace.active_fraction * (method.steps or self.steps) / self.steps
                for cell in self._cells
                for video in [self._sample(cell, method)]
            )
        return self._work[value]

    def time(self, value: float) -> Timed:
        """Ratios of the denoising times of pairs of runs, one right after the other.

        Of all pairs since the first call: every call adds some.
        """
        method, config = self.method.turned(value), self._config.timing
        if not self._warm:
            self._seconds(self._cells[0], self._reference)
            self._warm = True
        self._ratios[value] += [
            self._seconds(cell, method) / self._seconds(cell, self._reference)
            for _ in range(config.repeats)
            for cell in self._cells[: config.prompts]
        ]
        low, median, high = np.quantile(self._ratios[value], [0.25, 0.5, 0.75]).tolist()
        return Timed(median, low, high)

    def _seconds(self, cell: Cell, method: Method) -> float:
        return self._sample(cell, method).watch.to_dict()["denoise_s"]

    def _sample(self, cell: Cell, method: Method) -> Video:
        model = self._worker.model(self._config.model)
        request = with_steps(replace(cell.request, steps=self.steps), method)
        return sample(model, replace(cell, method=method, request=request), output_type="latent")
