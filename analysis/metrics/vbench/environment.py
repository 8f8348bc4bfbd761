"""The scorer environment: a Python of its own, since vbench and diffusers exclude each other.

vbench 0.1.5 pins transformers 4.33.2, whose huggingface-hub is older than any that diffusers 0.42
accepts. So vbench runs in `.venv-vbench`, made by `hsa-bench setup vbench`, and is spoken to in
JSON. What is installed there is read from its metadata; no process is started to find out.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from analysis.metrics.vbench import weights
from analysis.metrics.vbench.dimensions import CHECKOUT, DIMENSIONS, GRIT, SMALL

DEFAULT_PYTHON = ".venv-vbench/bin/python"
WORKER = Path(__file__).with_name("worker.py")
SETUP = "`hsa-bench setup vbench`"
STAMP = "hsa-bench.json"  # in the environment's folder, written when it is complete
VERSIONS = (  # of what can change a number
    "vbench",
    "torch",
    "torchvision",
    "numpy",
    "opencv-python",
    "opencv-python-headless",
    "decord",
    "pillow",
    "imageio-ffmpeg",
    "openai-clip",
    "pyiqa",
    "timm",
    "transformers",
    "detectron2",
    "dreamsim",
)


class ScorerError(Exception):
    """The worker could not score a chunk; `code` is one of its words."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True)
class Environment:
    """Where VBench runs and where its weights lie.

    Attributes:
        python: interpreter of the scorer environment.
        weights: folder of `weights.FILES`.
        checkout: of VBench's repository, used instead of the wheel; camera_motion needs it.
    """

    python: Path
    weights: Path
    checkout: Path | None = None

    @property
    def folder(self) -> Path:
        return self.python.parent.parent

    @cached_property
    def mode(self) -> str | None:
        """small or full; None where there is no complete environment with its interpreter."""
        if not self.python.is_file():
            return None
        try:
            return json.loads((self.folder / STAMP).read_bytes())["mode"]
        except (OSError, ValueError, KeyError):
            return None

    @property
    def ffmpeg(self) -> str | None:
        """The one that imageio-ffmpeg bundles."""
        found = self.folder.glob("lib/python*/site-packages/imageio_ffmpeg/binaries/ffmpeg-*")
        return next(map(str, sorted(found)), None)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of the installed packages that can change a number."""
        site = [str(path) for path in self.folder.glob("lib/python*/site-packages")]
        installed = {each.name.lower(): each.version for each in metadata.distributions(path=site)}
        found = {name: installed[name] for name in VERSIONS if name in installed}
        if self.checkout:
            found["checkout"] = str(_commit(self.checkout))
        return found

    def lacks(self, dimension: str) -> list[str]:
        """What the dimension needs here next, one line each; empty if it is ready."""
        files = DIMENSIONS[dimension].weights
        return self.uninstalled(dimension) or weights.lacks(files, self.weights)

    def account(self, dimension: str) -> str | None:
        """All that it needs in one line, files by their paths only; None if it is ready."""
        files = weights.missing(DIMENSIONS[dimension].weights, self.weights)
        named = [f"weights {', '.join(files)}"] if files else []
        return "; ".join(self.uninstalled(dimension) + named) or None

    def uninstalled(self, dimension: str) -> list[str]:
        """What must be installed before its weights are of use: at most one line."""
        needs = DIMENSIONS[dimension].needs
        if self.mode is None:
            return [f"no scorer environment with {self.python}: {SETUP}"]
        if needs != SMALL and self.mode == SMALL:
            return [f"{self.folder} is the small environment, without models: {SETUP}"]
        if needs == GRIT and "detectron2" not in self.versions:
            return [f"detectron2: {SETUP[:-1]} grit`"]
        if needs == CHECKOUT and not self.checkout:
            return ["metric.vbench.checkout of github.com/Vchitect/VBench, for CoTracker's code"]
        return []

    def identity(self, dimension: str) -> dict[str, Any]:
        """Versions and weights that the dimension's numbers come from."""
        about = DIMENSIONS[dimension]
        versions = dict(self.versions)
        if about.needs != GRIT:
            versions.pop("detectron2", None)  # compiled later, it leaves other dimensions alone
        return {"versions": versions, "weights": weights.digests(about.weights, self.weights)}

    def score(
        self,
        dimension: str,
        items: Sequence[Mapping[str, Any]],
        device: str = "cpu",
        offline: bool = True,
    ) -> dict[str, Any]:
        """One chunk in one process; request and reply are described in `worker`.

        Raises:
            ScorerError: the chunk could not be scored. The exit code alone is never believed.
        """
        request = {
            "dimension": dimension,
            "device": device,
            "cache_dir": str(self.weights.absolute()),
            "offline": offline,
            "items": list(items),
        }
        self.weights.mkdir(parents=True, exist_ok=True)
        try:
            process = subprocess.run(
                [str(self.python.absolute()), "-s", str(WORKER)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                env=_clean_environment(self.checkout),
            )
        except OSError as error:
            raise ScorerError("not_installed", f"{self.python}: {error.strerror}") from error
        try:
            reply = json.loads(process.stdout)
        except ValueError:
            last = process.stderr.strip().splitlines()[-1:] or ["no output"]
            message = f"the worker ended with {process.returncode}: {last[0]}"
            raise ScorerError("crashed", message) from None
        if not reply["ok"]:
            raise ScorerError(reply["code"], " ".join(reply["message"].split()))
        return reply


def _clean_environment(checkout: Path | None) -> dict[str, str]:
    """Ours without what would let this environment's packages into the other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | ({"PYTHONPATH": str(checkout.absolute())} if checkout else {})


def _commit(checkout: Path) -> str | None:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or None
