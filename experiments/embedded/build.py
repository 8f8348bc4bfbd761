"""The embedded model before training: an untrained pipeline of real diffusers classes.

The VAE starts as a PCA codec written into `AutoencoderKLWan`'s weights. Its encoder is complete
as built (linear to within 1e-3, which makes encoding a training set one matrix product); only the
decoder is trained. The text encoder stays at its random initialisation: frozen random features of
a fixed vocabulary are enough to condition on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from experiments.embedded.videos import CAPTIONS, WORDS, render

PATCH = 4
LATENT_CHANNELS = 16
TEXT_WIDTH = 96
MAX_TOKENS = 16
SHIFT = 8.0  # the authors' recommendation for Wan2.1-T2V-1.3B, with guidance 6
VAE_WIDTH = 48
ENCODER_CARRIER = 3e3  # large against the latents, so that RMSNorm is a constant factor
DECODER_CARRIER = 8.0


@dataclass(frozen=True)
class PatchBasis:
    """The leading principal directions of 4x4 RGB patches.

    Attributes:
        directions: (16, 48), orthonormal rows, in the VAE's patchify order.
        mean: (48,) the mean patch, pixels in -1..1.
        scale: standard deviation of all latents together (one number for all channels, so that
            they keep their natural proportions).
    """

    directions: torch.Tensor
    mean: torch.Tensor
    scale: float

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) in -1..1 -> normalised latents (..., 16, H/4, W/4)."""
        lead = pixels.shape[:-3]
        patches = torch.nn.functional.pixel_unshuffle(pixels.flatten(0, -4), PATCH)
        # pixel_unshuffle orders (c, row, column); the VAE's patchify orders (c, column, row)
        patches = patches.unflatten(1, (3, PATCH, PATCH)).transpose(2, 3).flatten(1, 3)
        centred = patches - self.mean[:, None, None]
        latents = torch.einsum("kp,nphw->nkhw", self.directions, centred) / self.scale
        return latents.unflatten(0, lead)


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., F, H, W, 3) -> float32 (..., F, 3, H, W) in -1..1."""
    return torch.from_numpy(frames).movedim(-1, -3).float() / 127.5 - 1


def patch_basis(num_videos: int = 300) -> PatchBasis:
    """The basis of rendered training frames (fixed seed, the first and last frame of each)."""
    rng = np.random.default_rng(1)
    frames = [
        render(CAPTIONS[i], rng)[0][[0, -1]] for i in rng.permutation(len(CAPTIONS))[:num_videos]
    ]
    identity = PatchBasis(torch.eye(3 * PATCH**2), torch.zeros(3 * PATCH**2), 1.0)
    patches = identity.encode(to_pixels(np.concatenate(frames))).movedim(1, -1).flatten(0, -2)
    mean = patches.mean(0)
    _, _, directions = torch.linalg.svd((patches - mean).double().T @ (patches - mean).double())
    directions = directions[:LATENT_CHANNELS].float()
    scale = float(((patches - mean) @ directions.T).std())
    return PatchBasis(directions, mean, scale)


def build_vae(basis: PatchBasis) -> AutoencoderKLWan:
    """An `AutoencoderKLWan` that computes the PCA codec, frame by frame.

    SiLU is made linear by carrying every value with both signs, silu(u) - silu(-u) = u; RMSNorm by
    a constant carrier channel that dominates the norm.
    """
    vae = AutoencoderKLWan(
        base_dim=VAE_WIDTH,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=PATCH,
        scale_factor_temporal=1,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[basis.scale] * LATENT_CHANNELS,
    )
    k, to_latents = LATENT_CHANNELS, basis.directions
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith((".conv2.weight", ".conv2.bias", ".proj.weight", ".proj.bias")):
                parameter.zero_()
            elif name.endswith("conv1.weight"):
                parameter[:, :, :-1].zero_()  # no taps into the past: every frame on its own
        for part, carrier in ((vae.encoder, ENCODER_CARRIER), (vae.decoder, DECODER_CARRIER)):
            for conv in (part.conv_in, part.conv_out):
                conv.weight.zero_()
                conv.bias.zero_()
            part.conv_in.bias[2 * k] = carrier
        gain = ENCODER_CARRIER / VAE_WIDTH**0.5
        _centre(vae.encoder.conv_in)[:k] = to_latents
        _centre(vae.encoder.conv_in)[k : 2 * k] = -to_latents
        vae.encoder.conv_in.bias[:k] = -to_latents @ basis.mean
        vae.encoder.conv_in.bias[k : 2 * k] = to_latents @ basis.mean
        _centre(vae.encoder.conv_out)[:k, :k] = gain * torch.eye(k)
        _centre(vae.encoder.conv_out)[:k, k : 2 * k] = -gain * torch.eye(k)
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
        vae.quant_conv.weight[:k, :k, 0, 0, 0] = torch.eye(k)
        vae.quant_conv.bias[k:] = -30.0  # a log-variance of nothing: the encoder is deterministic
        vae.post_quant_conv.weight.zero_()
        vae.post_quant_conv.bias.zero_()
        vae.post_quant_conv.weight[:, :, 0, 0, 0] = torch.eye(k)
        gain = DECODER_CARRIER / VAE_WIDTH**0.5
        _centre(vae.decoder.conv_in)[:k] = torch.eye(k)
        _centre(vae.decoder.conv_in)[k : 2 * k] = -torch.eye(k)
        _centre(vae.decoder.conv_out)[:, :k] = gain * to_latents.T
        _centre(vae.decoder.conv_out)[:, k : 2 * k] = -gain * to_latents.T
        vae.decoder.conv_out.bias.copy_(basis.mean)
    return vae.eval()


def _centre(conv: torch.nn.Conv3d) -> torch.Tensor:
    """(out, in) view of a causal 3x3x3 kernel's tap on the pixel itself."""
    return conv.weight[:, :, -1, 1, 1]


def build_text_encoder() -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """A word-level tokenizer of the captions' vocabulary and a random, frozen UMT5 encoder."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(vocabulary),
                d_model=TEXT_WIDTH,
                d_kv=24,
                num_heads=4,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
    return fast, encoder.eval().requires_grad_(False)


def build_transformer() -> WanTransformer3DModel:
    """Wan's transformer at width 128: 6 blocks of 2 heads, 576 tokens for 9 frames of 64x64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=512,
            num_layers=6,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )
        torch.nn.init.zeros_(transformer.proj_out.weight)
        torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_pipeline(basis: PatchBasis) -> WanPipeline:
    """The untrained text-to-video pipeline; image-to-video shares its components."""
    tokenizer, text_encoder = build_text_encoder()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=build_vae(basis),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=build_transformer(),
        expand_timesteps=True,
    )
