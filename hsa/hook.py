"""HSA on a diffusers pipeline: each token's step budget from how its velocity changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hsa.adapter import Forward
from hsa.allocation import Rows, groups_by_fraction, groups_by_threshold
from hsa.config import HSAConfig
from hsa.engine import token_sampler
from hsa.schedule import Schedule
from hsa.schedulers import CachedEuler
from hsa.trace import Trace


@contextmanager
def apply_hsa(pipe: DiffusionPipeline, config: HSAConfig) -> Iterator[Trace]:
    """Sample with HSA inside the block; the pipeline is as before when it ends, however it ends.

    Yields:
        The trace of what runs. Its allocation is that of the last video made.

    Raises:
        ValueError, FloatingPointError: as `token_sampler`, and while sampling, where the number of
            steps is not `config.budgets[0]`.
    """
    kv_policy = config.kv_dtype, config.kv_device
    with token_sampler(pipe, partial(HSARule, config), kv_policy) as trace:
        yield trace


class Signal(Protocol):
    """What the tokens of one video are ranked by, most steps to the largest."""

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        """See a forward of the first guidance branch, and the branch's velocity before it.

        Called at every step until the groups are cut.
        """

    def value(self) -> Tensor:
        """(B, N), asked for at the first step that leaves tokens out."""


class VelocityChange:
    """The signal of the paper: mean relative L1 change of each token's velocity.

    Args:
        steps: how many it is measured over, from the first on; the change needs two.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.changes: list[Tensor] = []  # (B, N) each

    def observe(self, forward: Forward, previous: Tensor | None) -> None:
        if forward.step < self.steps and previous is not None:
            self.changes.append(forward.velocity_change(previous))

    def value(self) -> Tensor:
        if not self.changes:
            raise ValueError(
                f"warmup_steps: {self.steps} left no velocity change to measure, "
                "another expert took over in between; it must be larger"
            )
        return torch.stack(self.changes).mean(0)


class HSARule:
    """Measures the velocity change of each token, cuts the groups, and runs them when due.

    Args:
        signal: what the groups are cut by; None: the velocity change over the warm-up.

    Raises:
        ValueError: the scheduler has another number of steps than the budgets.
    """

    def __init__(
        self,
        config: HSAConfig,
        scheduler: CachedEuler,
        trace: Trace,
        signal: Signal | None = None,
    ) -> None:
        if scheduler.num_inference_steps != config.schedule.steps:
            raise ValueError(
                f"budgets: {config.budgets} are for {config.schedule.steps} steps, "
                f"but num_inference_steps is {scheduler.num_inference_steps}"
            )
        self.config, self.trace = config, trace
        self.schedule: Schedule = config.schedule
        self.change = VelocityChange(config.warmup_steps)
        self.signal = signal or self.change
        self.grid: tuple[int, int, int] | None = None
        self.groups: Tensor | None = None  # (B, N)
        self._rows: dict[tuple, Rows | None] = {}

    def rows(self, step: int, copies: int) -> Rows | None:
        """The tokens of all groups active at `step`."""
        if self.schedule.is_full(step):
            return None
        if self.groups is None:
            self._allocate()
        groups = self.schedule.active_groups(step)
        if (groups, copies) not in self._rows:
            active = self.active(groups).repeat(copies, 1)
            self._rows[groups, copies] = None if active.all() else Rows(active)
        return self._rows[groups, copies]

    def active(self, groups: Sequence[int]) -> Tensor:
        """(B, N) bool, the tokens that run when these groups are due."""
        return torch.isin(self.groups, self.groups.new_tensor(groups))

    def measure(self, forward: Forward, previous: Tensor | None) -> None:
        """Let the signals see a forward, until the groups are cut."""
        if self.groups is not None:
            return
        self.grid = forward.grid
        self.change.observe(forward, previous)
        if self.signal is not self.change:
            self.signal.observe(forward, previous)

    def _allocate(self) -> None:
        """Cut the groups, after the warm-up."""
        change, value = self.change.value(), self.signal.value()
        self.groups = self.cut(value)
        shares = [
            (self.groups == group).float().mean().item()
            for group in range(self.schedule.num_groups)
        ]
        self.trace.expected_fraction = self.schedule.expected_fraction(shares)
        maps = {"allocation": self.allocation().to(torch.int8), "velocity_change": change}
        if self.signal is not self.change:
            maps["signal"] = value
        self.trace.arrays |= {
            name: tokens.unflatten(1, self.grid).cpu() for name, tokens in maps.items()
        }

    def allocation(self) -> Tensor:
        """Index of each token's budget, (B, N)."""
        return self.groups

    def cut(self, value: Tensor) -> Tensor:
        """Group of each token from its signal, (B, N) -> (B, N) int64."""
        if self.config.fractions is None:
            return groups_by_threshold(value, self.config.thresholds)
        return groups_by_fraction(value, self.config.fractions)
