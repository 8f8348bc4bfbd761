from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.frame import runtimes, tidy
from analysis.summary import summarise
from analysis.wandb_sink import WandbSink, contents
from experiments.errors import UserError
from tests.analysis import offline_run, stored

PICTURE = "figure.png"


@pytest.fixture(scope="module")
def tables(results):
    plan, store = results
    frame = tidy(plan, store, stored.METRICS)
    return frame, summarise(frame, runtimes(plan, store), stored.METRICS), store


@pytest.fixture(scope="module")
def two(tables):
    """Two settings are enough to log."""
    frame, summary, store = tables
    labels = ["FM T=40", "HSA 0.2"]
    return frame[frame["label"].isin(labels)], summary[summary["label"].isin(labels)], store


@pytest.fixture(scope="module")
def synced(two, tmp_path_factory) -> tuple[Path, list[str]]:
    out_dir = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.delenv("WANDB_API_KEY", raising=False)
        Image.new("RGB", (8, 8), "red").save(out_dir / PICTURE)
        ids = WandbSink(previews=1).sync("rendered", *two, out_dir, {"frontier": out_dir / PICTURE})
    return out_dir, ids


def run_files(out_dir: Path) -> list[Path]:
    return sorted(out_dir.glob("wandb/offline-run-*/run-*.wandb"))


