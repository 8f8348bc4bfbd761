"""An offline schedule for step-level caching: masks planned from what reuse does to whole videos.

What no online rule can have: `calibrate` runs calibration videos with one span of reuse each and
sees how far the finished video strays; a dynamic program then plans the computed steps for every
budget. Running a plan replays a static mask. It is no upper bound on step caching: it takes
spans for independent of each other, which they are not where the errors are large, and its plan is
for the calibration videos, not for the one that is made.

Shapes: T steps. A span is a computed step and the next one; the steps between reuse the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from baselines.base import Request, require
from baselines.policy import Policy, ReuseMethod
from baselines.static_mask import ExplicitMask

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Spans that are measured: how many steps reuse a residual, the most also the longest that is
# planned, and every how many steps one ends.
LENGTHS = (1, 4, 12)
EVERY = 2


@dataclass(frozen=True)
class OracleSchedule(ReuseMethod):
    """Compute the ``budget`` steps that `calibrate` planned, reuse the residual in between.

    ``masks``: for each task, one text of T zeros and ones (computed) for every possible budget.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2511.00090 (LeMiCa)"
    source: ClassVar[str] = "the paper: outcome costs and lexicographic minimax path"
    deviations: ClassVar[tuple[str, ...]] = (
        "costs: L2 distance of the final latents, measured for some spans and interpolated for the "
        "others; LeMiCa takes L1 and measures every span",
        "the last step may be reused; LeMiCa's schedules end with a computed one",
        "DPCache (arXiv 2602.22654), which plans by a sum of costs that depend on the span before "
        "and predicts features, is not this",
    )

    budget: int = 20
    masks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def knob(self) -> tuple[str, int, int]:
        planned = [set(map(_budget, masks)) for masks in self.masks.values()]
        budgets = set.intersection(*planned) if planned else {self.budget}
        return "budget", min(budgets), max(budgets)

    def validate(self, request: Request) -> None:
        if self == self.neutral(request):
            return
        masks = self.masks.get(request.task, ())
        require(
            bool(masks) and all(len(mask) == request.steps for mask in masks),
            "oracle.masks",
            self.masks,
            f"masks of {request.steps} steps for {request.task}, "
            "from `hsa-bench calibrate method=oracle`",
        )
        budgets = sorted(map(_budget, masks))
        require(self.budget in budgets, "oracle.budget", self.budget, f"one of {budgets}")

    def neutral(self, request: Request) -> OracleSchedule:
        return replace(self, budget=request.steps)

    def policy(self, request: Request) -> Policy:
        if self.budget == request.steps:
            return ExplicitMask((1,) * request.steps).policy(request)
        (mask,) = (mask for mask in self.masks[request.task] if _budget(mask) == self.budget)
        return ExplicitMask(tuple(map(int, mask))).policy(request)


def calibrate(pipe: DiffusionPipeline, requests: Iterable[Request]) -> dict[str, Any]:
    """Plan a mask for every budget from what spans of reuse do to the videos of some requests.

    All requests are of one task and step count. A video of 40 steps takes about 50 partial runs,
    the work of 25 full ones.

    Returns:
        ``masks`` for `OracleSchedule`, and ``costs`` (T, T + 1), which `schedules` took: the L2
        distance of the final latents to the full run's, relative to those; the mean over videos.
    """
    from baselines.reuse import expert_steps
    from baselines.span_runs import span_runs
    from hsa.schedulers import euler

    videos = []
    with euler(pipe):
        for request in requests:
            with span_runs(pipe, request) as run:
                full = run((0, 1))
                spans = expert_steps(pipe)
                costs = {
                    span: ((run(span) - full).norm() / full.norm()).item()
                    for span in measured_spans(spans)
                }
            videos.append(interpolated(costs, spans))
    costs = np.mean(videos, axis=0)
    masks = ["".join(map(str, map(int, mask))) for mask in schedules(costs).values()]
    return {"masks": {request.task: masks}, "costs": costs}


def measured_spans(experts: Sequence[range]) -> Iterator[tuple[int, int]]:
    """Those that `calibrate` runs, given the steps of each expert."""
    for steps in experts:
        ends = sorted({*range(steps.start + 2, steps.stop, EVERY), steps.stop})
        lengths = sorted({min(length, len(steps) - 1) for length in LENGTHS})
        for end, length in product(ends, lengths):
            if end - 1 - length in steps:
                yield end - 1 - length, end


def interpolated(measured: Mapping[tuple[int, int], float], experts: Sequence[range]) -> np.ndarray:
    """The cost of every span, (T, T + 1), from those of some.

    Logarithms of costs are interpolated linearly in the span's end, then in the logarithm of its
    length. Spans of length 0 cost nothing; infinite are those that are longer than any measured, or
    would cross from one expert to the next.

    Args:
        measured: (computed step, next one) -> cost.
        experts: the steps of each.
    """
    steps = experts[-1].stop
    costs = np.full((steps, steps + 1), np.inf)
    costs[range(steps), range(1, steps + 1)] = 0.0
    for expert in experts:
        lines: dict[int, dict[int, float]] = defaultdict(dict)  # length -> end -> log cost
        for (start, end), cost in sorted(measured.items()):
            if start in expert:
                lines[end - start - 1][end] = np.log(max(cost, 1e-9))
        lengths = sorted(lines)
        for end in range(expert.start + 2, expert.stop + 1):
            logs = [np.interp(end, [*lines[n]], [*lines[n].values()]) for n in lengths]
            for length in range(1, min(lengths[-1], end - 1 - expert.start) + 1):
                costs[end - 1 - length, end] = np.exp(
                    np.interp(np.log(length), np.log(lengths), logs)
                )
    return costs


def schedules(costs: np.ndarray) -> dict[int, tuple[bool, ...]]:
    """The best mask for every number of computed steps that is possible.

    The best mask has the smallest largest span, among those the smallest second largest, and so on
    (the lexicographic minimax of LeMiCa): one bad span spoils a video that a sum of small errors
    would not.

    Args:
        costs: (T, T + 1), what it costs to compute step i and to reuse its residual up to the next
            computed step j, or T after the last; infinite where that cannot be done.

    Returns:
        budget -> T times whether the step is computed; the first always is.
    """
    steps = len(costs)
    # For each j, the spans of the best way to compute `budget` of the steps before j, largest
    # first, and those steps
    best: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {0: ((), ())}
    found = {}
    for budget in range(1, steps + 1):
        best = {
            j: min(
                (tuple(sorted((*best[i][0], costs[i, j]), reverse=True)), (*best[i][1], i))
                for i in best
                if i < j
            )
            for j in range(budget, steps + 1)
            if any(i < j for i in best)
        }
        largest, computed = best[steps]
        if np.isfinite(largest[0]):
            found[budget] = tuple(step in computed for step in range(steps))
    return found


def _budget(mask: str) -> int:
    return mask.count("1")
