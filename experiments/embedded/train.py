"""Trains the embedded model from scratch: first single frames, then whole videos.

    hsa-bench's weights:  torchrun --nproc-per-node 2 -m experiments.embedded.train
    one GPU:              python -m experiments.embedded.train batch=64 images=1024

Settings are those of conf/embedded_training.yaml. Flow matching: x_t = (1 - s) x_0 + s noise, the
target is noise - x_0. A quarter of the video steps are image-to-video the TI2V way: the first
latent frame is clean, at timestep 0, and outside the loss. A run that was stopped goes on from its
last checkpoint.
"""

from __future__ import annotations

import copy
import csv
import os
import time
from contextlib import nullcontext
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from omegaconf import DictConfig
from torch import distributed

from experiments.embedded.build import (
    MAX_TOKENS,
    PatchBasis,
    build_pipeline,
    patch_basis,
    to_pixels,
)
from experiments.embedded.videos import NUM_FRAMES, render, split


class Batches:
    """Endless random batches of rendered videos, as latents with their captions' features."""

    def __init__(self, basis: PatchBasis, features: torch.Tensor, cfg: DictConfig, rank: int):
        self.basis, self.features, self.cfg, self.rank = basis, features, cfg, rank
        self.captions = split("train")

    def draw(self, step: int) -> dict[str, torch.Tensor]:
        """Latents (B, 16, F, 16, 16), loss weights (B, 1, F, 16, 16) and text (B, L, D) of a step.

        The last row of `features` is the empty caption's, drawn for `caption_dropout` of the rows.
        """
        images = step < self.cfg.image_steps
        rng = np.random.default_rng([self.cfg.seed, self.rank, step])
        latents, masks, rows = [], [], []
        for _ in range(self.cfg.images if images else self.cfg.batch):
            row = int(rng.integers(len(self.captions)))
            times = [int(rng.integers(NUM_FRAMES))] if images else range(NUM_FRAMES)
            frames, mask = render(self.captions[row], rng, times)
            latents.append(self.basis.encode(to_pixels(frames)).transpose(0, 1))
            masks.append(torch.from_numpy(mask))
            rows.append(-1 if rng.random() < self.cfg.caption_dropout else row)
        near = F.max_pool2d(F.avg_pool2d(torch.stack(masks), 4), 3, stride=1, padding=1)
        return {
            "latents": torch.stack(latents),
            "weights": (1 + (self.cfg.object_weight - 1) * near)[:, None],
            "text": self.features[rows],
            "image_to_video": torch.tensor(not images and rng.random() < self.cfg.i2v_share),
        }


def loss_of(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], cfg: DictConfig
) -> torch.Tensor:
    """Weighted mean squared error of the velocity, at one random sigma a video."""
    clean, weights = batch["latents"], batch["weights"]
    base = torch.sigmoid(cfg.sigma_spread * torch.randn(len(clean), device=clean.device))
    sigma = cfg.sigma_shift * base / (1 + (cfg.sigma_shift - 1) * base)
    noise = torch.randn_like(clean)
    mix = sigma[:, None, None, None, None]
    noisy = (1 - mix) * clean + mix * noise
    timestep = 1000 * sigma
    if batch["image_to_video"]:
        noisy[:, :, 0] = clean[:, :, 0]
        weights = weights.clone()
        weights[:, :, 0] = 0
        tokens_a_frame = clean.shape[-1] * clean.shape[-2] // 4
        timestep = timestep[:, None].repeat(1, clean.shape[2] * tokens_a_frame)
        timestep[:, :tokens_a_frame] = 0
    with torch.autocast(clean.device.type, torch.bfloat16):
        velocity = model(noisy, timestep, batch["text"], return_dict=False)[0]
    error = (velocity.float() - (noise - clean)).square().mean(1, keepdim=True)
    return (error * weights).sum() / weights.sum()


def optimisers(model: torch.nn.Module, cfg: DictConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if n.startswith("blocks.") and p.ndim == 2]
    rest = [p for n, p in named if not (n.startswith("blocks.") and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, cfg: DictConfig) -> float:
    """Warm-up, a constant stretch, and a linear decay to zero over the last steps."""
    decay = max(0.0, (cfg.steps - step) / cfg.decay_steps)
    return cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps, decay)


