"""Tiny Wan pipelines with random weights: real diffusers classes, no network, built in a second.

They prove exactness and plumbing. Random weights say nothing about quality.
"""

from functools import cache

import torch
from diffusers import (
    AutoencoderKLWan,
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

PROMPT = "a red circle moves left"
NEGATIVE = "blurry"
TOKENS = (3, 4, 4)  # frames, height, width of the token grid of `inputs`


def wan_t2v() -> WanPipeline:
    """Wan 2.1 text-to-video: one transformer, one timestep for all tokens."""
    return _quiet(WanPipeline, **_shared(), transformer=_transformer(0))


def wan_ti2v() -> WanImageToVideoPipeline:
    """TI2V-5B style image-to-video: the first latent frame is clean and has timestep 0."""
    return _quiet(
        WanImageToVideoPipeline, **_shared(), transformer=_transformer(0), expand_timesteps=True
    )


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


def inputs(pipe, *, seed: int = 0, steps: int = 8, **overrides) -> dict:
    """Arguments for `pipe(**inputs(pipe))`: latents out, noise from a CPU generator."""
    image_tokens = pipe.transformer.config.image_dim is not None
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(seed),
        "max_sequence_length": 512 if image_tokens else 16,  # image K/V: 512 is fixed in diffusers
        "output_type": "latent",
    }
    if isinstance(pipe, WanImageToVideoPipeline):
        arguments["image"] = picture()
    return arguments | overrides


def sample(pipe, **overrides) -> torch.Tensor:
    """Latents (B, C, F, H, W) of one call."""
    return pipe(**inputs(pipe, **overrides)).frames


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
