"""VMAF of the raw frames to the reference run, by an ffmpeg that has libvmaf."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from analysis.metrics.base import Metric, Sample, frame_pair
from analysis.metrics.vbench.environment import Environment


@dataclass(frozen=True)
class VMAF(Metric):
    """Mean over frames of vmaf_v0.6.1, frames given to ffmpeg as raw RGB and compared in yuv420p.

    Identical videos get somewhat less than 100; the model was made for larger pictures than a toy
    model's.

    Attributes:
        ffmpeg: null for the first with libvmaf: on the path, or bundled in the scorer environment.
        environment: of VBench's scorer, whose imageio-ffmpeg has one.
        model: a model built into libvmaf.
    """

    ffmpeg: str | None = None
    environment: str = ".venv-vbench"
    model: str = "vmaf_v0.6.1"

    name: ClassVar[str] = "vmaf"
    title: ClassVar[str] = "VMAF"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def unavailable(self) -> str | None:
        if self._program:
            return None
        return (
            f"metric vmaf: no ffmpeg with libvmaf at {self.ffmpeg}"
            if self.ffmpeg
            else "metric vmaf: no ffmpeg with libvmaf on the path; `make vbench` brings one"
        )

    def parameters(self) -> dict[str, Any]:
        return {"model": self.model, "ffmpeg": _version(self._program)}

    def __call__(self, sample: Sample, reference: Sample | None = None) -> dict[str, float]:
        frames, target = frame_pair(sample, reference)
        with tempfile.TemporaryDirectory() as folder:
            given = [Path(folder, name) for name in ("distorted.rgb", "reference.rgb")]
            for path, array in zip(given, (frames, target), strict=True):
                path.write_bytes(np.ascontiguousarray(array).tobytes())
            self._run(given, frames.shape, Path(folder))
            log = json.loads(Path(folder, "vmaf.json").read_text())
        return {self.name: float(log["pooled_metrics"]["vmaf"]["mean"])}

    def _run(self, given: list[Path], shape: tuple[int, ...], folder: Path) -> None:
        _, height, width, _ = shape
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25"]
        inputs = [argument for path in given for argument in (*raw, "-i", str(path))]
        graph = (
            "[0:v]format=yuv420p[d];[1:v]format=yuv420p[r];"
            f"[d][r]libvmaf=model=version={self.model}:log_fmt=json:log_path=vmaf.json:n_threads=1"
        )
        command = [self._program, "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"ffmpeg: {done.stderr.strip().splitlines()[-1:]}")

    @cached_property
    def _program(self) -> str | None:
        return next(filter(_has_vmaf, self._candidates()), None)

    def _candidates(self) -> Iterator[str]:
        if self.ffmpeg:
            yield self.ffmpeg
            return
        if found := shutil.which("ffmpeg"):
            yield found
        scorer = Path(self.environment).absolute()
        if bundled := Environment(scorer / "bin" / "python", scorer).ffmpeg:
            yield bundled


@cache
def _has_vmaf(program: str) -> bool:
    try:
        listed = subprocess.run(
            [program, "-v", "error", "-filters"], capture_output=True, text=True
        )
    except OSError:
        return False
    return any("libvmaf" in line.split() for line in listed.stdout.splitlines())


@cache
def _version(program: str | None) -> str | None:
    """First word of what `ffmpeg -version` says of itself."""
    if program is None:
        return None
    said = subprocess.run([program, "-version"], capture_output=True, text=True).stdout
    return said.split()[2] if said.startswith("ffmpeg version") else None
