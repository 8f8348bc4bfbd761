"""Transformers of real size with inputs of real shape, and a denoising loop around them.

Weights and inputs are random: what a step costs does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
}
WAN_SLICE = {
    "num_attention_heads": 4,
    "attention_head_dim": 128,
    "ffn_dim": 2048,
    "num_layers": 2,
}
LTX2_LAYERS = 8  # of 48: a step is as many times faster, and fits beside other things


@dataclass
class Loop:
    """What HSA needs of a pipeline, for one guidance branch.

    `inputs`: of latents and a timestep, the transformer's arguments.
    """

    transformer: nn.Module
    latents: Tensor
    grid: tuple[int, int, int]  # F, H, W of the tokens
    inputs: Callable[[Tensor, Tensor], dict[str, Any]]
    scheduler: Any = field(default_factory=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0))
    do_classifier_free_guidance: bool = False

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    @torch.no_grad()
    def steps(self, count: int) -> tuple[list[float], Tensor]:
        """Seconds of the transformer in each of `count` steps, and the last velocity."""
        self.scheduler.set_timesteps(count, device=self.latents.device)
        latents, seconds = self.latents, []
        for t in self.scheduler.timesteps:
            arguments = self.inputs(latents.to(self.transformer.dtype), t)
            start = _clock()
            with self.transformer.cache_context("cond"):
                velocity = self.transformer(**arguments, return_dict=False)[0]
            seconds.append(_clock() - start)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return seconds, velocity


def embedded() -> Loop:
    """The embedded model at the size of its videos."""
    from experiments.config import load_experiment
    from experiments.embedded import load

    pipe, request = load().pipeline("t2v"), load_experiment().config.model.request
    frames = (request.num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    sides = (side // pipe.vae_scale_factor_spatial for side in (request.height, request.width))
    return wan(pipe.transformer, (frames, *sides), request.max_sequence_length)


def wan_slice() -> Loop:
    """Two layers of a narrow Wan (width 512) on 2 048 tokens, float32: what a CPU can still time.

    Large enough that a step is arithmetic and not the start of operations, unlike the embedded
    model's.
    """
    transformer = WanTransformer3DModel(**WAN_SLICE).eval()
    return wan(transformer, (8, 32, 32), text=32)


def wan_1_3b() -> Loop:
    """Wan2.1-1.3B at 480 x 832, 81 frames: 32 760 tokens, in bfloat16."""
    return wan(_random(WanTransformer3DModel, **WAN_1_3B), (21, 60, 104), text=512)


def ltx2_layers() -> Loop:
    """LTX-2 at 512 x 768, 121 frames: 6 144 video and 126 audio tokens, in bfloat16."""
    transformer = _random(LTX2VideoTransformer3DModel, rope_type="split", num_layers=LTX2_LAYERS)
    return ltx2(transformer, (16, 16, 24), audio=126, text=1024)


def wan(transformer: nn.Module, latent_size: tuple[int, int, int], text: int) -> Loop:
    """`latent_size`: F, H, W of the latents; `text`: tokens of the prompt."""
    config, device = transformer.config, transformer.device
    caption = _noise(device, 1, text, config.text_dim).to(transformer.dtype)

    def inputs(latents: Tensor, t: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": t.expand(1),
            "encoder_hidden_states": caption,
        }

    grid = tuple(n // patch for n, patch in zip(latent_size, config.patch_size, strict=True))
    return Loop(transformer, _noise(device, 1, config.in_channels, *latent_size), grid, inputs)


def ltx2(transformer: nn.Module, grid: tuple[int, int, int], audio: int, text: int) -> Loop:
    """`grid`: F, H, W of the video tokens; `audio`, `text`: tokens of either."""
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    frames, height, width = grid
    sound = _noise(device, 1, audio, config.audio_in_channels).to(dtype)
    caption = _noise(device, 1, text, config.caption_channels).to(dtype)
    fixed = {
        "audio_hidden_states": sound,
        "encoder_hidden_states": caption,
        "audio_encoder_hidden_states": caption,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio,
        "video_coords": transformer.rope.prepare_video_coords(1, *grid, device),
        "audio_coords": transformer.audio_rope.prepare_audio_coords(1, audio, device),
    }

    def inputs(latents: Tensor, t: Tensor) -> dict[str, Any]:
        return {**fixed, "hidden_states": latents, "timestep": t.expand(1), "sigma": t.expand(1)}

    latents = _noise(device, 1, prod(grid), config.in_channels)
    return Loop(transformer, latents, grid, inputs)


def _random(model: type[nn.Module], **config: Any) -> nn.Module:
    with torch.device("cuda"):
        return model(**config).to(torch.bfloat16).eval()


def _noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
