"""From a configuration to VBench's table, with the real scorer."""

from __future__ import annotations

import json

import pytest

from experiments.store import Store
from tests.harness.helpers import TINY, hsa_bench
from tests.vbench.test_worker import flickering


def test_generate_score_table(python, tmp_path, capsys):
    results = tmp_path / "results"
    settings = [f"metric.vbench.python={python}", f"metric.vbench.weights={tmp_path}/weights"]
    overrides = [TINY, "limit=1", "timing.repeats=0", "metric=[psnr,vbench]", *settings]
    assert hsa_bench("run", results, *overrides) == 0
    shown = capsys.readouterr().out
    assert "VBench, T2V" in shown and "Not available on this machine" in shown

    (folder,) = (path.parent for path in results.glob("*/vbench.json"))
    cards = json.loads((folder / "vbench.json").read_text())
    store = Store(results / "store")
    clips = [sample.frames() for sample in store.samples()]
    values = [card["dimensions"]["temporal_flickering"] for card in cards]
    assert sorted(values) == pytest.approx(sorted(map(flickering, clips)), abs=1e-7)
    assert {card["protocol"]["preset"] for card in cards} == {"custom"}
    table = (folder / "table.md").read_text()
    assert "VBench temporal flickering" in table and "subject_consistency" in table

    scores = {path: path.stat().st_mtime_ns for path in (store.root / "scores").rglob("*.json")}
    assert hsa_bench("run", results, *overrides) == 0
    assert scores == {path: path.stat().st_mtime_ns for path in scores}


def test_without_the_scorer_everything_else_goes_on(tmp_path, capsys):
    none = f"metric.vbench.python={tmp_path}/none/bin/python"
    overrides = [TINY, "limit=1", "timing.repeats=0", "metric=[psnr,vbench]", none]
    assert hsa_bench("run", tmp_path / "results", *overrides) == 0
    shown = capsys.readouterr().out
    assert shown.count("hsa-bench setup vbench") == 1
    (table,) = (tmp_path / "results").glob("*/table.md")
    assert "PSNR" in table.read_text() and "VBench" not in table.read_text()
