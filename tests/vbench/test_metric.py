"""VBench as a metric: what is missing is said once, what is scored stays scored."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import pytest

from analysis.metrics.vbench import VBench
from analysis.metrics.vbench.dimensions import DIMENSIONS, QUALITY7
from analysis.metrics.vbench.environment import Environment
from analysis.metrics.vbench.metric import VBenchDimension, stage
from analysis.metrics.vbench.weights import FILES
from analysis.score import score
from experiments import cli
from experiments.plan import Plan
from experiments.prompts import Prompt
from experiments.store import Store
from tests.pipelines import picture
from tests.vbench import stored


def lacking(vbench: VBench) -> dict[str, str]:
    return {p.dimension: p.unavailable() for p in vbench.parts() if p.unavailable()}


def test_without_an_environment_there_is_one_message(tmp_path):
    vbench = VBench(python=str(tmp_path / "none" / "bin" / "python"), weights=str(tmp_path))
    (message,) = set(lacking(vbench).values())
    assert "hsa-bench setup vbench" in message and len(lacking(vbench)) == 7
    assert vbench.unavailable() == message


def test_a_small_environment_has_the_dimension_without_weights(tmp_path):
    vbench = VBench(**stored.claim_everything(tmp_path, "small"))
    assert set(lacking(vbench)) == set(QUALITY7) - {"temporal_flickering"}
    assert len(set(lacking(vbench).values())) == 1 and vbench.unavailable() is None


@pytest.mark.parametrize("python", ["python", "/usr/bin/python3", "/none/bin/python", "/"])
def test_another_interpreter_is_no_scorer_environment(python, tmp_path):
    message = VBench(python=python, weights=str(tmp_path)).unavailable()
    assert f"no scorer environment with {python}: `hsa-bench setup vbench`" in message


def test_everything_that_is_missing_is_one_message(tmp_path):
    settings = stored.claim_everything(tmp_path)
    for name in ("clip_b32", "viclip"):
        FILES[name].find(tmp_path / "weights").unlink()
    vbench = VBench("t2v", **settings)
    (message,) = set(lacking(vbench).values())
    first, clip, viclip = message.splitlines()
    assert all(name in first for name in lacking(vbench)) and "scene" not in first
    assert FILES["clip_b32"].url in clip and FILES["viclip"].url in viclip
    assert len(lacking(vbench)) == 4  # two dimensions for each


def test_a_full_environment_is_ready(tmp_path):
    assert not lacking(VBench("t2v", **stored.claim_everything(tmp_path)))
    assert set(lacking(VBench("i2v", **_again(tmp_path)))) == {"camera_motion"}


def _again(folder: Path) -> dict[str, str]:
    return {
        "python": str(folder / "environment" / "bin" / "python"),
        "weights": str(folder / "weights"),
    }


@pytest.mark.parametrize("name", FILES)
def test_missing_weights_are_named_with_place_size_and_url(name, tmp_path):
    vbench = VBench("t2v", **stored.claim_everything(tmp_path), checkout=str(tmp_path))
    file = FILES[name]
    users = {d for d, about in DIMENSIONS.items() if name in about.weights}
    file.find(tmp_path / "weights").unlink()
    environment = vbench.environment
    assert {d for d in DIMENSIONS if environment.lacks(d)} == users
    for dimension in users:
        (lack,) = environment.lacks(dimension)
        assert str(tmp_path / "weights" / file.path) in lack and file.url in lack
        assert not file.mb or f"{file.mb:g} MB" in lack


def test_weights_are_the_published_ones_and_not_empty(tmp_path):
    environment = VBench(**stored.claim_everything(tmp_path)).environment
    clip, raft = (FILES[name].find(tmp_path / "weights") for name in ("clip_b32", "raft"))
    clip.write_bytes(b"half of it")
    raft.write_bytes(b"")  # what wget leaves where a download failed
    assert "not the published file" in environment.lacks("background_consistency")[0]
    assert "raft-things.pth" in environment.lacks("dynamic_degree")[0]


def test_other_weights_are_another_score(tmp_path):
    settings = stored.claim_everything(tmp_path)
    before = VBenchDimension("motion_smoothness", VBench(**settings)).parameters()
    assert json.loads(json.dumps(before)) == before
    FILES["amt"].find(tmp_path / "weights").write_bytes(b"others")
    assert VBenchDimension("motion_smoothness", VBench(**settings)).parameters() != before


def test_prompts_decide_which_dimensions_apply():
    entry = stored.inputs("a cat", meta=stored.suite_meta("a cat", "color", "dynamic_degree"))
    other = stored.inputs("a cat")

    def applying(preset: str, record: dict) -> list[str]:
        return [part.dimension for part in VBench(preset).parts() if part.applies(record)]

    assert applying("t2v", entry) == ["dynamic_degree", "color"]
    assert applying("mlperf6", entry) == ["dynamic_degree"]
    assert applying("t2v", other) == applying("i2v", entry) == []
    assert applying("custom", other) == list(QUALITY7)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="preset='all': choose t2v"):
        VBench("all")
    with pytest.raises(ValueError, match="device='gpu': choose cpu, cuda"):
        VBench(device="gpu")
    with pytest.raises(ValueError, match="chunk=0"):
        VBench(chunk=0)


CHUNK = """
import json, os, sys, time
from pathlib import Path
request = json.loads(sys.stdin.read())
parent = os.getppid()
calls = Path({calls!r})
done = calls.read_text() if calls.exists() else ""
calls.write_text(done + "x")
if len(done) == 1:
    {trouble}
