"""HSA as a method of the harness: settings in, the library's `apply_hsa` on the pipe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Method, Request, is_count, is_numbers, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hsa import HSAConfig
    from hsa.trace import Trace


@dataclass(frozen=True)
class HSA(Method):
    """Heterogeneous Step Allocation; the fields are those of `hsa.HSAConfig`."""

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "from-paper"
    paper: ClassVar[str] = "arXiv 2605.06892"
    source: ClassVar[str] = "hsa"
    deviations: ClassVar[tuple[str, ...]] = (
        "group fractions and protected windows are ours: the paper does not print its own",
    )

    budgets: Sequence[int] = (40, 10, 5)
    fractions: Sequence[float] | None = None
    thresholds: Sequence[float] | None = None
    warmup_steps: int = 5
    cooldown_steps: int = 1
    kv_dtype: str = "model"
    kv_device: str = "model"

    @property
    def knob(self) -> tuple[str, float, float]:
        """A factor on all thresholds, or the expected share of active tokens."""
        from hsa.schedule import least_runtime

        self._require_types()
        if self.thresholds is not None:
            return "thresholds", 1 / 64, 64.0
        least = least_runtime(self.budgets[0], self.warmup_steps, self.cooldown_steps)
        return "fractions", least, 1.0

    def turned(self, value: float) -> HSA:
        from hsa import HSAConfig

        if self.thresholds is not None:
            return replace(self, thresholds=[value * threshold for threshold in self.thresholds])
        windows = self.warmup_steps, self.cooldown_steps
        config = HSAConfig.for_runtime(value, self.budgets[0], *windows)
        return replace(self, budgets=config.budgets, fractions=config.fractions)

    @property
    def config(self) -> HSAConfig:
        from hsa import HSAConfig

        return HSAConfig(**{field.name: getattr(self, field.name) for field in fields(HSAConfig)})

    def validate(self, request: Request) -> None:
        self._require_types()
        require(
            self.config.budgets[0] == request.steps,
            "hsa.budgets",
            self.budgets,
            f"divisors of the number of steps, the first of them {request.steps} itself",
        )

    def _require_types(self) -> None:
        for name in ("fractions", "thresholds"):
            value = getattr(self, name)
            require(value is None or is_numbers(value), f"hsa.{name}", value, "a list of numbers")
        for name in ("warmup_steps", "cooldown_steps"):
            value = getattr(self, name)
            require(is_count(value, minimum=0), f"hsa.{name}", value, "a whole number")
        require(
            isinstance(self.budgets, tuple) and self.budgets and all(map(is_count, self.budgets)),
            "hsa.budgets",
            self.budgets,
            "divisors of the number of steps, the first of them that number itself",
        )

    def neutral(self, request: Request) -> HSA:
        one_group = {"budgets": (request.steps,), "fractions": (1.0,), "thresholds": None}
        return replace(self, **one_group, warmup_steps=2, cooldown_steps=0)

    def attach(self, pipe: DiffusionPipeline, request: Request) -> AbstractContextManager[Trace]:
        from hsa import apply_hsa

        self.validate(request)
        return apply_hsa(pipe, self.config)
