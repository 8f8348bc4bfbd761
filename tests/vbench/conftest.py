"""The scorer environment and the suites, where this machine can have them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from analysis.metrics.vbench import VBench
from analysis.metrics.vbench.environment import Environment
from analysis.metrics.vbench.suite import _installed
from analysis.metrics.vbench.weights import DEFAULT_FOLDER
from experiments import setup
from experiments.errors import UserError

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("VBENCH_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def python() -> str:
    """Interpreter of a scorer environment: the user's, else a small one that is kept in build/."""
    mine = ROOT / ".venv-vbench"
    if Environment(mine / "bin" / "python", mine).mode:
        return str(mine / "bin" / "python")
    made = ROOT / "build" / "venv-vbench-small"
    made.parent.mkdir(exist_ok=True)
    lock = open(made.with_suffix(".lock"), "w")  # the processes of pytest-xdist make one
    with lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("PIP_RETRIES", "0")  # a registry that does not answer is not there
        patch.setenv("PIP_DEFAULT_TIMEOUT", "20")
        try:
            setup.build(made, "small")
        except UserError as error:
            pytest.skip(f"no scorer environment (`make vbench`), and none could be made: {error}")
    return str(made / "bin" / "python")


@pytest.fixture
def vbench(python, tmp_path) -> VBench:
    return VBench(python=python, weights=str(tmp_path / "weights"))


@pytest.fixture(scope="session")
def t2v_info(request) -> str:
    """VBench's own prompt file, which its package has."""
    found = DATA / "VBench_full_info.json"
    return str(found if found.is_file() else _installed(request.getfixturevalue("python")))


@pytest.fixture(scope="session")
def i2v_info() -> str:
    name = "vbench2_i2v_full_info.json"
    found = (DATA / name, Path(DEFAULT_FOLDER).expanduser() / name)
    there = next((path for path in found if path.is_file()), None)
    if there is None:
        pytest.skip(f"{name} comes with `hsa-bench setup vbench i2v`")
    return str(there)
