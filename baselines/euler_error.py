"""Flow matching that notes what a cached Euler update would have cost at each of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baselines.base import Request, is_count, require
from baselines.flow_matching import FlowMatching

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from hsa.trace import Trace

NAME = "euler_error"


@dataclass(frozen=True)
class EulerError(FlowMatching):
    """A probe, not a competitor: the video is that of flow matching.

    Records `euler_error` (B, M, T) for M = ``longest``: at [m - 1, i] the distance between one
    update by m steps with the velocity of step i, as of a token that skips m - 1 steps, and the m
    updates of the full run, from the same latents. L2 norm, as a share of the final latents' norm;
    NaN past the end. A first frame that is given is left out.

    The guided velocities of ``longest`` steps stay in memory.
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2605.06892"

    longest: int = 8

    def validate(self, request: Request) -> None:
        super().validate(request)
        longest = self.longest
        require(is_count(longest), "euler_error.longest", longest, "a whole number >= 1")

    def sampler(self, pipe: DiffusionPipeline) -> AbstractContextManager:
        from baselines.euler_probe import WatchedEuler
        from hsa.schedulers import euler

        return euler(pipe, WatchedEuler)

    @contextmanager
    def attach(self, pipe: DiffusionPipeline, request: Request) -> Iterator[Trace]:
        from baselines.euler_probe import Probe

        # LTX's pipelines keep a given first frame from the scheduler, Wan's TI2V does not
        given = request.task == "i2v" and bool(pipe.config.get("expand_timesteps"))
        with super().attach(pipe, request) as trace:
            pipe.scheduler.probe = Probe(NAME, self.longest, given, trace)
            yield trace
