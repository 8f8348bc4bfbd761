"""Region-Adaptive Sampling: at each step only the tokens that the last velocity points out run.

The rule for images, on the tokens of a video and on HSA's engine: tokens that are left out keep
their stale keys and values and move on by their last guided velocity.

Shapes: B batch, N tokens of a grid of F frames, C channels of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from baselines.base import Method, Request, is_count, is_number, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from hsa.adapter import Forward
    from hsa.allocation import Rows
    from hsa.schedulers import CachedEuler
    from hsa.trace import Trace

CHOICES = {
    "metric": ("std", "l2norm"),
    "starvation": ("released", "sign-fixed"),
    "kv_dtype": ("model", "fp8"),
    "kv_device": ("model", "host"),
}


@dataclass(frozen=True)
class RAS(Method):
    """Run ``sample_ratio`` of the tokens from ``start_step`` on, all of them at ``reset_steps``.

    A token's metric is the standard deviation (or norm) of its last velocity over the channels.
    Of the tokens left out, ``high_ratio`` have the highest metrics and the rest the lowest.

    A token that was left out d times has its metric multiplied by exp(starvation_scale * d). That
    protects it from being left out again for a low metric, but not for a high one, which is the
    released default. With ``starvation`` "sign-fixed" the high end is ranked by the metric times
    exp(-starvation_scale * d), so that the term protects at both ends.

    The first frame of an image-to-video model may be given: tokens of timestep 0. There is no noise
    to predict for them, so they are the first to be left out and run at dense steps alone.

    ``kv_dtype`` and ``kv_device`` are those of `hsa.HSAConfig`.
    """

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "official-rule"
    paper: ClassVar[str] = "arXiv 2502.10389"
    source: ClassVar[str] = "github.com/microsoft/RAS a9c5ec8 (MIT)"
    deviations: ClassVar[tuple[str, ...]] = (
        "video tokens; the released code samples square images, one at a time",
        "tokens of a given first frame are left out first",
        "starvation=sign-fixed is ours; the released term favours what it should prevent",
        "high_ratio=0 leaves the lowest tokens out; the released code leaves every token out",
        "no ramp of the number of tokens, whose released steps are counts for one image size, and "
        "no step from which all tokens run again, by default the 30th",
        "metrics are in fp32 with a stable order of ties, the released ones in the model's dtype; "
        "the released code has a starvation scale of 0.1 whatever is asked for",
        "two experts: one that takes over starts with a dense step",
        "LTX-2: audio tokens always run",
    )
    knob: ClassVar[tuple[str, float, float]] = ("sample_ratio", 0.05, 1.0)

    sample_ratio: float = 0.5
    start_step: int = 4
    reset_steps: Sequence[int] = (12, 22)
    metric: Literal["std", "l2norm"] = "std"
    high_ratio: float = 1.0
    starvation: Literal["released", "sign-fixed"] = "released"
    starvation_scale: float = 0.1
    kv_dtype: Literal["model", "fp8"] = "model"
    kv_device: Literal["model", "host"] = "model"

    def validate(self, request: Request) -> None:
        ratio, start, resets = self.sample_ratio, self.start_step, self.reset_steps
        valid = is_number(ratio) and 0 < ratio <= 1
        require(valid, "ras.sample_ratio", ratio, "a number above 0, at most 1")
        valid = is_count(start) and start <= request.steps
        require(valid, "ras.start_step", start, f"a whole number in 1..{request.steps}")
        require(
            isinstance(resets, tuple)
            and all(is_count(step, start) and step < request.steps for step in resets),
            "ras.reset_steps",
            resets,
            f"whole numbers in {start}..{request.steps - 1}",
        )
        valid = is_number(self.high_ratio) and self.high_ratio <= 1
        require(valid, "ras.high_ratio", self.high_ratio, "a number in 0..1")
        valid = is_number(self.starvation_scale)
        require(valid, "ras.starvation_scale", self.starvation_scale, "a number >= 0")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"ras.{name}", value, f"one of {', '.join(choices)}")

    def neutral(self, request: Request) -> RAS:
        return replace(self, sample_ratio=1.0, start_step=1, reset_steps=())

    def attach(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[Trace]:
        from hsa.engine import token_sampler

        self.validate(request)
        return token_sampler(pipe, partial(_Selection, self), (self.kv_dtype, self.kv_device))

    def num_dropped(self, step: int, num_tokens: int) -> int:
        """Tokens to leave out at a step."""
        if step < self.start_step or step in self.reset_steps:
            return 0
        return int((1 - self.sample_ratio) * num_tokens)


class _Selection:
    """The tokens of one video, chosen at each step from the guided velocity of the last.

    The released code ranks the update (sigma_{i+1} - sigma_i) * v and counts from -(T + 1): factors
    that all tokens share.
    """

    def __init__(self, method: RAS, scheduler: CachedEuler, trace: Trace) -> None:
        self.method, self.scheduler = method, scheduler
        self.grid: tuple[int, int, int] | None = None
        self.given: Tensor | None = None  # (B, N) bool
        self.drops: Tensor | None = None  # (B, N), how often each token was left out
        self.step: int | None = None  # of `dropped`
        self.dropped: Tensor | None = None  # (B, N) bool
        self.running: dict[int, Rows] = {}  # the others, by copies

    def rows(self, step: int, copies: int) -> Rows | None:
        from hsa.allocation import Rows

        count = self.method.num_dropped(step, self.given.shape[1])
        if count == 0:
            return None
        if step != self.step:
            self.step, self.dropped = step, self._choose(count)
            self.drops += self.dropped
            self.running = {}
        if copies not in self.running:
            self.running[copies] = Rows(~self.dropped.repeat(copies, 1))
        return self.running[copies]

    def measure(self, forward: Forward, previous: Tensor | None) -> None:
        import torch

        if self.given is None:
            given = forward.given
            if given is None:
                given = torch.zeros_like(forward.branch.velocity[..., 0], dtype=torch.bool)
            self.grid, self.given = forward.grid, given.chunk(forward.copies)[-1]
            self.drops = self.given.long() * 0

    def _choose(self, count: int) -> Tensor:
        """(B, N) bool, true for the tokens to leave out."""
        import torch

        method = self.method
        metric = token_metric(self.scheduler.velocity, self.grid, method.metric)
        low = metric * (method.starvation_scale * self.drops).exp()
        sign = -1 if method.starvation == "sign-fixed" else 1
        high = metric * (sign * method.starvation_scale * self.drops).exp()
        return torch.stack(
            [
                dropped(*tokens, count, method.high_ratio)
                for tokens in zip(low, high, self.given, strict=True)
            ]
        )


def token_metric(velocity: Tensor, grid: tuple[int, int, int], metric: str) -> Tensor:
    """Deviation or norm over the channels, mean over the pixels of a token: (B, N).

    Args:
        velocity: (B, N, C), or (B, C, F, H, W) in patches of tokens. First frames that are given
            may be missing; their tokens get 0.
    """
    import torch

    if velocity.ndim == 3:
        velocity = velocity.unflatten(1, grid).movedim(-1, 1)
    pixels = velocity.std(1) if metric == "std" else velocity.norm(dim=1)  # (B, F, H, W)
    patches = pixels.unflatten(3, (grid[2], -1)).unflatten(2, (grid[1], -1))
    tokens = patches.mean((3, 5)).flatten(1)
    missing = grid[0] * grid[1] * grid[2] - tokens.shape[1]
    return torch.nn.functional.pad(tokens, (missing, 0))


def dropped(low: Tensor, high: Tensor, given: Tensor, count: int, high_ratio: float) -> Tensor:
    """Which ``count`` tokens of one sample to leave out, (N,) bool; all arguments (N,).

    Given tokens come first. Of the rest, the lowest by ``low`` make up 1 - high_ratio, and the
    highest by ``high`` the remainder, each rounded down.
    """
    drop = given & (given.cumsum(0) <= count)
    count -= int(drop.sum())
    num_low, num_high = int(count * (1 - high_ratio)), int(count * high_ratio)
    drop[low.masked_fill(given, float("inf")).argsort(stable=True)[:num_low]] = True
    taken = given | drop
    drop[high.masked_fill(taken, -1).argsort(descending=True, stable=True)[:num_high]] = True
    return drop
