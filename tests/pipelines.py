"""Tiny Wan and LTX pipelines with random weights: real diffusers classes, offline.

They prove exactness and plumbing. Random weights say nothing about quality.
"""

from functools import cache

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from experiments.tiny_ltx2 import build as tiny_ltx2

PROMPT = "a red circle moves left"
NEGATIVE = "blurry"
TOKENS = (3, 4, 4)  # frames, height, width of the token grid of `inputs`
STG_BLOCK = 1  # of LTX-2: the block without self-attention in the third guidance pass


def wan_t2v() -> WanPipeline:
    """Wan 2.1 text-to-video: one transformer, one timestep for all tokens."""
    return _quiet(WanPipeline, **_shared(), transformer=_transformer(0))


def wan_ti2v() -> WanImageToVideoPipeline:
    """TI2V-5B style image-to-video: the first latent frame is clean and has timestep 0."""
    return _quiet(
        WanImageToVideoPipeline, **_shared(), transformer=_transformer(0), expand_timesteps=True
    )


def ti2v_t2v() -> WanPipeline:
    """TI2V-5B style text-to-video: a timestep for every token."""
    return _quiet(WanPipeline, **_shared(), transformer=_transformer(0), expand_timesteps=True)


def wan_i2v() -> WanImageToVideoPipeline:
    """Wan 2.1 image-to-video: CLIP image tokens before the text, condition on the channels."""
    transformer = _transformer(0, in_channels=36, image_dim=4, added_kv_proj_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        vision = CLIPVisionConfig(
            hidden_size=4,
            projection_dim=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=16,
        )
        encoder = CLIPVisionModel(vision).eval()
    processor = CLIPImageProcessorPil(crop_size=32, size=32)
    return _quiet(
        WanImageToVideoPipeline,
        **_shared(),
        transformer=transformer,
        image_encoder=encoder,
        image_processor=processor,
    )


def wan22_t2v() -> WanPipeline:
    """Wan 2.2 A14B style text-to-video: `transformer_2` takes over below 0.875 of the noise."""
    experts = {"transformer": _transformer(0), "transformer_2": _transformer(1)}
    return _quiet(WanPipeline, **_shared(), **experts, boundary_ratio=0.875)


def wan22_i2v() -> WanImageToVideoPipeline:
    """Wan 2.2 A14B style image-to-video: two experts, condition on the channels, no CLIP."""
    experts = {
        "transformer": _transformer(0, in_channels=36),
        "transformer_2": _transformer(1, in_channels=36),
    }
    return _quiet(WanImageToVideoPipeline, **_shared(), **experts, boundary_ratio=0.9)


def ltx2_t2v() -> LTX2Pipeline:
    """LTX-2.0: packed video tokens beside a few audio tokens, up to three passes a step."""
    return _quiet(LTX2Pipeline, **tiny_ltx2.components("2.0"))


def ltx2_i2v() -> LTX2ImageToVideoPipeline:
    """LTX-2.0 image-to-video: the first latent frame is clean and has timestep 0."""
    return _quiet(LTX2ImageToVideoPipeline, **tiny_ltx2.components("2.0"))


def ltx23_t2v() -> LTX2Pipeline:
    """LTX-2.3: gated attention, modulated text attention, a block that STG can perturb."""
    return _quiet(LTX2Pipeline, **tiny_ltx2.components("2.3"))


def ltx23_i2v() -> LTX2ImageToVideoPipeline:
    return _quiet(LTX2ImageToVideoPipeline, **tiny_ltx2.components("2.3"))


def ltx25_t2v() -> LTX2Pipeline:
    """LTX-2.5: 2.3 without biases in the video feed-forward, with a position for keyframes."""
    return _quiet(LTX2Pipeline, **tiny_ltx2.components("2.5"))


def ltx25_i2v() -> LTX2ImageToVideoPipeline:
    return _quiet(LTX2ImageToVideoPipeline, **tiny_ltx2.components("2.5"))


def ltx_t2v() -> LTXPipeline:
    """LTX-Video, before LTX-2: packed video tokens, no audio, batched guidance."""
    return _quiet(LTXPipeline, **_ltx_video())


def ltx_i2v() -> LTXImageToVideoPipeline:
    """LTX-Video image-to-video: the first latent frame is clean and has timestep 0."""
    return _quiet(LTXImageToVideoPipeline, **_ltx_video())


ALL = {
    builder.__name__: builder
    for builder in (
        *(wan_t2v, wan_ti2v, ti2v_t2v, wan_i2v, wan22_t2v, wan22_i2v),
        *(ltx2_t2v, ltx2_i2v, ltx23_t2v, ltx23_i2v, ltx25_t2v, ltx25_i2v),
        *(ltx_t2v, ltx_i2v),
    )
}


def inputs(pipe, *, seed: int = 0, steps: int = 8, **overrides) -> dict:
    """Arguments for `pipe(**inputs(pipe))`: latents out, noise from a CPU generator.

    A batch is a list of prompts, negative prompts and generators.
    """
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "max_sequence_length": 32,
        "output_type": "latent",
        **guidance(pipe),
    }
    if is_i2v(pipe):
        batched = isinstance(overrides.get("prompt"), list)
        arguments["image"] = picture()
        if batched and not isinstance(pipe, WanImageToVideoPipeline):  # LTX: an image each
            arguments["image"] = [picture()] * len(overrides["prompt"])
    if is_ltx2(pipe):
        # The cross-attention of 2.0 is modulated by the own stream's timesteps, per token in I2V.
        arguments["use_cross_timestep"] = pipe.transformer.config.cross_attn_mod
        if is_i2v(pipe):
            arguments["image_crf"] = 0  # the picture as it is, not re-compressed with H.264
    elif getattr(pipe.transformer.config, "image_dim", None) is not None:
        arguments["max_sequence_length"] = 512  # fixed in diffusers where image tokens precede text
    return arguments | overrides


