"""What each method costs beside the work it saves: memory, hooks, and the steps it skips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.tables import MISSING, Entry, Table, megabytes, percent
from baselines.flow_matching import FlowMatching
from experiments.bench import note
from experiments.cell import Cell
from experiments.config import Experiment, Setting
from experiments.errors import UserError
from experiments.execute import Video, Worker, sample
from experiments.memory import held
from experiments.plan import plan

NOTE = (
    "Extra memory: what is held between steps, beyond flow matching. Overhead: runtime of the "
    "method set to skip nothing, against flow matching. Skipped step: a step in which no block "
    f"runs, against a full one; {MISSING} where the method has none."
)


@dataclass
class Cost:
    """Of one setting; `refusal` says why there are no numbers.

    Attributes:
        extra_bytes: held between steps, beyond flow matching.
        neutral: runtimes when nothing is skipped, as shares of flow matching's.
        skipped: times of steps without any block, as shares of a full step's.
    """

    label: str
    implementation: str = ""
    extra_bytes: int = 0
    neutral: list[float] = field(default_factory=list)
    skipped: list[float] = field(default_factory=list)
    refusal: str = ""


def bench(experiment: Experiment, worker: Worker) -> Iterator[Cost]:
    """The cost of every setting, on its first prompt and task; runs take turns with plain ones."""
    plain_bytes: dict[str, int] = {}  # what flow matching holds, by model
    for setting in experiment.settings:
        try:
            cell = plan(Experiment(experiment.config, (_bare(setting),))).cells[0]
            plain = replace(cell, method=FlowMatching(steps=cell.request.steps))
            model = repr(cell.config.model)
            if model not in plain_bytes:
                _run(plain, worker)  # a first run also fills what libraries keep for good
                plain_bytes[model] = _held(plain, worker)
            extra = _held(cell, worker) - plain_bytes[model]
            cost = Cost(cell.label, cell.method.implementation, extra)
            for _ in range(experiment.config.bench.repeats):
                _time(cost, cell, plain, worker)
            yield cost
        except (UserError, ValueError) as error:  # the model is not one for the method
            yield Cost(setting.label, refusal=str(error))


def tables(costs: Sequence[Cost]) -> list[Table]:
    header = ("Method", "Implementation", "Extra memory (MB)", "Overhead", "Skipped step")
    rows = tuple(
        (
            Entry(cost.label, number=False),
            Entry(cost.refusal or cost.implementation, number=False),
            Entry(MISSING if cost.refusal else megabytes(cost.extra_bytes)),
            Entry(_spread(np.array(cost.neutral) - 1)),
            Entry(_spread(np.array(cost.skipped))),
        )
        for cost in costs
    )
    return [Table("Cost of the methods", header, rows, f"{NOTE} {note()}")]


def rows(costs: Sequence[Cost]) -> list[Mapping[str, Any]]:
    return [
        {
            "label": cost.label,
            "implementation": cost.implementation,
            "refusal": cost.refusal,
            "extra_bytes": cost.extra_bytes,
            "neutral": " ".join(f"{value:.5f}" for value in cost.neutral),
            "skipped": " ".join(f"{value:.5f}" for value in cost.skipped),
        }
        for cost in costs
    ]


def _bare(setting: Setting) -> Setting:
    config = replace(setting.config, tasks=setting.config.tasks[:1], limit=1)
    return replace(setting, config=config, reference=None)


def _run(cell: Cell, worker: Worker, **arguments: Any) -> Video:
    model = worker.model(cell.config.model)
    return sample(model, cell, output_type="latent", **arguments)


def _held(cell: Cell, worker: Worker) -> int:
    with held() as memory:
        _run(cell, worker, each_step=memory.note)
    return memory.peak


def _time(cost: Cost, cell: Cell, plain: Cell, worker: Worker) -> None:
    """Add one run set to skip nothing and one as it is, beside a plain one."""
    neutral = replace(cell, method=cell.method.neutral(cell.request))
    full, idle, video = (_run(each, worker) for each in (plain, neutral, cell))
    cost.neutral.append(_denoising(idle) / _denoising(full))
    step = _denoising(full) / cell.request.steps
    cost.skipped += [seconds / step for seconds in _skipped_steps(video)]


def _denoising(video: Video) -> float:
    return video.watch.to_dict()["denoise_s"]


def _skipped_steps(video: Video) -> Iterator[float]:
    """Seconds of the steps in which no guidance branch ran a block."""
    ran: dict[int, float] = {}
    for record in video.trace.records:
        ran[record.step] = ran.get(record.step, 0) + record.block_calls
    for step, (begin, end) in enumerate(pairwise(video.watch.steps)):
        if ran.get(step) == 0:
            yield end - begin


def _spread(shares: np.ndarray) -> str:
    """Median and quartiles."""
    if not len(shares):
        return MISSING
    low, median, high = np.quantile(shares, [0.25, 0.5, 0.75])
    return f"{percent(median)} [{100 * low:.1f}, {100 * high:.1f}]".replace("-", "\N{MINUS SIGN}")
