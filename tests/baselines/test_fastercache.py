"""FasterCache against the equations of its paper, evaluated on what plain torch hooks saw."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from diffusers.hooks.faster_cache import _split_low_high_freq

from baselines.base import Request
from baselines.fastercache import FasterCache
from baselines.guidance_cache import emphasised
from hsa.trace import experts
from tests import pipelines

STEPS = 15
REQUEST = Request("t2v", "a red circle", "", 0, STEPS, 4.0, 32, 32, 9, 16)
# From a third of the steps on: the unconditional branch every 5th step, attention every 2nd.
UNCOND = "111111000010000"
ATTENTION = "111111010111010"


def watched(method, pipe, steps=STEPS, **overrides):
    """[(record, velocity, {block: output of its self-attention}, {blocks that computed it})]."""
    calls = []

    def watch(transformer):
        yield transformer.register_forward_pre_hook(
            lambda m, a, k: calls.append([None, {}, set()]), with_kwargs=True
        )
        yield transformer.register_forward_hook(
            lambda m, a, output: calls[-1].__setitem__(0, output[0])
        )
        for index, block in enumerate(transformer.blocks):
            yield block.attn1.register_forward_hook(
                lambda m, a, output, index=index: calls[-1][1].update({index: output})
            )
            yield block.attn1.to_out[0].register_forward_hook(
                lambda *_, index=index: calls[-1][2].add(index)
            )

    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            for handle in watch(transformer):
                stack.callback(handle.remove)
        trace = stack.enter_context(method.attach(pipe, replace(REQUEST, steps=steps)))
        size = {"height": 32, "width": 32, "num_frames": 9}
        pipelines.sample(pipe, steps=steps, **size | overrides)
    return [(record, *call) for record, call in zip(trace.records, calls, strict=True)]


def mask(calls, branch, ran):
    return "".join(str(int(ran(call))) for call in calls if call[0].branch == branch)


def test_intervals_are_those_asked_for():
    """16 steps: from the fifth on, a third of them rounded."""
    calls = watched(FasterCache(attention_interval=3, guidance_interval=4), pipelines.wan_t2v(), 16)
    assert mask(calls, "uncond", lambda call: len(call[2]) == 3) == "1111110001000100"
    assert mask(calls, "cond", lambda call: len(call[3]) == 3) == "1111110011010110"


@pytest.mark.parametrize("family", ["wan_t2v", "wan_i2v", "ti2v_t2v"])
def test_runs_what_the_paper_says(family):
    calls = watched(FasterCache(), getattr(pipelines, family)())
    for ran in (lambda call: len(call[2]) == 3, lambda call: len(call[3]) == 3):
        assert mask(calls, "uncond", ran) == UNCOND
    assert mask(calls, "cond", lambda call: len(call[2]) == 3) == "1" * STEPS
    assert mask(calls, "cond", lambda call: len(call[3]) == 3) == ATTENTION
    for record, _, outputs, computed in calls:  # a block runs its feed-forward whatever else
        assert record.block_calls == (len(outputs) + len(computed)) / 2


def test_without_guidance_attention_alone_is_reused():
    calls = watched(FasterCache(), pipelines.wan_t2v(), guidance_scale=1.0)
    assert len(calls) == STEPS
    assert mask(calls, "cond", lambda call: len(call[3]) == 3) == ATTENTION


def test_expert_begins_with_a_full_step():
    calls = watched(FasterCache(start=0.0), pipelines.wan22_t2v(), steps=22)
    begun = {}
    for record, _, _, computed in calls:
        begun.setdefault((record.expert, record.branch), (record.step, len(computed)))
    switch = begun["transformer_2", "cond"][0]
    assert switch % 5 and switch % 2  # a step that is neither a full nor a cached one by itself
    assert begun == {
        ("transformer", "cond"): (0, 3),
        ("transformer", "uncond"): (0, 3),
        ("transformer_2", "cond"): (switch, 3),
        ("transformer_2", "uncond"): (switch, 3),
    }


def test_attention_continues_its_last_change():
    """Eq. 5: F[t-1] = F[t] + (F[t] - F[t+2]) w(t), w from 0 at the start to 1 at the last step."""
    calls = watched(FasterCache(), pipelines.wan_t2v())
    outputs = [outputs for record, _, outputs, _ in calls if record.branch == "cond"]
    reused = [step for step in range(STEPS) if ATTENTION[step] == "0"]
    for step in reused:
        weight = (step - 5) / (14 - 5)
        for block in range(3):
            newest, older = outputs[step - 1][block], outputs[step - 3][block]
            expected = newest + (newest - older) * weight
            torch.testing.assert_close(outputs[step][block], expected, rtol=0, atol=1e-6)
            assert not torch.equal(outputs[step][block], newest)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_unconditional_velocity_is_that_of_the_paper():
    """Eqs. 6 to 11, with the low and high frequencies as diffusers' port splits them."""
    size = {"height": 48, "width": 64}  # 6 x 8 latents, low frequencies 5 of 48
    method = FasterCache(alpha_low=0.2, alpha_high=0.3, switch=8 / STEPS)
    calls = watched(method, pipelines.wan_t2v(), **size)
    velocity = {(record.step, record.branch): v for record, v, _, _ in calls}

    def spectrum(step, branch):
        return _split_low_high_freq(velocity[step, branch].movedim(1, 2).flatten(0, 1).float())

    full = None
    for step in range(STEPS):
        if UNCOND[step] == "1":
            full = step
            continue
        parts = zip(
            spectrum(full, "uncond"),
            spectrum(full, "cond"),
            spectrum(step, "cond"),
            (1.2, 1.0) if step < 8 else (1.0, 1.3),
            strict=True,
        )
        frequencies = sum((uncond - cond) * w + now for uncond, cond, now, w in parts)
        expected = torch.fft.ifft2(torch.fft.ifftshift(frequencies)).real
        got = velocity[step, "uncond"].movedim(1, 2).flatten(0, 1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 4), (5, 8), (12, 10)])
def test_equal_factors_scale_the_velocity(size):
    velocity = torch.randn(1, 2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(emphasised(velocity, 1.5, 1.5), 1.5 * velocity)
    constant = torch.ones(1, 1, 1, *size)
    torch.testing.assert_close(emphasised(constant, 2.0, 7.0), 2 * constant)


@pytest.mark.parametrize("family", ["ltx2_t2v", "ltx_t2v"])
def test_batched_guidance_is_refused(family):
    pipe = getattr(pipelines, family)()
    with pytest.raises(ValueError, match="fastercache: transformer=.*choose WanTransformer3DModel"):
        with FasterCache().attach(pipe, REQUEST):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 1.5}, "fastercache.start=1.5: choose a number in 0..1"),
        ({"guidance_interval": 0}, "fastercache.guidance_interval=0: choose a whole number >= 1"),
        ({"alpha_low": -1}, "fastercache.alpha_low=-1: choose a number >= 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FasterCache(**settings).validate(REQUEST)
