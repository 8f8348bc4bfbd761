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
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import torch
from diffusers import WanPipeline
from omegaconf import DictConfig
from torch import Tensor, nn

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
)


@dataclass(frozen=True)
class Lesson:
    """Videos at some noise, each with its caption and then each without, and what the model says.

    Attributes:
        inputs: latents (2B, 16, F, 16, 16), timesteps (2B,) or (2B, N), text (2B, L, D).
        velocity: of the frozen model on its own patches.
        first: frame that the loss begins with; 1 where the first is given.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    velocity: Tensor
    first: int

    @classmethod
    @torch.no_grad()
    def draw(cls, transformer: nn.Module, batch: dict[str, Tensor], empty: Tensor) -> Lesson:
        """Of a batch of `Batches`; `empty` is the text (L, D) of no caption."""
        text = torch.cat([batch["text"], empty.expand_as(batch["text"])])
        inputs = (*(torch.cat([part, part]) for part in inputs_of(batch)), text)
        return cls(inputs, _velocity(transformer, inputs), int(batch["given"]))

    def distances(
        self, patches: CoarsePatches, transformer: nn.Module, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Squared distance of the velocity on coarse patches, over the square of the true one.

        Returns:
            that of the guidance branches, and that of the guided velocity.
        """
        with patches.installed(transformer, lambda: True):
            error = _velocity(transformer, self.inputs) - self.velocity
        pairs = [(error, self.velocity)]
        pairs += [tuple(_guided(velocity, guidance_scale) for velocity in pairs[0])]
        return tuple(
            wrong[:, :, self.first :].square().mean() / right[:, :, self.first :].square().mean()
            for wrong, right in pairs
        )


def train_patches(pipe: WanPipeline, cfg: DictConfig, out: Path) -> CoarsePatches:
    """Coarse patches for the pipe's transformer, the average over the last steps of a training."""
    transformer = pipe.transformer.requires_grad_(False)
    device = transformer.device
    torch.manual_seed(cfg.seed)
    patches = CoarsePatches(transformer).to(device)
    average = copy.deepcopy(patches).requires_grad_(False)
    optim = torch.optim.AdamW(patches.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0)
    features = caption_features(pipe)
    batches = Batches(patch_basis(), features, cfg, rank=0)
    lessons: deque[Lesson] = deque(maxlen=cfg.lessons)
    checkpoint = Checkpoint(out / "checkpoint.pt", patches, average, [optim])
    start, seconds = checkpoint.restore(device)
    began, running = time.time() - seconds, None
    for step in range(start, cfg.steps):
        with attention(device):
            if step % cfg.repeats == 0 or not lessons:
                batch = {name: value.to(device) for name, value in batches.draw(step).items()}
                lessons.append(Lesson.draw(transformer, batch, features[-1].to(device)))
            lesson = lessons[-1 - np.random.default_rng([cfg.seed, step]).integers(len(lessons))]
            branches, guided = lesson.distances(patches, transformer, cfg.guidance_scale)
            (branches + guided).backward()
        torch.nn.utils.clip_grad_norm_(patches.parameters(), 1.0)
        optim.param_groups[0]["lr"] = learning_rate(step, cfg)
        optim.step()
        optim.zero_grad()
        weight = 1 - min(cfg.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(patches.parameters()), weight)
        errors = np.array([branches.item(), guided.item()])
        running = errors if running is None else 0.99 * running + 0.01 * errors
        done, spent = step + 1, time.time() - began
        if done % cfg.log_every == 0:
            numbers = [f"{error:.4f}" for error in running] + [f"{spent:.1f}"]
            print(f"step {done}/{cfg.steps} errors, seconds: {' '.join(numbers)}", flush=True)
            with open(out / "log.csv", "a", newline="") as log:
                csv.writer(log).writerow([done, *numbers])
        if done % cfg.checkpoint_every == 0 or done == cfg.steps:
            checkpoint.save(done, spent)
            average.save(out / "ddit_embedded.safetensors", transformer)
    return average


def _velocity(transformer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return transformer(*inputs, return_dict=False)[0].float()


def _guided(velocity: Tensor, scale: float) -> Tensor:
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
