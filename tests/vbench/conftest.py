"""The scorer environment and the suites, where this machine can have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from analysis.metrics.vbench import VBench
from analysis.metrics.vbench.environment import Environment
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
    with pytest.MonkeyPatch.context() as patch:  # a registry that does not answer is not there
        patch.setenv("PIP_RETRIES", "0")
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
def t2v_info() -> str:
    """VBench's own prompt file."""
    found = [DATA / "VBench_full_info.json"]
    found += ROOT.glob(".venv-vbench/lib/python*/site-packages/vbench/VBench_full_info.json")
    return _first(found, "VBench_full_info.json comes with `make vbench`")


@pytest.fixture(scope="session")
def i2v_info() -> str:
    name = "vbench2_i2v_full_info.json"
    found = [DATA / name, Path("~/.cache/hsa-bench/vbench").expanduser() / name]
    return _first(found, f"{name} comes with `hsa-bench setup vbench i2v`")


def _first(paths: list[Path], otherwise: str) -> str:
    there = [path for path in paths if path.is_file()]
    if not there:
        pytest.skip(otherwise)
    return str(there[0])
