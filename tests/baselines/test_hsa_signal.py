"""Signals against HSA itself, against their definitions, and the oracle against a run by hand."""

import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch

from baselines.hsa import HSA
from baselines.hsa_signal import MEASURED, SIGNALS, HSASignal
from hsa.allocation import groups_by_fraction
from hsa.schedulers import euler
from tests import pipelines
from tests.baselines import cases

SETTING = {"budgets": (8, 4, 2), "fractions": (0.1, 0.3, 0.6), "warmup_steps": 4}
BUILDS = [pipelines.wan_t2v, pipelines.wan_ti2v, pipelines.wan22_t2v, pipelines.ltx23_i2v]
every_kind = pytest.mark.parametrize("build", BUILDS)
pipe_of = cache(lambda build: build())


def request_of(build, **changes):
    pipe = pipe_of(build)
    return pipe, replace(cases.request(pipe, steps=8), **changes)


def run(method, build=pipelines.wan_t2v, **changes):
    pipe, request = request_of(build, **changes)
    with method.attach(pipe, request) as trace:
        latents = cases.latents(pipe(**request.kwargs(pipe)))
    return latents, trace


def signal(name, **settings):
    return HSASignal(**SETTING, signal=name, **settings)


@every_kind
def test_velocity_is_hsa(build):
    latents, trace = run(signal("velocity"), build)
    expected, expected_trace = run(HSA(**SETTING), build)
    assert torch.equal(latents, expected)
    assert trace.to_dict() == expected_trace.to_dict()
    assert torch.equal(trace.arrays["velocity_change"], trace.arrays["signal"])


@every_kind
@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "velocity"])
def test_signal_changes_who_runs_and_nothing_else(build, name):
    latents, trace = run(signal(name), build)
    _, expected = run(HSA(**SETTING), build)
    assert trace.to_dict() == expected.to_dict()  # as many tokens, at the same steps
    assert torch.equal(trace.velocity_change, expected.velocity_change)
    value = trace.arrays["signal"].flatten(1)
    assert torch.equal(trace.allocation.flatten(1), groups_by_fraction(value, (0.1, 0.3, 0.6)))
    assert latents.isfinite().all()


def test_reversed_gives_most_to_what_changes_least():
    _, trace = run(signal("reversed"))
    _, plain = run(HSA(**SETTING))
    change = plain.velocity_change.flatten(1)
    assert torch.equal(trace.allocation.flatten(1), groups_by_fraction(-change, (0.1, 0.3, 0.6)))


@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "velocity"])
def test_given_tokens_come_last(name):
    _, trace = run(signal(name), pipelines.wan_ti2v)
    assert trace.allocation[:, 0].eq(2).all()
    assert trace.arrays["signal"][:, 1:].isfinite().all()


def test_random_depends_on_prompt_and_seed_alone():
    method = signal("random")
    alone = run(method)[1].allocation
    for changes in ({"seed": 1}, {"prompt": "a blue star"}):
        assert not torch.equal(run(method, **changes)[1].allocation, alone)
    assert torch.equal(run(method)[1].allocation, alone)
    assert torch.equal(run(method, negative_prompt="dark")[1].allocation, alone)


def guided_run(build):
    """Guided velocity, latents after the step and sigma of every step of a plain run."""
    pipe, request = request_of(build)
    seen, last = [], None

    def note(pipe, step, timestep, tensors):
        nonlocal last
        sigmas, latents = pipe.scheduler.sigmas, tensors["latents"].clone()
        if step:
            velocity = (latents - last) / (sigmas[step + 1] - sigmas[step])
            seen.append((velocity, latents, sigmas[step + 1]))
        last = latents
        return {}

    kwargs = request.kwargs(pipe) | {"callback_on_step_end": note, "guidance_scale": 6.0}
    with euler(pipe):
        pipe(**kwargs)
    return seen  # of steps 1, 2, ...


def blocks_of(latents):
    """One token is 1 x 2 x 2 latent pixels: a list of them in (frame, row, column) order."""
    frames, height, width = latents.shape[2:]
    return [
        latents[0, :, f, y : y + 2, x : x + 2]
        for f in range(frames)
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]


def test_guided_velocity_is_what_moves_the_latents():
    _, trace = run(signal("guided_velocity", measured_steps=3), guidance_scale=6.0)
    first, second = (blocks_of(velocity) for velocity, _, _ in guided_run(pipelines.wan_t2v)[:2])
    # The first change needs the velocity of step 0, which no latents before it tell.
    _, shorter = run(signal("guided_velocity", measured_steps=2), guidance_scale=6.0)
    found = 2 * trace.arrays["signal"] - shorter.arrays["signal"]
    change = [
        ((b - a).abs().sum() / a.abs().sum()).item() for a, b in zip(first, second, strict=True)
    ]
    assert found.flatten().tolist() == pytest.approx(change, rel=1e-2)
    _, conditional = run(signal("velocity", measured_steps=3), guidance_scale=6.0)
    assert not torch.allclose(conditional.arrays["signal"], trace.arrays["signal"], rtol=1e-3)


