"""What `baselines.euler_error` sees: a scheduler that shows each update to a probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsa.schedulers import EulerFlowMatch, current_step
from hsa.trace import Trace


class WatchedEuler(EulerFlowMatch):
    """Attributes: `probe`, told of every update."""

    probe: Probe | None = None

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any):
        step = current_step(self)
        output = super().step(model_output, *args, **kwargs)
        self.probe.note(step, model_output.float(), output[0], self.sigmas)
        return output


class Probe:
    """Errors of the updates by 1 to `longest` steps, written to `trace` with the last step.

    Shapes: B batch, M = `longest`, T steps.

    Args:
        given: whether the first frame of the latents (B, C, F, H, W) is given and does not count.
    """

    def __init__(self, name: str, longest: int, given: bool, trace: Trace) -> None:
        self.name, self.longest, self.given, self.trace = name, longest, given, trace
        self.running: dict[int, tuple[Tensor, Tensor]] = {}  # begin -> velocity, error so far
        self.errors: Tensor | None = None  # (B, M, T)

    def note(self, step: int, velocity: Tensor, latents: Tensor, sigmas: Tensor) -> None:
        """`latents` are those after the step."""
        steps = len(sigmas) - 1
        if step == 0:
            self.running.clear()
            self.errors = torch.full((len(latents), self.longest, steps), torch.nan)
        self.running.pop(step - self.longest, None)
        self.running[step] = velocity, torch.zeros_like(velocity)
        interval = sigmas[step + 1] - sigmas[step]
        for begin, (cached, error) in self.running.items():
            error += interval * (cached - velocity)
            self.errors[:, step - begin, begin] = self._norm(error)
        if step == steps - 1:
            self.trace.arrays[self.name] = self.errors / self._norm(latents)[:, None, None]

    def _norm(self, latents: Tensor) -> Tensor:
        if self.given:
            latents = latents[:, :, 1:]
        return latents.flatten(1).norm(dim=1).cpu()
