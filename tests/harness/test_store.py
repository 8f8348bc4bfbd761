"""The store keeps what it was given, and says so when something is not."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from experiments import video
from experiments.cell import canonical_json, content_key
from experiments.store import Store, StoreError
from tests.harness.helpers import files, hashes, write


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_key_is_a_hash_of_the_meaning():
    # printf '%s' '{"a":[1,0.5,null],"b":"\u00e9"}' | sha256sum
    golden = "0cd028332595"
    value = {"b": "é", "a": (1.0, 0.5, None)}
    assert canonical_json(value) == '{"a":[1,0.5,null],"b":"\\u00e9"}'
    assert content_key(value).startswith(golden)
    assert content_key(value) == content_key({"a": [1, 0.5, None], "b": "é"})
    assert content_key(value) != content_key({"a": [1, 0.5, 0], "b": "é"})
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


@pytest.mark.parametrize("shape", [(3, 16, 16, 3), (1, 8, 8, 3), (5, 33, 47, 3)])
def test_frames_survive_bit_for_bit(shape, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = video.encode_lossless(frames, fps=8)
    (tmp_path / "frames.mkv").write_bytes(data)
    np.testing.assert_array_equal(video.decode(tmp_path / "frames.mkv"), frames)
    assert data == video.encode_lossless(frames, fps=8)
    assert video.encode_preview(frames, fps=8)


def test_a_sample_is_what_was_written(store):
    frames = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    arrays = {
        "latents": np.random.default_rng(2).normal(size=(4, 3, 2, 2)).astype(np.float32),
        "allocation": np.arange(12, dtype=np.int8).reshape(3, 2, 2),
    }
    inputs = {
        "method": {"params": {"threshold": 0.1}},
        "request": {"prompt": "a/b \N{GRINNING FACE}"},
    }
    written = store.write_sample(inputs, frames, arrays, 8, {"active_fraction": 0.5}, {"who": "me"})

    assert written.key == content_key(inputs)
    assert store.has(written.key)
    read = Store(store.root).sample(written.key)
    np.testing.assert_array_equal(read.frames(), frames)
    np.testing.assert_array_equal(read.latents(), arrays["latents"])
    np.testing.assert_array_equal(read.arrays["allocation"], arrays["allocation"])
    assert read.record["request"] == inputs["request"]
    assert read.record["result"]["active_fraction"] == 0.5
    assert read.record["result"]["shape"] == [3, 16, 16, 3]
    assert read.record["provenance"] == {"who": "me"}
    assert list(store.verify()) == []
    assert not list((store.root / ".tmp").iterdir())


def test_the_first_writer_stays(store):
    key = write(store, 0)
    before = files(store.root)
    write(store, 0)
    assert files(store.root) == before
    assert [sample.key for sample in store.samples()] == [key]


def _write_all(root, numbers):
    store = Store(root)
    for number in numbers:
        write(store, number)


def test_many_writers_share_a_store(store):
    """Three processes write the same twelve samples, each in its own order."""
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        orders = [np.random.default_rng(i).permutation(12).tolist() for i in range(3)]
        for future in [pool.submit(_write_all, store.root, order) for order in orders]:
            future.result()
    alone = Store(store.root.parent / "alone")
    _write_all(alone.root, range(12))
    assert hashes(store) == hashes(alone)
    assert list(store.verify()) == []
    assert not list((store.root / ".tmp").iterdir())


def test_killed_writers_leave_whole_records_or_none(store):
    """kill -9 at forty random moments of writing; every sample comes out once and unharmed."""
    delays = np.random.default_rng(0).uniform(0, 0.06, 40)
    process = get_context("fork").Process
    for delay in delays:
        writer = process(target=_write_all, args=(store.root, range(40)))
        writer.start()
        writer.join(delay)
        writer.kill()
        writer.join()
        assert list(store.verify()) == []
    store.clean()
    assert not list((store.root / ".tmp").iterdir())

    _write_all(store.root, range(40))
    alone = Store(store.root.parent / "alone")
    _write_all(alone.root, range(40))
    assert hashes(store) == hashes(alone)


def test_what_another_machine_writes_is_left_alone(store):
    """The name of one host may begin like another's; pids of both mean nothing to each other."""
    gone, here = 2**22 + 1, socket.gethostname()  # above the largest pid
    folders = [store.root / ".tmp" / f"{host}-{gone}-abc" for host in (here, f"{here}-2")]
    for folder in folders:
        folder.mkdir(parents=True)
    store.clean()
    assert [folder.exists() for folder in folders] == [False, True]


def _truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, (0, 0))  # on many file systems time passes in steps


@pytest.mark.parametrize("name", ["record.json", "frames.mkv", "arrays.safetensors", "preview.mp4"])
@pytest.mark.parametrize("harm", [_truncate, _flip, os.remove], ids=lambda harm: harm.__name__)
def test_damage_is_found_and_mended(store, name, harm):
    whole, key = write(store, 1), write(store, 2)
    before = hashes(store)
    harm(store.sample_dir(key) / name)

    assert store.damage(key)
    assert store.damage(whole) is None
    (problem,) = store.verify()
    assert problem.path == store.sample_dir(key)
    store.quarantine(problem.path)
    assert not store.has(key)
    write(store, 2)
    assert list(store.verify()) == []
    assert hashes(store) == before


