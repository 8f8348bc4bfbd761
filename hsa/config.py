"""The setting of HSA: what a user chooses. Pure Python, no torch."""

from collections.abc import Sequence
from contextlib import suppress
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
      while the one before computes.

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
        cooldown_steps: int = 1,
    ) -> "HSAConfig":
        """The setting whose expected share of active tokens is `runtime` (0..1); see `solve`.

        Without a number of warm-up steps it is an eighth of the steps, as the paper's 5 of 40, or
        the most below that with which `runtime` can be met. `Trace.expected_fraction` and
        `Trace.active_fraction` tell what was promised and what ran.

        Raises:
            ValueError: `runtime` cannot be met; the line says what can.
        """
        longest = max(2, steps // 8)
        windows = range(longest, 1, -1) if warmup_steps is None else (warmup_steps,)

        def between(window: int) -> HSAConfig:
            cut = solve(runtime, steps, window, cooldown_steps)
            return cls(*cut, warmup_steps=window, cooldown_steps=cooldown_steps)

        for window in windows[:-1]:
            with suppress(ValueError):
                return between(window)
        return between(windows[-1])

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.budgets, self.warmup_steps, self.cooldown_steps)

    @property
    def expected_fraction(self) -> float | None:
        """Expected share of active tokens, None for thresholds: the video decides."""
        return None if self.fractions is None else self.schedule.expected_fraction(self.fractions)
