"""DiCache against its rule, written again over tensors taken from the run by plain hooks."""

import numpy as np
import pytest
import torch

from baselines.dicache import DiCache
from tests import pipelines
from tests.baselines.forwards import PIPELINES, forwards, request

STEPS = 12
PROTECTED = 2  # int(0.2 * 12)


def rule(found, threshold, depth, limit):
    """For each forward: is it skipped, and what leaves the blocks, by stream; in float64."""
    accumulated, previous, history = 0.0, None, []
    for forward in found:
        x, probe = double(forward.entered), double(forward.outputs[depth - 1])
        skip = False
        if previous is not None and forward.step >= PROTECTED:
            accumulated += np.abs(probe[0] - previous).mean() / np.abs(previous).mean()
            skip = accumulated < threshold
        previous, p = probe[0], [a - b for a, b in zip(probe, x, strict=True)]
        if skip:
            yield True, [x[i] + aligned(history, p, i, limit) for i in range(len(x))]
        else:
            accumulated = 0.0
            left = double(forward.left)
            history.append(([a - b for a, b in zip(left, x, strict=True)], p))
            yield False, left


def aligned(history, p, i, limit):
    if len(history) < 2:
        return history[-1][0][i]
    (r2, p2), (r1, p1) = history[-2:]
    gamma = np.abs(p[i] - p2[i]).mean() / np.abs(p1[i] - p2[i]).mean()
    return r2[i] + np.clip(gamma, 1, limit) * (r1[i] - r2[i])


def double(streams):
    return [stream.double().numpy() for stream in streams]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("depth", "limit"), [(1, 2.0), (2, 1.05)])
def test_follows_the_published_rule(pipeline, depth, limit):
    method = DiCache(threshold=0.25, probe_depth=depth, max_gamma=limit)
    found = forwards(method, pipelines.ALL[pipeline](), STEPS)
    decisions = []
    for branch in found.values():
        for forward, (skip, left) in zip(branch, rule(branch, 0.25, depth, limit), strict=True):
            assert forward.ran == [index < depth or not skip for index in range(3)]
            for ours, theirs in zip(forward.left, left, strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-5)
            decisions.append(skip)
    assert True in decisions and False in decisions[PROTECTED:]


def test_protected_share_is_rounded_down():
    """2.8 of 14 steps."""
    found = forwards(DiCache(threshold=float("inf")), pipelines.wan_t2v(), 14)
    assert [sum(forward.ran) for forward in found["transformer", "cond"]] == [3] * 2 + [1] * 12


def test_experts_start_over():
    """With shift 3 and 12 steps the second expert takes over at step 4 (boundary 0.875)."""
    found = forwards(DiCache(threshold=10.0), pipelines.wan22_t2v(), STEPS)
    for branch in ("cond", "uncond"):
        first = [sum(forward.ran) for forward in found["transformer", branch]]
        second = [sum(forward.ran) for forward in found["transformer_2", branch]]
        assert (first, second) == ([3, 3, 1, 1], [3, 1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"threshold": -1}, "dicache.threshold=-1: choose a number >= 0"),
        ({"probe_depth": 0}, "dicache.probe_depth=0: choose a whole number >= 1"),
        ({"ret_ratio": 1.5}, r"dicache.ret_ratio=1.5: choose a number in 0\.\.1"),
        ({"max_gamma": 0.5}, "dicache.max_gamma=0.5: choose a number >= 1"),
        ({"probe_depth": 3}, "dicache.probe_depth=3: choose less than the model's 3 blocks"),
    ],
)
def test_bad_setting_is_refused_before_anything_runs(settings, complaint):
    pipe = pipelines.wan_t2v()
    with pytest.raises(ValueError, match=complaint):
        with DiCache(**settings).attach(pipe, request(STEPS)):
            pytest.fail("attached")


@pytest.mark.parametrize("pipeline", ["wan_t2v", "ltx2_t2v"])
def test_batch_is_refused(pipeline):
    pipe = pipelines.ALL[pipeline]()
    with pytest.raises(ValueError, match="dicache: batch=2: choose 1, one video a call"):
        with DiCache().attach(pipe, request(STEPS)), torch.no_grad():
            pipe(**pipelines.inputs(pipe, steps=STEPS, num_videos_per_prompt=2))
