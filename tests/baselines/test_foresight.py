"""Foresight against the official loop, written again over tensors taken from the run."""

import pytest
import torch

from baselines.foresight import Foresight
from tests import pipelines
from tests.baselines.forwards import PIPELINES, forwards, request

STEPS, WARMUP, DEPTH = 12, 4, 3


def official(found, recalculate, threshold):
    """Blocks that run in each forward: the branches of the official loop over `count`."""
    cache, mse, limit = [None] * DEPTH, [None] * DEPTH, [None] * DEPTH
    for count, forward in enumerate(found):
        now = [output[0].double() for output in forward.outputs]
        if count < WARMUP or count % recalculate == 0:
            ran = [True] * DEPTH
        else:
            below = [i for i in range(DEPTH) if not mse[i] > limit[i]]
            layer = below[-1] if below else -1
            ran = [i > layer for i in range(DEPTH)]
        for i in range(DEPTH):
            if ran[i]:
                if cache[i] is not None:
                    mse[i] = ((now[i] - cache[i]) ** 2).mean()
                cache[i] = now[i]
        if count == WARMUP - 1:
            limit = [threshold * change for change in mse]
        yield ran


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("recalculate", "threshold"), [(2, 1.5), (3, 4.0), (3, 1.0)])
def test_runs_the_blocks_of_the_official_loop(pipeline, recalculate, threshold):
    """At 3 and 1.0 the first change that is looked at equals its limit."""
    method = Foresight(WARMUP, recalculate, threshold)
    found = forwards(method, pipelines.ALL[pipeline](), STEPS)
    patterns = []
    for branch in found.values():
        expected = list(official(branch, recalculate, threshold))
        assert [forward.ran for forward in branch] == expected
        kept = [None] * DEPTH
        for forward, ran in zip(branch, expected, strict=True):
            for i in range(DEPTH):
                if ran[i]:
                    kept[i] = forward.outputs[i]
                assert all(map(torch.equal, forward.outputs[i], kept[i]))
        patterns += expected
    assert any(not all(ran) for ran in patterns)


def test_large_changes_are_told_apart_in_half_precision():
    """A square beyond the range of fp16 would make change and limit infinite, and equal."""
    rule = Foresight(warmup=2, threshold=0.5).rule(request(STEPS))
    for step, value in enumerate((0, 1000, 3000, 6000)):
        rule.begin(step)
        (output,) = rule.run(0, (), lambda value=value: (torch.full((1, 4), value).half(),))
        rule.end()
    assert (output == 6000).all()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"warmup": 1}, "foresight.warmup=1: choose a whole number >= 2"),
        ({"recalculate": 0}, "foresight.recalculate=0: choose a whole number >= 1"),
        ({"threshold": None}, "foresight.threshold=None: choose a number >= 0"),
    ],
)
def test_bad_setting_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Foresight(**settings).validate(request(STEPS))