def table(path: Path, history: dict, name: str) -> list[dict]:
    """Rows of a logged table."""
    content = json.loads((path.parent / "files" / history[f"{name}/path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_a_run_for_every_setting_holds_its_config_and_numbers(two, synced) -> None:
    out_dir, ids = synced
    runs = {run["name"]: run for run in map(offline_run.read, run_files(out_dir))}
    assert set(runs) == {"FM T=40", "HSA 0.2", "overview"}
    assert sorted(run["id"] for run in runs.values()) == sorted(ids)
    run = runs["HSA 0.2"]
    assert (run["group"], run["job_type"], run["project"]) == ("rendered", "hsa", "hsa-bench")
    assert run["exit_code"] == 0
    assert run["config"]["method"]["params"]["thresholds"] == [0.2]
    assert run["config"]["schedule"] == {"steps": 40}
    assert run["config"]["tasks"] == ["t2v", "i2v"] and run["config"]["prompts"] == 2

    _, summary, _ = two
    for _, row in summary[summary["label"] == "HSA 0.2"].iterrows():
        name = f"{row['task']}/{row['metric']}"
        assert run["history"][name] == row["mean"]
        assert run["history"][f"{name}_low"] == row["low"]
        assert run["history"][f"{row['task']}/runtime_s"] == row["runtime_s"]


def test_a_task_with_settings_of_its_own_says_them(tables) -> None:
    """The same label for two settings, as a target gives."""
    frame, summary, store = tables
    steps = frame["label"].map({"FM T=20": "t2v", "FM T=10": "i2v"})
    one = frame[steps == frame["task"]].assign(label="FM, 0.5")
    (content,) = contents("matched", one, summary, store, previews=0)
    assert content.config["schedule"] == {"steps": 20}
    assert content.config["i2v"]["schedule"] == {"steps": 10}
    assert "t2v" not in content.config and content.config["tasks"] == ["t2v", "i2v"]


def test_missing_numbers_are_not_logged(synced) -> None:
    out_dir, _ = synced
    runs = {run["name"]: run for run in map(offline_run.read, run_files(out_dir))}
    logged = runs["FM T=40"]["history"]
    assert not any(name.startswith("t2v/psnr") for name in logged)
    assert logged["t2v/prompt_adherence"] == 1.0


def test_table_and_preview_videos_are_those_of_the_store(two, synced) -> None:
    out_dir, _ = synced
    frame, _, store = two
    path = next(p for p in run_files(out_dir) if offline_run.read(p)["name"] == "HSA 0.2")
    history = offline_run.read(path)["history"]
    files = path.parent / "files"
    rows = table(path, history, "videos")
    assert len(rows) == 4  # two prompts, two tasks
    for row in rows:
        mine = frame[(frame["key"] == row["key"]) & (frame["metric"] == "psnr")]
        assert row["psnr"] == mine["value"].item()
    for task in ("t2v", "i2v"):
        key = next(row["key"] for row in rows if row["task"] == task)
        assert history[f"preview/{task}/0/_type"] == "video-file"
        preview = store.sample(key).path / "preview.mp4"
        assert (files / history[f"preview/{task}/0/path"]).read_bytes() == preview.read_bytes()


def test_a_second_sync_adds_nothing(two, synced) -> None:
    out_dir, _ = synced
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}
    assert WandbSink(previews=1).sync("rendered", *two, out_dir, {}) == []
    assert {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file()} == before


def test_a_sync_that_was_killed_is_done_again(two, tmp_path: Path, monkeypatch) -> None:
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WandbSink, "_log", killed)
        with pytest.raises(KeyboardInterrupt):
            WandbSink().sync("rendered", *two, tmp_path, {})
    logged: list[str] = []
    monkeypatch.setattr(WandbSink, "_log", lambda _, content, *__: logged.append(content.label))
    WandbSink().sync("rendered", *two, tmp_path, {})
    assert logged == ["FM T=40", "HSA 0.2", "overview"]


def test_another_project_is_another_place(two, tmp_path: Path, monkeypatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(WandbSink, "_log", lambda sink, *_: logged.append(sink.project))
    for project in ("one", "two", "one"):
        WandbSink(project=project).sync("rendered", *two, tmp_path, {})
    assert logged == 3 * ["one"] + 3 * ["two"]


def test_new_results_are_a_new_run_of_that_setting_only(tables) -> None:
    frame, summary, store = tables
    before = {c.label: c.run_id for c in contents("rendered", frame, summary, store, 1)}
    changed = frame.copy()
    row = changed.index[(changed["label"] == "HSA 0.1") & (changed["metric"] == "psnr")][0]
    changed.loc[row, "value"] = np.nextafter(changed.loc[row, "value"], 99.0) + 1e-9
    after = {c.label: c.run_id for c in contents("rendered", changed, summary, store, 1)}
    assert {label for label in before if before[label] != after[label]} == {"HSA 0.1"}


def test_the_overview_has_a_scatter_of_all_settings_a_metric(two, synced) -> None:
    out_dir, _ = synced
    _, summary, _ = two
    path = next(p for p in run_files(out_dir) if offline_run.read(p)["name"] == "overview")
    run = offline_run.read(path)
    assert (run["group"], run["job_type"]) == ("rendered", "overview")
    for task in ("t2v", "i2v"):
        charts = f"_wandb/visualize/frontier/{task}"
        chart = run["config"][f"{charts}/prompt_adherence"]["panel_config"]
        assert chart["panelDefId"] == "wandb/scatter/v0"
        assert chart["fieldSettings"] == {"x": "runtime", "y": "prompt_adherence"}
        rows = table(path, run["history"], f"frontier/{task}/prompt_adherence_table")
        mine = summary[(summary["task"] == task) & (summary["metric"] == "prompt_adherence")]
        expected = zip(mine["label"], mine["method"], mine["runtime"], mine["mean"], strict=True)
        shown = ("label", "method", "runtime", "prompt_adherence")
        assert [tuple(row[name] for name in shown) for row in rows] == list(expected)
        assert f"{charts}/prompt_adherence.colour" not in run["config"]
    assert [row["label"] for row in table(path, run["history"], "frontier/t2v/psnr_table")] == [
        "HSA 0.2"  # the reference has no fidelity to itself
    ]
    settings = table(path, run["history"], "settings")
    assert [row["mean"] for row in settings] == [
        None if np.isnan(mean) else mean for mean in summary["mean"]
    ]
    logged = path.parent / "files" / run["history"]["figure/frontier/path"]
    assert logged.read_bytes() == (out_dir / PICTURE).read_bytes()


def test_online_without_an_account_is_one_line(two, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="logger.mode=online: No API key") as found:
        WandbSink(mode="online").sync("rendered", *two, tmp_path / "out", {})
    assert "\n" not in str(found.value)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="logger.mode='of-line': choose offline, online, disabled"):
        WandbSink(mode="of-line")
