"""The models of an experiment: what the harness needs to know of one, and checkpoints of the hub.

Importing it costs no torch, so that planning stays fast.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Model:
    """A loaded model: one diffusers pipeline per task, sharing their components.

    Built by the `load` target of a `conf/model` yaml. Everything that decides a video and is
    known without loading (weights identity, sizes, guidance, what methods have to know of it)
    stands in that yaml instead.
    """

    name: str
    pipelines: Mapping[str, Any]  # task ("t2v", "i2v") -> diffusers pipeline

    def pipeline(self, task: str) -> Any:
        """The pipeline of a task; ValueError names the tasks the model has."""
        if task not in self.pipelines:
            raise ValueError(f"model {self.name} has no task {task!r}: {', '.join(self.pipelines)}")
        return self.pipelines[task]


def identity(repo: str, revision: str, path: str | None = None, **settings: Any) -> dict[str, Any]:
    """What decides a checkpoint's videos beside the request, without loading or having it.

    Args:
        path: a pipeline folder in the place of the pinned snapshot; known by its content.
        settings: those of `load` that change its videos.
    """
    if path is None:
        return {"repo": repo, "revision": revision, **settings}
    return {"sha256": fingerprint(_given(path)), **settings}


def locate(repo: str, revision: str, size: str, path: str | None = None) -> Path:
    """The pipeline folder of a checkpoint of the Hugging Face hub; nothing is downloaded.

    Args:
        size: of the download, as people read it.
        path: a folder in the place of the pinned snapshot in the Hugging Face cache.

    Raises:
        ValueError: it is not there, or not all of it; the line says how to get it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if path is not None:
        return _given(path)
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        lack = "snapshot"
    else:
        lack = _lack(folder)
        if lack is None:
            return folder
    raise ValueError(
        f"{repo}: no {lack} in the Hugging Face cache; get it ({size}) with `hf download {repo} "
        f"--revision {revision} --include model_index.json --include '*/*'`"
    )


def load(
    name: str,
    folder: Path,
    pipelines: Mapping[str, str],
    dtype: str = "bfloat16",
    float32: Sequence[str] = (),
    flow_shift: float | None = None,
) -> Model:
    """A checkpoint with one pipeline per task, on the accelerator if there is one.

    Args:
        folder: in diffusers' layout.
        pipelines: task -> name of the diffusers class.
        dtype: torch's name of the dtype of all components but those of `float32`.
        flow_shift: of the noise schedule; None for the checkpoint's own.
    """
    import diffusers
    import torch

    (task, class_name), *others = pipelines.items()
    dtypes = dict.fromkeys(float32, torch.float32) | {"default": getattr(torch, dtype)}
    pipe = getattr(diffusers, class_name).from_pretrained(
        folder, dtype=dtypes, local_files_only=True, use_safetensors=True
    )
    if flow_shift is not None:
        kind, config = type(pipe.scheduler), pipe.scheduler.config
        pipe.register_modules(scheduler=kind.from_config(config, flow_shift=flow_shift))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    made = {task: pipe} | {
        task: _sharing(pipe, getattr(diffusers, other)) for task, other in others
    }
    for each in made.values():
        each.set_progress_bar_config(disable=True)
    return Model(name, made)


def fingerprint(folder: Path) -> str:
    """sha256 over every file of a pipeline folder that decides a video."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".json", ".safetensors"}:
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _sharing(pipe: Any, kind: type) -> Any:
    """A pipeline of another class on the same components and settings."""
    have = {**pipe.config, **pipe.components}
    wanted = inspect.signature(kind).parameters
    return kind(**{name: have[name] for name in wanted if name in have})


def _given(path: str) -> Path:
    """The folder that `model.path` names; ValueError says what it lacks."""
    if lack := _lack(Path(path)):
        raise ValueError(f"model.path={path!r}: no {lack} there, so no whole diffusers pipeline")
    return Path(path)


def _lack(folder: Path) -> str | None:
    """The first thing that a whole pipeline folder would hold and this one does not."""
    index = folder / "model_index.json"
    if not index.is_file():
        return index.name
    for name, entry in json.loads(index.read_text()).items():
        if isinstance(entry, list) and entry[0] is not None:
            for path in _needed(folder / name):
                if not path.exists():
                    return str(path.relative_to(folder))
    return None


def _needed(component: Path) -> Iterator[Path]:
    """What a component's folder holds when it is whole, as far as its own files tell."""
    yield component
    shards = list(component.glob("*.safetensors.index.json"))
    for index in shards:
        files = json.loads(index.read_text())["weight_map"].values()
        yield from (component / file for file in sorted(set(files)))
    if (component / "config.json").is_file() and not shards:  # a model, in one file
        yield from list(component.glob("*.safetensors")) or [component / "*.safetensors"]
