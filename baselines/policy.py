"""What a whole-model cache has to say: for each call, compute or reuse the residual.

`baselines.reuse` does the rest. Nothing here imports torch.

Shapes: B batch, F H W grid, N = F * H * W video tokens, C channels, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from baselines.base import Method, Request, require, require_own_forward

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

# A submodule of the transformer by name, whose output is the signal, or a function of the first
# block and the arguments of its call.
Tap = str | Callable[["nn.Module", Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Call:
    """One transformer call, seen just before what may be skipped.

    Attributes:
        step: index of the denoising step, 0-based, counted over all experts.
        branch: name of diffusers' cache context, such as cond or uncond.
        tokens: what the video stream enters with: (B, N, D) before the first block; latents in
            the model's own layout where the whole model is skipped.
        signal: output of what the method taps, if anything.
        sigma: noise level of the step.
        spans: the steps of each expert.
        videos: how many videos the call serves.
        config: of the transformer.
        inputs: what the transformer was called with.
    """

    step: int
    branch: str
    tokens: Tensor
    signal: Any
    sigma: float
    spans: tuple[range, ...]
    videos: int
    config: Any
    inputs: Mapping[str, Any]

    @property
    def grid(self) -> tuple[int, int, int]:
        """F, H, W of the video tokens: in the shape of Wan's latents, said beside LTX's."""
        latents, patch = self.inputs["hidden_states"], self.config.patch_size
        if latents.ndim == 5:
            sizes, patches = latents.shape[2:], patch
        else:
            sizes = (self.inputs[name] for name in ("num_frames", "height", "width"))
            patches = self.config.patch_size_t, patch, patch
        return tuple(size // of for size, of in zip(sizes, patches, strict=True))

    @property
    def latents(self) -> Tensor:
        """(B, F, H, W, C), the noisy video latents without the channels of an image condition."""
        latents = self.inputs["hidden_states"]
        if latents.ndim == 5:
            return latents[:, : self.config.out_channels].movedim(1, -1)
        return latents.unflatten(1, self.grid)


class Policy(ABC):
    """The rule of a method for one branch of one expert, fresh for every video.

    ``memory``: how many residuals are kept for `forecast`.
    """

    memory: int = 1

    @abstractmethod
    def decide(self, call: Call) -> bool:
        """True to compute, False to reuse. Asked once in every step, in order."""

    def observe(self, call: Call, residual: Tensor) -> None:  # noqa: B027
        """See what was added to ``call.tokens`` by a computed call, in the same layout."""

    def forecast(self, step: int, history: Sequence[tuple[int, Tensor]]) -> Tensor:
        """The residual to reuse at ``step``, given (step, residual) of the last computed calls.

        Asked for each stream by itself: video, and audio where the model has it.
        """
        return history[-1][1]


@dataclass(frozen=True)
class ReuseMethod(Method):
    """A method that is a policy over residual reuse.

    ``boundary``: what a reused call skips, the transformer's blocks or the whole model.
    ``joint``: the first guidance branch of a step decides for all of them.
    """

    boundary: ClassVar[Literal["blocks", "model"]] = "blocks"
    joint: ClassVar[bool] = False

    @property
    def tap(self) -> Tap | None:
        """Where the policy's signal comes from."""
        return None

    @abstractmethod
    def policy(self, request: Request) -> Policy: ...

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from baselines.reuse import residual_reuse

        if self.boundary == "model":
            require_own_forward(pipe, type(self).__name__.lower())
        policy = partial(self.policy, request)
        return residual_reuse(pipe, policy, self.tap, boundary=self.boundary, joint=self.joint)


def relative_change(new: Tensor, old: Tensor) -> float:
    """L1 distance relative to ``old``: mean |new - old| / mean |old|."""
    return relative_distance(new, old).item()


def relative_distance(new: Tensor, old: Tensor) -> Tensor:
    """`relative_change` that is left on the device, which nobody waits for."""
    return (new - old).abs().mean() / old.abs().mean()


def one_video(call: Call, method: str) -> None:
    """Refuse a batch where the rule averages over it: its videos would steer each other."""
    require(call.videos == 1, f"{method}: batch", call.videos, "1, one video a call")


def modulated_input(block: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """What the block's video self-attention sees: the normed tokens, scaled and shifted; (B, N, D).

    The same formula in Wan, LTX-Video and LTX-2: rows 0 and 1 of the block's table plus time
    embedding are shift and scale.
    """
    tokens, temb = arguments["hidden_states"], arguments["temb"]
    table = block.scale_shift_table.reshape(-1, tokens.shape[-1])  # (6 or 9, D)
    modulation = table + temb.reshape(len(tokens), -1, *table.shape)  # (B, 1 or N, 6 or 9, D)
    return block.norm1(tokens.float()) * (1 + modulation[:, :, 1]) + modulation[:, :, 0]
