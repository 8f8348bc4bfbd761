"""A tiny LTX-2 with random weights: real diffusers classes, no network, built in a second.

It proves exactness and plumbing. Random weights say nothing about quality or speed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    SiglipVisionConfig,
)

VIDEO_WIDTH, AUDIO_WIDTH, TEXT_WIDTH = 16, 8, 16
TEXT_LAYERS, LAYERS = 2, 3
VIDEO_CHANNELS, AUDIO_CHANNELS = 8, 4  # of a token

_LTX23 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
VARIANTS: dict[str, dict[str, Any]] = {  # what the versions change of the transformer
    "2.0": {},
    "2.3": _LTX23,
    "2.5": _LTX23 | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True},
}


def components(version: str) -> dict[str, Any]:
    """Everything `LTX2Pipeline` is made of; scheduler and transformer are new each time.

    The VAE makes a token of 4 frames of 16 x 16 pixels, so 9 frames of 64 x 64 are 3 x 4 x 4.

    Raises:
        ValueError: there is no such version.
    """
    if version not in VARIANTS:
        raise ValueError(f"version={version!r}: choose {', '.join(VARIANTS)}")
    return {
        "scheduler": scheduler(),
        "transformer": _transformer(VARIANTS[version]),
        "connectors": _connectors(version != "2.0"),
        **_frozen(),
    }


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The one that LTX-Video and LTX-2 ship with: the shift grows with the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def _transformer(variant: dict[str, Any]) -> LTX2VideoTransformer3DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LTX2VideoTransformer3DModel(
            in_channels=VIDEO_CHANNELS,
            out_channels=VIDEO_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=VIDEO_WIDTH // 2,
            cross_attention_dim=VIDEO_WIDTH,
            vae_scale_factors=(4, 16, 16),
            audio_in_channels=AUDIO_CHANNELS,
            audio_out_channels=AUDIO_CHANNELS,
            audio_num_attention_heads=2,
            audio_attention_head_dim=AUDIO_WIDTH // 2,
            audio_cross_attention_dim=AUDIO_WIDTH,
            num_layers=LAYERS,
            caption_channels=TEXT_WIDTH,
            rope_type="split",
            **variant,
        ).eval()


@cache
def _connectors(per_modality: bool) -> LTX2TextConnectors:
    """Text of both streams: one projection for both (2.0) or one each (from 2.3 on)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LTX2TextConnectors(
            caption_channels=TEXT_WIDTH,
            text_proj_in_factor=TEXT_LAYERS + 1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=VIDEO_WIDTH // 2,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=8,
            video_gated_attn=per_modality,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=(AUDIO_WIDTH if per_modality else TEXT_WIDTH) // 2,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=8,
            audio_gated_attn=per_modality,
            rope_type="split",
            per_modality_projections=per_modality,
            video_hidden_dim=VIDEO_WIDTH,
            audio_hidden_dim=AUDIO_WIDTH,
        ).eval()


@cache
def _frozen() -> dict[str, Any]:
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = GemmaTokenizer(
        vocab={name: index for index, name in enumerate(names)}, merges=[], model_max_length=1024
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        text = Gemma3TextConfig(
            vocab_size=len(names),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=16,
        )
        vision = SiglipVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        text_encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ).eval()
        torch.manual_seed(3)
        vae = AutoencoderKLLTX2Video(
            latent_channels=VIDEO_CHANNELS,
            block_out_channels=(8, 16),
            down_block_types=("LTX2VideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            downsample_type=("spatiotemporal", "spatiotemporal"),
            decoder_block_out_channels=(8, 16),
            decoder_layers_per_block=(1, 1, 1),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False, False, False),
            upsample_type=("spatiotemporal", "spatiotemporal"),
            upsample_residual=(True, True),
            upsample_factor=(2, 2),
        ).eval()
        torch.manual_seed(4)
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=AUDIO_CHANNELS,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            latent_channels=AUDIO_CHANNELS // 2,
            mel_bins=8,
        ).eval()
        torch.manual_seed(5)
        vocoder = LTX2Vocoder(
            in_channels=audio_vae.config.output_channels * audio_vae.config.mel_bins,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ).eval()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "audio_vae": audio_vae,
        "vocoder": vocoder,
    }
