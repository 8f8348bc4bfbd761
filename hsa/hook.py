"""HSA on a diffusers pipeline: each token's step budget from how its velocity changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from hsa.adapter import Forward
from hsa.allocation import Rows, groups_by_fraction, groups_by_threshold
from hsa.config import HSAConfig
from hsa.engine import token_sampler
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


class HSARule:
    """Measures the velocity change of each token, cuts the groups, and runs them when due.

    Raises:
        ValueError: the scheduler has another number of steps than the budgets.
    """

    def __init__(self, config: HSAConfig, scheduler: CachedEuler, trace: Trace) -> None:
        if scheduler.num_inference_steps != config.schedule.steps:
            raise ValueError(
                f"budgets: {config.budgets} are for {config.schedule.steps} steps, "
                f"but num_inference_steps is {scheduler.num_inference_steps}"
            )
        self.config, self.trace = config, trace
        self.changes: list[Tensor] = []  # (B, N) each
        self.groups: Tensor | None = None  # (B, N)
        self._rows: dict[tuple, Rows] = {}

    def rows(self, step: int, copies: int) -> Rows | None:
        """The tokens of all groups active at `step`."""
        groups = self.config.schedule.active_groups(step)
        if len(groups) == len(self.config.budgets):
            return None
        if (groups, copies) not in self._rows:
            active = torch.isin(self.groups, self.groups.new_tensor(groups)).repeat(copies, 1)
            self._rows[groups, copies] = None if active.all() else Rows(active)
        return self._rows[groups, copies]

    def measure(self, forward: Forward, previous: Tensor | None) -> None:
        """Note the velocity change of a warm-up step; cut the groups after the last of them."""
        if forward.step < self.config.warmup_steps and previous is not None:
            self.changes.append(forward.velocity_change(previous))
        if forward.step == self.config.warmup_steps - 1:
            self._allocate(forward.grid)

    def _allocate(self, grid: tuple[int, int, int]) -> None:
        if not self.changes:
            raise ValueError(
                f"warmup_steps: {self.config.warmup_steps} left no velocity change to measure, "
                "another expert took over in between; it must be larger"
            )
        change = torch.stack(self.changes).mean(0)
        if self.config.fractions is None:
            self.groups = groups_by_threshold(change, self.config.thresholds)
        else:
            self.groups = groups_by_fraction(change, self.config.fractions)
        shares = [
            (self.groups == group).float().mean().item()
            for group in range(len(self.config.budgets))
        ]
        self.trace.expected_fraction = self.config.schedule.expected_fraction(shares)
        allocation = self.groups.to("cpu", torch.int8)
        self.trace.arrays["allocation"] = allocation.unflatten(1, grid)
        self.trace.arrays["velocity_change"] = change.unflatten(1, grid).cpu()
