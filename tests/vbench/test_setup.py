"""The set-up command says what it cannot do, and its locks are what was found to work."""

from __future__ import annotations

import re

import pytest

from experiments import cli, setup


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["setup", "vbench"]),
        (["vbnch"], ["vbnch", "vbench"]),
        (["vbench", "tiny"], ["tiny", "small"]),
        (["vbench", "pyhton=x"], ["pyhton", "python="]),
        (["vbench", "python=/none/python3.11"], ["Python 3.11", "python="]),
    ],
)
def test_what_cannot_be_set_up_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["setup", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words)
    assert not list(tmp_path.iterdir())


def pins(name: str) -> dict[str, str]:
    lines = (setup.LOCKS / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


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
