"""The results: a folder of immutable, content-addressed records, without server or locks.

    samples/<kk>/<key>/     record.json, frames.mkv, preview.mp4, arrays.safetensors
    timings/<machine>/<key>/<id>.json
    scores/<kk>/<key>/<score key>.json
    failures/<kk>/<key>/<id>.json
    patches/<sha256>.diff   uncommitted changes that samples were made with
    quarantine/<id>/        samples that are not what their record says
    .tmp/<host>-<pid>-<id>  being written

Everything is written beside its place, synced, and renamed into it: a record is there whole or
not at all, whoever is killed, and any number of writers may work on the same cells. Two stores
merge with rsync.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments import video
from experiments.cell import canonical_json, content_key

FRAMES, PREVIEW, ARRAYS, RECORD = "frames.mkv", "preview.mp4", "arrays.safetensors", "record.json"
OUTCOME = ("key", "files", "result", "provenance", "digest")  # of a record; the rest is its key's


class StoreError(Exception):
    """The store cannot be read or written as it should; what is in it stays as it was."""


@dataclass(frozen=True)
class Sample:
    """One stored video."""

    path: Path
    record: dict[str, Any]

    @property
    def key(self) -> str:
        return self.record["key"]

    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3].

        Raises:
            StoreError: they are not the frames that the record was written with.
        """
        try:
            frames = video.decode(self.path / FRAMES)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path / FRAMES}: cannot be decoded ({error})") from error
        if video.frames_sha256(frames) != self.record["result"]["frames_sha256"]:
            raise StoreError(f"{self.path / FRAMES}: altered, see `hsa-bench verify`")
        return frames

    def latents(self) -> np.ndarray:
        """fp32 [C, F, H, W] after the last step, before decoding."""
        return self.arrays["latents"]

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """latents, and what the method recorded, as HSA its allocation: int8 [F, H, W]."""
        from safetensors.numpy import load_file

        return load_file(self.path / ARRAYS)


