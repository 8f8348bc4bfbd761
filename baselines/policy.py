"""What a whole-model cache has to say: for each call, compute the blocks or reuse their residual.

`baselines.reuse` does the rest. Nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from baselines.base import Method, Request

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class Call:
    """One transformer call, seen just before its first block.

    Attributes:
        step: index of the denoising step, 0-based, counted over all experts.
        branch: name of diffusers' cache context, such as cond or uncond.
        tokens: (B, N, D), input of the first block.
        signal: output of the submodule that the method taps, if any.
    """

    step: int
    branch: str
    tokens: Tensor
    signal: Any = None


class Policy(ABC):
    """The rule of a method for one branch of one expert, fresh for every video."""

    @abstractmethod
    def decide(self, call: Call) -> bool:
        """True to compute the blocks, False to reuse. Asked once in every step, in order."""

    def observe(self, call: Call, residual: Tensor) -> None:  # noqa: B027
        """See what the blocks added to the tokens, (B, N, D), after a computed call."""


@dataclass(frozen=True)
class ReuseMethod(Method):
    """A method that is a policy over residual reuse."""

    @property
    def tap(self) -> str | None:
        """Name of a submodule of the transformer whose output the policy wants as its signal."""
        return None

    @abstractmethod
    def policy(self, request: Request) -> Policy: ...

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from baselines.reuse import residual_reuse

        return residual_reuse(pipe, partial(self.policy, request), self.tap)


def relative_change(new: Tensor, old: Tensor) -> float:
    """L1 distance relative to ``old``: mean |new - old| / mean |old|."""
    return ((new - old).abs().mean() / old.abs().mean()).item()
