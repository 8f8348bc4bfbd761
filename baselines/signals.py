"""The signals of `baselines.hsa_signal`: each gives a value to every token of one video.

Shapes: B batch, N tokens of a grid of F frames, C channels of a token with all its pixels. Latents
are (B, channels, F, height, width), or packed as tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from baselines.base import Request
from hsa.adapter import Forward
from hsa.allocation import velocity_change
from hsa.hook import Signal, VelocityChange
from hsa.schedule import Schedule
from hsa.schedulers import CachedEuler, current_step, euler
from hsa.trace import blocks, experts

Grid = tuple[int, int, int]


@contextmanager
def source(
    name: str, steps: int, schedule: Schedule, pipe: DiffusionPipeline, request: Request
) -> Iterator[Callable[[CachedEuler], Signal]]:
    """What makes a video's signal from its scheduler, within the block.

    Args:
        name: of `baselines.hsa_signal.SIGNALS`.
        steps: that the signal is measured over, from the first on.
    """
    if name == "attention_norm":
        with attention_norms(pipe) as norms:
            yield lambda scheduler: _AttentionNorm(steps, norms)
    elif name == "oracle":
        error = cached_update_error(pipe, request, schedule)
        yield lambda scheduler: _Oracle(error)
    elif name == "random":
        yield lambda scheduler: _Random(request)
    else:
        yield {
            "velocity": lambda scheduler: VelocityChange(steps),
            "reversed": lambda scheduler: _Reversed(steps),
            "guided_velocity": partial(_GuidedVelocity, steps),
            "temporal_difference": partial(_TemporalDifference, steps),
        }[name]


class _TokenSignal(ABC):
    """Knows the tokens of its video, and lets those that are given come last."""

    def __init__(self) -> None:
        self.grid: Grid | None = None
        self.given: Tensor | None = None  # (B, N) bool

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        """Keeps nothing of the forward, whose branch has the keys and values."""
        self.grid = forward.grid
        given = forward.given
        if given is None:
            given = torch.zeros_like(forward.branch.velocity[..., 0], dtype=torch.bool)
        self.given = given.chunk(forward.copies)[-1]

    def value(self) -> Tensor:
        return self.tokens().masked_fill(self.given, -torch.inf)

    @abstractmethod
    def tokens(self) -> Tensor:
        """(B, N), of given tokens too."""


class _Reversed(_TokenSignal):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.change = VelocityChange(steps)

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        super().observe(forward, previous)
        self.change.observe(forward, previous)

    def tokens(self) -> Tensor:
        return -self.change.value()


class _Random(_TokenSignal):
    """One draw a request, of one video, so that what was made before does not matter.

    Not from the seed alone, whose generator has drawn the noise.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        digest = hashlib.sha256(f"{request.seed} {request.prompt}".encode()).digest()
        self.seed = int.from_bytes(digest[:8], "big") >> 1

    def tokens(self) -> Tensor:
        if len(self.given) > 1:
            raise ValueError("signal: random is drawn for one video; make one video at a time")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(self.given.shape, generator=generator).to(self.given.device)


class _Oracle(_TokenSignal):
    """`error` in the layout of the latents, of the one video that was run in full before."""

    def __init__(self, error: Tensor) -> None:
        super().__init__()
        self.error = error

    def tokens(self) -> Tensor:
        error = as_tokens(self.error, self.grid).sum(-1)
        if error.shape != self.given.shape:
            raise ValueError("signal: the oracle knows one video; make one video at a time")
        return error


class _Scheduled(_TokenSignal):
    """Measured on what the scheduler has after each step, a mean over the first `steps` steps."""

    def __init__(self, steps: int, scheduler: CachedEuler) -> None:
        super().__init__()
        self.steps, self.scheduler = steps, scheduler
        self.values: dict[int, Tensor | None] = {}  # step -> (B, N)

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        if self.grid is not None:
            self._look()
        super().observe(forward, previous)

    def tokens(self) -> Tensor:
        self._look()
        return torch.stack([value for value in self.values.values() if value is not None]).mean(0)

    def _look(self) -> None:
        """At the step that has ended."""
        step = current_step(self.scheduler) - 1
        if step < self.steps and step not in self.values:
            self.values[step] = self.measure()

    @abstractmethod
    def measure(self) -> Tensor | None:
        """(B, N) after the step, None where there is nothing to measure."""


