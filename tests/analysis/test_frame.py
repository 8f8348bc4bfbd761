from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from analysis.frame import origin, runtimes
from experiments.cell import Cell
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


def timed(folder, *timings: tuple[str, str | None, float]) -> dict[str, float]:
    """Label -> seconds, of (label, pass, seconds) on one machine; prompts take turns in a pass."""
    plan, store = tiny_plan("limit=2"), Store(folder)
    turns = Counter()
    for label, made, seconds in timings:
        cells: list[Cell] = plan.by_setting()["t2v", label]
        timing = {"denoise_s": seconds} | ({"pass": made} if made else {})
        turn = turns[label, made] if made else 0
        store.write_timing(cells[turn].key, "box", timing)
        turns[label, made] += 1
    return runtimes(plan, store).table.loc["t2v"]["runtime_s"].to_dict()


def test_shares_of_the_runtime_are_those_within_a_pass(tmp_path) -> None:
    """The machine is a quarter slower when HSA is timed, and the reference with it."""
    monday = [("FM T=4", "mon", 4.0), ("uniform", "mon", 2.0)]
    tuesday = [("FM T=4", "tue", 5.0), ("HSA", "tue", 1.25)]
    found = timed(tmp_path, *monday, *tuesday)
    assert found["FM T=4"] == pytest.approx(4.5)
    assert found["uniform"] / found["FM T=4"] == pytest.approx(0.5)
    assert found["HSA"] / found["FM T=4"] == pytest.approx(0.25)


def test_a_pass_of_others_leaves_a_share_alone(tmp_path) -> None:
    """Only the first prompt is timed again, on a machine that is twice as fast by then."""
    reference = [("FM T=4", "mon", 4.0), ("FM T=4", "mon", 5.0)]
    hsa = [("HSA", "mon", 1.0), ("HSA", "mon", 2.5)]
    tuesday = [("FM T=4", "tue", 2.0), ("uniform", "tue", 1.0)]
    found = timed(tmp_path, *reference, *hsa, *tuesday)
    assert found["HSA"] / found["FM T=4"] == pytest.approx((0.25 + 0.5) / 2)


def test_a_pass_that_timed_nothing_but_references_changes_nothing(tmp_path) -> None:
    """Another experiment on the same captions has the same references."""
    mine = [("FM T=4", "mon", 4.0), ("uniform", "mon", 2.0)]
    others = [("FM T=4", "tue", 9.0), ("FM T=4", "tue", 9.0)]
    assert timed(tmp_path / "a", *mine) == timed(tmp_path / "b", *mine, *others)


def test_timings_of_before_there_were_passes_are_one(tmp_path) -> None:
    old = [("FM T=4", None, 4.0), ("uniform", None, 1.0), ("uniform", None, 3.0)]
    assert timed(tmp_path / "old", *old) == {"FM T=4": 4.0, "uniform": 2.0}
    new = [("FM T=4", "new", 8.0), ("uniform", "new", 4.0), ("HSA", "new", 2.0)]
    found = timed(tmp_path / "both", *old, *new)
    assert found == {"FM T=4": 6.0, "uniform": 3.0, "HSA": 1.5}


def test_a_timing_without_its_reference_does_not_count(tmp_path) -> None:
    runs = [("FM T=4", "a", 4.0), ("uniform", "a", 2.0), ("uniform", "b", 9.0), ("HSA", "b", 1.0)]
    found = timed(tmp_path, *runs)
    assert found["uniform"] == 2.0 and np.isnan(found["HSA"])
