"""Euler flow matching on the model's own sigma grid: one scheduler for every method compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler


class EulerFlowMatch(FlowMatchEulerDiscreteScheduler):
    """First-order flow matching whose sigmas are shifted once and whose latents stay fp32.

    The parent shifts its default grid twice (it takes sigma_min and sigma_max after the shift, see
    diffusers issue 13243) and returns latents in the model's dtype. Here the grid is the one Wan's
    shipped UniPC uses, `shift(linspace(1, 1 / 1000, T + 1)[:-1])` followed by 0. Under this
    scheduler a velocity that is returned again moves its token by exactly the cached Euler update.
    """

    @classmethod
    def like(cls, scheduler: Any) -> "EulerFlowMatch":
        """A fresh scheduler on the grid of `scheduler`, which is not touched.

        Raises:
            ValueError: `scheduler` does not sample a flow-matching model.
        """
        config = scheduler.config
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return cls.from_config(config, shift=scheduler.shift)
        if not config.get("use_flow_sigmas"):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} does not sample a flow-matching model; "
                "choices: FlowMatchEulerDiscreteScheduler, or a scheduler with use_flow_sigmas=True"
            )
        return cls(
            num_train_timesteps=config["num_train_timesteps"],
            shift=config["flow_shift"],
            use_dynamic_shifting=config.get("use_dynamic_shifting", False),
            shift_terminal=config.get("shift_terminal"),
        )

    def set_timesteps(
        self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None
    ) -> None:
        """As the parent, with the once-shifted grid where the caller names no sigmas."""
        if sigmas is None and timesteps is None:
            smallest = 1 / self.config.num_train_timesteps
            sigmas = np.linspace(1, smallest, num_inference_steps + 1)[:-1]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any):
        """As the parent, with the update and its result in fp32 whatever the model's dtype."""
        return super().step(model_output.float(), *args, **kwargs)


@contextmanager
def euler(pipe: DiffusionPipeline) -> Iterator[EulerFlowMatch]:
    """Run `pipe` under `EulerFlowMatch`; its own scheduler object comes back untouched."""
    original = pipe.scheduler
    pipe.scheduler = EulerFlowMatch.like(original)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = original
