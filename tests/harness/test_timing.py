"""Which runs a timing pass makes, and what it reuses."""

from __future__ import annotations

from itertools import groupby

import pytest

from experiments.config import TimingConfig
from experiments.execute import Worker
from experiments.plan import Plan
from experiments.provenance import machine
from experiments.store import Store
from experiments.timing import measure, untimed
from tests.harness.helpers import TINY, hsa_bench, tiny_plan

ONE = "prompts.texts=[a red circle]"
TWICE = TimingConfig(repeats=2, prompts=1)


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Worker:
    """Of a store with every cell of the tiny experiment's first prompt, none of them timed."""
    results = tmp_path_factory.mktemp("timing")
    assert hsa_bench("run", results, TINY, ONE, "metric=[]", "timing.repeats=0") == 0
    return Worker(Store(results / "store"))


@pytest.fixture
def cells(worker):
    yield {cell.label: cell for cell in tiny_plan(ONE).cells}
    for path in worker.store.root.glob("timings/*/*/*.json"):
        path.unlink()


def labels(plan: Plan, store: Store, config: TimingConfig) -> list[str]:
    return [cell.label for cell in untimed(plan, store, config, machine().name)]


def passes(store: Store) -> list[list[str]]:
    """Keys of the timed runs of each pass, in the order they were made."""
    timings = [timing for cell in tiny_plan(ONE).cells for timing in store.timings(cell.key)]
    timings.sort(key=lambda timing: timing["finished"])
    return [[t["key"] for t in group] for _, group in groupby(timings, lambda t: t["pass"])]


def test_settings_take_turns(worker, cells):
    every = ["FM T=4", "FM T=2", "uniform", "HSA"]
    assert labels(tiny_plan(ONE), worker.store, TWICE) == [*every, *every]


def test_prompts_are_counted_and_not_their_seeds(tmp_path):
    two = ["prompts.texts=[a red circle, a blue square]", "seeds=[0,1]"]
    assert hsa_bench("run", tmp_path, TINY, *two, "metric=[]", "timing.repeats=0") == 0
    config = TimingConfig(repeats=1, prompts=2)
    runs = untimed(tiny_plan(*two), Store(tmp_path / "store"), config, machine().name)
    asked = [cell.inputs["request"] for cell in runs if cell.label == "uniform"]
    assert [(a["prompt"], a["seed"]) for a in asked] == [("a red circle", 0), ("a blue square", 0)]


def test_the_reference_runs_again_after_some_others(worker, cells, monkeypatch):
    monkeypatch.setattr("experiments.timing.BESIDE", 2)
    found = labels(tiny_plan(ONE), worker.store, TimingConfig(repeats=1, prompts=1))
    assert found == ["FM T=4", "FM T=2", "FM T=4", "uniform", "HSA"]


def test_what_is_added_later_is_timed_beside_the_reference(worker, cells):
    store, reference, uniform, hsa = worker.store, cells["FM T=4"], cells["uniform"], cells["HSA"]
    first = Plan((reference, uniform))
    list(measure(untimed(first, store, TWICE, machine().name), worker))
    assert labels(first, store, TWICE) == []
    wider = Plan((reference, uniform, hsa))
    list(measure(untimed(wider, store, TWICE, machine().name), worker))
    assert labels(wider, store, TWICE) == []
    assert passes(store) == [2 * [reference.key, uniform.key], 2 * [reference.key, hsa.key]]


def test_a_timing_without_its_reference_is_made_again(worker, cells):
    store, here = worker.store, machine().name
    plan = Plan((cells["FM T=4"], cells["uniform"]))
    timings = [("FM T=4", "a"), ("FM T=4", "a"), ("uniform", "a"), ("uniform", "b")]
    for label, made in timings:
        timing = {"denoise_s": 1.0, "pass": made, "finished": made}
        store.write_timing(cells[label].key, here, timing)
    store.write_timing(cells["uniform"].key, "another machine", {"denoise_s": 1.0, "pass": "a"})
    assert labels(plan, store, TWICE) == ["FM T=4", "uniform"]


def test_timings_of_before_there_were_passes_count(worker, cells):
    for cell in (cells["FM T=4"], cells["uniform"], cells["FM T=4"], cells["uniform"]):
        worker.store.write_timing(cell.key, machine().name, {"denoise_s": 1.0})
    assert labels(Plan((cells["FM T=4"], cells["uniform"])), worker.store, TWICE) == []


def test_memory_is_counted_once(worker, cells):
    """A count that cannot be true shows that nobody counted again."""
    store, cell = worker.store, cells["FM T=4"]
    store.write_timing(cell.key, machine().name, {"denoise_s": 1.0, "held_bytes": 7})
    list(measure([cell, cells["uniform"]], worker))
    held = {c.key: {t["held_bytes"] for t in store.timings(c.key)} for c in cells.values()}
    assert held[cell.key] == {7}
    assert min(held[cells["uniform"].key]) > 1000
