"""Stored videos for VBench, and an environment that claims to have everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from analysis.metrics.vbench.environment import STAMP
from analysis.metrics.vbench.weights import FILES
from baselines.base import Request
from baselines.flow_matching import FlowMatching
from experiments.cell import Cell, content_key
from experiments.config import Config
from experiments.store import Sample, Store


def clip(seed: int, noise: float, frames: int = 6, size: int = 48) -> np.ndarray:
    """uint8 (F, H, W, 3): one texture, noisy in time."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(40, 215, (1, size, size, 3))
    video = texture + rng.normal(0, noise, (frames, size, size, 3))
    return np.clip(video, 0, 255).astype(np.uint8)


def inputs(
    prompt: str, label: str = "FM", seed: int = 0, meta: dict | None = None, id: str | None = None
) -> dict:
    request = {"task": "t2v", "prompt": prompt, "prompt_id": id or prompt, "seed": seed}
    return {
        "schema": 1,
        "model": {"name": "rendered"},
        "method": {"name": label, "implementation": "native", "params": {}},
        "schedule": {"steps": 4},
        "request": {**request, "image_sha256": None, "meta": meta or {}},
    }


def write(store: Store, about: dict, frames: np.ndarray, fps: int = 8) -> Sample:
    latents = {"latents": np.zeros((1, 1, 1, 1), np.float32)}
    result = {"active_fraction": 1.0, "trace": {}}
    return store.write_sample(about, frames, latents, fps, result, {})


def cell(about: dict, reference_key: str | None = None) -> Cell:
    key, asked = content_key(about), about["request"]
    request = Request(
        task="t2v",
        prompt=asked["prompt"],
        negative_prompt="",
        seed=asked["seed"],
        steps=4,
        guidance_scale=1.0,
        height=48,
        width=48,
        num_frames=6,
        max_sequence_length=16,
    )
    label = about["method"]["name"]
    return Cell(key, label, about, Config(), FlowMatching(), request, reference_key or key)


def suite_meta(prompt: str, *dimensions: str, **more: object) -> dict:
    """What a prompt of the text-to-video suite carries."""
    about = {"suite": "t2v", "suite_sha256": "0", "rewritten_sha256": None, "prompt": prompt}
    return {"vbench": {**about, "dimensions": list(dimensions), "auxiliary_info": {}, **more}}


def claim_everything(folder: Path, mode: str = "full") -> dict[str, str]:
    """A folder that looks like a complete environment with all weights, for what only reads it."""
    environment, weights = folder / "environment", folder / "weights"
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (environment / STAMP).write_text(json.dumps({"mode": mode}))
    info = environment / "lib" / "python3" / "site-packages" / "detectron2-0.6.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: detectron2\nVersion: 0.6\n")
    for file in FILES.values():
        path = weights / file.path.replace("*", "0")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not the weights")
        state = path.stat()
        note = {"file": [state.st_size, state.st_mtime_ns], "sha256": file.sha256.ljust(64, "0")}
        path.with_name(f".{path.name}.sha256.json").write_text(json.dumps(note))
    return {"python": str(python), "weights": str(weights)}
