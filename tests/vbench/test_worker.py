"""The real vbench through the worker, and upstream's silences that must not be ours.

Starting the scorer takes seconds, so all that is asked of it is asked in three processes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from analysis.metrics.vbench import VBench
from analysis.metrics.vbench.environment import WORKER, Environment, ScorerError
from analysis.metrics.vbench.metric import VBenchDimension, stage
from experiments import video
from experiments.store import Store
from tests.vbench import stored

FLICKERING = "vbench_temporal_flickering"
FACADES = "In a still frame, the painted fa\N{LATIN SMALL LETTER C WITH CEDILLA}ades of a street"
PROMPTS = ("In a still frame, a stop sign", "a fantasy landscape", "A fantasy landscape", FACADES)


def flickering(frames: np.ndarray) -> float:
    """VBench's definition, on frames (F, H, W, 3) of any decoder, in float64."""
    return float((255 - np.abs(np.diff(frames.astype(np.float64), axis=0)).mean()) / 255)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list:
    """A video for every prompt, from still to noisy."""
    store = Store(tmp_path_factory.mktemp("store"))
    return [
        stored.write(
            store,
            stored.inputs(prompt, meta=stored.suite_meta(prompt, "temporal_flickering")),
            stored.clip(i, 12.0 * i),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def dimension(python, tmp_path_factory) -> VBenchDimension:
    weights = tmp_path_factory.mktemp("weights")
    return VBenchDimension("temporal_flickering", VBench("t2v", python, str(weights)))


@pytest.fixture(scope="module")
def ours(dimension, samples) -> dict[str, float]:
    """prompt -> value, scored in one process."""
    outcomes = dimension.batch(samples)
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    return {prompt: each[FLICKERING] for prompt, each in zip(PROMPTS, outcomes, strict=True)}


def test_values_are_the_formula_on_the_stored_frames(samples, ours):
    for sample in samples:
        prompt = sample.record["request"]["prompt"]
        assert ours[prompt] == pytest.approx(flickering(sample.frames()), abs=1e-7)
    assert list(ours.values()) == sorted(ours.values(), reverse=True)
    assert ours[PROMPTS[0]] == 1


@pytest.fixture(scope="module")
def upstream(python, samples, tmp_path_factory) -> dict:
    """What vbench makes of the same videos when it looks for files by itself."""
    root = tmp_path_factory.mktemp("upstream")
    info = root / "info.json"
    suite = [{"prompt_en": prompt, "dimension": ["temporal_flickering"]} for prompt in PROMPTS]
    info.write_text(json.dumps(suite))

    def folder(name: str) -> Path:
        (root / name).mkdir()
        for sample in samples:
            prompt = sample.record["request"]["prompt"]
            (root / name / f"{prompt}-0.mp4").symlink_to(sample.path.absolute() / "frames.mkv")
        return root / name

    standard, renamed, cut = map(folder, ("standard", "renamed", "cut"))
    (renamed / f"{FACADES}-0.mp4").rename(
        renamed / unicodedata.normalize("NFD", f"{FACADES}-0.mp4")
    )
    truncate(cut / f"{PROMPTS[1]}-0.mp4")
    runs = {path.name: {"folder": str(path), "mode": None} for path in (standard, renamed, cut)}
    runs["custom"] = {"folder": str(standard), "mode": "custom_input"}
    for run in runs.values():
        run["info"] = str(info)
    request = {"runs": runs, "out": str(root / "out"), "worker": str(WORKER.parent)}
    script = str(Path(__file__).with_name("upstream.py"))
    done = subprocess.run(
        [python, "-s", script], input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def truncate(link: Path, size: int = 300) -> None:
    """A copy of what a link points to that ends too early to be read."""
    data = link.read_bytes()[:size]
    link.unlink()
    link.write_bytes(data)


def test_standard_and_custom_mode_of_upstream_agree_with_us(upstream, ours):
    expected = {f"{prompt}-0.mp4": value for prompt, value in ours.items()}
    assert upstream["standard"]["rows"] == expected
    assert upstream["custom"]["rows"] == expected
    assert upstream["standard"]["value"] == pytest.approx(np.mean(list(ours.values())), abs=1e-12)


@pytest.fixture(scope="module")
def damaged(python, samples, tmp_path_factory) -> dict:
    """The reply to the same videos in another order, among some that cannot be scored."""
    folder = tmp_path_factory.mktemp("damaged")
    still = stored.inputs("a still", meta=stored.suite_meta("a still", "temporal_flickering"))
    single = stored.write(Store(folder / "store"), still, stored.clip(0, 5.0, frames=1))
    given = [*samples[::-1], samples[0], samples[1], single]
    items = [stage(sample, i, folder, VBench()) for i, sample in enumerate(given)]
    truncate(Path(items[4]["video"]))
    Path(items[5]["video"]).unlink()
    return Environment(Path(python), folder / "weights").score("temporal_flickering", items)


def test_the_order_of_videos_does_not_matter(damaged, ours):
    assert [row["value"] for row in damaged["rows"]] == list(ours.values())[::-1]


def test_a_file_renamed_to_nfd_is_lost_upstream_and_not_here(upstream, samples, tmp_path, ours):
    """macOS and rsync do that; upstream's mean silently is of fewer videos."""
    assert len(upstream["renamed"]["rows"]) == len(PROMPTS) - 1
    assert FACADES in ours
    item = stage(samples[-1], 0, tmp_path, VBench())
    assert unicodedata.is_normalized("NFC", item["video"])


def test_truncated_and_missing_videos_are_lost_upstream_and_errors_here(upstream, damaged):
    assert len(upstream["cut"]["rows"]) == len(PROMPTS) - 1
    assert damaged["failed"]["4"] == "0 of 6 frames are readable"
    assert damaged["failed"]["5"] == "no such file"


def test_a_video_of_one_frame_is_an_error_instead_of_nan(damaged):
    assert damaged["failed"]["6"] == "vbench returned nan"
    assert [row["id"] for row in damaged["rows"]] == ["0", "1", "2", "3"]


IMAGEIO = """
import sys, imageio_ffmpeg
source, target = sys.argv[1:]
writer = imageio_ffmpeg.write_frames(
    target, (40, 40), fps=8, quality=5, macro_block_size=16, output_params=["-threads", "1"]
)
writer.send(None)
data = open(source, "rb").read()
for i in range(0, len(data), 40 * 40 * 3):
    writer.send(data[i : i + 40 * 40 * 3])
writer.close()
"""


def test_the_encoder_of_diffusers_is_imageios(python, tmp_path):
    """`export_to_video` calls imageio with these settings; MLPerf scores what comes out."""
    sample = stored.write(Store(tmp_path / "store"), stored.inputs("a"), stored.clip(0, 9.0, 6, 40))
    settings = VBench(python=python, encoder="export_to_video")
    ours, again = (Path(stage(sample, i, tmp_path, settings)["video"]) for i in range(2))
    assert ours.read_bytes() == again.read_bytes()

    raw, theirs = tmp_path / "frames.rgb", tmp_path / "imageio.mp4"
    raw.write_bytes(sample.frames().tobytes())
    subprocess.run([python, "-c", IMAGEIO, str(raw), str(theirs)], check=True)
    assert video.decode(ours).shape == (6, 48, 48, 3)
    np.testing.assert_array_equal(video.decode(ours), video.decode(theirs))
    assert settings.encoding == "ffmpeg -vcodec libx264 -pix_fmt yuv420p -crf 25"


def test_what_else_lies_in_a_folder_does_not_matter(samples, tmp_path):
    """Upstream takes every video's suffix from the first name that the folder lists."""
    (samples[0].path / ".DS_Store").touch()
    item = stage(samples[0], 0, tmp_path, VBench())
    assert (samples[0].path / "record.json").is_file()
    assert Path(item["video"]).resolve() == (samples[0].path / "frames.mkv").resolve()
    assert Path(item["video"]).name == f"{PROMPTS[0]}-0.mp4"


def test_prompts_that_differ_in_case_only_do_not_meet(samples, tmp_path):
    videos = [
        stage(sample, i, tmp_path, VBench())["video"] for i, sample in enumerate(samples[1:3])
    ]
    assert len({path.lower() for path in videos}) == 2


def test_lossless_frames_are_read_with_their_rate(tmp_path):
    """What `dynamic_degree` subsamples by is the rate in the file."""
    for fps in (8, 16, 24, 25):
        (tmp_path / "frames.mkv").write_bytes(video.encode_lossless(stored.clip(0, 9.0), fps))
        with av.open(str(tmp_path / "frames.mkv")) as container:
            assert container.streams.video[0].average_rate == fps


# What follows needs no scorer environment: the worker is an ordinary Python file.


def fake(folder: Path, script: str) -> Environment:
    """An environment whose interpreter is a shell script."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
    python.chmod(0o755)
    return Environment(python, folder / "weights")


@pytest.mark.parametrize("script", ["echo boom >&2; exit 0", "echo boom >&2; kill -9 $$"])
def test_a_crash_is_an_error_whatever_the_exit_code(script, tmp_path):
    """`vbench evaluate` ends with 0 when it crashed."""
    with pytest.raises(ScorerError, match="crashed: the worker ended with .*boom"):
        fake(tmp_path, script).score("temporal_flickering", [])


def test_an_interpreter_that_does_not_start_is_an_error_of_the_chunk(tmp_path):
    environment = fake(tmp_path, "exit 0")
    environment.python.chmod(0o644)
    with pytest.raises(ScorerError, match="not_installed: .*Permission denied"):
        environment.score("temporal_flickering", [])


WATCH = """
import os, sys
sys.path.insert(0, sys.argv[1])
import worker
parent = os.getpid()
if os.fork() == 0:
    print("watching", flush=True)
    worker.die_with(parent)
os.wait()
"""


def test_the_worker_of_a_killed_run_ends_too():
    command = [sys.executable, "-c", WATCH, str(WORKER.parent)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "watching\n"
    run.kill()
    assert run.stdout.read() == ""  # which both held open
    run.wait()


def test_an_error_of_the_worker_has_its_code(tmp_path):
    reply = json.dumps({"ok": False, "code": "dimension_failed", "message": "out of\nmemory"})
    with pytest.raises(ScorerError, match="dimension_failed: out of memory") as caught:
        fake(tmp_path, f"cat <<'E'\n{reply}\nE").score("scene", [])
    assert caught.value.code == "dimension_failed"


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("vbench_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_of_the_captioner_are_not_nothing_found(worker):
    """object_class has a bare `except` around it: with nms missing it scored 0.0."""

    class DenseCaptioning:
        def run_caption_tensor(self, image):
            if image is None:
                raise RuntimeError("operator torchvision::nms does not exist")
            return [], image

    module = SimpleNamespace(DenseCaptioning=DenseCaptioning)
    errors = worker.watch_captioner(module)
    captioner = module.DenseCaptioning()
    assert captioner.run_caption_tensor("frame") == ([], "frame") and errors == []
    with pytest.raises(RuntimeError):
        captioner.run_caption_tensor(None)
    assert errors == ["RuntimeError: operator torchvision::nms does not exist"]


def test_rows_add_up_to_upstreams_aggregate_or_the_chunk_fails(worker):
    rows = [{"value": 0.5, "weight": 3}, {"value": 0.9, "weight": 1}, {"value": None, "weight": 0}]
    worker.check_sum(rows, 0.6)
    with pytest.raises(worker.Failure, match="rows average 0.6.*, vbench says 0.7"):
        worker.check_sum(rows, 0.7)


@pytest.mark.parametrize(
    "dimension, result, row",
    [
        ("subject_consistency", {}, (0.5, 8)),
        ("background_consistency", {"cnt_per_video": 8}, (0.5, 8)),
        ("appearance_style", {"frame_results": [0.5] * 9, "cur_sim": 0.1}, (0.5, 9)),
        ("spatial_relationship", {"frame_results": [0.5] * 16}, (0.5, 16)),
        ("object_class", {"frame_count": 16, "success_frame_count": 8}, (0.5, 16)),
        ("human_action", {"cor_num_per_video": 1}, (0.5, 1)),
        ("imaging_quality", {}, (0.005, 1)),
    ],
)
def test_each_dimension_weighs_videos_as_upstream_does(worker, dimension, result, row):
    item = {"id": "a", "video": "/v.mp4", "frames": 9}
    given = [{"video_path": "/v.mp4", "video_results": 0.5, **result}]
    rows, lost = worker.read(dimension, [item], given)
    assert rows == [{"id": "a", "value": row[0], "weight": row[1]}] and not lost


def test_a_video_without_result_is_lost_but_for_a_colour_of_nothing(worker):
    item = {"id": "a", "video": "/v.mp4", "frames": 9}
    assert worker.read("scene", [item], []) == ([], {"a": "vbench returned no result"})
    assert worker.read("color", [item], []) == ([{"id": "a", "value": None, "weight": 0}], {})


def test_a_chunk_without_any_object_in_colour_is_no_failure(worker):
    """Upstream divides by the number of videos in which it found the object."""

    def fail(*_):
        return 0 / 0

    module = SimpleNamespace(compute_color=fail, compute_scene=fail)
    aggregate, rows = worker.compute(module, "color", "", None, "cpu")
    assert math.isnan(aggregate) and rows == []
    with pytest.raises(ZeroDivisionError):
        worker.compute(module, "scene", "", None, "cpu")


@pytest.mark.parametrize(
    "attempt",
    [
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/x')",
        "import subprocess; subprocess.run(['wget', 'http://127.0.0.1:9/x'])",
        "import subprocess; subprocess.run('git clone http://127.0.0.1:9/x', shell=True)",
    ],
)
def test_offline_nothing_is_downloaded(attempt, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(WORKER.parent)!r})
from pathlib import Path
import worker
worker.prepare("scene", Path({str(tmp_path)!r}), True)
try:
    {attempt}
except Exception as error:
    print("offline" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