def guidance(pipe, on: bool = True) -> dict:
    """Arguments that turn every term of the pipeline's guidance on, or all of them off.

    LTX-2 needs all eight scales to be off: those of the audio stream default to on, and one that
    is on for either stream runs its pass for both.
    """
    if not is_ltx2(pipe):
        return {"guidance_scale": 4.0 if on else 1.0}
    names = ("guidance_scale", "stg_scale", "modality_scale", "guidance_rescale")
    video = (3.0, 1.0, 3.0, 0.7) if on else (1.0, 0.0, 1.0, 0.0)
    audio = (7.0, 1.0, 3.0, 0.7) if on else video
    return {
        **dict(zip(names, video, strict=True)),
        **{f"audio_{name}": scale for name, scale in zip(names, audio, strict=True)},
        "spatio_temporal_guidance_blocks": [STG_BLOCK] if on else None,
    }


def is_i2v(pipe) -> bool:
    return isinstance(
        pipe, (WanImageToVideoPipeline, LTX2ImageToVideoPipeline, LTXImageToVideoPipeline)
    )


def is_ltx2(pipe) -> bool:
    return isinstance(pipe, (LTX2Pipeline, LTX2ImageToVideoPipeline))


def sample(pipe, **overrides) -> torch.Tensor:
    """Video latents (B, C, F, H, W) of one call; LTX-Video leaves them packed, (B, N, C)."""
    return pipe(**inputs(pipe, **overrides)).frames


def sample_av(pipe, **overrides) -> tuple[torch.Tensor, torch.Tensor]:
    """Video latents (B, C, F, H, W) and audio latents (B, C, A, mel) of one call of LTX-2."""
    output = pipe(**inputs(pipe, **overrides))
    return output.frames, output.audio


def picture() -> Image.Image:
    """A 64x64 gradient, the first frame of the image-to-video pipelines."""
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def _quiet(pipeline_class, **components):
    pipe = pipeline_class(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _transformer(seed: int, **config) -> WanTransformer3DModel:
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 32,
        "num_layers": 3,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanTransformer3DModel(**settings | config).eval()


def _shared() -> dict:
    """Everything but the transformer; the scheduler is new each time, the rest is reused."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )
    return {"scheduler": scheduler, **_frozen()}


def _ltx_video() -> dict:
    """LTX-Video with the text encoder of Wan; scheduler and transformer are new each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=3,
            caption_channels=32,
        ).eval()
    scheduler = tiny_ltx2.scheduler()
    return _frozen() | {"transformer": transformer, "scheduler": scheduler, "vae": _ltx_vae()}


@cache
def _ltx_vae() -> AutoencoderKLLTXVideo:
    """A token of 4 frames of 16 x 16 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, True),
            downsample_type=("conv", "conv"),
            decoder_block_out_channels=(8, 8),
            decoder_layers_per_block=(1, 1, 1),
            decoder_spatio_temporal_scaling=(True, True),
            decoder_inject_noise=(False, False, False),
            upsample_residual=(False, False),
            upsample_factor=(1, 1),
        ).eval()


@cache
def _frozen() -> dict:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(
        vocab=pieces + [(letter, -3.0) for letter in letters], extra_ids=0, model_max_length=512
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        text = UMT5Config(
            vocab_size=len(pieces) + len(letters),
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
        )
        text_encoder = UMT5EncoderModel(text).eval()
        torch.manual_seed(3)
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1] * 4,
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval()
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae}