rows = [{{"id": i["id"], "value": 0.9, "weight": 1}} for i in request["items"]]
print(json.dumps({{"ok": True, "rows": rows, "failed": {{}}, "aggregate": 0.9}}))
"""


CRASH = "sys.exit(0)"
HANG = "while os.getppid() == parent: time.sleep(0.01)"


def counting(folder: Path, trouble: str) -> tuple[Plan, Store, VBenchDimension, Path]:
    """Five stored videos and a worker of ours in vbench's place, for two at a time: it counts its
    calls in a file, and has trouble at the second."""
    settings = stored.claim_everything(folder)
    calls = folder / "calls"
    script = folder / "worker.py"
    script.write_text(CHUNK.format(calls=str(calls), trouble=trouble))
    python = Path(settings["python"])
    python.unlink()
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    python.chmod(0o755)
    store = Store(folder / "store")
    abouts = [stored.inputs(f"prompt {i}") for i in range(5)]
    for i, about in enumerate(abouts):
        stored.write(store, about, stored.clip(i, 5.0, frames=2, size=16))
    plan = Plan(tuple(stored.cell(about) for about in abouts))
    return plan, store, VBenchDimension("temporal_flickering", VBench(**settings, chunk=2)), calls


def values(plan: Plan, store: Store) -> list:
    return [record["values"] for cell in plan.cells for record in store.scores(cell.key)]


def test_a_crash_costs_one_chunk_and_the_next_run_makes_up_for_it(tmp_path):
    plan, store, part, calls = counting(tmp_path, CRASH)
    ticks: list[tuple[int, int]] = []
    with pytest.warns(UserWarning, match="could not judge 2 videos.*crashed"):
        score(plan, store, [part], lambda *tick: ticks.append(tick))
    assert calls.read_text() == "xxx" and ticks[-1] == (10, 10)
    assert [done for done, _ in ticks] == sorted(done for done, _ in ticks)

    score(plan, store, [part])
    assert calls.read_text() == "xxxx"
    assert values(plan, store) == [{"vbench_temporal_flickering": 0.9}] * 5
    score(plan, store, [part])
    assert calls.read_text() == "xxxx"


def test_a_killed_run_goes_on_at_the_chunk_that_was_lost(tmp_path):
    plan, store, part, calls = counting(tmp_path, HANG)
    run = multiprocessing.get_context("fork").Process(target=score, args=(plan, store, [part]))
    run.start()
    while run.is_alive() and not (calls.exists() and calls.read_text() == "xx"):
        time.sleep(0.01)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert values(plan, store) == [{"vbench_temporal_flickering": 0.9}] * 2

    score(plan, store, [part])
    assert calls.read_text() == "xxxx"
    assert values(plan, store) == [{"vbench_temporal_flickering": 0.9}] * 5


def test_image_to_video_is_compared_with_the_image_it_was_made_from(tmp_path):
    crop = tmp_path / "crop" / "7-4"
    crop.mkdir(parents=True)
    picture().convert("L").save(crop / "one.png")
    first = Prompt("", "", picture().convert("L").convert("RGB")).image_sha256
    meta = stored.suite_meta("a cat", "i2v_subject", image="one.png", ratio="7-4")
    meta["vbench"]["suite"] = "i2v"
    about = stored.inputs("a cat", meta=meta)
    about["request"]["image_sha256"] = first
    sample = stored.write(Store(tmp_path / "store"), about, stored.clip(0, 1.0))

    item = stage(sample, 0, tmp_path, VBench(images=str(tmp_path / "crop")))
    from PIL import Image

    assert Image.open(item["image"]).mode == "RGB"  # upstream takes what it gets
    picture().rotate(90).save(crop / "one.png")
    with pytest.raises(ValueError, match="not the image that the video was made from"):
        stage(sample, 1, tmp_path, VBench(images=str(tmp_path / "crop")))
    with pytest.raises(ValueError, match="metric.vbench.images: missing"):
        stage(sample, 2, tmp_path, VBench())


def test_a_video_that_cannot_be_staged_costs_no_other(tmp_path):
    _, store, part, calls = counting(tmp_path, CRASH)
    meta = stored.suite_meta("a cat", part.dimension, image="one.png", ratio="7-4")
    meta["vbench"]["suite"] = "i2v"
    animated = stored.write(store, stored.inputs("a cat", meta=meta), stored.clip(0, 1.0, 2, 16))
    plain = stored.write(store, stored.inputs("a dog"), stored.clip(0, 1.0, 2, 16))
    refused = "metric.vbench.images: missing, the folder that prompts.images names"
    assert part.batch([animated, plain]) == [refused, {part.name: 0.9}]
    crashed = part.batch([animated, plain])
    assert calls.read_text() == "xx" and crashed[0] == refused and "crashed" in crashed[1]


def test_doctor_tells_of_every_dimension(tmp_path, capsys):
    settings = stored.claim_everything(tmp_path)
    FILES["viclip"].find(tmp_path / "weights").unlink()
    overrides = [f"metric.vbench.{key}={value}" for key, value in settings.items()]
    cli.main(["doctor", "metric=[vbench]", *overrides])
    lines = {
        line.split()[1]: line.split(maxsplit=2)[2]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("vbench ")
    }
    assert set(DIMENSIONS) <= set(lines)
    assert lines["scene"].split() == ["ok", "ready"]
    assert "ViClip-InternVid-10M-FLT.pth" in lines["temporal_style"]
    assert "checkout" in lines["camera_motion"]


def test_an_interrupted_set_up_is_no_environment(tmp_path):
    settings = stored.claim_everything(tmp_path)
    python = Path(settings["python"])
    (python.parents[1] / "hsa-bench.json").unlink()
    assert Environment(python, tmp_path).mode is None
