"""HSA with its tokens ranked by something else than the velocity change: is the signal worth it?

Controls for the measured signal, and an oracle that no sampler can have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, require
from baselines.hsa import HSA

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hsa.adapter import Branch
    from hsa.engine import TokenRule
    from hsa.hook import Signal
    from hsa.schedulers import CachedEuler
    from hsa.trace import Trace

MEASURED = (
    "velocity",
    "guided_velocity",
    "reversed",
    "temporal_difference",
    "attention_norm",
)
SIGNALS = (*MEASURED, "random", "oracle")
IN_UNITS_OF_THRESHOLDS = ("velocity", "guided_velocity")


@dataclass(frozen=True)
class HSASignal(HSA):
    """HSA whose groups are cut by ``signal``, the largest values first:

    * velocity: relative change of the conditional branch's velocity, as in the paper;
    * guided_velocity: that of the guided velocity, by which the tokens move;
    * reversed: the paper's, negated;
    * temporal_difference: how much the predicted clean token differs from its neighbours in time;
    * attention_norm: L2 norm of the token's self-attention output, mean over the blocks;
    * random: one draw for a video, from its prompt and seed;
    * oracle: the error that the smallest budget would make on the trajectory of a full run. That
      run is made inside `attach` and counted nowhere: offline, a bound for what a signal can gain.

    The measured ones are means over the first ``measured_steps`` steps, None for the whole warm-up.
    Tokens of a given first frame always come last.

    Under random and oracle a batch is refused.

    The trace's arrays have the ``signal`` beside the velocity change.
    """

    version: ClassVar[int] = 1
    deviations: ClassVar[tuple[str, ...]] = (
        *HSA.deviations,
        "signal: all but velocity are ours, controls without a paper",
    )

    signal: str = "velocity"
    measured_steps: int | None = None

    def validate(self, request: Request) -> None:
        super().validate(request)
        require(
            self.signal in SIGNALS, "hsa_signal.signal", self.signal, f"one of {', '.join(SIGNALS)}"
        )
        require(
            self.thresholds is None or self.signal in IN_UNITS_OF_THRESHOLDS,
            "hsa_signal.signal",
            self.signal,
            f"{' or '.join(IN_UNITS_OF_THRESHOLDS)}, or fractions instead of thresholds",
        )
        steps = self.measured_steps
        require(
            steps is None or (is_count(steps, 2) and steps <= self.warmup_steps),
            "hsa_signal.measured_steps",
            steps,
            f"a whole number in 2..{self.warmup_steps}, the warm-up, or none",
        )
        require(
            steps is None or self.signal in MEASURED,
            "hsa_signal.measured_steps",
            steps,
            f"none, for signal={self.signal} is not measured",
        )

    def neutral(self, request: Request) -> HSASignal:
        return replace(super().neutral(request), signal="velocity", measured_steps=None)

    @contextmanager
    def attach(self, pipe: DiffusionPipeline, request: Request) -> Iterator[Trace]:
        from hsa.engine import token_sampler

        self.validate(request)
        kv_policy = self.kv_dtype, self.kv_device
        with (
            self.rules(pipe, request) as make_rule,
            self.branches(pipe) as make_branch,
            token_sampler(pipe, make_rule, kv_policy, make_branch) as trace,
        ):
            yield trace

    def branches(self, pipe: DiffusionPipeline) -> AbstractContextManager[Callable[..., Branch]]:
        """What makes the memory of a guidance branch; in the block."""
        from hsa.adapter import Branch

        return nullcontext(Branch)

    @contextmanager
    def rules(
        self, pipe: DiffusionPipeline, request: Request
    ) -> Iterator[Callable[[CachedEuler, Trace], TokenRule]]:
        """What makes each video's rule; what its signal has to watch is watched meanwhile."""
        from baselines.signals import source

        def make_rule(scheduler: CachedEuler, trace: Trace) -> TokenRule:
            return self.rule(scheduler, trace, make_signal(scheduler))

        steps = self.measured_steps or self.warmup_steps
        with source(self.signal, steps, self.config.schedule, pipe, request) as make_signal:
            yield make_rule

    def rule(self, scheduler: CachedEuler, trace: Trace, signal: Signal) -> TokenRule:
        from hsa.hook import HSARule

        return HSARule(self.config, scheduler, trace, signal)
