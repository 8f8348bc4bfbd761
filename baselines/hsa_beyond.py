"""HSA and what may beat it at the same cost: each a field whose default is as in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, is_number, require
from baselines.hsa_context import HSAContext

if TYPE_CHECKING:
    from hsa.engine import TokenRule
    from hsa.hook import Signal
    from hsa.schedulers import CachedEuler
    from hsa.trace import Trace


@dataclass(frozen=True)
class HSABeyond(HSAContext):
    """HSA with variations, which combine:

    * ``regroup_every``: so many steps after the warm-up, and again after as many, the groups are
      cut anew, from each token's relative velocity change at its last run divided by the steps
      since the run before. None: cut once.
    * ``block``: frames, rows and columns over which the signal is averaged before it is cut, so
      that neighbours share a group. Tokens that are given stay out of it.
    * ``dilation``: where not all groups are due, the tokens up to so many rows and columns from a
      due one in its frame run too. For each video all groups but the last are made smaller by one
      factor, until the expected cost is that of the fractions.
    * ``step_interval``: between the windows a step-level mask computes every step_interval-th step
      and skips the others whole; every token moves on with its last velocity. Groups count the
      computed steps. Of a skipped step one token runs and is dropped.

    The trace's allocation is the first one.
    """

    version: ClassVar[int] = 1
    deviations: ClassVar[tuple[str, ...]] = (
        *HSAContext.deviations,
        "regroup_every, block, dilation, step_interval are ours",
    )

    regroup_every: int | None = None
    block: Sequence[int] = (1, 1, 1)
    dilation: int = 0
    step_interval: float = 1

    def validate(self, request: Request) -> None:
        super().validate(request)
        every, block, dilation = self.regroup_every, self.block, self.dilation
        valid = every is None or is_count(every)
        require(valid, "hsa_beyond.regroup_every", every, "a whole number of steps, or none")
        valid = isinstance(block, tuple) and len(block) == 3 and all(map(is_count, block))
        require(valid, "hsa_beyond.block", block, "frames, rows and columns: whole numbers >= 1")
        valid = is_count(dilation, minimum=0) and (not dilation or self.fractions is not None)
        require(valid, "hsa_beyond.dilation", dilation, "a whole number; 0 with thresholds")
        valid = is_number(self.step_interval, 1)
        require(valid, "hsa_beyond.step_interval", self.step_interval, "a number >= 1")

    def neutral(self, request: Request) -> HSABeyond:
        off = {"regroup_every": None, "block": (1, 1, 1), "dilation": 0, "step_interval": 1}
        return replace(super().neutral(request), **off)

    def rule(self, scheduler: CachedEuler, trace: Trace, signal: Signal) -> TokenRule:
        from baselines.beyond import BeyondRule

        return BeyondRule(self, scheduler, trace, signal)
