"""The literature table: every quoted method has its reason, every figure its source."""

import csv
from pathlib import Path

import pytest

from analysis import literature, tables

ROOT = Path(__file__).parents[2]
ASKED = (
    "HarmoniCa DiffCR BlockCache CHAI HetCache LiteAttention SpectralCache OmniCache X-Slim "
    "TaoCache ProfilingDiT Delta-DiT T-GATE AdaptiveHybridCache DDiT"
).split()


def rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "analysis" / "literature" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_method_is_there_and_says_why_it_is_not_run():
    known = {row["method"]: row for row in rows("methods.csv")}
    assert set(ASKED) <= known.keys()
    assert all(row["what"] and row["why"] for row in known.values())


def test_every_figure_has_a_source_and_a_value():
    for row in rows("figures.csv"):
        assert row["source"] and row["model"] and row["speedup"].rstrip("x")[-1].isdigit()


@pytest.mark.parametrize(
    ("method", "speedup", "name", "value"),
    [
        ("DDiT", "2.1x", "vbench", "80.97 (base 81.24)"),
        ("DDiT and TeaCache", "3.2x", "vbench", "80.53 (base 81.24)"),
        ("ProfilingDiT", "2.01x", "psnr", "22.02"),
        ("SpectralCache", "2.46x", "lpips", "0.217"),
        ("Astraea 40 %", "2.29x", "psnr", "26.98"),
    ],
)
def test_figures_are_the_published_ones(method, speedup, name, value):
    (row,) = (r for r in rows("figures.csv") if (r["method"], r["speedup"]) == (method, speedup))
    assert row[name] == value


def test_docs_are_what_the_data_says():
    written = (ROOT / "docs" / "literature.md").read_text(encoding="utf-8")
    assert written == tables.markdown(literature.tables())
    assert "Published figures, not ours" in written and "No row compares" in written
