"""`hsa-bench log`: what a store holds goes to wandb, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.analysis import offline_run
from tests.harness.helpers import TINY, files, hsa_bench

SWEEP = [TINY, "-m", "grid=[{}]", "limit=1", "method=static_uniform", "method.interval=2,3"]
SWEEP += ["metric=[psnr]", "name=sweep"]
UNLOADABLE = "model.load={_target_: tests.harness.tiny.refuse}"


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Results of a sweep that nobody has logged."""
    results = tmp_path_factory.mktemp("collected")
    assert hsa_bench("run", results, *SWEEP) == 0
    return results


@pytest.fixture(scope="module")
def logged(collected) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(collected / "data"))
        patch.delenv("WANDB_MODE", raising=False)
        assert hsa_bench("log", collected, *SWEEP, UNLOADABLE) == 0
    return collected


def runs(results: Path) -> dict[str, dict]:
    """Everything in the offline runs, by name."""
    found = sorted(results.glob("sweep/wandb/offline-run-*/run-*.wandb"))
    read = [offline_run.read(path) for path in found]
    assert len({run["name"] for run in read}) == len(read)
    return {run["name"]: run for run in read}


def test_a_sweep_is_one_group_with_the_numbers_of_its_table(logged):
    found = runs(logged)
    labels = [f"static_uniform interval={interval}" for interval in (2, 3)]
    assert found.keys() == {"flow_matching", *labels, "overview"}
    assert {run["group"] for run in found.values()} == {"sweep"}
    table = pd.read_csv(logged / "sweep" / "table.csv").set_index("label")
    for label in labels:
        history = found[label]["history"]
        assert history["t2v/psnr"] == pytest.approx(table.loc[label, "mean"], rel=1e-12)
        assert history["t2v/runtime"] == pytest.approx(table.loc[label, "runtime"], rel=1e-12)
    assert "figure/frontier/path" in found["overview"]["history"]


def test_every_table_says_what_it_was_measured_on_and_with(collected):
    made = collected / "sweep"
    table = pd.read_csv(made / "table.csv")
    (machine,), (versions,) = table["timed_on"].unique(), table["made_with"].unique()
    assert "torch" in machine and "diffusers 0." in versions
    captions = [line for line in (made / "table.tex").read_text().splitlines() if "caption" in line]
    assert len(captions) > 3
    assert all(machine in line and versions in line for line in captions)
    titles, notes = ((made / name).read_text() for name in ("table.md", "comparison.md"))
    for text in (titles, notes):
        assert text.count("## ") == text.count(f"Made with {versions}.") > 0


def test_logging_again_adds_nothing(logged, capsys):
    before = files(logged / "sweep" / "wandb")
    assert hsa_bench("log", logged, *SWEEP, UNLOADABLE) == 0
    assert files(logged / "sweep" / "wandb") == before
    assert "sweep: 0 new runs logged" in capsys.readouterr().out


def test_another_machine_with_the_same_store_logs_the_same_runs(logged, tmp_path, monkeypatch):
    shutil.copytree(logged / "store", tmp_path / "store")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    assert hsa_bench("log", tmp_path, *SWEEP, UNLOADABLE) == 0
    here, there = runs(logged), runs(tmp_path)
    assert {name: run["id"] for name, run in there.items()} == {
        name: run["id"] for name, run in here.items()
    }


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("hsa-bench: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_online_asks_for_an_account_and_loses_nothing(logged, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    before = files(logged / "store")
    assert hsa_bench("log", logged, *SWEEP, UNLOADABLE) == 2
    assert "logger.mode=online: No API key configured" in one_line(capsys)
    assert files(logged / "store") == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "none of the 3 videos is stored"),
        (["logger=none"], "logger=none: nowhere to log to; choose logger=wandb"),
        (["logger=wandb", "logger.mode=on"], "logger.mode='on': choose offline, online, disabled"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, overrides, message):
    assert hsa_bench("log", tmp_path, *SWEEP, *overrides) == 2
    assert message in one_line(capsys)
