"""HSA whose groups take turns: of each group, every step runs an equal part.

In the paper all tokens of a group run at the same steps, and between them all their keys and values
grow old together. Here a token of a group with stride m waits for its turn among m, so that every
step runs about as many tokens as any other and finds fresh neighbours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request
from baselines.hsa import HSA

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hsa.engine import TokenRule
    from hsa.schedulers import CachedEuler
    from hsa.trace import Trace


@dataclass(frozen=True)
class HSAStagger(HSA):
    """Groups and windows of HSA; in (frame, row, column) order, the j-th token of a group with
    stride m runs at the steps i with i mod m == j mod m.

    That is one m-th of the steps between the windows, where HSA's tokens run at the multiples of m
    among them: the same fractions cost a little more or less.
    """

    version: ClassVar[int] = 1
    deviations: ClassVar[tuple[str, ...]] = (*HSA.deviations, "staggered groups are ours")

    def attach(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[Trace]:
        from hsa.engine import token_sampler

        self.validate(request)
        return token_sampler(pipe, self._rule, (self.kv_dtype, self.kv_device))

    def _rule(self, scheduler: CachedEuler, trace: Trace) -> TokenRule:
        from baselines.stagger import StaggeredRule

        return StaggeredRule(self.config, scheduler, trace)
