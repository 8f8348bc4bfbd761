"""MagCache: skip while the ratios of consecutive residuals' magnitudes predict a small error.

The ratios are measured beforehand on other prompts, so the computed steps are fixed before the run:
they depend on the model, the number of steps and the settings, never on the sample.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from baselines.base import Request, is_count, is_number, is_numbers, require
from baselines.policy import Call, Policy, ReuseMethod

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

# model -> ratios of cond and uncond in turn, from the second step on; its "source" says whose.
OFFICIAL = json.loads((files("baselines") / "tables/magcache_ratios.json").read_text())
OFFICIAL.pop("source")


@dataclass(frozen=True)
class MagCache(ReuseMethod):
    """Skip up to ``max_skip_steps`` steps while the accumulated error is below ``threshold``.

    The error of a step is |1 - product of the ratios since the last computed one|. The first
    ``retention_ratio`` of each expert's steps are computed, and the last ``cache_end_steps`` of
    all: none, in the released rule.

    ``ratios``: a model of the official table, without its task where the table has both, or for
    each guidance branch the list that `calibrate` measured; other numbers of steps take the nearest
    entry. None has to be replaced where the threshold lets anything be skipped. ``sqrt_ratios``:
    their square roots, as the paper's evaluation takes of its own list, where the released rule
    takes them as they are.
    ``cache_first_expert``: off, the first of two experts is never cached, as in the released
    image-to-video script.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2506.09045"
    source: ClassVar[str] = "github.com/Zehong-Ma/MagCache df81cb1"
    deviations: ClassVar[tuple[str, ...]] = (
        "two experts: each starts with a computed step, where the released script can reuse the "
        "residual of the other; calibrated ratios are 1 there, the authors' measure across",
        "TI2V: the released script fails before its first step; the rule it is meant to run",
        "LTX-2, for which there is no official rule: that of Wan, decided by the video stream",
    )
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 0.001, 10.0)

    ratios: str | Mapping[str, Sequence[float]] | None = None
    threshold: float = 0.12
    max_skip_steps: int = 2
    retention_ratio: float = 0.2
    sqrt_ratios: bool = False
    cache_first_expert: bool = True
    cache_end_steps: int = 0

    @property
    def by_branch(self) -> dict[str, Sequence[float]]:
        """Ratios of each guidance branch from the first step on, in the order of the calls."""
        if not isinstance(self.ratios, str):
            return {branch: tuple(values) for branch, values in self.ratios.items()}
        interleaved = OFFICIAL[self.ratios]
        return {"cond": [1.0, *interleaved[0::2]], "uncond": [1.0, *interleaved[1::2]]}

    def validate(self, request: Request) -> None:
        if isinstance(self.ratios, str):
            known = self._for(request.task).ratios in OFFICIAL
        else:
            lists = self.by_branch.values() if isinstance(self.ratios, Mapping) else ()
            known = bool(lists) and all(values and is_numbers(values) for values in lists)
        require(
            known or (self.ratios is None and self.threshold == 0),
            "magcache.ratios",
            self.ratios,
            f"one of {', '.join(OFFICIAL)}, or a list for each branch from `hsa-bench calibrate`",
        )
        require(is_number(self.threshold), "magcache.threshold", self.threshold, "a number >= 0")
        for name in ("max_skip_steps", "cache_end_steps"):
            value = getattr(self, name)
            require(is_count(value, minimum=0), f"magcache.{name}", value, "a whole number >= 0")
        require(
            is_number(self.retention_ratio) and self.retention_ratio <= 1,
            "magcache.retention_ratio",
            self.retention_ratio,
            "a number in 0..1",
        )
        for name in ("sqrt_ratios", "cache_first_expert"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"magcache.{name}", value, "true or false")

    def neutral(self, request: Request) -> MagCache:
        return replace(self, ratios=None, threshold=0.0)

    def policy(self, request: Request) -> Policy:
        return _Schedule(self._for(request.task))

    def _for(self, task: str) -> MagCache:
        if not isinstance(self.ratios, str) or self.ratios in OFFICIAL:
            return self
        return replace(self, ratios=f"{self.ratios}-{task}")

    def computed(self, branch: str, spans: Sequence[range]) -> list[bool]:
        """Whether each step of a branch is computed, by the released rule.

        Args:
            spans: the steps of each expert.

        Raises:
            ValueError: there are no ratios for that branch.
        """
        if self.threshold == 0:
            return [True] * spans[-1].stop
        by_branch = self.by_branch
        require(
            branch in by_branch,
            f"magcache.ratios of branch {branch}",
            self.ratios,
            "ratios of all branches, from `hsa-bench calibrate`",
        )
        index, branches, steps = list(by_branch).index(branch), len(by_branch), spans[-1].stop
        ratios = nearest(by_branch[branch], steps) ** (0.5 if self.sqrt_ratios else 1.0)
        starts = {span.start for span in spans}  # nothing can be reused yet
        computed, error, skipped, product = [], 0.0, 0, 1.0
        for step in range(steps):
            skip = False
            if not self._retained(branches * step + index, branches, spans):
                product *= ratios[step]
                skipped += 1
                error += abs(1 - product)
                skip = error < self.threshold and skipped <= self.max_skip_steps
                skip = skip and step not in starts
                if not skip:
                    error, skipped, product = 0.0, 0, 1.0
            computed.append(not skip or step >= steps - self.cache_end_steps)
        return computed

    def _retained(self, call: int, branches: int, spans: Sequence[range]) -> bool:
        """The released scripts count calls, not steps, and are not consistent at the boundary."""
        total = branches * spans[-1].stop
        if len(spans) == 1:
            return call < int(total * self.retention_ratio)
        switch = branches * spans[0].stop
        second = switch + (total - switch) * self.retention_ratio
        if not self.cache_first_expert:
            return call < int(second)
        return call < int(switch * self.retention_ratio) or switch <= call <= second


