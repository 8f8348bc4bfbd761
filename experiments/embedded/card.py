"""Measures an embedded model and writes its card: `python -m experiments.embedded.card [FOLDER]`.

The card is FOLDER/README.md with its pictures. On 64 held-out captions, text- and image-to-video:
does the video show what the caption says at 40 steps, and does it still at 10?
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.progress import track

from experiments.config import load_experiment
from experiments.embedded import WEIGHTS, classify, load
from experiments.embedded.build import to_pixels
from experiments.embedded.videos import CAPTIONS, NUM_FRAMES, render, split
from experiments.execute import Worker
from experiments.models import Model
from experiments.plan import plan
from experiments.store import Store

STEPS = (40, 10)
TOKEN = 8  # pixels a side
WORDS = ("colour", "shape", "direction", "background", "all")


@dataclass(frozen=True)
class Pair:
    """One caption's videos at 40 and at 10 steps, uint8 (F, H, W, 3), and their latents."""

    meta: Mapping[str, str]  # the caption's words
    videos: tuple[np.ndarray, np.ndarray]
    latents: tuple[np.ndarray, np.ndarray]  # (C, F, h, w)

    @property
    def psnr(self) -> float:
        """Of the 10-step video against the 40-step one, dB."""
        return _psnr(*self.videos)

    @property
    def token_error(self) -> np.ndarray:
        """(F, h / 2, w / 2): mean absolute latent difference of the two in each token."""
        error = np.abs(self.latents[0] - self.latents[1]).mean(0)
        frames, height, width = error.shape
        return error.reshape(frames, height // 2, 2, width // 2, 2).mean((2, 4))

    @property
    def object_tokens(self) -> np.ndarray:
        """bool (F, h / 2, w / 2): tokens that the 40-step video's object touches."""
        mask = classify.object_mask(self.videos[0])
        frames, height, width = mask.shape
        return mask.reshape(frames, height // TOKEN, TOKEN, width // TOKEN, TOKEN).any((2, 4))


def write_card(folder: Path, training: Mapping[str, Any] | None = None) -> None:
    """Measure the pipeline in `folder` and write its card there.

    Args:
        training: settings and cost of the training; None keeps those of the card before.
    """
    record = folder / "training.yaml"
    if training is not None:
        OmegaConf.save(OmegaConf.create(dict(training)), record)
    pairs = _pairs(folder)
    for task, found in pairs.items():
        _contact_sheet(found[:8]).save(folder / f"{task}.png")
    _difficulty_map(pairs["t2v"][:6]).save(folder / "difficulty.png")
    settings = record.read_text().strip() if record.exists() else "not recorded"
    (folder / "README.md").write_text(_card(pairs, vae_psnr(load(str(folder))), settings))


def vae_psnr(model: Model, count: int = 64) -> float:
    """Mean reconstruction of rendered held-out videos, dB."""
    vae = model.pipeline("t2v").vae
    values = []
    for index, caption in enumerate(split("heldout")[:count]):
        frames, _ = render(caption, np.random.default_rng([11, index]))
        pixels = to_pixels(frames).transpose(0, 1)[None].to(vae.device)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        decoded = ((decoded[0].permute(1, 2, 3, 0).cpu() + 1) * 127.5).round().byte().numpy()
        values.append(_psnr(frames, decoded))
    return float(np.mean(values))


def _pairs(folder: Path) -> dict[str, list[Pair]]:
    """The pairs of each task: the videos of conf/experiment/embedded_quality.yaml, from its store.

    Videos that are not stored yet are made.
    """
    experiment = load_experiment(["experiment=embedded_quality", f"model.path={folder}"])
    groups = plan(experiment).by_setting()
    store = Store(experiment.config.store)
    worker = Worker(store)
    found: dict[str, list[Pair]] = {}
    for task in experiment.config.tasks:
        cells = zip(*(group for (t, _), group in groups.items() if t == task), strict=True)
        found[task] = []
        for pair in track(list(cells), f"measure {task}"):
            for cell in pair:
                if error := worker.make(cell).error:
                    raise RuntimeError(f"{cell.label}: {error}")
            samples = [store.sample(cell.key) for cell in pair]
            found[task].append(
                Pair(
                    pair[0].inputs["request"]["meta"],
                    tuple(sample.frames() for sample in samples),
                    tuple(sample.latents() for sample in samples),
                )
            )
    return found


def _card(pairs: Mapping[str, Sequence[Pair]], vae: float, training: str) -> str:
    rows = []
    for task, found in pairs.items():
        for column, steps in enumerate(STEPS):
            right = [classify.adherence(pair.videos[column], pair.meta) for pair in found]
            shares = " | ".join(
                f"{100 * np.mean([r[word] for r in right]):.0f} %" for word in WORDS
            )
            still = np.mean([_floor_change(pair.videos[column]) for pair in found])
            psnr = "" if column == 0 else f"{np.mean([pair.psnr for pair in found]):.1f} dB"
            rows.append(f"| {task} | {steps} | {shares} | {still:.2f} | {psnr} |")
    on, off = (
        float(np.mean(np.concatenate([p.token_error[mask(p)] for p in pairs["t2v"]])))
        for mask in (lambda p: p.object_tokens, lambda p: ~p.object_tokens)
    )
    return CARD.format(
        captions=len(CAPTIONS),
        trained=len(split("train")),
        count=len(pairs["t2v"]),
        frames=NUM_FRAMES,
        vae=vae,
        rows="\n".join(rows),
        ratio=on / off,
        training=training,
    )


CARD = """\
# The embedded model

A tiny Wan (transformer of width 128 and 6 blocks, `AutoencoderKLWan`, a frozen random
`UMT5EncoderModel`) trained from scratch by this project on procedural videos: a coloured shape
moves over a static patterned floor, {frames} frames of 64x64. {captions} captions, {trained} of
them trained on. It exists so that the whole harness runs on a laptop; it says nothing about Wan.

Trained by `python -m experiments.embedded.train`; measured, and this page written, by
`python -m experiments.embedded.card`.

## Quality

First {count} held-out captions, flow matching (Euler) with the model's own shift and guidance.
Shares are of videos in which pixel classifiers find what the caption says; *floor* the
mean absolute change of floor pixels from frame to frame (0 to 255); *PSNR* is to the 40-step video.

| task | steps | colour | shape | direction | background | all | floor | PSNR |
|---|---|---|---|---|---|---|---|---|
{rows}

VAE reconstruction: {vae:.1f} dB.

Eight captions, frames 0, 2, 4, 6, 8; left at 40 steps, right at 10.

Text-to-video:

![text-to-video](t2v.png)

Image-to-video:

![image-to-video](i2v.png)

## Which tokens are hard

Difference of the 10-step latents to the 40-step ones, per token, beside the 40-step frames (0, 4,
8). Tokens of the object are off by {ratio:.1f} times as much as tokens of the floor.

![difficulty](difficulty.png)

## Training

```yaml
{training}
```
"""


def _contact_sheet(pairs: Sequence[Pair]) -> Image.Image:
    rows = []
    for pair in pairs:
        left, right = (np.concatenate(list(video[::2]), 1) for video in pair.videos)
        gap = np.full((left.shape[0], 8, 3), 255, np.uint8)
        rows.append(np.concatenate([left, gap, right], 1))
    return Image.fromarray(np.concatenate(rows))


def _difficulty_map(pairs: Sequence[Pair]) -> Image.Image:
    rows = []
    brightest = max(float(pair.token_error.max()) for pair in pairs)
    for pair in pairs:
        frames, errors = pair.videos[0][[0, 4, 8]], pair.token_error[[0, 4, 8]]
        shades = np.kron(255 * errors / brightest, np.ones((1, TOKEN, TOKEN)))
        maps = np.repeat(shades[..., None], 3, -1).astype(np.uint8)
        rows.append(np.concatenate([*frames, *maps], 1))
    return Image.fromarray(np.concatenate(rows))


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def _floor_change(frames: np.ndarray) -> float:
    floor = classify.floor_mask(frames)
    if not floor.any():
        return float("nan")
    return float(np.abs(np.diff(frames[:, floor].astype(float), axis=0)).mean())


if __name__ == "__main__":
    write_card(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
