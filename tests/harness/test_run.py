"""The whole command on a real, tiny pipeline: what is stored, resumed, repaired and refused."""

import json
import os
import resource
import shutil
import signal
import time
from multiprocessing import get_context

import numpy as np
import pytest

from experiments.execute import Worker
from experiments.store import Store
from tests import pipelines
from tests.harness.helpers import TINY, files, hashes, hsa_bench, tiny_plan

UNLOADABLE = "model.load={_target_: tests.harness.tiny.refuse}"
QUICK = ["metric=[]", "timing.repeats=0"]
fork = get_context("fork")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Results of one complete run; tests that change them take a copy."""
    results = tmp_path_factory.mktemp("finished")
    assert hsa_bench("run", results, TINY) == 0
    return results


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "results")


def test_a_run_stores_every_cell_and_reports(finished):
    store, cells = Store(finished / "store"), tiny_plan().cells
    assert hashes(store).keys() == {cell.key for cell in cells}
    assert len({cell.label for cell in cells}) == 4 and len(cells) == 8
    for name in ("table.md", "table.csv", "frontier.png", "frontier.svg", "index.html"):
        assert (finished / "tiny" / name).stat().st_size > 0
    assert all(label in (finished / "tiny/table.md").read_text() for label in ("FM T=2", "HSA"))
    page = (finished / "tiny/index.html").read_text()
    assert "Published figures, not ours" in page and "Where the methods come from" in page


def test_stored_frames_are_those_of_plain_diffusers(finished):
    """The reference cell equals a call of the pipeline that knows nothing of the harness."""
    from hsa.schedulers import euler

    cell = tiny_plan().cells[0]
    assert cell.key == cell.reference_key
    pipe = pipelines.wan_t2v()
    arguments = pipelines.inputs(
        pipe,
        seed=0,
        steps=4,
        prompt="a red circle",
        max_sequence_length=cell.request.max_sequence_length,
        output_type="np",
    )
    with euler(pipe):
        frames = pipe(**arguments).frames[0]
    stored = Store(finished / "store").sample(cell.key)
    np.testing.assert_array_equal(stored.frames(), (frames * 255).round().astype(np.uint8))


def test_a_record_says_how_it_came_about(finished):
    store = Store(finished / "store")
    hsa = next(cell for cell in tiny_plan().cells if cell.label == "HSA")
    sample = store.sample(hsa.key)
    record, result = sample.record, sample.record["result"]
    assert record["method"]["name"] == "hsa"
    assert record["method"]["params"]["budgets"] == [4, 2]
    assert record["schedule"] == {"steps": 4}
    assert record["request"]["prompt"] == "a red circle"
    assert 0 < result["active_fraction"] <= 1
    assert result["timing"].keys() == {"text_s", "denoise_s", "decode_s"}
    assert min(result["timing"].values()) > 0
    assert len(result["trace"]["records"]["step"]) == 2 * 4  # with and without the prompt
    assert sample.latents().shape == (16, 3, 8, 8)
    assert sample.arrays["allocation"].shape == sample.arrays["velocity_change"].shape == (3, 4, 4)
    provenance = record["provenance"]
    assert provenance["config"]["method"]["budgets"] == [4, 2]
    assert provenance["versions"]["torch"] and provenance["machine"]
    assert provenance["started"] <= provenance["finished"]


def test_runtime_is_measured_apart_and_once(copied):
    store = Store(copied / "store")
    first = [cell for cell in tiny_plan().cells if cell.request.prompt == "a red circle"]
    assert all(len(store.timings(cell.key)) == 1 for cell in first)
    assert hsa_bench("run", copied, TINY, "timing.repeats=3") == 0
    assert all(len(store.timings(cell.key)) == 3 for cell in first)
    assert sum(1 for _ in store.root.glob("timings/*/*/*.json")) == 3 * len(first)


def test_the_second_run_makes_nothing(finished, capsys):
    before = files(finished / "store")
    assert hsa_bench("run", finished, TINY, UNLOADABLE) == 0
    assert files(finished / "store") == before
    assert "all cached" in capsys.readouterr().out


def test_analysis_alone_writes_no_samples(copied, capsys):
    shutil.rmtree(copied / "tiny")
    before = files(copied / "store")
    for command in ("score", "report"):
        assert hsa_bench(command, copied, TINY, UNLOADABLE) == 0
    assert files(copied / "store") == before
    assert str(copied / "tiny" / "index.html") in capsys.readouterr().out


def test_shards_score_the_whole(copied):
    store = Store(copied / "store")
    whole = scored(store)
    shutil.rmtree(store.root / "scores")
    shares = []
    for index in range(2):
        share = ["engine=shard", f"shard={index}/2"]
        assert hsa_bench("score", copied, TINY, UNLOADABLE, *share) == 0
        shares.append(scored(store) - set().union(*shares))
    assert all(shares) and set().union(*shares) == whole


def scored(store: Store) -> set[str]:
    return {path.parent.name for path in (store.root / "scores").rglob("*.json")}


def test_a_wider_grid_keeps_what_is_there(copied):
    before = files(copied / "store" / "samples")
    wider = "prompts.texts=[a red circle, a blue star, a green square]"
    assert hsa_bench("run", copied, TINY, wider, *QUICK) == 0
    after = files(copied / "store" / "samples")
    assert before.items() <= after.items()
    assert len(hashes(Store(copied / "store"))) == 12


def test_a_sweep_is_a_grid_in_one_process(finished, tmp_path, capsys):
    sweep = [
        "method=hsa",
        "method.budgets=[4,2]",
        "method.warmup_steps=2",
        "method.thresholds=[0.1],[0.9]",
    ]
    assert hsa_bench("plan", tmp_path, "-m", TINY, "grid=[{}]", *sweep) == 0
    shown = capsys.readouterr().out
    assert "hsa budgets=[4,2] warmup_steps=2 thresholds=[0.1]" in shown
    assert "6 videos, 0 cached, 6 to make" in shown  # two thresholds and the reference, two prompts


def test_both_tasks_and_prompts_of_a_file(tmp_path):
    pipelines.picture().save(tmp_path / "first.png")
    lines = [
        {"text": "a/../b \N{GRINNING FACE} \\ ? *", "image": "first.png"},
        {"text": "x" * 10_000, "image": "first.png", "id": "long", "meta": {"colour": "red"}},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    prompts = ["prompts=file", f"prompts.path={file}"]
    grid = ["model=tiny", "schedule.steps=2", "tasks=[t2v, i2v]", *prompts, *QUICK]
    assert hsa_bench("run", tmp_path / "results", *grid) == 0
    samples = list(Store(tmp_path / "results/store").samples())
    assert len(samples) == 4
    requests = [sample.record["request"] for sample in samples]
    assert {request["task"] for request in requests} == {"t2v", "i2v"}
    assert {request["prompt"] for request in requests} == {line["text"] for line in lines}
    assert sum(request["meta"] == {"colour": "red"} for request in requests) == 2
    assert all(
        (request["image_sha256"] is None) == (request["task"] == "t2v") for request in requests
    )


def _harm(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["frames.mkv", "arrays.safetensors", "record.json"])
def test_an_altered_file_is_found_and_made_again(copied, name, capsys):
    store = Store(copied / "store")
    before = hashes(store)
    key = tiny_plan().cells[-1].key
    path = store.sample_dir(key) / name
    _harm(path)
    assert hsa_bench("verify", copied, TINY) == 1
    assert key in capsys.readouterr().out
    assert hsa_bench("run", copied, TINY, *QUICK) == 0
    assert hashes(store) == before
    assert hsa_bench("verify", copied, TINY) == 0


def test_run_itself_repairs_a_truncated_file(copied):
    store = Store(copied / "store")
    before = hashes(store)
    path = store.sample_dir(tiny_plan().cells[0].key) / "frames.mkv"
    os.truncate(path, 100)
    assert hsa_bench("run", copied, TINY, *QUICK) == 0
    assert hashes(store) == before


def test_a_failure_is_recorded_and_tried_again(tmp_path, capsys):
    grid = [TINY, "grid=[{method: breaking}]", *QUICK]
    store = Store(tmp_path / "store")
    assert hsa_bench("run", tmp_path, *grid) == 1
    assert "RuntimeError: velocity is not finite" in capsys.readouterr().out
    (cell,) = [cell for cell in tiny_plan(grid[1]).cells if not store.has(cell.key)]
    assert (cell.label, cell.request.prompt) == ("breaking", "a blue star")
    (failure,) = store.failures(cell.key)
    assert failure["error"] == "velocity is not finite" and "Traceback" in failure["traceback"]
    assert hsa_bench("run", tmp_path, *grid) == 1
    assert len(store.failures(cell.key)) == 2
    assert len(hashes(store)) == 3


def test_a_setting_without_any_video_is_named_in_the_table(tmp_path):
    grid = [TINY, "grid=[{}, {method: breaking}]", "prompts.texts=[a blue star]", *QUICK]
    assert hsa_bench("run", tmp_path, *grid, "metric=[psnr]") == 1
    assert "Without any video: breaking (t2v)." in (tmp_path / "tiny/table.md").read_text()


def _run(results, *overrides):
    """In a forked process, with nothing on the terminal."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(hsa_bench("run", results, TINY, *QUICK, *overrides))


