"""From stored rows to VBench's tables: upstream's aggregation, strict coverage, one protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.vbench import VBench, aggregate, scorecard
from analysis.metrics.vbench.dimensions import DIMENSIONS, QUALITY7
from analysis.metrics.vbench.presets import PRESETS
from analysis.pipeline import analyse
from analysis.score import _identity
from analysis.stats import paired
from analysis.tables import markdown
from experiments.config import load_experiment
from experiments.plan import Plan
from experiments.store import Store
from tests.vbench import stored

COUNT = 4  # prompts of each group, instead of 8
GROUPS = (  # the suite's, so that every dimension of `mini` has its prompts
    ("temporal_flickering",),
    ("subject_consistency", "dynamic_degree", "motion_smoothness"),
    ("background_consistency", "scene"),
    ("overall_consistency", "aesthetic_quality", "imaging_quality"),
    *((name,) for name in ("object_class", "multiple_objects", "human_action", "color")),
    *((name,) for name in ("spatial_relationship", "temporal_style", "appearance_style")),
)
WEIGHTED = {"subject_consistency": (5, 9), "object_class": (16, 16), "color": (1, 0)}


class Bench:
    """A store of the mini preset, two settings, with made-up rows."""

    def __init__(self, folder, groups=GROUPS, fps=8):
        self.vbench = VBench("mini", **stored.claim_everything(folder))
        self.store = Store(folder / "store")
        self.rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
        cells = []
        for g, group in enumerate(groups):
            for p in range(COUNT):
                meta = stored.suite_meta(f"prompt {g} {p}", *group)
                reference = None
                for label in ("FM", "fast"):
                    about = stored.inputs(f"prompt {g} {p}", label, meta=meta)
                    rate = fps if label == "FM" else 8
                    stored.write(self.store, about, stored.clip(p, 1.0, 2, 16), rate)
                    cell = stored.cell(about, reference)
                    reference = reference or cell.key
                    cells.append(cell)
        self.plan = Plan(tuple(cells))

    def score(self) -> None:
        """Rows that depend on setting and prompt."""
        rng = np.random.default_rng(0)
        for part in self.vbench.parts():
            mine = [cell for cell in self.plan.cells if part.applies(cell.inputs)]
            for i, cell in enumerate(mine):
                low, high = DIMENSIONS[part.dimension].low, DIMENSIONS[part.dimension].high
                value = low + (high - low) * rng.uniform(0.5, 0.9)
                weight = WEIGHTED.get(part.dimension, (1, 1))[i // 2 % 2]
                values = {part.name: value} if weight else {}
                values |= {} if weight == 1 else {"weight": weight}
                identity = _identity(cell, part)
                self.store.write_score(cell.key, **identity, values=values, error=None)
                self.rows.setdefault((cell.label, part.dimension), []).append((value, weight))

    def cards(self, **changes):
        settings = {**vars(self.vbench), **changes}
        settings.pop("environment", None)
        return scorecard.cards(self.plan, self.store, VBench(**settings))


@pytest.fixture(scope="module", autouse=True)
def fewer_prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", replace(PRESETS["mini"], per_dimension=COUNT))
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("bench"))
    made.score()
    return made


def test_values_are_weighted_as_upstream_weighs_and_totals_are_aggregated(bench):
    for card in bench.cards():
        for name in PRESETS["mini"].dimensions:
            rows = np.array(bench.rows[card.label, name])
            expected = (rows[:, 0] * rows[:, 1]).sum() / rows[:, 1].sum()
            assert card.values[name] == pytest.approx(expected), name
        assert card.scores == aggregate(card.values)
        assert card.complete and not card.allow_partial


def test_a_colour_of_no_object_counts_as_scored_but_not_as_a_value(bench):
    card = bench.cards()[0]
    assert card.videos["color"] == card.expected["color"] == COUNT
    assert sum(weight for _, weight in bench.rows["FM", "color"]) == COUNT / 2


@pytest.fixture
def one_missing(bench):
    """Without the score of one video in imaging quality."""
    for cell in bench.plan.cells:
        for path in (bench.store.root / "scores" / cell.key[:2] / cell.key).glob("*.json"):
            if "vbench_imaging_quality" in path.read_text():
                data = path.read_bytes()
                path.unlink()
                yield bench
                path.write_bytes(data)
                return


def test_one_missing_video_withholds_the_dimension_and_its_totals(one_missing):
    card, other = one_missing.cards()
    assert "imaging_quality" not in card.values and set(card.scores) == {"semantic"}
    assert "total" in other.scores and "total" not in scorecard.difference(other, card)
    text = markdown(scorecard.tables([card]))
    assert f"({COUNT - 1} of {COUNT})" in text and "PARTIAL" not in text


def test_partial_scores_are_shown_as_such_when_asked_for(one_missing):
    card = one_missing.cards(allow_partial=True)[0]
    assert set(card.scores) == {"total", "quality", "semantic"}
    (found,) = scorecard.record([card])
    assert found["allow_partial"] is True and not found["complete"]
    assert "PARTIAL" in markdown(scorecard.tables([card]))


def test_a_shorter_plan_is_not_the_suite(bench):
    part = Plan(tuple(cell for cell in bench.plan.cells if " 0" not in cell.request.prompt))
    for card in scorecard.cards(part, bench.store, bench.vbench):
        assert not card.complete and "total" not in card.scores


def test_a_smaller_preset_reads_the_same_scores(bench):
    card = bench.cards(preset="quality7")[0]
    assert not card.scores  # 8 prompts of 72 and more
    card = bench.cards(preset="quality7", allow_partial=True)[0]
    whole = bench.cards()[0]
    assert card.scores == {"quality": pytest.approx(whole.scores["quality"])}
    assert set(card.values) == set(QUALITY7)


def test_differences_are_paired(bench):
    reference, fast = bench.cards()
    found = scorecard.difference(fast, reference)
    assert set(found) == {*PRESETS["mini"].dimensions, "total", "quality", "semantic"}
    for name, estimate in found.items():
        expected = (fast.values | fast.scores)[name] - (reference.values | reference.scores)[name]
        assert estimate.mean == pytest.approx(expected)
        assert estimate.low <= estimate.mean <= estimate.high
    same = scorecard.difference(reference, reference)
    assert all((each.mean, each.low, each.high) == (0, 0, 0) for each in same.values())
    written = scorecard.record([reference, fast])[1]["minus"]["FM"]
    assert written["total"] == [found["total"].mean, found["total"].low, found["total"].high]


def test_the_interval_of_a_dimension_is_that_of_its_paired_differences(bench):
    """A dimension alone in its group, with equal weights, has the plain paired bootstrap."""
    reference, fast = bench.cards()
    rows = [np.array(bench.rows[label, "temporal_flickering"])[:, 0] for label in ("fast", "FM")]
    expected = paired(*rows)
    found = scorecard.difference(fast, reference)["temporal_flickering"]
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_groups_are_resampled_independently(bench):
    """Else a total's interval would hold a covariance of prompts that have nothing in common."""
    card = bench.cards()[0]
    alone = [group[0] for group in GROUPS if len(group) == 1 and group[0] not in WEIGHTED]
    correlation = np.corrcoef([card.draws[name] for name in alone])
    assert np.abs(correlation - np.eye(len(alone))).max() < 0.05


