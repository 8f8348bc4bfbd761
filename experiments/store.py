"""The results: a folder of immutable, content-addressed records. See `Store`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One stored video."""

    path: Path
    record: dict[str, Any]

    @property
    def key(self) -> str:
        return self.record["key"]

    def frames(self) -> np.ndarray:
        """uint8 [F, H, W, 3]; raises StoreError where they are not what the record says."""
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """latents fp32 [C, F, H, W]; where recorded allocation int8, velocity_change fp32 [F, H, W]."""
        raise NotImplementedError

    def latents(self) -> np.ndarray:
        return self.arrays()["latents"]


@dataclass(frozen=True)
class Problem:
    """Something `verify` found wrong."""

    path: Path
    message: str


class Store:
    """Samples, timings, scores and failures under one folder."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def has(self, key: str) -> bool:
        raise NotImplementedError

    def sample(self, key: str) -> Sample:
        raise NotImplementedError

    def samples(self, keys: Iterable[str] | None = None) -> Iterator[Sample]:
        """The stored ones among `keys`, or all."""
        raise NotImplementedError

    def write_sample(
        self,
        inputs: Mapping[str, Any],
        frames: np.ndarray,
        arrays: Mapping[str, np.ndarray],
        fps: int,
        result: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> Sample:
        raise NotImplementedError

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
        raise NotImplementedError

    def scores(self, sample_key: str) -> list[dict[str, Any]]:
        """Scores of the frames stored now: metric, version, params, reference_key, values, error."""
        raise NotImplementedError

    def timings(self, key: str) -> list[dict[str, Any]]:
        """Timings of one sample on all machines: machine, text_s, denoise_s, ..."""
        raise NotImplementedError

    def verify(self) -> list[Problem]:
        raise NotImplementedError
