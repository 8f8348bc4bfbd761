"""What a cache inside the transformer has to say: for each module it hooks, run it or stand in.

`baselines.blocks` does the rest. Nothing here imports torch.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Method, Request

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

# (B, N, D) of each stream that passes a module: video tokens, then those of audio on LTX-2.
Streams = tuple["Tensor", ...]


class Rule(ABC):
    """The cache of one guidance branch of one expert, fresh for every video."""

    def begin(self, step: int) -> None:  # noqa: B027
        """A forward of the transformer starts; ``step`` is 0-based and counts over all experts."""

    @abstractmethod
    def run(self, key: Hashable, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        """Output of the module ``key`` for ``tokens``: ``compute()``, or something in its place."""

    def end(self) -> None:  # noqa: B027
        """The forward is through."""


@dataclass(frozen=True)
class RuleMethod(Method):
    """A method that is a rule over modules inside the transformer.

    ``one_video``: the rule takes means over a batch, so that videos in it would steer each other
    and a batch is refused. Where guidance runs as one batch (LTX), a video is its two rows.
    """

    one_video: ClassVar[bool] = True

    @abstractmethod
    def rule(self, request: Request) -> Rule: ...

    def modules(self, transformer: nn.Module) -> Mapping[Hashable, nn.Module]:
        """What the rule sees, in the order it runs: by default the blocks, keyed 0, 1, ..."""
        from hsa.trace import blocks

        return dict(enumerate(blocks(transformer)))

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from baselines.blocks import ruled_modules

        refusing = type(self).__name__.lower() if self.one_video else None
        return ruled_modules(pipe, lambda branch: self.rule(request), self.modules, refusing)
