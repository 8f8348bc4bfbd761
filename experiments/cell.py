"""A cell: one video to make, and the key that says whether it was made before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from baselines.base import Method, Request
from experiments.config import Config, ModelConfig
from experiments.prompts import Prompt

SCHEMA = 1
NOISE = "torch cpu generator per sample"


@dataclass(frozen=True)
class Cell:
    """One video of an experiment.

    Attributes:
        inputs: everything that decides the video or that scoring reads of the prompt, as JSON;
            the store's record begins with it, and `key` is its hash.
        label: what tables call the setting. Not part of the key.
        config: of the setting.
        reference_key: the cell that fidelity is measured against; the reference's own key is its.
    """

    key: str
    label: str
    inputs: Mapping[str, Any]
    config: Config
    method: Method
    request: Request
    reference_key: str

    @property
    def task(self) -> str:
        return self.request.task

    @property
    def setting(self) -> tuple[str, str]:
        """What tables have one row of."""
        return self.task, self.label


def cell_inputs(
    model: ModelConfig,
    identity: Mapping[str, Any],
    name: str,
    method: Method,
    request: Request,
    prompt: Prompt,
) -> dict[str, Any]:
    """The JSON whose hash is the key.

    A method that sets the number of steps says so under `schedule` alone: flow matching with
    `steps=40` is flow matching on a schedule of 40.
    """
    params = {key: value for key, value in asdict(method).items() if key != "steps"}
    asked = {key: value for key, value in vars(request).items() if key not in ("steps", "image")}
    return _plain(
        {
            "schema": SCHEMA,
            "model": {"name": model.name, "dtype": model.dtype, "identity": identity},
            "method": {
                "name": name,
                "version": method.version,
                "implementation": method.implementation,
                "params": params,
            },
            "schedule": {"steps": request.steps},
            "request": {
                **asked,
                "image_sha256": prompt.image_sha256 if request.image else None,
                "prompt_id": prompt.id,
                "meta": prompt.meta,
            },
            "noise": NOISE,
        }
    )


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, whole floats as integers.

    Raises:
        ValueError: NaN or infinity.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_key(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
