"""Trains DDiT's coarse patches for the embedded model: `python -m experiments.embedded.train_ddit`.

Settings are those of conf/ddit_training.yaml. Distillation as in the paper (arXiv 2602.16968): the
model stays frozen, its velocity on its own patches is the target, and only the new layers learn:
embedder, last layer, low-rank branches. Beside the velocity of each guidance branch the guided one
is a target, because that is where small differences grow. The videos are the rendered ones that
the model itself was trained on. A run that was stopped goes on from its last checkpoint; the
weights come to lie in the folder `out`.
"""

from __future__ import annotations

import copy
import csv
import time
from pathlib import Path

import hydra
import torch
from diffusers import WanPipeline
from omegaconf import DictConfig

from baselines.patches import CoarsePatches
from experiments.embedded import load
from experiments.embedded.build import patch_basis
from experiments.embedded.train import (
    Batches,
    Checkpoint,
    attention,
    caption_features,
    inputs_of,
    learning_rate,
    optimisers,
)


def train_patches(pipe: WanPipeline, cfg: DictConfig, out: Path) -> CoarsePatches:
    """Coarse patches for the pipe's transformer, the average over the last steps of a training."""
    transformer = pipe.transformer.requires_grad_(False)
    device = transformer.device
    patches = CoarsePatches(transformer).to(device)
    average = copy.deepcopy(patches).requires_grad_(False)
    optims = optimisers(patches, cfg, inner="lora.")
    features = caption_features(pipe).to(device)
    batches = Batches(patch_basis(), features.cpu(), cfg, rank=0)
    checkpoint = Checkpoint(out / "checkpoint.pt", patches, average, optims)
    start, seconds = checkpoint.restore(device)
    began, running = time.time() - seconds, None
    for step in range(start, cfg.steps):
        batch = {name: value.to(device) for name, value in batches.draw(step).items()}
        with attention(device):
            loss, error = distances(patches, transformer, batch, features[-1], cfg.guidance_scale)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(patches.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = learning_rate(step, cfg)
            optim.step()
            optim.zero_grad()
        weight = 1 - min(cfg.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(patches.parameters()), weight)
        running = error.item() if running is None else 0.98 * running + 0.02 * error.item()
        done = step + 1
        if done % cfg.log_every == 0:
            spent = time.time() - began
            print(f"step {done}/{cfg.steps} error {running:.4f} {spent / 60:.1f} min", flush=True)
            with open(out / "log.csv", "a", newline="") as log:
                csv.writer(log).writerow([done, f"{running:.5f}", f"{spent:.1f}"])
        if done % cfg.checkpoint_every == 0 or done == cfg.steps:
            checkpoint.save(done, time.time() - began)
            average.save(out / "ddit_embedded.safetensors", transformer)
    return average


def distances(
    patches: CoarsePatches,
    transformer: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    empty: torch.Tensor,
    guidance_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far velocities on coarse patches are from those on fine ones.

    Squared distance over the fine velocity's square: of the two branches plus that of the guided
    velocity, which is the loss, and of the latter alone. A given first frame is left out.

    Args:
        empty: (L, D), text of the branch without caption.
    """
    noisy, timestep = inputs_of(batch)
    first = int(batch["given"])
    inputs = (
        torch.cat([noisy, noisy]),
        torch.cat([timestep, timestep]),
        torch.cat([batch["text"], empty.expand_as(batch["text"])]),
    )
    with torch.autocast(noisy.device.type, torch.bfloat16):
        with torch.no_grad():
            fine = transformer(*inputs, return_dict=False)[0].float()[:, :, first:]
        with patches.installed(transformer, lambda: True):
            coarse = transformer(*inputs, return_dict=False)[0].float()[:, :, first:]
    error = coarse - fine
    branches, guided = (
        wrong.square().mean() / right.square().mean()
        for wrong, right in (
            (error, fine),
            (_guided(error, guidance_scale), _guided(fine, guidance_scale)),
        )
    )
    return branches + guided, guided.detach()


def _guided(velocity: torch.Tensor, scale: float) -> torch.Tensor:
    """Of the captioned half of a batch and the half without, what the pipeline makes of both."""
    captioned, empty = velocity.chunk(2)
    return empty + scale * (captioned - empty)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="ddit_training")
def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    train_patches(load().pipelines["t2v"], cfg, out)


if __name__ == "__main__":
    main()
