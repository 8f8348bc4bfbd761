"""The tiny trained Wan model that ships with the repository: a model organism, not Wan.

One checkpoint, text-to-video and image-to-video (the TI2V way: the first frame clean, per-token
timesteps). `videos` makes its data, `train` its weights, `classify` reads its videos.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.models import Model, fingerprint

if TYPE_CHECKING:
    from experiments.prompts import Prompt

WEIGHTS = Path(__file__).parent / "weights"


def identity(path: str | None = None) -> dict[str, Any]:
    """What the weights are, without loading them: sha256 over every file that decides a video.

    Raises:
        ValueError: there is no pipeline folder at `path`.
    """
    return {"name": "embedded", "sha256": fingerprint(_folder(path))}


def load(path: str | None = None, dtype: str = "float32") -> Model:
    """The model with a pipeline for each task, on the accelerator if there is one.

    Args:
        path: a diffusers pipeline folder; None for the weights in this package.
        dtype: torch's name of the transformer's dtype.

    Raises:
        ValueError: there is no pipeline folder at `path`, or torch knows no such dtype.
    """
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline

    folder = _folder(path)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"model.dtype={dtype!r}: choose float32, bfloat16 or float16")
    dtypes = {"transformer": getattr(torch, dtype), "default": torch.float32}
    t2v = WanPipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True)
    t2v.to("cuda" if torch.cuda.is_available() else "cpu")
    i2v = WanImageToVideoPipeline(**t2v.components, expand_timesteps=True)
    for pipe in (t2v, i2v):
        pipe.set_progress_bar_config(disable=True)
    return Model(name="embedded", pipelines={"t2v": t2v, "i2v": i2v})


def prompts(
    split: str = "heldout", count: int | None = None, pattern: str | None = None
) -> list[Prompt]:
    """The first `count` captions of a split, each with a rendered first frame of its own.

    Args:
        pattern: of the floor, where only such captions are wanted.

    Raises:
        ValueError: no such split or pattern, or it has fewer captions.
    """
    import numpy as np
    from PIL import Image

    from experiments.embedded import videos
    from experiments.prompts import Prompt

    if pattern not in (None, *videos.PATTERNS):
        raise ValueError(f"prompts.pattern={pattern!r}: choose {', '.join(videos.PATTERNS)}")
    captions = [
        (index, caption)
        for index, caption in enumerate(videos.split(split))
        if pattern in (None, caption.pattern)
    ]
    if count is not None and not 0 < count <= len(captions):
        raise ValueError(f"prompts.count={count}: split {split} has 1 to {len(captions)} captions")
    found = []
    for index, caption in captions[:count]:
        frames, _ = videos.render(caption, np.random.default_rng([7, index]), times=[0])
        image = Image.fromarray(frames[0])
        found.append(Prompt(f"{split}-{index:03d}", caption.text, image, asdict(caption)))
    return found


def _folder(path: str | None) -> Path:
    folder = Path(path) if path else WEIGHTS
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model.path={str(folder)!r}: no diffusers pipeline folder there; train one with "
            "`python -m experiments.embedded.train`"
        )
    return folder
