"""The setting of HSA: what a user chooses. Pure Python, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from typing import Literal

from hsa.schedule import Schedule, solve


@dataclass(frozen=True)
class HSAConfig:
    """Step budgets, how tokens are cut into groups, and the protected windows.

    Exactly one of `fractions` and `thresholds` is given:

    * `fractions`: share of the tokens in each group, highest velocity change first. They fix the
      runtime in advance.
    * `thresholds`: one fewer than groups, non-increasing; a token whose mean relative L1 velocity
      change is at least `thresholds[k]` is in group k or a fuller one. All zero is flow matching.

    The velocity change is measured over the `warmup_steps`. `budgets[0]` must be the number of
    inference steps the pipeline is called with.

    Where the keys and values of all tokens are kept (`hsa.memory` says how large they are):

    * `kv_dtype`: "model", as computed; "fp8", 8 bits with a scale for each token and head.
    * `kv_device`: "model", beside the weights; "host", in pinned memory, layer by layer on the way
      while the one before computes. Blocks that are compiled need fullgraph=False with "host".

    Raises:
        ValueError: one line with the field, its value and what it may be.
    """

    budgets: Sequence[int] = (40, 10, 5)
    fractions: Sequence[float] | None = None
    thresholds: Sequence[float] | None = None
    warmup_steps: int = 5
    cooldown_steps: int = 1
    kv_dtype: Literal["model", "fp8"] = "model"
    kv_device: Literal["model", "host"] = "model"

    def __post_init__(self) -> None:
        for name in ("budgets", "fractions", "thresholds"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(values))
        groups = len(self.schedule.budgets)
        if (self.fractions is None) == (self.thresholds is None):
            raise ValueError(
                f"fractions: {self.fractions} and thresholds: {self.thresholds}; give exactly one"
            )
        if self.fractions is not None:
            if len(self.fractions) != groups:
                raise ValueError(
                    f"fractions: {self.fractions} must have {groups} entries, one a budget"
                )
            if min(self.fractions) < 0 or not isclose(sum(self.fractions), 1, abs_tol=1e-6):
                raise ValueError(f"fractions: {self.fractions} must be at least 0 and sum to 1")
        else:
            if len(self.thresholds) != groups - 1:
                raise ValueError(
                    f"thresholds: {self.thresholds} must have {groups - 1} entries, "
                    f"one fewer than budgets {self.budgets}"
                )
            if list(self.thresholds) != sorted(self.thresholds, reverse=True):
                raise ValueError(f"thresholds: {self.thresholds} must not increase")
            if any(not threshold >= 0 for threshold in self.thresholds):
                raise ValueError(f"thresholds: {self.thresholds} must be at least 0")
        for name, choices in (("kv_dtype", ("model", "fp8")), ("kv_device", ("model", "host"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}; choices: {', '.join(choices)}")

    @classmethod
    def for_runtime(
        cls,
        runtime: float,
        steps: int,
        warmup_steps: int | None = None,
        cooldown_steps: int | None = None,
    ) -> "HSAConfig":
        """The setting whose expected share of active tokens is `runtime` (0..1); see `solve`.

        Windows that are not given take half of the `runtime * steps` full steps that could be paid
        for, three quarters of it at the beginning; at least 2 steps there and 1 at the end.
        That rule is ours, found on the embedded model's calibration prompts (`ablation/windows`);
        the paper measures over the first 5 to 10 of 40 steps. `Trace.expected_fraction` and
        `Trace.active_fraction` tell what was promised and what ran.

        Raises:
            ValueError: `runtime` cannot be met; the line says what can.
        """
        paid = int(runtime * steps) if 0 < runtime < 1 else 0
        if warmup_steps is None:
            warmup_steps = max(2, 3 * paid // 8)
        if cooldown_steps is None:
            cooldown_steps = max(1, paid // 8)
        cut = solve(runtime, steps, warmup_steps, cooldown_steps)
        return cls(*cut, warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.budgets, self.warmup_steps, self.cooldown_steps)

    @property
    def expected_fraction(self) -> float | None:
        """Expected share of active tokens, None for thresholds: the video decides."""
        return None if self.fractions is None else self.schedule.expected_fraction(self.fractions)