def test_temporal_difference_by_hand():
    _, three = run(signal("temporal_difference", measured_steps=3), guidance_scale=6.0)
    _, two = run(signal("temporal_difference", measured_steps=2), guidance_scale=6.0)
    found = (3 * three.arrays["signal"] - 2 * two.arrays["signal"])[0].flatten(1)  # of step 2
    velocity, latents, sigma = guided_run(pipelines.wan_t2v)[1]
    clean = blocks_of(latents - sigma * velocity)
    size = len(clean) // 3
    first, middle, last = clean[:size], clean[size : 2 * size], clean[2 * size :]
    before = [(b - a).abs().sum().item() for a, b in zip(first, middle, strict=True)]
    after = [(b - a).abs().sum().item() for a, b in zip(middle, last, strict=True)]
    assert found[0].tolist() == pytest.approx(before, rel=1e-3)
    assert found[2].tolist() == pytest.approx(after, rel=1e-3)
    both = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    assert found[1].tolist() == pytest.approx(both, rel=1e-3)


def test_attention_norm_is_that_of_the_conditional_branch():
    pipe, request = request_of(pipelines.wan_t2v)
    outputs = []
    handles = [
        block.attn1.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
        for block in pipe.transformer.blocks
    ]
    with euler(pipe):
        pipe(**request.kwargs(pipe))
    for handle in handles:
        handle.remove()
    blocks = len(pipe.transformer.blocks)
    calls = [outputs[start : start + blocks] for start in (0, 2 * blocks)]  # of steps 0 and 1
    norms = [[out.square().sum(-1).sqrt() for out in call] for call in calls]
    expected = sum(sum(call) / blocks for call in norms) / 2
    _, trace = run(signal("attention_norm", measured_steps=2))
    torch.testing.assert_close(trace.arrays["signal"].flatten(), expected, rtol=1e-4, atol=0)


def test_oracle_is_the_error_of_the_smallest_budget_on_the_full_trajectory():
    pipe, request = request_of(pipelines.wan_t2v)
    path = []

    def note(pipe, step, timestep, tensors):
        path.append(tensors["latents"].clone())
        return {}

    with euler(pipe):
        pipe(**request.kwargs(pipe) | {"callback_on_step_end": note})
        sigmas = pipe.scheduler.sigmas
    # budget 2 of 8, warm-up 4, cool-down 1: runs at 0 to 4 and at 7, so one update spans 4, 5, 6
    cached = path[3] + (path[4] - path[3]) * (sigmas[7] - sigmas[4]) / (sigmas[5] - sigmas[4])
    expected = [block.abs().sum().item() for block in blocks_of(cached - path[6])]
    _, trace = run(signal("oracle"))
    assert trace.arrays["signal"].flatten().tolist() == pytest.approx(expected, rel=1e-3)


def test_oracle_counts_its_own_run_nowhere():
    pipe, request = request_of(pipelines.wan_t2v)
    with signal("oracle").attach(pipe, request) as trace:
        assert trace.records == []
        pipe(**request.kwargs(pipe))
    assert len(trace.records) == 2 * 8


@pytest.mark.parametrize("name", ["random", "oracle"])
def test_signal_of_one_request_refuses_a_batch(name):
    pipe, request = request_of(pipelines.wan_t2v)
    both = request.kwargs(pipe)
    for key in ("prompt", "negative_prompt", "generator"):
        both[key] = [request.kwargs(pipe)[key]] * 2
    with (
        signal(name).attach(pipe, request),
        pytest.raises(ValueError, match=f"signal: .*{name} .* make one video at a time"),
    ):
        pipe(**both)


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_keeps_no_keys_and_values_past_the_last_step(name):
    """They would stand in the decoder's way."""
    pipe, request = request_of(pipelines.wan_t2v)
    attention, caches, alive = pipe.transformer.blocks[0].attn1, weakref.WeakSet(), []

    def count(pipe, step, timestep, tensors):
        alive.append(len(caches))
        return {}

    with signal(name).attach(pipe, request):
        handle = attention.register_forward_hook(lambda *_: caches.add(attention.kv_cache))
        pipe(**request.kwargs(pipe) | {"callback_on_step_end": count})
        handle.remove()
    assert alive == [2] * 7 + [0]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"signal": "motion"}, "hsa_signal.signal='motion': choose one of velocity, "),
        ({"measured_steps": 5}, r"measured_steps=5: choose a whole number in 2\.\.4"),
        ({"measured_steps": 1}, "measured_steps=1: choose a whole number"),
        ({"signal": "oracle", "measured_steps": 2}, "measured_steps=2: choose none"),
        (
            {"signal": "reversed", "fractions": None, "thresholds": (0.2, 0.1)},
            "signal='reversed': choose velocity or guided_velocity, or fractions",
        ),
    ],
)
def test_bad_setting_is_refused(settings, complaint):
    _, request = request_of(pipelines.wan_t2v)
    with pytest.raises(ValueError, match=complaint):
        HSASignal(**SETTING | settings).validate(request)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_steps_none_is_the_whole_warm_up(name):
    whole, trace = run(signal(name, measured_steps=4))
    assert torch.equal(run(signal(name))[0], whole)
    assert not torch.equal(
        run(signal(name, measured_steps=2))[1].arrays.get("signal", trace.velocity_change * 0),
        trace.arrays.get("signal", trace.velocity_change),
    )
