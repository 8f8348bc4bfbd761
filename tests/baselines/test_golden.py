"""Every method on the embedded model, held to the frames it gave when its version was set.

A golden picture is the method's video of one caption, its frames side by side. Output that changed
means a higher `version`, and with it a new picture: a missing one is written, for a person to look
at and commit. The comparison leaves room for the rounding of another CPU.
"""

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image

from experiments.config import load_experiment
from experiments.embedded import load
from experiments.execute import sample
from experiments.plan import plan
from tests.baselines.cases import METHODS

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.mark.parametrize("name", METHODS)
def test_output_is_that_of_its_version(model, name):
    version = instantiate(METHODS[name]).version
    (cell,) = plan(load_experiment([f"method={name}", "reference=null", "limit=1"])).cells
    video = (sample(model, cell).output * 255).round().astype(np.uint8)
    frames = np.concatenate(list(video), axis=1)
    golden = GOLDEN / f"{name}-v{version}.png"
    if not golden.exists():
        GOLDEN.mkdir(exist_ok=True)
        Image.fromarray(frames).save(golden)
        pytest.fail(f"{golden} is new: look at it and commit it")
    error = np.mean((frames.astype(float) - np.asarray(Image.open(golden))) ** 2)
    assert error < 1.0, f"{name} gives other frames than version {version} did"
