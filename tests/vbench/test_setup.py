"""The set-up command says what it cannot do, and its locks are what was found to work."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.metrics.vbench import suite, weights
from analysis.metrics.vbench.environment import STAMP
from analysis.metrics.vbench.weights import WeightFile
from experiments import cli, setup
from experiments.errors import UserError


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["setup", "vbench"]),
        (["vbnch"], ["vbnch", "vbench"]),
        (["vbench", "tiny"], ["tiny", "small"]),
        (["vbench", "pyhton=x"], ["pyhton", "python="]),
        (["vbench", "python=/none/python3.11"], ["Python 3.11", "python="]),
        (["vbench", "small", "grit"], ["small", "no models"]),
    ],
)
def test_what_cannot_be_set_up_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["setup", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_not_cleared(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["setup", "vbench", "small", f"folder={tmp_path}"]) == 2
    assert "no virtual environment" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_environment_is_made_anew_once_its_interpreter_is_gone(tmp_path):
    lock = (setup.LOCKS / "requirements-small.lock").read_bytes()
    state = {"mode": "small", "lock_sha256": hashlib.sha256(lock).hexdigest()}
    (tmp_path / STAMP).write_text(json.dumps(state))
    (tmp_path / "pyvenv.cfg").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    setup.build(tmp_path, "small", python="/none/python")  # there is nothing to do
    python.unlink()
    python.symlink_to("/none/python")
    with pytest.raises(UserError, match="needs Python"):
        setup.build(tmp_path, "small", python="/none/python")


@pytest.mark.parametrize(
    "output, reason",
    [
        ("error: subprocess-exited-with-error\n  fatal: no such host\nnote: not pip's", "fatal"),
        ("ERROR: no matching distribution\nnote: more", "ERROR: no matching"),
        ("what else\n", "what else"),
    ],
)
def test_of_a_failed_command_the_line_that_says_why_is_shown(output, reason):
    script = f"import sys; sys.exit(sys.stderr.write({output!r}))"
    with pytest.raises(UserError, match=f"failed: {reason}"):
        setup._run([sys.executable, "-c", script])


def pins(name: str) -> dict[str, str]:
    lines = (setup.LOCKS / name).read_text().splitlines()
    return dict(re.split("={2,3}", line) for line in lines if not line.startswith("#"))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def test_the_full_lock_avoids_what_breaks_vbench():
    lock = pins("requirements.lock")
    assert lock["vbench"] == "0.1.5" and lock["transformers"] == "4.33.2"
    assert version(lock["setuptools"]) < (82,)  # later ones lack pkg_resources, which clip imports
    assert version(lock["numpy"]) < (2,)
    assert version(lock["timm"]) <= (1, 0, 12)
    assert version(lock["peft"]) < (0, 13)  # DreamSim beside this transformers
    assert version(lock["omegaconf"]) < (2, 4) and version(lock["iopath"]) < (0, 1, 10)
    assert "detectron2" not in lock  # compiled when asked for


def test_torchvision_is_the_one_for_torch():
    for lock in map(pins, ("requirements.lock", "requirements-small.lock")):
        assert (lock["torch"], lock["torchvision"]) == ("2.13.0", "0.28.0")
        assert lock["vbench"] == "0.1.5"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "hsa-bench" / "vbench"


def test_the_i2v_suite_is_downloaded_and_believed_by_its_hash(i2v_info, home, monkeypatch):
    about = suite.SUITES["i2v"]
    wrong = Path(__file__).as_uri()
    monkeypatch.setitem(suite.SUITES, "i2v", replace(about, url=wrong))
    assert cli.main(["setup", "vbench", "i2v"]) == 2 and not home.exists()
    monkeypatch.setitem(suite.SUITES, "i2v", replace(about, url=Path(i2v_info).as_uri()))
    assert cli.main(["setup", "vbench", "i2v"]) == 0
    assert (home / about.file).read_bytes() == Path(i2v_info).read_bytes()


def test_weights_are_downloaded_whole_or_not_at_all(home, monkeypatch, capsys):
    there, gone = (Path(__file__).as_uri(), Path(__file__).with_name("none").as_uri())
    files = {
        "one": WeightFile("a/one.pth", there),
        "zipped": WeightFile("b/two.pth", there, how="unzip it"),
        "bad": WeightFile("c/three.pth", there, sha256="0000"),
    }
    monkeypatch.setattr(weights, "FILES", files)
    assert cli.main(["setup", "vbench", "weights"]) == 1
    shown = capsys.readouterr().out
    assert (home / "a" / "one.pth").read_bytes() == Path(__file__).read_bytes()
    assert "unzip it" in shown and "not the published file" in shown
    assert not (home / "b" / "two.pth").exists() and not list(home.rglob("*.part"))

    monkeypatch.setattr(weights, "FILES", {"gone": WeightFile("d.pth", gone)})
    assert cli.main(["setup", "vbench", "weights"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
