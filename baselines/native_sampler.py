"""Flow matching with the model's own scheduler: a row beside the comparison, no part of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baselines.flow_matching import FlowMatching

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class NativeSampler(FlowMatching):
    """Flow matching with the scheduler that the model ships, UniPC on Wan; all else has Euler.

    In a module of its own: the module's name is part of the key of what is stored, and the Euler
    run has the same fields.
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "the model's own"
    deviations: ClassVar[tuple[str, ...]] = ("the model's own scheduler instead of Euler",)

    def sampler(self, pipe: DiffusionPipeline) -> AbstractContextManager[None]:
        return nullcontext()