class _GuidedVelocity(_Scheduled):
    def __init__(self, steps: int, scheduler: CachedEuler) -> None:
        super().__init__(steps, scheduler)
        self.begins = True  # another expert's velocity is no measure of change
        self.last: Tensor | None = None

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        super().observe(forward, previous)
        self.begins = previous is None

    def measure(self) -> Tensor | None:
        last, self.last = self.last, as_tokens(self.scheduler.velocity, self.grid)
        return None if self.begins else velocity_change(self.last, last)


class _TemporalDifference(_Scheduled):
    """L1 distance of a token's predicted clean latents to those of the frames before and after."""

    def measure(self) -> Tensor:
        scheduler = self.scheduler
        sigma = scheduler.sigmas[current_step(scheduler)].item()
        clean = scheduler.latents - sigma * scheduler.velocity
        frames = as_tokens(clean, self.grid).unflatten(1, (self.grid[0], -1))
        between = frames.diff(dim=1).abs().sum(-1)  # (B, F - 1, H * W)
        if not between.shape[1]:
            return torch.zeros_like(frames[..., 0]).flatten(1)
        before, after = between[:, :1], between[:, -1:]
        return ((torch.cat([before, between], 1) + torch.cat([between, after], 1)) / 2).flatten(1)


class _AttentionNorm(_TokenSignal):
    """Args: `norms`, what `attention_norms` fills."""

    def __init__(self, steps: int, norms: list[Tensor]) -> None:
        super().__init__()
        self.steps, self.norms = steps, norms
        self.values: list[Tensor] = []

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        super().observe(forward, previous)
        if forward.step < self.steps:
            self.values.append(torch.stack(self.norms).mean(0).chunk(forward.copies)[-1])

    def tokens(self) -> Tensor:
        return torch.stack(self.values).mean(0)


@contextmanager
def attention_norms(pipe: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """A list with the L2 norms of each block's self-attention output, (B, K), of the last call."""
    norms: list[Tensor] = []

    def start(module: nn.Module, args: tuple) -> None:
        norms.clear()

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        norms.append(output.float().norm(dim=-1))

    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            stack.callback(transformer.register_forward_pre_hook(start).remove)
            for block in blocks(transformer):
                stack.callback(block.attn1.register_forward_hook(note).remove)
        yield norms


def cached_update_error(pipe: DiffusionPipeline, request: Request, schedule: Schedule) -> Tensor:
    """What each number of the latents would lose on the smallest budget, in their layout.

    On the trajectory of a full run: at each step on which the smallest budget runs, the distance
    between the one cached update up to the next such step and the full run's updates, summed over
    those steps.
    """
    smallest = len(schedule.budgets) - 1
    total = cached = error = None

    def follow(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        nonlocal total, cached, error
        velocity = pipe.scheduler.velocity
        if smallest in schedule.active_groups(step):
            total = 0 if error is None else total + error.abs()
            cached, error = velocity, torch.zeros_like(velocity)
        interval = pipe.scheduler.sigmas[step + 1] - pipe.scheduler.sigmas[step]
        error = error + interval * (cached - velocity)
        return {}

    full = {"callback_on_step_end": follow, "output_type": "latent"}
    with euler(pipe, CachedEuler):
        pipe(**request.kwargs(pipe) | full)
    return total + error.abs()


def as_tokens(latents: Tensor, grid: Grid) -> Tensor:
    """Latents as tokens with all their pixels, (B, N, C); given frames left out are zeros."""
    if latents.ndim == 5:
        patches = latents.unflatten(4, (grid[2], -1)).unflatten(3, (grid[1], -1))
        latents = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    return pad(latents, (0, 0, prod(grid) - latents.shape[1], 0))