def train_decoder(vae: torch.nn.Module, basis: PatchBasis, cfg: DictConfig) -> None:
    """Trains the VAE's decoder on single frames; its taps into the past stay zero."""
    rng = np.random.default_rng(cfg.seed)
    captions = split("train")
    vae.requires_grad_(False).decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=cfg.decoder_lr, weight_decay=0.0)
    device = next(vae.parameters()).device
    for step in range(cfg.decoder_steps):
        rate = cfg.decoder_lr * min(1, (step + 1) / 50, (cfg.decoder_steps - step) / 300)
        optimiser.param_groups[0]["lr"] = rate
        rows = rng.integers(len(captions), size=cfg.decoder_batch)
        frames = [render(captions[r], rng, [int(rng.integers(NUM_FRAMES))])[0] for r in rows]
        pixels = to_pixels(np.stack(frames)).transpose(1, 2).to(device)  # (B, 3, 1, H, W)
        latents = basis.encode(pixels.cpu()[:, :, 0])[:, :, None].to(device) * basis.scale
        latents += cfg.decoder_noise * torch.randn_like(latents)
        error = vae.decode(latents).sample - pixels
        loss = error.square().mean() + 0.1 * error.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(
                f"decoder {step}: {-10 * np.log10(error.square().mean().item() / 4):.2f} dB",
                flush=True,
            )
    vae.requires_grad_(False)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_transformer(pipe, basis: PatchBasis, cfg: DictConfig, out: Path) -> None:
    """Trains pipe.transformer and leaves the averaged weights in it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device()
    transformer = pipe.transformer.to(device)
    texts = [caption.text for caption in split("train")] + [""]
    with torch.no_grad():
        features = pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
        )[0]
    batches = Batches(basis, features, cfg, rank)
    average = copy.deepcopy(transformer).requires_grad_(False)
    optims = optimisers(transformer, cfg)
    checkpoint, start = out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        transformer.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optim, state in zip(optims, saved["optimisers"], strict=True):
            optim.load_state_dict(state)
        start = saved["step"]
    model = transformer
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(transformer)
    torch.manual_seed(cfg.seed + 1000 * rank + start)
    # On a CPU plain bf16 attention trains twice as fast as the fused one's backward. (The switch
    # serves every device, whatever its name says.)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    backend = attention_backend("_native_math") if device.type == "cpu" else nullcontext()
    began, running = time.time(), None
    with backend:
        for step in range(start, cfg.steps):
            batch = {k: v.to(device) for k, v in batches.draw(step).items()}
            loss = loss_of(model, batch, cfg)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = learning_rate(step, cfg)
                optim.step()
                optim.zero_grad()
            decay = min(cfg.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(
                list(average.parameters()), list(transformer.parameters()), 1 - decay
            )
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            if rank == 0 and (step + 1) % cfg.log_every == 0:
                seconds = (time.time() - began) / (step + 1 - start)
                minutes = seconds * (cfg.steps - step - 1) / 60
                print(
                    f"step {step + 1}/{cfg.steps} loss {running:.4f} {seconds:.3f} s/step, "
                    f"{minutes:.0f} min left",
                    flush=True,
                )
                with open(out / "log.csv", "a", newline="") as log:
                    csv.writer(log).writerow(
                        [step + 1, f"{running:.5f}", f"{time.time() - began:.1f}"]
                    )
            if rank == 0 and ((step + 1) % cfg.checkpoint_every == 0 or step + 1 == cfg.steps):
                state = {
                    "model": transformer.state_dict(),
                    "average": average.state_dict(),
                    "optimisers": [o.state_dict() for o in optims],
                    "step": step + 1,
                }
                torch.save(state, out / "checkpoint.tmp")
                (out / "checkpoint.tmp").rename(checkpoint)
    transformer.load_state_dict(average.state_dict())


@hydra.main(version_base="1.3", config_path="../../conf", config_name="embedded_training")
def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    distribute = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if distribute:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    basis = patch_basis()
    pipe = build_pipeline(basis)
    pipe.set_progress_bar_config(disable=True)
    train_transformer(pipe, basis, cfg, out)
    if int(os.environ.get("RANK", 0)) == 0:
        train_decoder(pipe.vae.to(_device()), basis, cfg)
        pipe.to("cpu", torch.bfloat16).save_pretrained(out / "weights", safe_serialization=True)
    if distribute:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
