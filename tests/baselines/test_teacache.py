"""TeaCache against the published rule, written again as the authors' call counter has it."""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch

from baselines.teacache import OFFICIAL, ProtectedTeaCache, TeaCache, calibrate
from hsa.schedulers import euler
from hsa.trace import blocks
from tests import pipelines
from tests.baselines.cases import PIPELINES, fingerprint, request

STEPS = 20
CURVED = (0.3, -0.2, 1.1, 0.05)


def embeddings(pipe, use_ret_steps: bool) -> list[np.ndarray]:
    """e (or e0) of every step, straight from the sigma grid: no sampling involved."""
    with euler(pipe) as scheduler:
        scheduler.set_timesteps(STEPS)
        timesteps = scheduler.timesteps
    embedder = pipe.transformer.condition_embedder
    with torch.no_grad():
        e = embedder.time_embedder(embedder.timesteps_proj(timesteps))
        e0 = embedder.time_proj(embedder.act_fn(e))
    return list((e0 if use_ret_steps else e).double().numpy())


def official_calls(embeddings, coefficients, thresh, use_ret_steps) -> list[bool]:
    """Whether each call computes; calls alternate between cond and uncond."""
    ret_steps = 5 * 2 if use_ret_steps else 1 * 2
    cutoff_steps = 2 * STEPS if use_ret_steps else 2 * STEPS - 2
    accumulated, previous, computed = [0.0, 0.0], [None, None], []
    for cnt in range(2 * STEPS):
        branch, e = cnt % 2, embeddings[cnt // 2]
        if cnt < ret_steps or cnt >= cutoff_steps:
            should_calc = True
        else:
            change = np.abs(e - previous[branch]).mean() / np.abs(previous[branch]).mean()
            accumulated[branch] += np.polyval(coefficients, change)
            should_calc = not accumulated[branch] < thresh
        if should_calc:
            accumulated[branch] = 0.0
        previous[branch] = e
        computed.append(should_calc)
    return computed


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan_i2v", "ti2v_t2v", "ti2v_i2v"])
@pytest.mark.parametrize("use_ret_steps", [False, True])
@pytest.mark.parametrize("coefficients", ["identity", CURVED], ids=["identity", "explicit"])
@pytest.mark.parametrize("threshold", [0.8, 2.5])
def test_decides_as_the_official_rule(pipeline, use_ret_steps, coefficients, threshold):
    pipe = PIPELINES[pipeline]()
    polynomial = (1.0, 0.0) if coefficients == "identity" else coefficients
    e = embeddings(pipe, use_ret_steps)
    expected = official_calls(e, polynomial, threshold, use_ret_steps)
    method = TeaCache(threshold, coefficients, use_ret_steps)
    with method.attach(pipe, request(pipe, steps=STEPS)) as trace:
        pipe(**request(pipe, steps=STEPS).kwargs(pipe))
    assert [record.block_calls > 0 for record in trace.records] == expected
    assert not all(expected)


@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_protected_steps_always_compute(use_ret_steps):
    pipe = PIPELINES["wan_t2v"]()
    method = TeaCache(float("inf"), "identity", use_ret_steps)
    with method.attach(pipe, request(pipe, steps=8)) as trace:
        pipe(**request(pipe, steps=8).kwargs(pipe))
    cond = [record.block_calls > 0 for record in trace.records if record.branch == "cond"]
    protected = {0, 1, 2, 3, 4} if use_ret_steps else {0, 7}
    assert cond == [step in protected for step in range(8)]


def test_other_protected_steps():
    pipe = PIPELINES["wan_t2v"]()
    method = ProtectedTeaCache(float("inf"), first_steps=3, last_steps=2)
    with method.attach(pipe, request(pipe, steps=8)) as trace:
        pipe(**request(pipe, steps=8).kwargs(pipe))
    cond = [record.block_calls > 0 for record in trace.records if record.branch == "cond"]
    assert cond == [True] * 3 + [False] * 3 + [True] * 2
    with pytest.raises(ValueError, match="teacache.first_steps=0: choose a whole number >= 1"):
        ProtectedTeaCache(first_steps=0).validate(request(pipe))


@pytest.mark.parametrize(
    ("model", "use_ret_steps", "change", "value"),
    [
        ("wan2.1-t2v-1.3b", False, 0.1, 0.250),
        ("wan2.1-t2v-1.3b", True, 0.02, 0.078),
        ("wan2.1-t2v-14b", False, 0.3, 1.136),
        ("wan2.1-t2v-14b", True, 0.05, 0.219),
        ("wan2.1-i2v-14b-480p", False, 0.2, 0.179),
        ("wan2.1-i2v-14b-480p", True, 0.05, 0.140),
        ("wan2.1-i2v-14b-720p", False, 0.15, 0.242),
        ("wan2.1-i2v-14b-720p", True, 0.1, 0.836),
        ("ltx-video-0.9.1", False, 0.15, 0.148),
        ("hunyuanvideo", False, 0.3, 0.343),
    ],
)
def test_official_polynomials(model, use_ret_steps, change, value):
    """Values tabulated from the authors' coefficients with np.poly1d."""
    polynomial = TeaCache(coefficients=model, use_ret_steps=use_ret_steps).polynomial
    assert np.poly1d(polynomial)(change) == pytest.approx(value, abs=6e-4)
    assert model in OFFICIAL


def test_table_is_as_it_was_compared_with_the_authors_scripts():
    """All nineteen polynomials, digit by digit, at 7c10efc."""
    digest = hashlib.sha256(json.dumps(OFFICIAL).encode()).hexdigest()
    assert digest == "985e91259b467181043909912b3af7e9f1d5018dbb93bfb52902df106724f58a"


@pytest.mark.parametrize("use_ret_steps", [False, True])
def test_calibration_fits_what_happened(use_ret_steps):
    pipe = PIPELINES["ti2v_i2v"]()
    before = fingerprint(pipe)
    requests = [request(pipe, seed, STEPS) for seed in (0, 1)]
    fit = calibrate(pipe, requests, use_ret_steps)

    e = np.array(embeddings(pipe, use_ret_steps))
    changes = np.abs(np.diff(e, axis=0)).mean(axis=1) / np.abs(e[:-1]).mean(axis=1)
    x, y = np.array(fit["points"]).T
    per_video = 2 * (STEPS - 1)
    assert len(x) == 2 * per_video
    np.testing.assert_allclose(x[0:per_video:2], changes, rtol=1e-4)  # cond of the first video
    residuals = y - np.polyval(fit["coefficients"], x)
    assert len(fit["coefficients"]) == 5
    assert fit["r2"] == pytest.approx(1 - residuals.var() / y.var(), abs=1e-6)
    np.testing.assert_allclose(residuals @ np.vander(x, 5), 0, atol=1e-8)  # normal equations
    assert fingerprint(pipe) == before


def block_inputs(pipe, method, steps) -> tuple[list[np.ndarray], list[bool]]:
    """Modulated input of block 0 at each call, as the block itself makes it, and what computed.

    The attention of a block beside the pipe's own is asked, so that skipped steps are seen too.
    """
    first, seen = blocks(pipe.transformer)[0], []
    twin = copy.deepcopy(first)
    twin.attn1.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].double().numpy()),
        with_kwargs=True,
    )

    def ask(block, args, kwargs):
        twin(**kwargs)

    request_ = request(pipe, steps=steps)
    with first.register_forward_pre_hook(ask, with_kwargs=True):
        with method.attach(pipe, request_) as trace:
            pipe(**request_.kwargs(pipe))
    return seen, [record.block_calls > 0 for record in trace.records]


