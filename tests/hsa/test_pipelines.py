"""The tiny pipelines are what the tests take them for."""

from collections import Counter

import pytest
import torch

from hsa.trace import experts
from tests import pipelines

STEPS = 3


def passes(pipe, **overrides) -> Counter:
    """(expert, samples in the batch) -> transformer calls of one video."""
    calls = Counter()
    handles = []
    for expert, transformer in experts(pipe).items():

        def count(module, args, kwargs, expert=expert):
            calls[expert, len(kwargs["hidden_states"])] += 1

        handles.append(transformer.register_forward_pre_hook(count, with_kwargs=True))
    pipelines.sample(pipe, steps=STEPS, **overrides)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", pipelines.ALL)
def test_the_token_grid_is_the_stated_one(name):
    pipe = pipelines.ALL[name]()
    latents = pipelines.sample(pipe, steps=2)
    frames, height, width = pipelines.TOKENS
    patch = 2 if name.startswith(("wan", "ti2v")) else 1
    packed = (1, frames * height * width, 8)
    grid = (1, latents.shape[1], frames, height * patch, width * patch)
    assert tuple(latents.shape) == (packed if name.startswith("ltx_") else grid)
    assert latents.isfinite().all()


@pytest.mark.parametrize("name", pipelines.ALL)
def test_the_prompt_and_the_seed_matter(name):
    pipe = pipelines.ALL[name]()
    latents = pipelines.sample(pipe, steps=2)
    assert torch.equal(latents, pipelines.sample(pipe, steps=2))
    assert not torch.equal(latents, pipelines.sample(pipe, steps=2, seed=1))
    assert not torch.equal(latents, pipelines.sample(pipe, steps=2, prompt="a blue star"))


@pytest.mark.parametrize("name", [name for name in pipelines.ALL if name.startswith("wan22")])
def test_both_experts_of_wan_22_run(name):
    calls = passes(pipelines.ALL[name]())
    assert {expert for expert, _ in calls} == {"transformer", "transformer_2"}


@pytest.mark.parametrize("name", [name for name in pipelines.ALL if name.startswith("ltx2")])
def test_full_guidance_of_ltx2_is_three_passes_and_none_is_one(name):
    pipe = pipelines.ALL[name]()
    assert passes(pipe) == {("transformer", 2): STEPS, ("transformer", 1): 2 * STEPS}
    off = pipelines.guidance(pipe, on=False)
    assert passes(pipe, **off) == {("transformer", 1): STEPS}


@pytest.mark.parametrize("name", ["ltx2_t2v", "ltx23_t2v", "ltx25_t2v"])
def test_spatio_temporal_guidance_perturbs_from_23_on(name):
    """A 2.0 transformer ignores the block list, so its third pass equals the first."""
    pipe = pipelines.ALL[name]()
    weaker = pipelines.sample(pipe, steps=2, guidance_rescale=0.0, stg_scale=0.5)
    stronger = pipelines.sample(pipe, steps=2, guidance_rescale=0.0, stg_scale=2.0)
    assert torch.allclose(weaker, stronger, atol=1e-5) == (name == "ltx2_t2v")


@pytest.mark.parametrize("name", [name for name in pipelines.ALL if name.startswith("ltx2")])
def test_the_streams_of_ltx2_hear_each_other(name):
    pipe = pipelines.ALL[name]()
    off = pipelines.guidance(pipe, on=False)
    video, audio = pipelines.sample_av(pipe, steps=2, **off)
    noise = torch.Generator().manual_seed(9)
    other_audio = torch.randn(audio.shape, generator=noise)
    other_video = torch.randn(video.shape, generator=noise)
    changed, _ = pipelines.sample_av(pipe, steps=2, **off, audio_latents=other_audio)
    assert not torch.equal(video, changed)
    _, changed = pipelines.sample_av(pipe, steps=2, **off, latents=other_video)
    assert not torch.equal(audio, changed)
