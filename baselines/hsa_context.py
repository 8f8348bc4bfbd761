"""HSA under another attention context: what do stale keys and values cost?

An active token attends to all tokens, to most of them as they were when they last ran. Here what it
sees of the inactive ones is varied, down to nothing and up to what a full forward would show.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, require, require_wan
from baselines.hsa_signal import HSASignal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hsa.adapter import Branch
    from hsa.trace import Trace

CONTEXTS = ("synchronised", "frozen", "invisible", "extrapolated", "refreshed", "fresh")


@dataclass(frozen=True)
class HSAContext(HSASignal):
    """HSA whose active tokens see the keys and values of inactive ones by ``context``:

    * synchronised: those of the step in which each token last ran, as in the paper;
    * frozen: those of the last step in which every token ran. Fresh ones are seen in the step that
      computes them and then forgotten;
    * invisible: none. Active tokens attend to active tokens alone;
    * extrapolated: linearly in sigma, from the last two steps in which each token ran;
    * refreshed: projected anew at every step, from each block's input when the token last ran and
      under the running step's timestep. Neither attention nor feed-forward runs for it. Wan only;
    * fresh: those of a full forward, which runs at every step; only active tokens' velocity is used
      of it. The bound. The trace counts it in full, ``expected_fraction`` is the nominal cost.

    A step in which every token runs is the same under all of them. What extrapolated and refreshed
    keep beyond the keys and values, as much again and the blocks' inputs, is not in the memory that
    a plan or the log tells, nor the projections of refreshed in the active tokens.
    """

    version: ClassVar[int] = 1
    deviations: ClassVar[tuple[str, ...]] = (
        *HSASignal.deviations,
        "context: all but synchronised are ours",
    )

    context: str = "synchronised"

    def validate(self, request: Request) -> None:
        super().validate(request)
        name, value = "hsa_context.context", self.context
        require(value in CONTEXTS, name, value, f"one of {', '.join(CONTEXTS)}")
        require(
            value == "synchronised" or (self.kv_dtype, self.kv_device) == ("model", "model"),
            name,
            value,
            "synchronised, or kv_dtype=model and kv_device=model",
        )

    def neutral(self, request: Request) -> HSAContext:
        return replace(super().neutral(request), context="synchronised")

    def attach(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[Trace]:
        if self.context == "refreshed":  # told before the full run that an oracle makes
            require_wan(pipe, "hsa_context: context=refreshed", "or another context")
        return super().attach(pipe, request)

    def branches(self, pipe: DiffusionPipeline) -> AbstractContextManager[Callable[..., Branch]]:
        from baselines.contexts import branches

        return branches(self.context, pipe)