@pytest.mark.parametrize("name", ["ltx_t2v", "ltx_i2v", "ltx23_t2v", "ltx2_i2v"])
@pytest.mark.parametrize(
    ("threshold", "coefficients"), [(0.3, "identity"), (0.2, "ltx-video-0.9.1"), (1.0, CURVED)]
)
def test_decides_on_ltx_by_the_modulated_input(name, threshold, coefficients):
    """The first and the last step are forced; guidance is one batch, of equal rows up to here."""
    pipe = pipelines.ALL[name]()
    method = TeaCache(threshold, coefficients)
    every = 3 if name == "ltx23_t2v" else 1
    inputs, computed = block_inputs(pipe, method, STEPS)
    assert len(inputs) == len(computed) == every * STEPS
    for branch in range(every):
        expected, accumulated, own = [True], 0.0, inputs[branch::every]
        for previous, now in zip(own[:-2], own[1:-1], strict=True):
            change = np.abs(now - previous).mean() / np.abs(previous).mean()
            accumulated += np.polyval(method.polynomial, change)
            expected.append(not accumulated < threshold)
            accumulated = 0.0 if expected[-1] else accumulated
        expected.append(True)
        assert computed[branch::every] == expected
        assert not all(expected)


@pytest.mark.parametrize(
    ("name", "method", "complaint"),
    [
        ("ltx2_t2v", TeaCache(use_ret_steps=True), "use_ret_steps=True: choose false, except on"),
        ("ltx_t2v", TeaCache(0.1, "wan2.1-t2v-14b"), "choose identity, ltx-video-0.9.1"),
        ("wan_t2v", TeaCache(0.1, "ltx-video-0.9.1"), "choose identity, wan2.1-t2v-1.3b"),
        ("ltx2_t2v", TeaCache(0.1, "flux"), "choose identity, ltx-video-0.9.1: those of"),
        ("wan_t2v", TeaCache(0.1, "flux", True), "choose one of wan2.1-t2v-1.3b, .* with use_ret"),
    ],
)
def test_setting_of_another_model_is_refused(name, method, complaint):
    pipe = pipelines.ALL[name]()
    before = fingerprint(pipe)
    with pytest.raises(ValueError, match=complaint):
        with method.attach(pipe, request(pipe, steps=STEPS)):
            pass
    assert fingerprint(pipe) == before


def test_batch_is_refused_where_the_sample_decides():
    pipe = pipelines.ltx2_t2v()
    request_ = request(pipe, steps=4)
    with pytest.raises(ValueError, match="teacache: batch=2: choose 1, one video a call"):
        with TeaCache().attach(pipe, request_):
            pipe(**request_.kwargs(pipe) | {"num_videos_per_prompt": 2})


def test_calibration_on_ltx2_sees_all_branches():
    pipe = pipelines.ltx2_t2v()
    fit = calibrate(pipe, [request(pipe, steps=6)])
    assert len(fit["points"]) == 3 * 5
    TeaCache(coefficients=fit["coefficients"]).validate(request(pipe))


def test_calibrated_list_is_accepted_by_the_method():
    pipe = PIPELINES["wan_t2v"]()
    fit = calibrate(pipe, [request(pipe, steps=STEPS)])
    TeaCache(coefficients=fit["coefficients"]).validate(request(pipe))