class _Schedule(Policy):
    def __init__(self, method: MagCache) -> None:
        self.method = method
        self.computed: Sequence[bool] = ()

    def decide(self, call: Call) -> bool:
        self.computed = self.computed or self.method.computed(call.branch, call.spans)
        return self.computed[call.step]


def nearest(values: Sequence[float], length: int) -> np.ndarray:
    """The list at another length, each entry the nearest of the given ones."""
    if length == 1:
        return np.array(values[-1:])
    scale = (len(values) - 1) / (length - 1)
    return np.array(values)[np.round(np.arange(length) * scale).astype(int)]


class _Probe(Policy):
    """Computes every step and notes by how much the tokens' residuals grew on average."""

    def __init__(self, found: Mapping[str, Mapping[int, list[float]]]) -> None:
        self.found = found
        self.norms: Tensor | None = None

    def decide(self, call: Call) -> bool:
        return True

    def observe(self, call: Call, residual: Tensor) -> None:
        previous, self.norms = self.norms, residual.float().norm(dim=-1)
        ratio = 1.0 if previous is None else (self.norms / previous).mean().item()
        self.found[call.branch][call.step].append(ratio)


def calibrate(pipe: DiffusionPipeline, requests: Iterable[Request]) -> dict[str, Any]:
    """Measure the ratios of each guidance branch, the mean over the requests.

    Every step of every request is computed, on the sigma grid that the methods use. The first step
    of each expert has no predecessor and gets 1.

    Returns:
        ``ratios`` for `MagCache`.
    """
    from baselines.reuse import residual_reuse
    from hsa.schedulers import euler

    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with euler(pipe), residual_reuse(pipe, partial(_Probe, found)):
        for request in requests:
            pipe(**request.kwargs(pipe) | {"output_type": "latent"})
    ratios = {
        branch: [round(float(np.mean(ratios)), 5) for _, ratios in sorted(steps.items())]
        for branch, steps in found.items()
    }
    return {"ratios": ratios}
