"""EasyCache against the published rule, evaluated again on what went in and out of the model."""

import numpy as np
import pytest

from baselines.easycache import EasyCache
from hsa.schedulers import euler
from tests.baselines import cases
from tests.baselines.cases import PIPELINES, request

STEPS = 24


def seen(method, pipe):
    """Latents into and velocity out of each call of the first branch, and which calls computed."""
    latents, velocities = [], []
    channels = pipe.transformer.config.out_channels

    def note(module, args, kwargs, output):
        x = kwargs["hidden_states"]
        x = x[:, :channels] if x.ndim == 5 else x[-1:]  # LTX: the conditional one of a batch
        latents.append(x.double().numpy())
        velocities.append(output[0][-1:].double().numpy())

    models = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in models if m is not None]
    with method.attach(pipe, request(pipe, steps=STEPS)) as trace:
        pipe(**request(pipe, steps=STEPS).kwargs(pipe))
    for hook in hooks:
        hook.remove()
    every = len(cases.branches(pipe))
    computed = [record.block_calls > 0 for record in trace.records]
    for other in range(1, every):
        assert computed[other::every] == computed[::every]
    return latents[::every], velocities[::every], computed[::every]


def published(latents, velocities, threshold, warmup) -> list[bool]:
    """The decisions of one expert; the first and the last ``latents`` are always computed."""
    computed, error, rate, last = [], 0.0, None, None
    for step, (x, v) in enumerate(zip(latents, velocities, strict=True)):
        compute = step < warmup or step == len(latents) - 1 or rate is None
        if not compute:
            error += rate * np.abs(x - latents[step - 1]).mean() / np.abs(last[1]).mean()
            compute = not error < threshold
        if compute:
            error = 0.0
            if last is not None:
                rate = np.abs(v - last[1]).mean() / np.abs(x - last[0]).mean()
            last = x, v
        computed.append(bool(compute))
    return computed


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan_i2v", "ti2v_i2v", "ltx2_t2v", "ltx2_i2v"])
@pytest.mark.parametrize(("threshold", "warmup"), [(0.3, 10), (0.9, 2)])
def test_decides_as_published(pipeline, threshold, warmup):
    method = EasyCache(threshold, warmup)
    latents, velocities, computed = seen(method, PIPELINES[pipeline]())
    assert computed == published(latents, velocities, threshold, warmup)
    assert not all(computed)


def test_second_expert_starts_afresh():
    pipe, warmup = PIPELINES["wan22_t2v"](), 4
    latents, velocities, computed = seen(EasyCache(0.9, warmup), pipe)
    with euler(pipe) as scheduler:
        scheduler.set_timesteps(STEPS)
        switch = int((scheduler.timesteps >= 0.875 * 1000).sum())
    assert 0 < switch < STEPS - 1
    # The first expert's last step is not protected: one more makes it a step among others.
    first = published(latents[: switch + 1], velocities[: switch + 1], 0.9, warmup)[:switch]
    second = published(latents[switch:], velocities[switch:], 0.9, 0)
    assert computed == first + second
    assert computed[switch:][:2] == [True, True]


def test_protected_steps_always_compute():
    _, _, computed = seen(EasyCache(float("inf"), 3), PIPELINES["wan_t2v"]())
    assert computed == [True] * 3 + [False] * (STEPS - 4) + [True]


def test_batch_is_refused():
    pipe = PIPELINES["ltx2_t2v"]()
    request_ = request(pipe, steps=4)
    with pytest.raises(ValueError, match="easycache: batch=2: choose 1, one video a call"):
        with EasyCache().attach(pipe, request_):
            pipe(**request_.kwargs(pipe) | {"num_videos_per_prompt": 2})


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (EasyCache(threshold="low"), "easycache.threshold='low': choose a number >= 0"),
        (EasyCache(warmup_steps=0), "easycache.warmup_steps=0: choose a whole number >= 1"),
    ],
    ids=repr,
)
def test_bad_setting_is_refused(method, complaint):
    with pytest.raises(ValueError, match=complaint):
        method.validate(request(PIPELINES["wan_t2v"]()))
