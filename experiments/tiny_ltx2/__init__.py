"""A tiny LTX-2 with random weights, so that LTX-2 experiments run offline.

It proves plumbing: what it makes is noise, and says nothing about quality or speed.
"""

from __future__ import annotations

import warnings
from typing import Any

from experiments.models import Model


def identity(version: str) -> dict[str, Any]:
    return {"name": "tiny_ltx2", "version": version, "weights": "random"}


def load(version: str, dtype: str = "float32") -> Model:
    """The model with a pipeline for each task.

    Args:
        version: of LTX-2, which decides the shape of the transformer: 2.0, 2.3 or 2.5.
        dtype: torch's name of the transformer's dtype.
    """
    import torch
    from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline

    from experiments.tiny_ltx2.build import components

    warnings.warn("tiny_ltx2 has random weights: plumbing only, not a result", stacklevel=2)
    parts = components(version)
    parts["transformer"].to(getattr(torch, dtype))
    pipelines = {"t2v": LTX2Pipeline(**parts), "i2v": LTX2ImageToVideoPipeline(**parts)}
    for pipe in pipelines.values():
        pipe.set_progress_bar_config(disable=True)
    return Model("tiny_ltx2", pipelines)
