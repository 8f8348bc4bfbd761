"""The literature table: every quoted method has its reason, every figure its source."""

import csv
import re
from pathlib import Path

import pytest

from analysis import literature, tables

ROOT = Path(__file__).parents[2]
ASKED = (
    "HarmoniCa DiffCR BlockCache CHAI HetCache LiteAttention SpectralCache OmniCache X-Slim "
    "TaoCache ProfilingDiT Delta-DiT T-GATE AdaptiveHybridCache DDiT"
).split()
NONE = "none found"
PLACES = ("abstract", "README", "Table ", "notes on the paper", "project page")


def rows(name: str) -> list[dict[str, str]]:
    with (ROOT / "analysis" / "literature" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_method_is_there_and_says_why_it_is_not_run():
    known = {row["method"]: row for row in rows("methods.csv")}
    assert set(ASKED) <= known.keys()
    assert all(row["what"] and row["why"] for row in known.values())


def test_every_method_has_the_id_of_its_paper():
    papers = [row["paper"] for row in rows("methods.csv")]
    assert all(re.match(r"arXiv \d{4}\.\d{5}\b", paper) for paper in papers)


def test_every_figure_names_its_place_and_has_a_value():
    for row in rows("figures.csv"):
        assert row["model"] and row["source"].startswith(PLACES)
        assert row["speedup"] == NONE or re.search(r"\d(x| %)$", row["speedup"])


@pytest.mark.parametrize("method", ASKED)
def test_every_asked_method_has_a_figure_or_says_that_none_was_found(method):
    speedups = [r["speedup"] for r in rows("figures.csv") if r["method"].startswith(method)]
    assert speedups == [NONE] or (speedups and NONE not in speedups)


@pytest.mark.parametrize(
    ("method", "speedup", "name", "value"),
    [
        ("DDiT", "2.1x", "vbench", "80.97 (base 81.24)"),
        ("DDiT and TeaCache", "3.2x", "vbench", "80.53 (base 81.24)"),
        ("DDiT", "2.18x", "model", "FLUX.1-dev, 1024x1024, 50 steps"),
        ("DDiT and TeaCache", "3.52x", "model", "FLUX.1-dev, 1024x1024, 50 steps"),
        ("ProfilingDiT", "2.01x", "psnr", "22.02"),
        ("ProfilingDiT", "1.87x", "psnr", "26.44"),
        ("CHAI", "3.35x", "vbench", "0.7985 (base 0.8018)"),
        ("HetCache fast", "2.67x", "model", "Wan2.1-VACE, inpainting, base of 100 steps"),
        ("LiteAttention", "1.89x", "model", "Wan2.1-14B, base FlashAttention 3"),
        ("SpectralCache", "2.46x", "lpips", "0.217"),
        ("SpectralCache", "2.46x", "ssim", "0.727"),
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
