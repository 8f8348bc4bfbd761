"""Trains the embedded model from scratch: first single frames, then whole videos.

    two CPU cores:  torchrun --nproc-per-node 2 -m experiments.embedded.train
    one GPU:        python -m experiments.embedded.train batch.videos=64 batch.images=1024

Settings are those of conf/embedded_training.yaml. Flow matching: x_t = (1 - s) x_0 + s noise, the
target is noise - x_0. A share of the video steps is image-to-video the TI2V way: the first
latent frame is clean, at timestep 0, and outside the loss. A run that was stopped goes on from its
last checkpoint.
"""

from __future__ import annotations

import copy
import csv
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.attention_dispatch import attention_backend
from omegaconf import DictConfig, OmegaConf
from torch import distributed

from experiments.embedded.build import (
    MAX_TOKENS,
    PatchBasis,
    build_pipeline,
    patch_basis,
    to_pixels,
)
from experiments.embedded.card import write_card
from experiments.embedded.videos import NUM_FRAMES, render, split
from experiments.provenance import machine


class Batches:
    """Random batches of rendered videos, as noisy latents; a step's is always the same."""

    def __init__(self, basis: PatchBasis, features: torch.Tensor, cfg: DictConfig, rank: int):
        self.basis, self.features, self.cfg, self.rank = basis, features, cfg, rank
        self.captions = split("train")

    def draw(self, step: int) -> dict[str, torch.Tensor]:
        """What the model sees of a step, and what it should say.

        Returns:
            latents and noise (B, 16, F, 16, 16); sigma (B,); weights (B, 1, F, 16, 16) of the
            loss; text (B, L, D), of the empty caption for `caption_dropout` of the rows; and
            whether the first frame is given.
        """
        cfg = self.cfg
        kind = "images" if step < cfg.image_steps else "videos"
        rng = np.random.default_rng([cfg.seed, self.rank, step])
        latents, masks, rows = [], [], []
        for _ in range(cfg.batch[kind]):
            row = int(rng.integers(len(self.captions)))
            times = [int(rng.integers(NUM_FRAMES))] if kind == "images" else range(NUM_FRAMES)
            frames, mask = render(self.captions[row], rng, times)
            latents.append(self.basis.encode(to_pixels(frames)).transpose(0, 1))
            masks.append(torch.from_numpy(mask))
            rows.append(-1 if rng.random() < cfg.caption_dropout else row)
        clean = torch.stack(latents)
        near = F.max_pool2d(F.avg_pool2d(torch.stack(masks), 4), 3, stride=1, padding=1)
        base = 1 / (1 + np.exp(-cfg.sigma_spread * rng.standard_normal(len(clean))))
        shift = cfg.sigma_shift[kind]
        sigma = shift * base / (1 + (shift - 1) * base)
        return {
            "latents": clean,
            "noise": torch.from_numpy(rng.standard_normal(clean.shape, np.float32)),
            "sigma": torch.from_numpy(sigma).float(),
            "weights": (1 + (cfg.object_weight - 1) * near)[:, None],
            "text": self.features[rows],
            "given": torch.tensor(kind == "videos" and rng.random() < cfg.i2v_share),
        }


def inputs_of(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and timesteps of a batch; a given first frame is clean and at timestep 0."""
    clean, sigma = batch["latents"], batch["sigma"][:, None, None, None, None]
    noisy = (1 - sigma) * clean + sigma * batch["noise"]
    timestep = 1000 * batch["sigma"]
    if batch["given"]:
        noisy[:, :, 0] = clean[:, :, 0]
        tokens_a_frame = clean.shape[-1] * clean.shape[-2] // 4
        timestep = timestep[:, None].repeat(1, clean.shape[2] * tokens_a_frame)
        timestep[:, :tokens_a_frame] = 0
    return noisy, timestep


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted mean squared error of the velocity."""
    noisy, timestep = inputs_of(batch)
    weights = batch["weights"]
    if batch["given"]:
        weights[:, :, 0] = 0
    with torch.autocast(noisy.device.type, torch.bfloat16):
        velocity = model(noisy, timestep, batch["text"], return_dict=False)[0]
    error = velocity.float() - (batch["noise"] - batch["latents"])
    error = error.square().mean(1, keepdim=True)
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


def train_decoder(vae: AutoencoderKLWan, basis: PatchBasis, cfg: DictConfig) -> None:
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


def train_transformer(pipe: WanPipeline, basis: PatchBasis, cfg: DictConfig, out: Path) -> float:
    """Trains pipe.transformer and leaves the averaged weights in it; returns its seconds."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = _device()
    transformer = pipe.transformer.to(device)
    average = copy.deepcopy(transformer).requires_grad_(False)
    optims = optimisers(transformer, cfg)
    batches = Batches(basis, caption_features(pipe), cfg, rank)
    checkpoint = Checkpoint(out / "checkpoint.pt", transformer, average, optims)
    start, seconds = checkpoint.restore(device)
    model = torch.nn.parallel.DistributedDataParallel(transformer) if world > 1 else transformer
    began, running = time.time() - seconds, None
    for step in range(start, cfg.steps):
        batch = {name: value.to(device) for name, value in batches.draw(step).items()}
        with attention(device):
            loss = loss_of(model, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, cfg)
            optim.step()
            optim.zero_grad()
        weight = 1 - min(cfg.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), weight)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        done = step + 1
        if rank == 0 and done % cfg.log_every == 0:
            pace = (time.time() - began - seconds) / (done - start)
            left = pace * (cfg.steps - done) / 60
            print(
                f"step {done}/{cfg.steps} loss {running:.4f} {pace:.3f} s/step, {left:.0f} min left"
            )
            with open(out / "log.csv", "a", newline="") as log:
                csv.writer(log).writerow([done, f"{running:.5f}", f"{time.time() - began:.1f}"])
        if rank == 0 and (done % cfg.checkpoint_every == 0 or done == cfg.steps):
            checkpoint.save(done, time.time() - began)
    transformer.load_state_dict(average.state_dict())
    return time.time() - began


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training in one file, replaced atomically."""

    path: Path
    model: torch.nn.Module
    average: torch.nn.Module
    optimisers: list[torch.optim.Optimizer]

    def save(self, step: int, seconds: float) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").rename(self.path)

    def restore(self, device: torch.device) -> tuple[int, float]:
        """Steps done and seconds spent so far; 0 where there is no checkpoint."""
        if not self.path.exists():
            return 0, 0.0
        state = torch.load(self.path, map_location=device)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return state["step"], state["seconds"]


@torch.no_grad()
def caption_features(pipe: WanPipeline) -> torch.Tensor:
    """(captions + 1, L, D): what the pipeline makes of every caption, and of none."""
    texts = [caption.text for caption in split("train")] + [""]
    return pipe.encode_prompt(
        texts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
    )[0]


def attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU plain bf16 attention trains twice as fast as the fused one's backward."""
    if device.type != "cpu":
        return nullcontext()
    # This switch serves every device, whatever its name says.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return attention_backend("_native_math")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    seconds = train_transformer(pipe, basis, cfg, out)
    if int(os.environ.get("RANK", 0)) == 0:
        train_decoder(pipe.vae.to(_device()), basis, cfg)
        pipe.to("cpu", torch.bfloat16).save_pretrained(out / "weights")
        settings = OmegaConf.to_container(OmegaConf.masked_copy(cfg, cfg.keys() - {"out"}))
        cost = {
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "hardware": machine().device,
            "hours": round(seconds / 3600, 2),
        }
        write_card(out / "weights", settings | cost)
    if distribute:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
