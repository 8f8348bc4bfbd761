"""TaylorSeer against Taylor's formula over tensors taken from the run, and diffusers' own hook."""

from collections import defaultdict
from contextlib import ExitStack

import pytest
import torch
from diffusers import TaylorSeerCacheConfig

from baselines.taylorseer import TaylorSeer, differences, taylor
from hsa.schedulers import euler
from hsa.trace import blocks, experts
from tests import pipelines
from tests.baselines.forwards import PIPELINES, forwards, request

STEPS = 10
BLOCK = r"(blocks|transformer_blocks)\.\d+"
PARTS = BLOCK + r"\.(\w+_)?(attn|attn1|attn2|ff|ffn)"
SETTINGS = [  # interval, max_order, warmup_steps, and the steps that are then computed
    (3, 1, 1, (0, 3, 6, 9)),
    (3, 2, 2, (0, 1, 4, 7)),
    (4, 0, 3, (0, 1, 2, 6)),
]
setting = pytest.mark.parametrize(("interval", "max_order", "warmup", "computed"), SETTINGS)


def arguments(pipe):
    return pipelines.inputs(pipe, steps=STEPS, height=32, width=32, num_frames=9)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_series_of_a_square(interval):
    """f(s) = s^2 sampled every d steps: backward differences miss f(s + x) by d x, no more."""
    factors = ()
    for step in (0, interval, 2 * interval):
        factors = differences(torch.tensor(float(step**2)), factors[:2], interval)
    for ahead in range(4):
        exact = (2 * interval + ahead) ** 2
        assert taylor(factors, ahead).item() == pytest.approx(exact - interval * ahead)


def series(values, step, max_order):
    """Taylor's formula at `step` from the values at computed steps, written out."""

    def slope(i):
        (s0, v0), (s1, v1) = past[i - 1], past[i]
        return (v1 - v0) / (s1 - s0)

    past = [(s, value.double()) for s, value in values.items() if s < step]
    last, value = past[-1]
    if max_order > 0 and len(past) > 1:
        value = value + slope(-1) * (step - last)
    if max_order > 1 and len(past) > 2:
        curvature = (slope(-1) - slope(-2)) / (last - past[-2][0])
        value = value + curvature * (step - last) ** 2 / 2
    return value


def watch(method, pipe, modules):
    """(name, n-th call in a step) -> step -> (what the module returned, did its inside run?)"""
    found, inside = defaultdict(dict), []

    def ran(*_):
        inside.append(True)

    def returned(name):
        def note(module, args, output):
            step = pipe.scheduler.step_index or 0
            nth = sum(step in found[key] for key in list(found) if key[0] == name)
            found[name, nth][step] = output, bool(inside)
            inside.clear()

        return note

    with ExitStack() as stack:
        for name, module, inner in modules:
            stack.callback(inner.register_forward_hook(ran).remove)
            stack.callback(module.register_forward_hook(returned(name)).remove)
        stack.enter_context(method.attach(pipe, request(STEPS)))
        pipe(**arguments(pipe))
    return found


def check(found, computed, max_order):
    for (name, _), calls in found.items():
        values = {}
        for step, (output, inside) in calls.items():
            assert inside == (step in computed), (name, step)
            if step in computed:
                values[step] = output
            else:
                predicted = series(values, step, max_order)
                torch.testing.assert_close(output.double(), predicted, rtol=1e-4, atol=1e-5)


@setting
@pytest.mark.parametrize(
    ("pipeline", "parts", "contexts"), [("wan_t2v", 3, 2), ("ltx2_t2v", 8, 3), ("ltx_t2v", 3, 1)]
)
def test_every_part_is_predicted(pipeline, parts, contexts, interval, max_order, warmup, computed):
    pipe = pipelines.ALL[pipeline]()
    modules = [
        ((index, name), module, module.to_out[0] if hasattr(module, "to_out") else module.net[-1])
        for index, block in enumerate(blocks(pipe.transformer))
        for name, module in block.named_children()
        if hasattr(module, "to_out") or hasattr(module, "net")
    ]
    assert len(modules) == 3 * parts
    found = watch(TaylorSeer(interval, max_order, warmup), pipe, modules)
    assert {nth for _, nth in found} == set(range(contexts))
    assert all(list(calls) == list(range(STEPS)) for calls in found.values())
    check(found, computed, max_order)


@setting
@pytest.mark.parametrize("pipeline", ["wan_t2v", "ltx2_t2v", "ltx_t2v"])
def test_lite_predicts_the_velocity(pipeline, interval, max_order, warmup, computed):
    """Of both streams. A head is computed in the steps in which the first block runs."""
    pipe = pipelines.ALL[pipeline]()
    first = blocks(pipe.transformer)[0].attn1.to_out[0]
    names = [name for name in ("proj_out", "audio_proj_out") if hasattr(pipe.transformer, name)]
    for name in names:
        module = getattr(pipe.transformer, name)
        found = watch(
            TaylorSeer(interval, max_order, warmup, lite=True), pipe, [(name, module, first)]
        )
        check(found, computed, max_order)
    assert len(names) == (2 if pipeline == "ltx2_t2v" else 1)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_lite_runs_whole_steps(pipeline):
    """Counted from the first step of each expert: the second computes 0, 3, 6, ... of its own."""
    found = forwards(TaylorSeer(3, lite=True), pipelines.ALL[pipeline](), STEPS)
    for branch in found.values():
        assert [forward.ran for forward in branch] == [
            [nth % 3 == 0] * 3 for nth in range(len(branch))
        ]
    assert {expert for expert, _ in found} == set(experts(pipelines.ALL[pipeline]()))


@pytest.mark.parametrize("lite", [False, True])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_agrees_with_the_hook_of_diffusers(pipeline, lite):
    """Its schedule (0..b-1, then b+1, b+1+n, ...) is the authors' where n = 2."""
    pipe = pipelines.ALL[pipeline]()
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=3,
        max_order=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=["(audio_)?proj_out"] if lite else [PARTS],
        skip_predict_identifiers=[BLOCK] if lite else None,
    )
    with TaylorSeer(2, max_order=2, warmup_steps=3, lite=lite).attach(pipe, request(STEPS)):
        ours = pipe(**arguments(pipe))
    with euler(pipe):
        plain = pipe(**arguments(pipe))
        for transformer in experts(pipe).values():
            transformer.enable_cache(config)
        theirs = pipe(**arguments(pipe))
    for stream in ("frames", "audio") if hasattr(ours, "audio") else ("frames",):
        tensor = getattr(ours, stream)
        torch.testing.assert_close(tensor, getattr(theirs, stream), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tensor, getattr(plain, stream), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"interval": 0}, "taylorseer.interval=0: choose a whole number >= 1"),
        ({"max_order": -1}, "taylorseer.max_order=-1: choose a whole number >= 0"),
        ({"warmup_steps": 0}, "taylorseer.warmup_steps=0: choose a whole number >= 1"),
        ({"lite": "yes"}, "taylorseer.lite='yes': choose true or false"),
    ],
)
def test_bad_setting_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        TaylorSeer(**settings).validate(request(STEPS))
