"""An oracle for step-level caching: the best step mask for a budget, planned from full runs.

What no online rule can have: `calibrate` sees the residuals of all steps, knows what reusing each
at each later step would cost, and a dynamic program picks the best computed steps for every budget.
Running it replays a static mask.

Shapes: T steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from baselines.base import Request, require
from baselines.policy import Call, Policy, ReuseMethod
from baselines.static_mask import ExplicitMask

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class OracleSchedule(ReuseMethod):
    """Compute the ``budget`` steps that `calibrate` found best, reuse the residual in between.

    ``masks``: for each task, one text of T zeros and ones (computed) for every possible budget.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2602.22654 (DPCache), arXiv 2511.00090 (LeMiCa)"
    source: ClassVar[str] = "the papers' idea: least total cost of a path through the steps"
    deviations: ClassVar[tuple[str, ...]] = (
        "costs: relative distance of the residuals, where LeMiCa measures final videos; DPCache's "
        "feature predictor is left out",
        "one mask for all guidance branches",
    )

    budget: int = 20
    masks: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def knob(self) -> tuple[str, int, int]:
        budgets = set.intersection(*(set(map(_budget, masks)) for masks in self.masks.values()))
        return "budget", min(budgets), max(budgets)

    def validate(self, request: Request) -> None:
        if self == self.neutral(request):
            return
        masks = self.masks.get(request.task, ())
        require(
            bool(masks) and all(len(mask) == request.steps for mask in masks),
            "oracle.masks",
            self.masks,
            f"masks of {request.steps} steps for {request.task}; `hsa-bench calibrate` finds them "
            f"with method.masks={{}} method.budget={request.steps}",
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
    """The best mask for every budget, from full runs of requests of one task and step count.

    Returns:
        ``masks`` for `OracleSchedule` and ``costs`` (T, T), see `schedules`: the relative distance
        of the residuals, |R_k - R_i| / |R_k|, the mean over videos and guidance branches.
    """
    from baselines.reuse import residual_reuse
    from hsa.schedulers import euler

    branches: list[np.ndarray] = []
    with euler(pipe):
        for request in requests:
            with residual_reuse(pipe, partial(_Probe, branches, request.steps)):
                pipe(**request.kwargs(pipe) | {"output_type": "latent"})
    known = [np.isfinite(costs) for costs in branches]
    total = sum(np.where(found, costs, 0) for found, costs in zip(known, branches, strict=True))
    count = sum(map(np.asarray, known)).clip(min=1)
    costs = np.where(np.any(known, axis=0), total / count, np.inf)
    masks = ["".join(map(str, map(int, mask))) for mask in schedules(costs).values()]
    return {"masks": {request.task: masks}, "costs": costs}


def schedules(costs: np.ndarray) -> dict[int, tuple[bool, ...]]:
    """The best mask for every number of computed steps that is possible.

    A mask's spans, each a computed step and the steps that reuse it, cost what their steps cost
    together. The best mask has the smallest largest span; among those the smallest second largest,
    and so on (the lexicographic minimax of LeMiCa): one bad span spoils a video that a sum of small
    errors would not.

    Args:
        costs: (T, T), what it costs to use the residual of step i at step k > i; infinite where
            that cannot be done, as when another expert has taken over.

    Returns:
        budget -> T times whether the step is computed; the first always is.
    """
    steps = len(costs)
    # spans[i, j]: compute i, reuse it at all steps up to the next computed one, j
    spans = np.full((steps, steps + 1), np.inf)
    for i in range(steps):
        spans[i, i + 1 :] = np.cumsum([0.0, *costs[i, i + 1 :]])
    # For each j, the spans of the best way to compute `budget` of the steps before j, largest
    # first, and those steps
    best: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {0: ((), ())}
    found = {}
    for budget in range(1, steps + 1):
        best = {
            j: min(
                (tuple(sorted((*best[i][0], spans[i, j]), reverse=True)), (*best[i][1], i))
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


class _Probe(Policy):
    """Computes every step and notes how far its residual is from each earlier one of the branch."""

    def __init__(self, branches: list[np.ndarray], steps: int) -> None:
        self.residuals: dict[int, Tensor] = {}
        self.costs = np.full((steps, steps), np.inf)
        branches.append(self.costs)

    def decide(self, call: Call) -> bool:
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        for step, earlier in self.residuals.items():
            change = (residual - earlier).norm() / residual.norm()
            self.costs[step, call.step] = change.item()
        self.residuals[call.step] = residual


def _budget(mask: str) -> int:
    return mask.count("1")
