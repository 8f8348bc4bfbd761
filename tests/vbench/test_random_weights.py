"""Further dimensions through the worker with random weights: the plumbing, never a score.

Slow, so only where the full environment is and VBENCH_RANDOM_WEIGHTS names its interpreter.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from analysis.metrics.vbench import VBench
from analysis.metrics.vbench.environment import WORKER, Environment
from analysis.metrics.vbench.metric import stage
from experiments.store import Store
from tests.vbench import stored

PYTHON = os.environ.get("VBENCH_RANDOM_WEIGHTS")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="slow: VBENCH_RANDOM_WEIGHTS=.venv-vbench/bin/python runs it"
)
FRAMES = (6, 9)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    weights = tmp_path_factory.mktemp("random-weights")
    script = str(Path(__file__).with_name("random_weights.py"))
    command = [PYTHON, "-s", script, str(weights), str(WORKER.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return Environment(Path(PYTHON), weights)


@pytest.mark.parametrize(
    "dimension, shares",
    [
        ("motion_smoothness", (1, 1)),
        ("dynamic_degree", (1, 1)),
        ("imaging_quality", (1, 1)),
        ("background_consistency", (5, 8)),
        ("appearance_style", (6, 9)),
    ],
)
def test_a_dimension_runs_and_its_rows_make_upstreams_aggregate(
    environment, dimension, shares, tmp_path
):
    meta = stored.suite_meta("a cat, oil painting", dimension)
    meta["vbench"]["auxiliary_info"] = {"appearance_style": {"appearance_style": "oil painting"}}
    store = Store(tmp_path / "store")
    samples = [
        stored.write(store, stored.inputs(f"{n}", meta=meta), stored.clip(n, 5.0, n, 128))
        for n in FRAMES
    ]
    items = [stage(sample, i, tmp_path, VBench("t2v")) for i, sample in enumerate(samples)]
    reply = environment.score(dimension, items)
    assert not reply["failed"]
    assert tuple(row["weight"] for row in reply["rows"]) == shares
    mean = sum(row["value"] * row["weight"] for row in reply["rows"]) / sum(shares)
    assert mean == pytest.approx(reply["aggregate"], abs=1e-9)
