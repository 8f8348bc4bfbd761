"""Runtime and memory, measured: a pass of its own with the machine to itself.

Settings take turns, so that a machine that gets slower or faster does so for all of them. Between
passes, days apart, it differs by ten percent: every pass therefore runs the references of what it
times beside it, again and again, and `analysis.frame` compares within a pass. The first run of each
method on each pipeline is a warm-up; the memory that a cell holds between its steps is counted
once, in a run of its own that is not timed. Records are appended per machine.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from experiments import provenance
from experiments.cell import Cell
from experiments.config import TimingConfig
from experiments.execute import Worker, sample
from experiments.memory import held
from experiments.plan import Plan
from experiments.store import Store

BESIDE = 8  # runs that share one of their reference: a slow one must not make all others look fast


def untimed(plan: Plan, store: Store, config: TimingConfig, machine: str) -> list[Cell]:
    """The runs to make, in order: of each setting's first stored prompts as many as are missing.

    Of several seeds of a prompt the first is timed. The references run first in every round and
    after each `BESIDE` runs. Only timings of a pass that timed the cell's reference too count as
    made.
    """
    stored = {cell.key: cell for cell in plan.stored(store)}
    chosen, prompts = [], defaultdict(set)
    for cell in stored.values():
        taken, prompt = prompts[cell.setting], cell.inputs["request"]["prompt_id"]
        if cell.reference_key in stored and prompt not in taken and len(taken) < config.prompts:
            taken.add(prompt)
            chosen.append(cell)
    have = {cell.key: _made(cell, store, machine) for cell in chosen}
    runs = []
    for turn in range(config.repeats):
        missing = [cell for cell in chosen if have[cell.key] <= turn]
        runs += _beside_references(missing, stored)
    return runs


def _beside_references(cells: Sequence[Cell], stored: Mapping[str, Cell]) -> Iterator[Cell]:
    runs = Counter()
    for cell in cells:
        if runs[cell.reference_key] % BESIDE == 0:
            yield stored[cell.reference_key]
        if cell.key != cell.reference_key:
            yield cell
        runs[cell.reference_key] += 1


def measure(cells: list[Cell], worker: Worker) -> Iterator[Cell]:
    """Time the runs as one pass and store what they took; yields each cell when it is done."""
    machine = provenance.machine()
    pass_id = uuid.uuid4().hex
    held_bytes = {cell.key: _held_bytes(cell, worker.store, machine.name) for cell in cells}
    warm = set()
    for cell in cells:
        model = worker.model(cell.config.model)
        kind = (cell.config.model.name, cell.task, type(cell.method))
        if held_bytes[cell.key] is None:
            with held() as memory:
                sample(model, cell, output_type="latent", each_step=memory.note)
            held_bytes[cell.key] = memory.peak
        elif kind not in warm:
            sample(model, cell, output_type="latent")
        warm.add(kind)
        load = provenance.load()
        watch = sample(model, cell, output_type="latent").watch
        timing = {
            **watch.to_dict(),
            "held_bytes": held_bytes[cell.key],
            "pass": pass_id,
            "hardware": asdict(machine),
            "load": load,
            "commit": provenance.code().commit,
            "finished": provenance.now(),
        }
        worker.store.write_timing(cell.key, machine.name, timing)
        yield cell


def _made(cell: Cell, store: Store, machine: str) -> int:
    """Timings of a cell in passes that timed its reference too."""
    passes = {timing.get("pass") for timing in store.timings(cell.reference_key, machine)}
    return sum(timing.get("pass") in passes for timing in store.timings(cell.key, machine))


def _held_bytes(cell: Cell, store: Store, machine: str) -> int | None:
    """What an earlier pass counted; None: nobody has."""
    counted = [timing.get("held_bytes") for timing in store.timings(cell.key, machine)]
    return max(filter(None, counted), default=None)
