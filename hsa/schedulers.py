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

    def __deepcopy__(self, memo: dict) -> "EulerFlowMatch":
        """The grid alone: LTX-2 pipelines copy the scheduler for their audio, all of which runs."""
        return EulerFlowMatch.like(self)


class CachedEuler(EulerFlowMatch):
    """The cached Euler update of HSA: a token that did not run moves by its last guided velocity.

    Under plain guidance this is what the pipeline computes anyway, because guidance is linear in
    the cached velocities. Guidance rescale (LTX-2) is not: it takes a standard deviation over all
    tokens, and would give a token that did not run another velocity at each step.

    Attributes:
        stale: (B, F, H, W) bool, true where a token did not run in this step, or None.
        velocity: fp32 in the layout of the latents, the guided velocity of the last step.
        latents: fp32, what that step gave.
    """

    stale: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    latents: torch.Tensor | None = None

    def step(self, model_output: torch.Tensor, *args: Any, **kwargs: Any):
        velocity = model_output.float()
        if self.stale is not None:
            velocity = torch.where(_spread(self.stale, velocity), self.velocity, velocity)
        self.stale, self.velocity = None, velocity
        output = super().step(velocity, *args, **kwargs)
        self.latents = output[0]
        return output


def _spread(tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A value for each token, (B, F, H, W), in the layout of `latents`.

    Latents are packed, (B, N, C), or (B, C, F, H, W) in patches of tokens; image-to-video
    pipelines of LTX leave the first frame out.
    """
    if latents.ndim == 3:
        return tokens.flatten(1)[..., None]
    frames, height, width = latents.shape[2:]
    tokens = tokens[:, None, -frames:]
    height, width = height // tokens.shape[3], width // tokens.shape[4]
    return tokens.repeat_interleave(height, 3).repeat_interleave(width, 4)


def current_step(scheduler: Any) -> int:
    """0-based index of the running step; diffusers sets it with the first update only."""
    return scheduler.step_index or 0


@contextmanager
def euler(
    pipe: DiffusionPipeline, scheduler_class: type[EulerFlowMatch] = EulerFlowMatch
) -> Iterator[EulerFlowMatch]:
    """Run `pipe` under `scheduler_class`; its own scheduler object comes back untouched."""
    original = pipe.scheduler
    pipe.scheduler = scheduler_class.like(original)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = original
