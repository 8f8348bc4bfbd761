"""VBench as metrics of this harness: one for each dimension, scored in chunks by the worker."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from analysis.metrics.base import BatchMetric, Metric, StoredSample
from analysis.metrics.vbench.dimensions import DIMENSIONS
from analysis.metrics.vbench.environment import (
    DEFAULT_PYTHON,
    Environment,
    ScorerError,
)
from analysis.metrics.vbench.presets import Preset, choose
from analysis.metrics.vbench.weights import DEFAULT_FOLDER

FRAMES = "frames.mkv"
LOSSLESS = "lossless"
ENCODERS = {  # what VBench reads
    LOSSLESS: "",
    "export_to_video": "-vcodec libx264 -pix_fmt yuv420p -crf 25",  # diffusers, MLPerf
    "crf10": "-vcodec libx264 -pix_fmt yuv420p -crf 10",  # VBench-I2V's README
}
MACRO_BLOCK = 16  # sides that are no multiple are scaled up, as imageio does
FLAVOUR = "standard"  # not VBench-Long, whatever a video's length
STATIC_FILTER = False  # of temporal flickering's videos


@dataclass(frozen=True)
class VBench(Metric):
    """The real vbench package, in an environment of its own; see docs/vbench.md.

    Attributes:
        preset: of `presets.PRESETS`, the same as the prompts'; `custom` scores any videos.
        python: interpreter of the scorer environment.
        weights: folder of the models' files.
        checkout: of VBench's repository, used instead of the package; null for the package.
        encoder: of `ENCODERS`. Lossy ones move scores: temporal flickering by a point and more.
        images: VBench-I2V's `crop` folder, which its dimensions compare with.
        device: cpu or cuda, part of a score's identity.
        offline: refuse the network while scoring.
        chunk: videos scored by one process; a crash costs one chunk.
        allow_partial: show scores that lack videos, and say so.
    """

    preset: str = "custom"
    python: str = DEFAULT_PYTHON
    weights: str = DEFAULT_FOLDER
    checkout: str | None = None
    encoder: str = LOSSLESS
    images: str | None = None
    device: str = "cpu"
    offline: bool = True
    chunk: int = 256
    allow_partial: bool = False

    name: ClassVar[str] = "vbench"
    title: ClassVar[str] = "VBench"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        choose(self.preset)
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder={self.encoder!r}: choose {', '.join(ENCODERS)}")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: choose a number from 1")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: choose cpu, cuda")

    @property
    def about(self) -> Preset:
        return choose(self.preset)

    @property
    def encoding(self) -> str:
        """What VBench reads, in words."""
        arguments = ENCODERS[self.encoder]
        return f"ffmpeg {arguments}" if arguments else "stored frames, ffv1 bgr0 in Matroska"

    @cached_property
    def environment(self) -> Environment:
        checkout = Path(self.checkout).expanduser() if self.checkout else None
        return Environment(Path(self.python), Path(self.weights).expanduser(), checkout)

    @property
    def account(self) -> str:
        """What keeps dimensions of the preset from being scored, each thing once."""
        lacks = {name: self.environment.lacks(name) for name in self.about.dimensions}
        without = ", ".join(name for name, things in lacks.items() if things)
        things = dict.fromkeys(chain.from_iterable(lacks.values()))
        return "\n  ".join([f"VBench: {without} left out", *things])

    def parts(self) -> Sequence[VBenchDimension]:
        return tuple(VBenchDimension(name, self) for name in self.about.dimensions)

    def unavailable(self) -> str | None:
        """None if one dimension or more can be scored."""
        reasons = [part.unavailable() for part in self.parts()]
        return None if None in reasons else reasons[0]

    def __call__(self, sample: StoredSample, reference: object = None) -> dict[str, float]:
        """Every available dimension of one video; many are scored by `parts`."""
        usable = (part for part in self.parts() if part.unavailable() is None)
        return {name: value for part in usable for name, value in part(sample).items()}


@dataclass(frozen=True)
class VBenchDimension(BatchMetric):
    """One dimension. `weight`, where it is not 1, is a video's share in upstream's aggregate."""

    dimension: str
    settings: VBench

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"vbench_{self.dimension}"

    @property
    def title(self) -> str:
        return f"VBench {self.dimension.replace('_', ' ')}"

    @property
    def chunk(self) -> int:
        return self.settings.chunk

    def unavailable(self) -> str | None:
        lacks = self.settings.environment.lacks(self.dimension)
        return self.settings.account if lacks else None

    def parameters(self) -> dict[str, Any]:
        """The scorer's identity: another version, file or device gives another score."""
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {
            "dimension": self.dimension,
            "device": self.settings.device,
            "encoder": self.settings.encoding,
            "flavour": FLAVOUR,
            **self.settings.environment.identity(self.dimension),
        }

    def applies(self, record: Mapping[str, Any]) -> bool:
        """Prompts of a suite say which dimensions they are for; others allow the custom ones."""
        suite = self.settings.about.suite
        about = suite_entry(record)
        if suite is None:
            return DIMENSIONS[self.dimension].custom
        return bool(about) and about["suite"] == suite and self.dimension in about["dimensions"]

    def batch(self, samples: Sequence[StoredSample]) -> list[dict[str, float] | str]:
        items, failed = [], {}
        with tempfile.TemporaryDirectory() as folder:
            for i, sample in enumerate(samples):
                try:
                    items.append(stage(sample, i, Path(folder), self.settings))
                except ValueError as error:
                    failed[str(i)] = str(error)
            try:
                reply = self.settings.environment.score(
                    self.dimension, items, self.settings.device, self.settings.offline
                )
                rows = {row["id"]: row for row in reply["rows"]}
                failed |= reply["failed"]
            except ScorerError as error:
                rows = {}
                failed = {item["id"]: str(error) for item in items} | failed
        return [
            failed[i] if i in failed else self._values(rows[i])
            for i in map(str, range(len(samples)))
        ]

    def _values(self, row: Mapping[str, Any]) -> dict[str, float]:
        value = {} if row["value"] is None else {self.name: row["value"]}
        return value if row["weight"] == 1 else value | {"weight": row["weight"]}


