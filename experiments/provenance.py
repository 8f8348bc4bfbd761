"""Where a result comes from: code, versions, machine, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("hsa", "baselines", "conf", "experiments", "analysis")
DEPENDENCIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "av")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """What a runtime is measured on. Runtimes of two names do not compare."""

    device: str
    threads: int
    torch: str

    @property
    def name(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.device}, {threads}, torch {self.torch}"


def machine() -> Machine:
    """The accelerator that torch uses, else the processor, with torch's threads."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return Machine(device, torch.get_num_threads(), torch.__version__)


def processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions() -> dict[str, str]:
    """Of Python and of everything installed that can change a video."""
    found = {"python": platform.python_version(), "hsa-bench": metadata.version("hsa-bench")}
    return found | {name: metadata.version(name) for name in DEPENDENCIES}


@dataclass(frozen=True)
class Code:
    """The commit that the packages are checked out at, and what was changed since.

    Both are None for an installed wheel, whose version then says what it is.
    """

    commit: str | None
    patch: str | None


@cache
def code() -> Code:
    if not (ROOT / ".git").exists():
        return Code(None, None)
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return Code(None, None)
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", *PACKAGES) or ""
    notes = "".join(f"# untracked: {name}\n" for name in untracked.splitlines())
    return Code(commit.strip(), notes + (_git("diff", "HEAD", "--", *PACKAGES) or ""))


def command() -> str:
    """The command line, with Python's flags left out."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def load() -> float | None:
    """Processes that wanted the CPU in the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout


def environment() -> dict[str, Any]:
    """What all samples of one process share."""
    here = machine()
    return {
        "command": command(),
        "commit": code().commit,
        "versions": versions(),
        "machine": here.name,
        "host": platform.node(),
    }
