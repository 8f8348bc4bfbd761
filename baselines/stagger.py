"""Groups that take turns, for `baselines.hsa_stagger`: their schedule and their rule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hsa.config import HSAConfig
from hsa.hook import HSARule
from hsa.schedule import Schedule
from hsa.schedulers import CachedEuler
from hsa.trace import Trace


@dataclass(frozen=True)
class StaggeredSchedule(Schedule):
    """Says of parts what `Schedule` says of groups: a group with stride m has m parts."""

    @cached_property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Group and turn of each part."""
        return tuple((k, turn) for k, stride in enumerate(self.strides) for turn in range(stride))

    @property
    def num_groups(self) -> int:
        return len(self.parts)

    def active_groups(self, step: int) -> tuple[int, ...]:
        """Indices of the parts that run at `step`: those with step mod m == turn."""
        full = self.in_window(step)
        return tuple(
            part
            for part, (k, turn) in enumerate(self.parts)
            if full or step % self.strides[k] == turn
        )


class StaggeredRule(HSARule):
    """Its groups are parts; what it records are groups all the same."""

    def __init__(self, config: HSAConfig, scheduler: CachedEuler, trace: Trace) -> None:
        super().__init__(config, scheduler, trace)
        self.schedule: StaggeredSchedule = StaggeredSchedule(
            config.budgets, config.warmup_steps, config.cooldown_steps
        )

    def cut(self, value: Tensor) -> Tensor:
        """Part of each token, (B, N) -> (B, N) int64: the tokens of a group by turns."""
        groups = super().cut(value)
        parts = torch.zeros_like(groups)
        for group, stride in enumerate(self.schedule.strides):
            members = groups == group
            turns = (members.cumsum(1) - 1) % stride
            parts += members * (self.schedule.parts.index((group, 0)) + turns)
        return parts

    def allocation(self) -> Tensor:
        group_of_part = [group for group, _ in self.schedule.parts]
        return self.groups.new_tensor(group_of_part)[self.groups]
