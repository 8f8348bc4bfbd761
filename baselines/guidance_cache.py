"""The unconditional branch from the conditional one: CFG-Cache of FasterCache.

Shapes: velocities are (B, C, F, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hsa.registry import RunningBranch, registered
from hsa.schedulers import current_step
from hsa.trace import experts

_HOOK = "guidance_cache"


@dataclass
class _Memory:
    """Of the running expert alone, so that one that takes over has no difference to reuse."""

    expert: nn.Module | None = None
    cond: Tensor | None = None
    difference: Tensor | None = None  # uncond - cond of the last full step

    def forget(self) -> None:
        self.expert = self.cond = self.difference = None


class _Guidance(RunningBranch):
    """Runs a branch, or answers for the unconditional one without running it.

    Pipelines ask for a tuple that holds the velocity (``return_dict=False``), cond before uncond.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        memory: _Memory,
        full: Callable[[int], bool],
        weights: Callable[[int], tuple[float, float]],
    ) -> None:
        super().__init__(ended=memory.forget)
        self.pipe, self.memory, self.full, self.weights = pipe, memory, full, weights

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        memory, step = self.memory, current_step(self.pipe.scheduler)
        if memory.expert is not module:
            memory.forget()
            memory.expert = module
        if self.name == "uncond" and memory.difference is not None and not self.full(step):
            return (memory.cond + emphasised(memory.difference, *self.weights(step)),)
        (velocity,) = self.fn_ref.original_forward(*args, **kwargs)
        if self.name == "cond":
            memory.cond = velocity
        else:
            memory.difference = velocity - memory.cond
        return (velocity,)


def emphasised(velocity: Tensor, low: float, high: float) -> Tensor:
    """Every frame with its low spatial frequencies times ``low`` and the others times ``high``.

    Low is what lies within a fifth of the shorter side from the constant.
    """
    height, width = velocity.shape[-2:]
    y = torch.fft.fftfreq(height, 1 / height, device=velocity.device)[:, None]
    x = torch.fft.fftfreq(width, 1 / width, device=velocity.device)
    is_low = y**2 + x**2 <= (min(height, width) // 5) ** 2
    spectrum = torch.fft.fft2(velocity.float()) * torch.where(is_low, low, high)
    return torch.fft.ifft2(spectrum).real.to(velocity.dtype)


@contextmanager
def guidance_cache(
    pipe: DiffusionPipeline,
    full: Callable[[int], bool],
    weights: Callable[[int], tuple[float, float]],
) -> Iterator[None]:
    """Run the unconditional branch only where it must be.

    Args:
        full: whether both branches run at a step.
        weights: factors of the low and high frequencies of the branches' difference at a step.
    """
    memory = _Memory()
    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            hook = _Guidance(pipe, memory, full, weights)
            stack.enter_context(registered(transformer, hook, _HOOK))
        yield
