"""Static step masks: the computed steps are written down before the run.

The control for every adaptive cache: what is left of a method's gain when it may not look at the
sample? On a skipped step the blocks' residual of the last computed step is reused.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from baselines.base import Request, is_count, is_number, require
from baselines.policy import Call, Policy, ReuseMethod


@dataclass(frozen=True)
class _StaticMask(ReuseMethod):
    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "native"
    paper: ClassVar[str] = "none: a control"
    source: ClassVar[str] = "baselines.reuse"

    @abstractmethod
    def computed(self, steps: int) -> tuple[bool, ...]:
        """Whether each of the steps is computed. An expert's first step is computed anyway."""

    def policy(self, request: Request) -> Policy:
        return _Written(self.computed(request.steps))


@dataclass(frozen=True)
class _Written(Policy):
    mask: tuple[bool, ...]

    def decide(self, call: Call) -> bool:
        return self.mask[call.step]


@dataclass(frozen=True)
class IntervalMask(_StaticMask):
    """The first ``warmup_steps`` steps, and from there on every ``interval``-th.

    An interval of 1.5 computes two of three.
    """

    knob: ClassVar[tuple[str, float, float]] = ("interval", 1.0, 20.0)

    interval: float = 2
    warmup_steps: int = 1

    def computed(self, steps: int) -> tuple[bool, ...]:
        first, every = self.warmup_steps - 1, self.interval
        return tuple(
            step < first or (step - first) // every > (step - first - 1) // every
            for step in range(steps)
        )

    def validate(self, request: Request) -> None:
        require(is_number(self.interval, 1), "static_mask.interval", self.interval, "a number >= 1")
        require(
            is_count(self.warmup_steps) and self.warmup_steps <= request.steps,
            "static_mask.warmup_steps",
            self.warmup_steps,
            f"a whole number in 1..{request.steps}",
        )

    def neutral(self, request: Request) -> IntervalMask:
        return replace(self, interval=1)


@dataclass(frozen=True)
class ExplicitMask(_StaticMask):
    """Any mask, one 0 or 1 a step: one's own, or the recorded one of another method."""

    mask: Sequence[int] = ()

    def computed(self, steps: int) -> tuple[bool, ...]:
        return tuple(map(bool, self.mask))

    def validate(self, request: Request) -> None:
        mask = self.mask
        require(
            len(mask) == request.steps and set(mask) <= {0, 1} and bool(mask[0]),
            "static_mask.mask",
            mask,
            f"{request.steps} zeros and ones, beginning with 1",
        )

    def neutral(self, request: Request) -> ExplicitMask:
        return replace(self, mask=(1,) * request.steps)


def replay(mask: Sequence[int], record: str | None = None) -> ExplicitMask:
    """The mask, or that of a record where one is given."""
    return recorded(record) if record else ExplicitMask(mask)


def recorded(record: str) -> ExplicitMask:
    """The steps that a stored sample ran in full, all tokens through all blocks.

    Args:
        record: path of its record.json in the store, or of a trace (`Trace.to_dict`) as JSON.

    Raises:
        ValueError: no trace is there, or its guidance branches did not compute the same steps.
    """
    try:
        content = json.loads(Path(record).read_text())
        trace = content["result"]["trace"] if "result" in content else content
        columns = trace["records"]
        calls = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        ran = [
            (
                call["step"],
                call["branch"],
                call["block_calls"] == call["blocks"] and call["active_tokens"] == call["tokens"],
            )
            for call in calls
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        choice = "the record.json of a stored sample"
        raise ValueError(f"static_mask.record={record!r}: choose {choice}") from error
    masks: dict[str, list[int]] = defaultdict(list)
    for _, branch, full in sorted(ran):
        masks[branch].append(int(full))
    different = {tuple(mask) for mask in masks.values()}
    require(len(different) == 1, "static_mask.record", record, "one where all branches agree")
    return ExplicitMask(different.pop())