def test_a_writer_replaces_a_damaged_sample(store):
    key = write(store, 1)
    os.remove(store.sample_dir(key) / "record.json")
    write(store, 1)
    assert list(store.verify()) == []


def test_altered_files_are_found_even_with_their_old_time(store):
    key = write(store, 1)
    path = store.sample_dir(key) / "frames.mkv"
    time = path.stat().st_mtime_ns
    _flip(path)
    os.utime(path, ns=(time, time))
    assert len(list(store.verify())) == 1


def test_records_cannot_be_exchanged(store):
    one, other = write(store, 1), write(store, 2)
    shutil.rmtree(store.sample_dir(other))
    shutil.copytree(store.sample_dir(one), store.sample_dir(other))
    assert "another key" in store.damage(other)


def test_a_copy_is_as_good_as_the_original(store, tmp_path):
    """rsync without times: sizes agree, times do not, contents decide."""
    key = write(store, 1)
    copy = Store(tmp_path / "copy")
    for path in store.root.rglob("*"):
        if path.is_file():
            target = copy.root / path.relative_to(store.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert copy.damage(key) is None
    assert hashes(copy) == hashes(store)


def test_altered_frames_are_never_handed_out(store):
    key = write(store, 1)
    other = write(store, 2)
    shutil.copy(store.sample_dir(other) / "frames.mkv", store.sample_dir(key) / "frames.mkv")
    with pytest.raises(StoreError, match=r"frames\.mkv: altered"):
        store.sample(key).frames()


def test_scores_belong_to_frames(store):
    key, reference = write(store, 1), write(store, 2)
    store.write_score(key, "psnr", 1, {"ceiling": 100.0}, reference, {"psnr": 30.5})
    store.write_score(key, "psnr", 1, {"ceiling": 100.0}, reference, {"psnr": 31.5})
    store.write_score(key, "lpips", 1, {}, reference, None, "no weights")
    scores = {score["metric"]: score for score in store.scores(key)}
    assert scores["psnr"]["values"] == {"psnr": 31.5}
    assert scores["psnr"]["params"] == {"ceiling": 100}
    assert scores["lpips"]["values"] is None and scores["lpips"]["error"] == "no weights"

    store.quarantine(store.sample_dir(reference))
    assert store.scores(key) == []
    write(store, 2)
    assert len(store.scores(key)) == 2


def test_timings_are_appended_per_machine(store):
    for seconds in (1.5, 2.5):
        store.write_timing("ab12", "CPU @ 2/3 GHz", {"denoise_s": seconds})
    store.write_timing("ab12", "GPU", {"denoise_s": 0.5})
    timings = store.timings("ab12")
    assert sorted(timing["denoise_s"] for timing in timings) == [0.5, 1.5, 2.5]
    assert {timing["machine"] for timing in timings} == {"CPU @ 2/3 GHz", "GPU"}
    assert [timing["denoise_s"] for timing in store.timings("ab12", "GPU")] == [0.5]


def test_altered_small_records_do_not_count(store):
    store.write_timing("ab12", "GPU", {"denoise_s": 0.5})
    (path,) = store.root.glob("timings/*/*/*.json")
    path.write_text(path.read_text().replace("0.5", "0.1"))
    assert store.timings("ab12") == []
    assert [problem.path for problem in store.verify()] == [path]


def test_a_failure_is_not_a_sample(store):
    store.write_failure("ab12", {"error": "velocity is not finite"})
    assert not store.has("ab12")
    assert list(store.samples()) == []
    assert [failure["error"] for failure in store.failures("ab12")] == ["velocity is not finite"]


def test_disk_full_loses_nothing(store):
    """A limit on file size is the disk-full error that needs no disk of its own."""
    key = write(store, 1)
    before = files(store.root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        with pytest.raises(StoreError, match="cannot write .* is intact") as failure:
            write(store, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert failure.value.__cause__.errno == errno.EFBIG
    assert "\n" not in str(failure.value)
    assert files(store.root) == before
    assert hashes(store).keys() == {key}
    write(store, 2)
    assert list(store.verify()) == []


def test_a_place_that_cannot_be_written_is_named():
    """/proc is read-only for everybody, root included."""
    store = Store("/proc/results/store")
    with pytest.raises(StoreError, match="store=/proc/results/store: cannot write"):
        store.require_writable()
    with pytest.raises(StoreError, match="cannot write"):
        write(store, 1)


def test_patches_are_stored_once(store):
    first = store.write_patch("diff\n+é\n")
    assert store.write_patch("diff\n+é\n") == first
    assert (store.root / "patches" / f"{first}.diff").read_text(encoding="utf-8") == "diff\n+é\n"


def test_records_are_plain_json(store):
    key = write(store, 1)
    record = json.loads((store.sample_dir(key) / "record.json").read_text())
    assert record == store.sample(key).record
