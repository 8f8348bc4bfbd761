"""Pyramid Attention Broadcast: an attention's output serves a few steps, by the kind of attention.

diffusers' own hook keeps one state a layer whatever the guidance branch: on Wan, whose branches run
one after the other, it hands the conditional branch's attention to the unconditional one. Here
every branch has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Method, Request, is_count, is_numbers, require
from baselines.rule import Rule, Streams

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

# The attentions of a block, in Wan, LTX-Video and LTX-2.
TEXT = ("attn2", "audio_attn2")
OTHER = ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn")

Key = tuple[int, str]  # block, attention


@dataclass(frozen=True)
class PyramidAttentionBroadcast(Method):
    """Compute an attention in one of ``interval`` steps while low < timestep < high of ``window``.

    The default window and ``self_interval`` are the official ones for CogVideoX, which has 3D
    attention as Wan and LTX do; ``text_interval``, for attention to the prompt, is that of
    Open-Sora-Plan. The timestep is 1000 before the first of T steps and falls by 1000 / T in each.
    """

    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2408.12588"
    source: ClassVar[str] = "github.com/NUS-HPC-AI-Lab/VideoSys 4cce477 (Apache-2.0)"
    deviations: ClassVar[tuple[str, ...]] = (
        "timesteps are evenly spaced, as CogVideoX's are, whatever the shift of the model: in "
        "Wan's the window would miss the middle of the steps and hold the last one",
        "feed-forwards are always computed: their official broadcast is a table made per model",
        "two experts: each counts its own steps and starts with a computed one",
        "LTX-2: attention between video and audio is broadcast like self-attention",
    )
    knob: ClassVar[tuple[str, int, int]] = ("self_interval", 1, 40)

    self_interval: int = 2
    text_interval: int = 6
    window: Sequence[float] = (100.0, 850.0)

    def validate(self, request: Request) -> None:
        for name in ("self_interval", "text_interval"):
            value = getattr(self, name)
            require(is_count(value), f"pab.{name}", value, "a whole number >= 1")
        require(
            is_numbers(self.window) and len(self.window) == 2 and self.window[0] < self.window[1],
            "pab.window",
            self.window,
            "two timesteps in 0..1000, the lower one first",
        )

    def neutral(self, request: Request) -> PyramidAttentionBroadcast:
        return replace(self, self_interval=1, text_interval=1)

    def install(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[None]:
        from baselines.blocks import ruled_modules

        return ruled_modules(pipe, lambda branch: _Broadcast(self, request.steps), attentions)


class _Broadcast(Rule):
    def __init__(self, method: PyramidAttentionBroadcast, steps: int) -> None:
        self.method, self.steps = method, steps
        self.calls = 0
        self.outputs: dict[Key, Streams] = {}

    def begin(self, step: int) -> None:
        low, high = self.method.window
        self.inside = low < 1000 * (self.steps - step) // self.steps < high

    def run(self, key: Key, tokens: Streams, compute: Callable[[], Streams]) -> Streams:
        method = self.method
        interval = method.text_interval if key[1] in TEXT else method.self_interval
        if not self.inside or self.calls % interval == 0:
            self.outputs[key] = compute()
        return self.outputs[key]

    def end(self) -> None:
        self.calls += 1


def attentions(transformer: nn.Module) -> dict[Key, nn.Module]:
    from hsa.trace import blocks

    return {
        (index, name): module
        for index, block in enumerate(blocks(transformer))
        for name, module in block.named_children()
        if name in TEXT + OTHER
    }
