"""What this installation is, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from analysis.metrics.vbench.dimensions import DIMENSIONS
from experiments import provenance
from experiments.config import Config, build
from experiments.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One line of `hsa-bench doctor`; `ok` is None for what is merely good to know."""

    name: str
    detail: str
    ok: bool | None = None


def check_packages() -> None:
    """Our package names are common words: refuse to run on somebody else's `conf` or `analysis`.

    Raises:
        UserError: naming the package that shadows or replaced ours.
    """
    for name in provenance.PACKAGES:
        spec = find_spec(name)
        found = Path(spec.origin).parents[1] if spec and spec.origin else None
        if found != provenance.ROOT:
            raise UserError(
                f"package {name!r} is {found and found / name}, not ours in {provenance.ROOT}; "
                "another distribution installs that name: use a virtual environment of its own"
            )


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything a run needs, without loading a model or importing torch."""
    code = provenance.code()
    commit = f"commit {code.commit}" if code.commit else "no git checkout"
    changed = ", with uncommitted changes" if code.patch else ""
    yield Finding("hsa-bench", f"{metadata.version('hsa-bench')}, {commit}{changed}")
    for name, version in provenance.versions().items():
        yield Finding(name, version)
    yield Finding("processor", f"{provenance.processor()}, {os.cpu_count()} cores")
    yield _no_torchvision_mismatch()
    yield _weights(config)
    yield _store(Path(config.store))
    yield from _vbench(config)


def _no_torchvision_mismatch() -> Finding:
    """diffusers imports torchvision where it is installed, and one of another build breaks it."""
    if find_spec("torchvision") is None:
        return Finding("torchvision", "absent, not needed", True)
    torch, vision = metadata.version("torch"), metadata.version("torchvision")
    local = [version.partition("+")[2] for version in (torch, vision)]
    detail = f"{vision} beside torch {torch}"
    if local[0] != local[1]:
        return Finding("torchvision", f"{detail}: different builds, uninstall it", False)
    return Finding("torchvision", detail, True)


def _weights(config: Config) -> Finding:
    name = f"model {config.model.name}"
    try:
        identity = build(config.model.identity, "model.identity")
        if config.model.weights:
            build(config.model.weights, "model.weights")
    except UserError as error:
        return Finding(name, str(error), False)
    return Finding(name, ", ".join(f"{key} {value}" for key, value in identity.items()), True)


def _store(path: Path) -> Finding:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return Finding("store", f"{path}: cannot write in {existing}", False)
    free = shutil.disk_usage(existing).free / 1e9
    return Finding("store", f"{path}, {free:.0f} GB free", free > 1)


def _vbench(config: Config) -> Iterator[Finding]:
    """Each dimension of VBench: ready, or what it still needs."""
    node = config.metric.get("vbench", {"_target_": "analysis.metrics.vbench.VBench"})
    try:
        environment = build(node, "metric.vbench").environment
    except UserError as error:
        yield Finding("vbench", str(error), False)
        return
    for dimension in DIMENSIONS:
        lack = environment.account(dimension)
        yield Finding(f"vbench {dimension}", lack or "ready", None if lack else True)
    yield Finding("vbench weights", f"{environment.weights}, see docs/vbench.md")
