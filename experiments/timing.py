"""Runtime and memory, measured: a pass of its own with the machine to itself.

Settings take turns, so that a machine that gets slower or faster does so for all of them. The
first run on each pipeline is a warm-up and dropped; a run of its own counts the memory that a cell
holds between its steps. Records are appended per machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from experiments import provenance
from experiments.cell import Cell
from experiments.config import TimingConfig
from experiments.execute import Worker, sample
from experiments.memory import held
from experiments.plan import Plan
from experiments.store import Store


def untimed(plan: Plan, store: Store, config: TimingConfig, machine: str) -> list[Cell]:
    """The runs to make, in order: of each setting's first stored cells as many as are missing."""
    chosen, count = [], Counter()
    for cell in plan.cells:
        if store.has(cell.key) and count[cell.setting] < config.prompts:
            count[cell.setting] += 1
            chosen.append(cell)
    have = {
        cell.key: sum(timing["machine"] == machine for timing in store.timings(cell.key))
        for cell in chosen
    }
    rounds = range(config.repeats)
    return [cell for turn in rounds for cell in chosen if have[cell.key] <= turn]


def measure(cells: list[Cell], worker: Worker) -> Iterator[Cell]:
    """Time the runs and store what they took; yields each cell when it is done."""
    machine = provenance.machine()
    warm, held_bytes = set(), {}
    for cell in cells:
        model = worker.model(cell.config.model)
        pipeline = (cell.config.model.name, cell.task)
        if pipeline not in warm:
            sample(model, cell, output_type="latent")
            warm.add(pipeline)
        if cell.key not in held_bytes:
            with held() as memory:
                sample(model, cell, output_type="latent", each_step=memory.note)
            held_bytes[cell.key] = memory.peak
        load = provenance.load()
        watch = sample(model, cell, output_type="latent").watch
        timing = {
            **watch.to_dict(),
            "held_bytes": held_bytes[cell.key],
            "hardware": asdict(machine),
            "load": load,
            "commit": provenance.code().commit,
            "finished": provenance.now(),
        }
        worker.store.write_timing(cell.key, machine.name, timing)
        yield cell