def test_the_table_tells_of_protocol_coverage_and_reference(bench):
    values, differences = scorecard.tables(bench.cards())
    assert values.header[:4] == ("Method", "Total", "Quality", "Semantic")
    assert [row[0].text for row in values.rows] == ["FM", "fast"]
    assert [row[0].text for row in differences.rows] == ["fast"]
    for words in ("Preset mini", "2 frames of 16x16 at 8 fps", "standard", "no static filter"):
        assert words in values.note


def test_different_protocols_share_no_table(tmp_path):
    bench = Bench(tmp_path, GROUPS[:1], fps=16)
    bench.score()
    with pytest.raises(ValueError, match="FM and fast cannot share a table, their fps differ"):
        scorecard.tables(bench.cards())
    assert "their fps differ: 16 and 8" in (text := written(bench, tmp_path / "out"))
    assert "| FM |" in text and "flickering" not in text


def written(bench: Bench, out: Path) -> str:
    """table.md of the whole analysis."""
    names = ("preset", "python", "weights")
    settings = [f"metric.vbench.{name}={getattr(bench.vbench, name)}" for name in names]
    overrides = ["metric=[vbench]", "figure=[]", *settings]
    config = load_experiment(overrides, False, None).config
    analyse(config, bench.plan, bench.store, out)
    return (out / "table.md").read_text()


def test_incomplete_dimensions_stand_in_no_other_table(one_missing, tmp_path):
    text = written(one_missing, tmp_path)
    assert text.lower().count("imaging quality") == 1
    assert f"– ({COUNT - 1} of {COUNT})" in text


def test_what_this_machine_cannot_compute_is_said(bench):
    environment = bench.vbench.environment
    file = environment.weights / "raft_model/models/raft-things.pth"
    data = file.read_bytes()
    file.write_bytes(b"")
    try:
        (values, *_) = scorecard.tables(bench.cards(allow_partial=True))
    finally:
        file.write_bytes(data)
    assert "Not available on this machine: dynamic_degree." in values.note
    assert "Total" not in values.header and "Semantic" in values.header
