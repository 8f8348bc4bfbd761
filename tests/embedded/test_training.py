"""The training of the embedded model: what it feeds the model, and that it can be interrupted."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

from experiments.embedded.build import build_pipeline, build_vae, patch_basis, to_pixels
from experiments.embedded.train import Batches, learning_rate, loss_of, train_transformer
from experiments.embedded.videos import NUM_FRAMES, SIZE, render, split


@pytest.fixture(scope="module")
def basis():
    return patch_basis(num_videos=40)


def config(*overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose("embedded_training", overrides=list(overrides))


def batch(basis, *overrides, step=0):
    captions = len(split("train"))
    features = torch.randn(captions + 1, 4, 8, generator=torch.Generator().manual_seed(0))
    return Batches(basis, features, config(*overrides), rank=0).draw(step), features


class Recorder(torch.nn.Module):
    """Answers with the true velocity, or with zero, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, latents, timestep, text, return_dict):
        self.latents, self.timestep = latents, timestep
        return (self.answer,)


def test_analytic_encoder_is_the_patch_basis(basis):
    frames, _ = render(split("train")[0], np.random.default_rng(0))
    pixels = to_pixels(frames)
    with torch.no_grad():
        encoded = build_vae(basis).encode(pixels.transpose(0, 1)[None]).latent_dist.mode()
    expected = basis.encode(pixels).transpose(0, 1)[None] * basis.scale
    assert torch.allclose(encoded, expected, atol=1e-3)


def test_analytic_decoder_inverts_what_the_basis_keeps(basis):
    frames, _ = render(split("train")[0], np.random.default_rng(0))
    pixels = to_pixels(frames)
    latents = basis.encode(pixels).transpose(0, 1)[None]
    with torch.no_grad():
        decoded = build_vae(basis).decode(latents * basis.scale).sample[0].transpose(0, 1)
    assert -10 * torch.log10((decoded - pixels).square().mean() / 4) > 20


def test_same_step_same_batch(basis):
    first, _ = batch(basis, step=5)
    again, _ = batch(basis, step=5)
    other, _ = batch(basis, step=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"])


def test_images_are_single_frames_and_videos_whole(basis):
    images, _ = batch(basis, "image_steps=1", step=0)
    videos, _ = batch(basis, "image_steps=1", step=1)
    assert images["latents"].shape == (32, 16, 1, SIZE // 4, SIZE // 4)
    assert videos["latents"].shape == (4, 16, NUM_FRAMES, SIZE // 4, SIZE // 4)


def test_dropped_captions_get_the_empty_one(basis):
    dropped, features = batch(basis, "caption_dropout=1")
    assert torch.equal(dropped["text"], features[-1].expand(32, -1, -1))


def test_true_velocity_has_no_loss_and_zero_has_some(basis):
    drawn, _ = batch(basis, "image_steps=0", "i2v_share=0")
    truth = drawn["noise"] - drawn["latents"]
    assert loss_of(Recorder(truth), drawn) == 0
    drawn["weights"].fill_(1)
    expected = truth.square().mean()
    assert torch.isclose(loss_of(Recorder(torch.zeros_like(truth)), drawn), expected)


def test_given_first_frame_is_clean_at_timestep_0_and_outside_the_loss(basis):
    drawn, _ = batch(basis, "image_steps=0", "i2v_share=1")
    answer = drawn["noise"] - drawn["latents"]
    answer[:, :, 0] += 100
    model = Recorder(answer)
    assert loss_of(model, drawn) == 0
    assert torch.equal(model.latents[:, :, 0], drawn["latents"][:, :, 0])
    assert (model.timestep[:, :64] == 0).all()
    assert torch.allclose(model.timestep[:, 64:], 1000 * drawn["sigma"][:, None])


def test_learning_rate_warms_up_holds_and_decays():
    cfg = config("steps=100", "warmup_steps=10", "decay_steps=20", "lr=1")
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:81]) == {1.0}
    assert rates[-1] == pytest.approx(0.05)


def test_an_interrupted_training_ends_with_the_same_weights(basis, tmp_path):
    common = ("image_steps=2", "batch.images=2", "batch.videos=1", "warmup_steps=1", "seed=3")
    runs = {"whole": [4], "parts": [2, 4]}
    weights = {}
    for name, stops in runs.items():
        out = tmp_path / name
        out.mkdir()
        for steps in stops:
            pipe = build_pipeline(basis)
            cfg = config(*common, f"steps={steps}", "decay_steps=1", "checkpoint_every=1")
            train_transformer(pipe, basis, cfg, out)
        pipe.transformer.save_pretrained(out)
        weights[name] = load_file(next(out.glob("*.safetensors")))
    whole, parts = weights.values()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
