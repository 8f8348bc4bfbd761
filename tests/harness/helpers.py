"""Runs hsa-bench in this process on the tiny model of `tests/harness/conf`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from experiments import cli
from experiments.config import load_experiment
from experiments.plan import Plan, plan
from experiments.store import Store

CONF = Path(__file__).parent / "conf"
TINY = "experiment=tiny"


def hsa_bench(command: str, results: Path, *overrides: str) -> int:
    """Exit code of a command whose results go to a folder."""
    flags = [flag for flag in overrides if flag.startswith("-")]
    values = [value for value in overrides if not value.startswith("-")]
    where = ["--config-dir", str(CONF), f"results_dir={results}"]
    return cli.main([command, *flags, *where, *values])


def tiny_plan(*overrides: str, multirun: bool = False) -> Plan:
    return plan(load_experiment([TINY, *overrides], multirun, str(CONF)))


def hashes(store: Store) -> dict[str, str]:
    """key -> sha256 of the frames, of everything stored."""
    return {sample.key: sample.record["result"]["frames_sha256"] for sample in store.samples()}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change."""
    found = (path for path in folder.rglob("*") if path.is_file())
    stats = ((path, path.stat()) for path in found)
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats}


def write(store: Store, number: int, frames: int = 3) -> str:
    """Store a small video that depends on a number alone; its key."""
    noise = np.random.default_rng(number)
    video = noise.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    latents = noise.normal(size=(4, frames, 2, 2)).astype(np.float32)
    inputs = {"number": number}
    return store.write_sample(inputs, video, {"latents": latents}, 8, {}, {"pid": os.getpid()}).key
