"""Prompts: what to make a video of. Importable without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baselines.base import rgb

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One prompt. `id` is unique within its set and never becomes a file name.

    `image` is the first frame for image-to-video, or its file; `meta` is JSON: what a metric may
    check the video against (the embedded model's captions say colour, shape, direction, ...).
    """

    id: str
    text: str
    image: Image | Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def image_sha256(self) -> str | None:
        """Hash of the RGB pixels and their size: the same picture is the same request."""
        if self.image is None:
            return None
        if isinstance(self.image, Path):
            written = self.image.stat().st_mtime_ns
            return _file_sha256(self.image, written)
        return _sha256(self.image)


def from_texts(texts: Sequence[str]) -> list[Prompt]:
    """Prompts written in the configuration, `prompts=texts 'prompts.texts=[a cat, a dog]'`.

    Raises:
        ValueError: one of them is no text.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"prompt {text!r}: not a text")
    return [Prompt(id=f"{index:04d}", text=text) for index, text in enumerate(texts)]


def from_file(path: str) -> list[Prompt]:
    """Prompts of a file: one a line, or with suffix .jsonl one object a line.

    Objects have `text` and optionally `id`, `image` (a path relative to the file) and `meta`.

    Raises:
        ValueError: the file is missing, or a line is not what it should be.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"prompts.path={path}: no such file")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix != ".jsonl":
        return from_texts(lines)
    return [_from_json(line, index, file) for index, line in enumerate(lines)]


def for_model(
    model: str,
    own: Mapping[str, Callable[[], list[Prompt]]],
    suite: Callable[[], list[Prompt]],
    size: int,
    count: int | None = None,
) -> list[Prompt]:
    """A suite's prompts, or those of its own for a model that was not made for the suite.

    Args:
        own: model -> its prompts.
        size: how many the suite has; `plan` counts so many where the suite is not installed.
        count: how many are taken, the first ones; None: all.

    Raises:
        ValueError: the suite is not installed, or has another size.
    """
    if model in own:
        return own[model]()[:count]
    found = suite()
    if len(found) != size:
        raise ValueError(f"size={size}: the suite has {len(found)} prompts, prompts.size says so")
    return found[:count]


def readable(path: Path, where: str) -> Path:
    """The path of a picture, of which no more than the head is read.

    Raises:
        ValueError: there is none; the line begins with `where`.
    """
    from PIL import Image

    try:
        with Image.open(path):
            return path
    except OSError as error:
        raise ValueError(f"{where}: cannot read the image {path}") from error


def stand_ins(size: int) -> list[Prompt]:
    """As many prompts as a suite that is not installed has: to be counted, not to be made."""
    from PIL import Image

    image = Image.new("RGB", (1, 1))
    return [Prompt(f"stand-in-{i:04d}", "not installed", image) for i in range(size)]


def _from_json(line: str, index: int, file: Path) -> Prompt:
    where = f"{file}: entry {index + 1}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f"{where} is not an object with a `text`")
    if unknown := sorted(entry.keys() - {"id", "text", "image", "meta"}):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}")
    image = readable(file.parent / entry["image"], where) if entry.get("image") else None
    return Prompt(str(entry.get("id", f"{index:04d}")), entry["text"], image, entry.get("meta", {}))


def _sha256(image: Image | Path) -> str:
    picture = rgb(image)
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


@cache
def _file_sha256(path: Path, written: int) -> str:
    """Prompts of a suite share pictures; `written` is when the file was."""
    return _sha256(path)
