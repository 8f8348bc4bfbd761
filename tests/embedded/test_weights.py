"""The weights that ship: they load with plain diffusers and do what their card says."""

import numpy as np
import pytest
from diffusers import WanImageToVideoPipeline, WanPipeline

from experiments.config import load_experiment
from experiments.embedded import WEIGHTS, classify, identity, load
from experiments.embedded.card import vae_psnr
from experiments.execute import sample
from experiments.plan import plan


@pytest.fixture(scope="module")
def model():
    return load()


def videos(model, task, count, *overrides):
    command = [f"tasks=[{task}]", "prompts=heldout", f"limit={count}", "reference=null"]
    for cell in plan(load_experiment([*command, *overrides])).cells:
        frames = (sample(model, cell).output * 255).round().astype(np.uint8)
        yield cell, frames


@pytest.mark.parametrize("pipeline", [WanPipeline, WanImageToVideoPipeline])
def test_plain_diffusers_loads_them(pipeline):
    assert pipeline.from_pretrained(WEIGHTS, local_files_only=True).config.expand_timesteps


def test_they_fit_into_a_repository():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) <= 10e6


def test_vae_reconstructs(model):
    assert vae_psnr(model, count=8) > 30


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_videos_show_what_their_captions_say(model, task):
    right = [
        classify.adherence(frames, cell.inputs["request"]["meta"])
        for cell, frames in videos(model, task, 5)
    ]
    for word in ("colour", "shape", "direction", "background"):
        assert sum(answer[word] for answer in right) >= 4


def test_image_to_video_begins_with_the_image(model):
    for cell, frames in videos(model, "i2v", 2, "method.steps=5"):
        error = np.mean((frames[0] - np.asarray(cell.request.image).astype(float)) ** 2)
        assert 10 * np.log10(255**2 / error) > 30


def test_identity_follows_the_weights(tmp_path):
    with pytest.raises(ValueError, match="no diffusers pipeline folder"):
        identity(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    first = identity(str(tmp_path))
    (tmp_path / "README.md").write_text("a card is not part of the model")
    assert identity(str(tmp_path)) == first
    (tmp_path / "weights.safetensors").write_bytes(b"changed")
    assert identity(str(tmp_path)) != first
