"""An oracle for step-level caching: the best step mask for a budget, planned from full runs.

What no online rule can have: `calibrate` sees every step's residual and what an error in each step
does to the finished video, and a dynamic program picks the computed steps that cost least in total.
Running it replays a static mask. A bound for the schedules of step caches, as far as costs add up.

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
        "costs: distance of the residuals, in units of what reusing the step before does to the "
        "final latents; DPCache's feature predictor and LeMiCa's minimax objective are left out",
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
    """The best mask for every budget, from runs of requests of one task and step count.

    A request takes T runs: a full one, and one for each step in which that step alone is reused.
    The first says how far a residual is from every earlier one, the others what the step's error
    does to the final latents.

    Returns:
        ``masks`` for `OracleSchedule` and ``costs`` (T, T), see `schedules`: the mean over
        requests of the relative error of the final latents.
    """
    costs = []
    for request in requests:
        distances, latents = _full_run(pipe, request)
        for step in range(1, request.steps):
            if np.isfinite(distances[step - 1, step]):
                mask = ExplicitMask(tuple(int(other != step) for other in range(request.steps)))
                with mask.attach(pipe, request):
                    error = _latents(pipe, request) - latents
                outcome = (error.norm() / latents.norm()).item()
                distances[:, step] *= outcome / distances[step - 1, step]
        costs.append(distances)
    mean = np.mean(costs, axis=0)
    masks = ["".join(map(str, map(int, mask))) for mask in schedules(mean).values()]
    return {"masks": {request.task: masks}, "costs": mean}


def _full_run(pipe: DiffusionPipeline, request: Request) -> tuple[np.ndarray, Tensor]:
    """(T, T) distances between the residuals, infinite across experts, and the final latents."""
    from baselines.reuse import residual_reuse
    from hsa.schedulers import euler

    branches: list[np.ndarray] = []
    with euler(pipe), residual_reuse(pipe, partial(_Probe, branches, request.steps)):
        latents = _latents(pipe, request)
    known = [np.isfinite(distances) for distances in branches]
    total = sum(np.where(found, d, 0) for found, d in zip(known, branches, strict=True))
    count = sum(map(np.asarray, known)).clip(min=1)
    return np.where(np.any(known, axis=0), total / count, np.inf), latents


def _latents(pipe: DiffusionPipeline, request: Request) -> Tensor:
    return pipe(**request.kwargs(pipe) | {"output_type": "latent"}).frames


def schedules(costs: np.ndarray) -> dict[int, tuple[bool, ...]]:
    """The mask of least total cost for every number of computed steps that is possible.

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
    least = np.full(steps + 1, np.inf)  # of the steps before j, with the current budget
    least[0] = 0.0
    before: list[np.ndarray] = []
    found = {}
    for budget in range(1, steps + 1):
        totals = least[:steps, None] + spans
        before.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
        if np.isfinite(least[steps]):
            found[budget] = _trace_back(before, steps)
    return found


def _trace_back(before: Sequence[np.ndarray], steps: int) -> tuple[bool, ...]:
    computed, j = set(), steps
    for choice in reversed(before):
        j = int(choice[j])
        computed.add(j)
    return tuple(step in computed for step in range(steps))


class _Probe(Policy):
    """Computes every step and notes how far its residual is from each earlier one of the branch."""

    def __init__(self, branches: list[np.ndarray], steps: int) -> None:
        self.residuals: dict[int, Tensor] = {}
        self.distances = np.full((steps, steps), np.inf)
        branches.append(self.distances)

    def decide(self, call: Call) -> bool:
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        for step, earlier in self.residuals.items():
            self.distances[step, call.step] = (residual - earlier).norm().item()
        self.residuals[call.step] = residual


def _budget(mask: str) -> int:
    return mask.count("1")
