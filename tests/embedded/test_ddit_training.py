"""The training of DDiT's coarse patches: what it asks of the model, and what it counts as error."""

import pytest
import torch
from hydra import compose, initialize_config_module

from baselines.patches import CoarsePatches, load_patches
from experiments.embedded import load
from experiments.embedded.build import patch_basis
from experiments.embedded.train import Batches, caption_features
from experiments.embedded.train_ddit import Lesson, train_patches

SCALE = 6.0


@pytest.fixture(scope="module")
def pipe():
    return load().pipelines["t2v"]


@pytest.fixture(scope="module")
def transformer(pipe):
    return pipe.transformer.requires_grad_(False)


@pytest.fixture(scope="module")
def features(pipe):
    return caption_features(pipe)


def config(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("ddit_training", overrides=["batch.videos=1", *overrides])


def lesson(transformer, features, *overrides):
    batch = Batches(patch_basis(num_videos=4), features, config(*overrides), rank=0).draw(0)
    return Lesson.draw(transformer, batch, features[-1])


def test_a_lesson_has_each_video_with_its_caption_and_without(transformer, features):
    latents, timestep, text = lesson(transformer, features, "i2v_share=0").inputs
    assert torch.equal(latents[0], latents[1]) and torch.equal(timestep[0], timestep[1])
    assert torch.equal(text[1], features[-1]) and not torch.equal(text[0], features[-1])


def test_distance_is_relative_and_counts_the_guided_velocity(transformer, features):
    drawn = lesson(transformer, features, "i2v_share=0")
    patches = CoarsePatches(transformer)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with patches.installed(transformer, lambda: True):
            coarse = transformer(*drawn.inputs, return_dict=False)[0].float()
        branches, guided = drawn.distances(patches, transformer, SCALE)
        same = Lesson(drawn.inputs, coarse, 0).distances(patches, transformer, SCALE)
    assert same == (0, 0)
    captioned, empty = drawn.velocity
    truth, found = SCALE * captioned - (SCALE - 1) * empty, SCALE * coarse[0] - 5 * coarse[1]
    error = (coarse - drawn.velocity).norm() / drawn.velocity.norm()
    torch.testing.assert_close(branches, error**2, rtol=1e-4, atol=0)
    expected = ((found - truth).norm() / truth.norm()) ** 2
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=0)


def test_a_given_first_frame_is_outside_the_loss(transformer, features):
    drawn = lesson(transformer, features, "i2v_share=1")
    patches = CoarsePatches(transformer)
    with torch.no_grad():
        before = drawn.distances(patches, transformer, SCALE)
        drawn.velocity[:, :, 0] += 100
        assert drawn.distances(patches, transformer, SCALE) == before


def test_training_leaves_weights_and_the_model_as_it_was(pipe, transformer, tmp_path):
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    trained = train_patches(pipe, config("steps=2", "repeats=2", "warmup_steps=1"), tmp_path)
    assert all(torch.equal(before[name], t) for name, t in transformer.state_dict().items())
    stored = load_patches(tmp_path / "ddit_embedded.safetensors", transformer).state_dict()
    started = CoarsePatches(transformer).state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(stored[name], tensor.bfloat16().float())
    assert not torch.equal(stored["embed.weight"], started["embed.weight"].bfloat16().float())
