from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from analysis.frame import COLUMNS, per_video, runtimes, tidy
from analysis.metrics.base import Metric
from analysis.metrics.latent_error import LatentError
from analysis.metrics.lpips import LPIPS
from analysis.score import score
from experiments.plan import Plan
from experiments.store import Store
from tests.analysis import stored


@dataclass(frozen=True)
class Brightness(Metric):
    """Mean level; refuses prompts about a word it does not like."""

    refuse: str = "nothing"

    name: ClassVar[str] = "brightness"
    title: ClassVar[str] = "Brightness"
    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    def __call__(self, sample, reference=None):
        if self.refuse in sample.record["request"]["prompt"]:
            raise ValueError(f"cannot judge {self.refuse}")
        return {self.name: float(sample.frames().mean()), "half": 0.5}


@dataclass(frozen=True)
class NextBrightness(Brightness):
    version: ClassVar[int] = 2


@pytest.fixture
def small(tmp_path: Path) -> tuple[Plan, Store]:
    return stored.fill(tmp_path, tasks=("t2v",), prompts=1)


def records(store: Store) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.root.glob("scores/*/*/*.json")}


def test_everything_is_scored_once(small) -> None:
    plan, store = small
    ticks: list[tuple[int, int]] = []
    score(plan, store, [Brightness(), LatentError()], lambda *tick: ticks.append(tick))
    written = records(store)
    cells = len(plan.cells)
    assert ticks == [(i + 1, cells) for i in range(cells)]
    assert len(written) == cells + (cells - 1)  # the reference has no error to itself

    stamps = {path: path.stat().st_mtime_ns for path in written}
    score(plan, store, [Brightness(), LatentError()])
    assert records(store) == written
    assert {path: path.stat().st_mtime_ns for path in written} == stamps


def test_scores_are_what_the_metric_says(small) -> None:
    plan, store = small
    score(plan, store, [LatentError()])
    cell = plan.cells[1]
    (found,) = store.scores(cell.key)
    direct = LatentError()(store.sample(cell.key), store.sample(cell.reference_key))
    assert found["values"] == direct and found["reference_key"] == cell.reference_key


@pytest.mark.parametrize("changed", [NextBrightness(), Brightness(refuse="else")])
def test_another_version_or_parameter_is_another_score(small, changed: Metric) -> None:
    plan, store = small
    score(plan, store, [Brightness()])
    before = len(records(store))
    assert tidy(plan, store, [changed])["value"].isna().all()
    score(plan, store, [changed])
    assert len(records(store)) == 2 * before
    assert tidy(plan, store, [changed])["value"].notna().all()


def test_a_video_that_cannot_be_judged_is_missing_and_tried_again(small) -> None:
    plan, store = small
    for _ in range(2):
        with pytest.warns(UserWarning, match="brightness could not judge 7 videos.*cannot judge"):
            score(plan, store, [Brightness(refuse="moves")])
    (record,) = store.scores(plan.cells[0].key)
    assert record["values"] is None and record["error"] == "cannot judge moves"
    frame = tidy(plan, store, [Brightness(refuse="moves")])
    assert len(frame) == len(plan.cells) and frame["value"].isna().all()


def test_an_unavailable_metric_warns_and_the_others_go_on(small, tmp_path: Path) -> None:
    plan, store = small
    lpips = LPIPS(weights=str(tmp_path / "none.safetensors"))
    with pytest.warns(UserWarning, match="metric lpips needs the weights file"):
        score(plan, store, [lpips, Brightness()])
    assert len(records(store)) == len(plan.cells)


def test_what_is_not_stored_is_left_out(small) -> None:
    plan, store = small
    absent = replace(plan.cells[1], key="0" * 64)
    orphan = replace(plan.cells[2], reference_key="1" * 64)
    partial = Plan((plan.cells[0], absent, orphan))
    score(partial, store, [LatentError(), Brightness()])
    frame = tidy(partial, store, [LatentError(), Brightness()])
    assert set(frame["label"]) == {plan.cells[0].label, orphan.label}
    errors = frame[frame["metric"] == "latent_error"]
    assert len(errors) == 2 and errors["value"].isna().all()


def test_the_frame_is_tidy(results) -> None:
    plan, store = results
    frame = tidy(plan, store, stored.METRICS)
    assert list(frame.columns) == COLUMNS
    assert not frame.duplicated(["key", "metric"]).any()
    assert set(frame["task"]) == {"t2v", "i2v"}
    assert list(frame["label"].unique()) == [label for label, *_ in stored.SETTINGS]
    assert set(frame[frame["reference"]]["label"]) == {"FM T=40"}
    parts = {"prompt_adherence": ("colour", "shape", "direction", "background", "all")}
    parts["latent_error"] = ("group_0", "group_1")  # of the settings with an allocation
    assert set(frame["metric"]) == {"psnr", *parts} | {
        f"{metric}.{part}" for metric, names in parts.items() for part in names
    }
    for cell in _cells(frame):
        record = store.sample(cell["key"]).record
        assert cell["method"] == record["method"]["name"]
        assert cell["steps"] == record["schedule"]["steps"]
        assert cell["active_fraction"] == record["result"]["active_fraction"]


def test_quality_per_video(results) -> None:
    plan, store = results
    quality = per_video(tidy(plan, store, stored.METRICS))
    assert list(quality.columns) == [("heldout-0", 0), ("heldout-1", 0)]
    key = next(c.key for c in plan.cells if c.label == "HSA 0.2" and c.task == "i2v")
    psnr = next(s for s in store.scores(key) if s["metric"] == "psnr")["values"]["psnr"]
    assert quality.loc[("i2v", "psnr", "HSA 0.2"), ("heldout-0", 0)] == psnr


def test_runtime_is_the_median_on_the_machine_that_timed_most(small) -> None:
    plan, store = small
    for cell in plan.cells[:2]:
        store.write_timing(cell.key, "a faster one", {"denoise_s": 0.001, "text_s": 0.0})
    store.write_timing(plan.cells[0].key, "box", {"denoise_s": 60.0, "text_s": 0.0})
    measured = runtimes(plan, store)
    assert measured.machine == "box"
    row = measured.table.loc[("t2v", "FM T=40")]
    assert row["runtime_s"] == pytest.approx(1.015)  # of 1.00, 1.01, 1.02 and an outlier of 60
    assert row["runtime_low"] <= row["runtime_s"] <= row["runtime_high"]
    assert runtimes(Plan(()), store).machine is None


def _cells(frame) -> Iterator[dict]:
    yield from frame.drop_duplicates("key").to_dict("records")