def suite_entry(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a video's prompt says of VBench; None for prompts of no suite."""
    return (record["request"].get("meta") or {}).get("vbench")


def stage(sample: StoredSample, i: int, folder: Path, settings: VBench) -> dict[str, Any]:
    """What the worker needs of one video, which lies under the name that VBench expects.

    The lossless frames are linked: both of VBench's decoders read ffv1. Every video gets a folder
    of its own, so that prompts that differ in case only don't meet, and is called .mp4.

    Raises:
        ValueError: the image that an image-to-video dimension compares with is not the one that
            the video was made from, or the video cannot be encoded.
    """
    record = sample.record
    about = suite_entry(record) or {}
    target = folder / str(i) / (f"{about['prompt']}-0.mp4" if about else "video.mp4")
    target.parent.mkdir()
    source = (sample.path / FRAMES).absolute()
    if settings.encoder == LOSSLESS:
        target.symlink_to(source)
    else:
        _encode(source, target, record["result"]["shape"], settings)
    item = {
        "id": str(i),
        "video": str(target),
        "frames": record["result"]["shape"][0],
        "prompt": about.get("prompt", record["request"]["prompt"]),
        "auxiliary_info": about.get("auxiliary_info"),
    }
    if about.get("suite") == "i2v":
        image = _first_frame(record, about, settings.images, target.with_name("image.png"))
        item["image"] = str(image)
    return item


def _encode(source: Path, target: Path, shape: Sequence[int], settings: VBench) -> None:
    """One thread, since the pixels of libx264 depend on their number."""
    program = settings.environment.ffmpeg
    if program is None:
        raise ValueError(f"encoder={settings.encoder}: no ffmpeg in the scorer environment")
    height, width = (-(-side // MACRO_BLOCK) * MACRO_BLOCK for side in shape[1:3])
    filters = f"format=rgb24,scale={width}:{height}"
    arguments = ["-i", str(source), "-vf", filters, *ENCODERS[settings.encoder].split()]
    command = [program, "-v", "error", *arguments, "-threads", "1", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"ffmpeg: {' '.join(done.stderr.split())}")


def _first_frame(
    record: Mapping[str, Any], about: Mapping[str, Any], images: str | None, target: Path
) -> Path:
    """The picture in RGB, which upstream expects without asking."""
    from baselines.base import rgb
    from experiments.prompts import Prompt

    if images is None:
        raise ValueError("metric.vbench.images: missing, the folder that prompts.images names")
    path = Path(images).expanduser() / about["ratio"] / about["image"]
    if not path.is_file():
        raise ValueError(f"no image {path}; metric.vbench.images is what prompts.images was")
    picture = rgb(path)
    if Prompt("", "", picture).image_sha256 != record["request"]["image_sha256"]:
        raise ValueError(f"{path}: not the image that the video was made from")
    picture.save(target)
    return target