def _start(results, *overrides):
    process = fork.Process(target=_run, args=(results, *overrides))
    process.start()
    return process


MANY = "prompts.texts=[" + ", ".join(f"circle {i}" for i in range(30)) + "]"


def test_killed_at_any_moment_a_grid_comes_out_as_if_never_interrupted(tmp_path):
    """kill -9 thirty times: while starting, and between and within videos; then it finishes."""
    results, random = tmp_path / "killed", np.random.default_rng(0)
    store, seen = Store(results / "store"), {}
    for attempt in range(30):
        before, process = len(hashes(store)), _start(results, MANY)
        if attempt % 3:
            while len(hashes(store)) == before and process.is_alive():
                time.sleep(0.005)
        time.sleep(random.uniform(0, 0.03 if attempt % 3 else 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = files(store.root / "samples")
        assert seen.items() <= now.items()
        assert list(store.verify()) == []
        seen = now
    assert len(hashes(store)) >= 20

    assert hsa_bench("run", results, TINY, *QUICK, MANY) == 0
    assert hsa_bench("run", tmp_path / "alone", TINY, *QUICK, MANY) == 0
    assert hashes(store) == hashes(Store(tmp_path / "alone/store"))
    assert hashes(store).keys() == {cell.key for cell in tiny_plan(MANY).cells}
    assert seen.items() <= files(store.root / "samples").items()
    assert not list((store.root / ".tmp").iterdir())


def test_two_runs_share_a_store(finished, tmp_path):
    both = [_start(tmp_path) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert hashes(Store(tmp_path / "store")) == hashes(Store(finished / "store"))
    assert hsa_bench("verify", tmp_path, TINY) == 0


def test_shards_make_the_whole(finished, tmp_path, capsys):
    store, shards = Store(tmp_path / "store"), []
    for index in range(3):
        share = ["engine=shard", f"shard={index}/3"]
        assert hsa_bench("run", tmp_path, TINY, *share) == 0
        shards.append(hashes(store).keys() - set().union(*shards))
    assert hashes(store) == hashes(Store(finished / "store"))
    assert sum(map(bool, shards)) > 1
    assert not list(store.root.glob("timings/*/*/*.json"))
    assert "shard 2/3 is done" in capsys.readouterr().out


def test_worker_processes_make_the_same_videos(finished, tmp_path, monkeypatch):
    """Spawned workers import the class anew; this process has lost the means to make one."""
    monkeypatch.delattr(Worker, "make")
    assert hsa_bench("run", tmp_path, TINY, "engine=procs", *QUICK) == 0
    assert hashes(Store(tmp_path / "store")) == hashes(Store(finished / "store"))


def test_a_full_disk_is_one_line_and_loses_nothing(finished, tmp_path, capsys):
    """A limit on file size between that of the small and the large files of a sample."""
    assert hsa_bench("run", tmp_path, TINY, "limit=1", *QUICK) == 0
    store = Store(tmp_path / "store")
    before = files(store.root / "samples")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        capsys.readouterr()
        assert hsa_bench("run", tmp_path, TINY, *QUICK) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    message = capsys.readouterr().err
    assert "cannot write" in message and "intact" in message and message.count("\n") == 1
    assert files(store.root / "samples") == before
    assert hsa_bench("run", tmp_path, TINY, *QUICK) == 0
    assert hashes(store) == hashes(Store(finished / "store"))


def test_a_read_only_place_is_one_line_before_the_model(tmp_path, capsys):
    """/proc is read-only for root too."""
    assert hsa_bench("run", "/proc/results", TINY, UNLOADABLE) == 2
    message = capsys.readouterr().err
    assert "/proc/results" in message and message.count("\n") == 1


def test_calibrate_prints_constants_for_the_models_yaml(tmp_path, capsys):
    """On random weights the numbers mean nothing; they are those of the method's own fit."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    arguments = ["model=tiny", "schedule.steps=8", "prompts=texts", "prompts.texts=[a circle]"]
    assert hsa_bench("calibrate", tmp_path, *arguments, "method=teacache") == 0
    shown = capsys.readouterr().out
    (found,) = OmegaConf.create(shown).constants.values()
    assert len(found.coefficients) == 5 and shown.startswith("# r2: ")
    fitted = {"_target_": "baselines.teacache.TeaCache", "threshold": 0.1}
    instantiate(fitted, **found)
    assert hsa_bench("calibrate", tmp_path, *arguments, "method=magcache") == 0  # none are known
    found = OmegaConf.create(capsys.readouterr().out)
    assert {*found.constants.magcache.ratios} == {"cond", "uncond"}
    assert hsa_bench("calibrate", tmp_path, *arguments, "-m", "method=teacache,magcache") == 2
    assert "calibrate fits one method, not teacache" in capsys.readouterr().err
    assert hsa_bench("calibrate", tmp_path, *arguments) == 2
    assert "flow_matching has nothing to calibrate" in capsys.readouterr().err