@dataclass(frozen=True)
class Problem:
    """Something in the store that is not as it was written."""

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class Store:
    """Samples, timings, scores and failures under one folder, made when first written to."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._hashes: dict[str, str] = {}  # sample key -> frames_sha256

    # Samples

    def sample_dir(self, key: str) -> Path:
        return self.root / "samples" / key[:2] / key

    def has(self, key: str) -> bool:
        return (self.sample_dir(key) / RECORD).is_file()

    def sample(self, key: str) -> Sample:
        """Raises StoreError where there is none, or its record is not readable."""
        folder = self.sample_dir(key)
        record = _read_json(folder / RECORD)
        if record is None or record.get("key") != key:
            raise StoreError(f"{folder / RECORD}: missing or damaged, see `hsa-bench verify`")
        return Sample(folder, record)

    def samples(self, keys: Iterable[str] | None = None) -> Iterator[Sample]:
        """The stored ones among `keys`, or all, ordered by key."""
        if keys is None:
            keys = sorted(path.parent.name for path in self.root.glob(f"samples/*/*/{RECORD}"))
        for key in keys:
            if self.has(key):
                yield self.sample(key)

    def write_sample(
        self,
        inputs: Mapping[str, Any],
        frames: np.ndarray,
        arrays: Mapping[str, np.ndarray],
        fps: int,
        result: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Sample:
        """Store a finished video; where another writer was first, that one stays.

        Args:
            inputs: of the cell; their hash is the key.
            frames: uint8 [F, H, W, 3].
            arrays: latents and what else the method recorded.
            result: what the run measured, JSON.
        """
        from safetensors.numpy import save

        files = {
            FRAMES: video.encode_lossless(frames, fps),
            PREVIEW: video.encode_preview(frames, fps),
            ARRAYS: save(dict(arrays)),
        }
        record = {
            **inputs,
            "key": content_key(inputs),
            "result": {
                "frames_sha256": video.frames_sha256(frames),
                "shape": list(frames.shape),
                "fps": fps,
                **result,
            },
            "provenance": provenance,
        }
        with self._staging() as folder:
            for name, data in files.items():
                _write(folder / name, data)
            record["files"] = {name: _state(folder / name, files[name]) for name in files}
            _write(folder / RECORD, _sealed(record))
            self._publish(folder, self.sample_dir(record["key"]))
        return self.sample(record["key"])

    def damage(self, key: str, deep: bool = False) -> str | None:
        """What is wrong with a stored sample, None if nothing is.

        Files whose size and time are those of the record are believed, others are hashed;
        `deep` hashes all and decodes the frames.
        """
        folder = self.sample_dir(key)
        record = _read_json(folder / RECORD)
        if record is None:
            return "record.json is not readable"
        if not _is_sealed(record):
            return "record.json was altered"
        if content_key({k: v for k, v in record.items() if k not in OUTCOME}) != key:
            return "the record belongs to another key"
        for name, state in record["files"].items():
            if problem := _file_damage(folder / name, state, deep):
                return problem
        if deep:
            try:
                Sample(folder, record).frames()
            except StoreError as error:
                return str(error)
        return None

    def verify(self) -> Iterator[Problem]:
        """Read everything, yield what is not as it was written."""
        for folder in sorted(self.root.glob("samples/*/*")):
            if message := self.damage(folder.name, deep=True):
                yield Problem(folder, message)
        for kind in ("timings", "scores", "failures"):
            for path in sorted(self.root.glob(f"{kind}/*/*/*.json")):
                if not _read_all([path]):
                    yield Problem(path, "altered or truncated")

    def quarantine(self, path: Path) -> Path:
        """Move a sample's folder or a file out of the way, so that the next run makes it again."""
        target = self.root / "quarantine" / f"{path.name}-{uuid.uuid4().hex[:8]}"
        with self._writing():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
        self._hashes.pop(path.name, None)
        return target

    def require_writable(self) -> None:
        """Raise StoreError if nothing can be written here."""
        with self._staging():
            pass

    def clean(self) -> None:
        """Remove what killed writers of this machine left half written."""
        for path in self.root.glob(".tmp/*-*-*"):
            host, pid, _ = path.name.rsplit("-", 2)
            if host == socket.gethostname() and not _is_alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)

    # Timings, scores, failures

    def write_timing(self, key: str, machine: str, timing: Mapping[str, Any]) -> None:
        """Add what one more run of a stored sample took on a machine."""
        folder = re.sub(r"[^\w.]+", "-", machine).strip("-")
        self._append(f"timings/{folder}/{key}", {"key": key, "machine": machine, **timing})

    def timings(self, key: str, machine: str | None = None) -> list[dict[str, Any]]:
        """Timings of one sample, on one machine or all: machine, pass, denoise_s, text_s, ..."""
        found = _read_all(sorted(self.root.glob(f"timings/*/{key}/*.json")))
        return [timing for timing in found if machine in (None, timing["machine"])]

    def write_failure(self, key: str, failure: Mapping[str, Any]) -> None:
        self._append(f"failures/{key[:2]}/{key}", {"key": key, **failure})

    def failures(self, key: str) -> list[dict[str, Any]]:
        return _read_all(sorted(self.root.glob(f"failures/{key[:2]}/{key}/*.json")))

    def write_score(
        self,
        sample_key: str,
        metric: str,
        version: int,
        params: Mapping[str, Any],
        reference_key: str | None,
        values: Mapping[str, float] | None,
        error: str | None = None,
    ) -> None:
        """Store what a metric says of a sample, or why it says nothing (`values` None)."""
        identity = {
            "sample_key": sample_key,
            "metric": metric,
            "version": version,
            "params": dict(params),
            "reference_key": reference_key,
            "frames_sha256": self._frames_sha256(sample_key),
            "reference_sha256": self._frames_sha256(reference_key),
        }
        folder = self.root / "scores" / sample_key[:2] / sample_key
        score = {**identity, "values": values, "error": error}
        self._replace(folder / f"{content_key(identity)}.json", _sealed(score))

    def scores(self, sample_key: str) -> list[dict[str, Any]]:
        """Scores of the frames that are stored now: metric, version, params, values, error..."""
        paths = sorted((self.root / "scores" / sample_key[:2] / sample_key).glob("*.json"))
        return [
            score
            for score in _read_all(paths)
            if score["frames_sha256"] == self._frames_sha256(sample_key)
            and score["reference_sha256"] == self._frames_sha256(score["reference_key"])
        ]

    def write_patch(self, text: str) -> str:
        """Store a diff once; its sha256 stands for it in the records."""
        data = text.encode()
        digest = hashlib.sha256(data).hexdigest()
        path = self.root / "patches" / f"{digest}.diff"
        if not path.is_file():
            self._replace(path, data)
        return digest

    # Writing

    def _append(self, folder: str, content: Mapping[str, Any]) -> None:
        self._replace(self.root / folder / f"{uuid.uuid4().hex}.json", _sealed(content))

    def _replace(self, path: Path, data: bytes) -> None:
        with self._staging() as folder:
            _write(folder / path.name, data)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / path.name, path)
            _sync(path.parent)

    def _publish(self, staged: Path, target: Path) -> None:
        """Rename a complete folder into its place, unless a sound one is there already."""
        target.parent.mkdir(parents=True, exist_ok=True)
        _sync(staged)
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.damage(target.name):
                self.quarantine(target)
                os.rename(staged, target)
        _sync(target.parent)

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder to write in; whatever is left in it afterwards is dropped.

        Raises:
            StoreError: instead of any OSError inside.
        """
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        folder = self.root / ".tmp" / name
        with self._writing():
            try:
                folder.mkdir(parents=True)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise StoreError(
                f"store={self.root}: cannot write ({reason}); everything stored so far is intact"
            ) from error

    def _frames_sha256(self, key: str | None) -> str | None:
        if key is None or not self.has(key):
            return None
        if key not in self._hashes:
            self._hashes[key] = self.sample(key).record["result"]["frames_sha256"]
        return self._hashes[key]


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON that carries its own hash, so that `_is_sealed` can tell it was altered."""
    return canonical_json({**content, "digest": content_key(content)}).encode()


def _is_sealed(content: Mapping[str, Any]) -> bool:
    body = {key: value for key, value in content.items() if key != "digest"}
    return content_key(body) == content.get("digest")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _read_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The sound ones; `verify` tells of the others."""
    contents = (_read_json(path) for path in paths)
    return [content for content in contents if content is not None and _is_sealed(content)]


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(path: Path, data: bytes) -> dict[str, Any]:
    """What `_file_damage` compares a file with."""
    digest = hashlib.sha256(data).hexdigest()
    return {"bytes": len(data), "sha256": digest, "mtime_ns": path.stat().st_mtime_ns}


def _file_damage(path: Path, state: Mapping[str, Any], deep: bool) -> str | None:
    try:
        found = path.stat()
        if found.st_size != state["bytes"]:
            return f"{path.name} has {found.st_size} bytes instead of {state['bytes']}"
        if deep or found.st_mtime_ns != state["mtime_ns"]:
            if hashlib.sha256(path.read_bytes()).hexdigest() != state["sha256"]:
                return f"{path.name} was altered"
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
