from __future__ import annotations

import numpy as np

from analysis.frame import origin
from experiments.plan import Plan
from experiments.store import Store
from tests.harness.helpers import tiny_plan

VERSIONS = {"python": "3.11", "hsa-bench": "0.1.0", "diffusers": "0.42.1", "transformers": "5.1"}


def stored(folder, *machines: str | None) -> tuple[Plan, Store]:
    """As many videos as machines, of which None left no provenance."""
    plan, store = tiny_plan(), Store(folder)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for cell, machine in zip(plan.cells, machines, strict=False):
        made = {"versions": VERSIONS, "machine": machine} if machine else {}
        store.write_sample(cell.inputs, frames, {"latents": np.zeros(1)}, 8, {}, made)
    return plan, store


def test_origin_names_versions_and_every_machine_once(tmp_path) -> None:
    found = origin(*stored(tmp_path, "box", "GPU", None, "box"))
    versions = "hsa-bench 0.1.0, diffusers 0.42.1, transformers 5.1"
    assert found == f"{versions} on box and {versions} on GPU"


def test_origin_of_nothing_is_empty(tmp_path) -> None:
    assert origin(*stored(tmp_path, None)) == ""
