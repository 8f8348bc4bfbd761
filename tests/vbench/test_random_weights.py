"""Every dimension of the real vbench through the worker with random weights: never a score.

Minutes long, so only where VBENCH_RANDOM_WEIGHTS names the full environment's interpreter. DINO's
and CoTracker's code is taken from the weights folder (docs/vbench.md) that VBENCH_WEIGHTS names,
VBench's own for camera motion from VBENCH_CHECKOUT; what is not there is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.metrics.vbench import VBench
from analysis.metrics.vbench.dimensions import DIMENSIONS, Group
from analysis.metrics.vbench.environment import WORKER, Environment
from analysis.metrics.vbench.metric import stage
from analysis.metrics.vbench.weights import DEFAULT_FOLDER, FILES
from experiments.prompts import Prompt
from experiments.store import Store
from tests.pipelines import picture
from tests.vbench import stored

PYTHON = os.environ.get("VBENCH_RANDOM_WEIGHTS")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="slow: VBENCH_RANDOM_WEIGHTS=.venv-vbench/bin/python runs it"
)
CODE = Path(os.environ.get("VBENCH_WEIGHTS", DEFAULT_FOLDER)).expanduser()
CHECKOUT = os.environ.get("VBENCH_CHECKOUT")
FRAMES = (6, 9)
COUNTED = ("object_class", "multiple_objects", "scene", "spatial_relationship")
SHARES = {  # of each video in upstream's aggregate, where it is not the same for all
    "subject_consistency": [5, 8],
    "background_consistency": [5, 8],
    "appearance_style": [6, 9],
    "color": [0, 0],  # nothing is found
    **dict.fromkeys(COUNTED, [16, 16]),
}
PLACES = {"object_a": "cat", "object_b": "dog", "relationship": "on the left"}
ABOUT = {  # what the suite says beside the prompt
    "appearance_style": {"appearance_style": "oil painting"},
    "object_class": {"object": "cat"},
    "multiple_objects": {"object": "cat and dog"},
    "color": {"color": "red"},
    "scene": {"scene": {"scene": "alley"}},
    "spatial_relationship": {"spatial_relationship": PLACES},
}
PROMPT = "A person is riding a bike, camera pans left"  # a name that every dimension understands


@pytest.fixture
def environment(dimension, tmp_path):
    checkout = Path(CHECKOUT) if CHECKOUT else None
    made = Environment(Path(PYTHON), tmp_path / "weights", checkout)
    if lack := made.uninstalled(dimension):
        pytest.skip(lack[0])
    names = DIMENSIONS[dimension].weights
    for name in (name for name in names if name.endswith("_code")):
        if lack := FILES[name].lack(CODE):
            pytest.skip(lack)
        _link(FILES[name].find(CODE).parent, made.weights / FILES[name].path)
    script = str(Path(__file__).with_name("random_weights.py"))
    random = [name for name in names if not name.endswith("_code")]
    command = [PYTHON, "-s", script, str(made.weights), str(WORKER.parent), *random]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    yield made
    shutil.rmtree(made.weights)  # up to two gigabytes


def _link(folder: Path, file: Path) -> None:
    file.parent.parent.mkdir(parents=True)
    file.parent.symlink_to(folder.absolute())


@pytest.fixture
def items(dimension, tmp_path) -> list[dict]:
    crop = tmp_path / "crop" / "7-4"
    crop.mkdir(parents=True)
    picture().save(crop / "one.png")
    meta = stored.suite_meta(PROMPT, dimension, image="one.png", ratio="7-4")
    about = meta["vbench"]
    about["auxiliary_info"] = {dimension: ABOUT[dimension]} if dimension in ABOUT else {}
    store, settings = Store(tmp_path / "store"), VBench(images=str(crop.parent))
    samples = []
    for frames in FRAMES:
        given = stored.inputs(f"{frames}", meta=meta)
        if DIMENSIONS[dimension].group is Group.I2V:
            about["suite"] = "i2v"
            given["request"]["image_sha256"] = Prompt("", "", picture()).image_sha256
        samples.append(stored.write(store, given, stored.clip(frames, 5.0, frames, 128)))
    return [stage(sample, i, tmp_path, settings) for i, sample in enumerate(samples)]


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_a_dimension_runs_and_its_rows_make_upstreams_aggregate(dimension, environment, items):
    reply = environment.score(dimension, items)
    assert not reply["failed"]
    shares = [row["weight"] for row in reply["rows"]]
    assert shares == SHARES.get(dimension, [1, 1])
    if dimension != "color":
        total = sum(row["value"] * row["weight"] for row in reply["rows"])
        assert total / sum(shares) == pytest.approx(reply["aggregate"], abs=1e-9)
