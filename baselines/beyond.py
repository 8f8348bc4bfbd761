"""The rule of `baselines.hsa_beyond`.

Shapes: B batch, N tokens of a grid of F frames, H rows and W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d, max_pool2d

from baselines.hsa_beyond import HSABeyond
from hsa.adapter import Forward
from hsa.allocation import Rows, groups_by_fraction
from hsa.hook import HSARule, Signal
from hsa.schedule import Schedule
from hsa.schedulers import CachedEuler
from hsa.trace import Trace

BISECTIONS = 12  # of the factor on the groups; 2 ** -12 is below one token in the embedded model


@dataclass(frozen=True)
class SparseSchedule(Schedule):
    """Runs nothing but every `interval`-th step between the windows, by whose number groups go."""

    interval: float = 1

    def active_groups(self, step: int) -> tuple[int, ...]:
        if self.in_window(step):
            return super().active_groups(step)
        last = self.warmup_steps - 1
        computed = int((step - last) // self.interval)
        if computed == int((step - last - 1) // self.interval):
            return ()
        number = last + computed
        return tuple(group for group, stride in enumerate(self.strides) if number % stride == 0)


class BeyondRule(HSARule):
    def __init__(
        self, method: HSABeyond, scheduler: CachedEuler, trace: Trace, signal: Signal
    ) -> None:
        config = method.config
        super().__init__(config, scheduler, trace, signal)
        self.schedule = SparseSchedule(
            config.budgets, config.warmup_steps, config.cooldown_steps, method.step_interval
        )
        self.method = method
        self.given: Tensor | None = None  # (B, N) bool
        self.step = 0  # that is running
        self.ran: Tensor | None = None  # (B, N), the step in which each token last ran
        self.rate: Tensor | None = None  # (B, N), change a step at that step

    def rows(self, step: int, copies: int) -> Rows | None:
        after, every = step - self.config.warmup_steps, self.method.regroup_every
        if step != self.step and self.groups is not None and every and after % every == 0:
            self.groups = self.cut(self.rate)
            self._rows.clear()
        self.step = step
        return super().rows(step, copies)

    def measure(self, forward: Forward, previous: Tensor | None) -> None:
        super().measure(forward, previous)
        if forward.given is not None:
            self.given = forward.given.chunk(forward.copies)[-1]
        if self.method.regroup_every is not None:
            self._note_change(forward, previous)

    def _note_change(self, forward: Forward, previous: Tensor | None) -> None:
        tokens = forward.branch.velocity[..., 0].chunk(forward.copies)[-1]
        if self.ran is None:
            self.ran = self.rate = torch.zeros_like(tokens, dtype=torch.float32)
        stale = forward.stale()
        runs = torch.ones_like(tokens, dtype=torch.bool) if stale is None else ~stale.flatten(1)
        if previous is not None:
            rate = forward.velocity_change(previous) / (forward.step - self.ran)
            self.rate = torch.where(runs, rate, self.rate)
        self.ran = torch.where(runs, forward.step, self.ran)

    def cut(self, value: Tensor) -> Tensor:
        value = block_means(value.unflatten(1, self.grid), self.method.block, self.given).flatten(1)
        if not self.method.dilation:
            return super().cut(value)
        return torch.cat([self._cut_to_cost(sample[None]) for sample in value])

    def active(self, groups: Sequence[int]) -> Tensor:
        return self._active(self.groups, groups)

    def _active(self, groups: Tensor, due: Sequence[int]) -> Tensor:
        """As `active`, for the groups (B, N) of any samples."""
        active = torch.isin(groups, groups.new_tensor(due))
        return dilated(active.unflatten(1, self.grid), self.method.dilation).flatten(1)

    def _cost(self, groups: Tensor) -> float:
        """Mean share of tokens that run over the steps."""
        due = [self.schedule.active_groups(step) for step in range(self.schedule.steps)]
        shares = {groups_: self._active(groups, groups_).float().mean() for groups_ in set(due)}
        return sum(shares[groups_].item() for groups_ in due) / len(due)

    def _cut_to_cost(self, value: Tensor) -> Tensor:
        """Groups (1, N) of one sample: the largest factor that costs no more than the fractions."""
        fractions = self.config.fractions
        limit = self.schedule.expected_fraction(fractions)
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            factor = (low + high) / 2
            kept = [factor * fraction for fraction in fractions[:-1]]
            groups = groups_by_fraction(value, (*kept, 1 - sum(kept)))
            low, high = (factor, high) if self._cost(groups) <= limit else (low, factor)
        kept = [low * fraction for fraction in fractions[:-1]]
        return groups_by_fraction(value, (*kept, 1 - sum(kept)))

    def _allocate(self) -> None:
        super()._allocate()
        self.trace.expected_fraction = self._cost(self.groups)


def block_means(value: Tensor, block: Sequence[int], given: Tensor | None) -> Tensor:
    """Each value (B, F, H, W) replaced by its block's mean, but for given tokens, (B, N) bool."""
    if tuple(block) == (1, 1, 1):
        return value
    block = [min(size, limit) for size, limit in zip(block, value.shape[1:], strict=True)]
    counts = torch.ones_like(value)
    if given is not None:
        counts = (~given).unflatten(1, value.shape[1:]).type_as(value)
    total = value.masked_fill(counts == 0, 0)
    total, number = (avg_pool3d(x[:, None], block, ceil_mode=True)[:, 0] for x in (total, counts))
    means = total / number
    for axis, size in enumerate(block, start=1):
        means = means.repeat_interleave(size, axis)
    frames, height, width = value.shape[1:]
    return torch.where(counts == 0, value, means[:, :frames, :height, :width])


def dilated(active: Tensor, radius: int) -> Tensor:
    """(B, F, H, W) bool: also the tokens up to `radius` rows and columns away, in the frame."""
    return max_pool2d(active.float(), 2 * radius + 1, stride=1, padding=radius) > 0
