"""BWCache against its rule, written again over tensors taken from the run by plain hooks."""

import pytest
import torch

from baselines.bwcache import BWCache
from tests import pipelines
from tests.baselines.forwards import PIPELINES, forwards, request

STEPS = 20


def rule(found, threshold, reuse):
    """Whether each forward computes. `found` is read at computed forwards only."""
    before, countdown, trigger = None, 0, None
    for forward in found:
        half = trigger is not None and 2 * (forward.step - trigger) > STEPS - 1 - trigger
        if countdown and not half:
            countdown -= 1
            yield False
            continue
        countdown = 0
        now = [output[0].double() for output in forward.outputs]
        if before is not None:
            changes = [
                (a - b).abs().sum() / b.abs().sum() for a, b in zip(now, before, strict=True)
            ]
            if sum(changes) / len(changes) < threshold:
                trigger = forward.step if trigger is None else trigger
                countdown = reuse
        before = now
        yield True


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("threshold", "interval"), [(0.25, 0.1), (0.6, 0.3)])
def test_follows_the_published_rule(pipeline, threshold, interval):
    method = BWCache(threshold, interval)
    found = forwards(method, pipelines.ALL[pipeline](), STEPS)
    decisions = []
    for branch in found.values():
        computed = list(rule(branch, threshold, int(interval * STEPS)))
        assert [forward.ran for forward in branch] == [[bit] * 3 for bit in computed]
        for forward, bit in zip(branch, computed, strict=True):
            if bit:
                last = forward
            for ours, kept in zip(forward.outputs, last.outputs, strict=True):
                assert all(map(torch.equal, ours, kept))
            assert all(map(torch.equal, forward.left, last.outputs[-1]))
        decisions += computed
    assert False in decisions and decisions.count(True) > 4 * len(found)


def test_second_half_after_the_trigger_is_computed():
    """Triggered at step 1 of 20, 18 remain: 2..10 may be reused, two at a time; 11..19 not."""
    found = forwards(BWCache(threshold=1e9), pipelines.wan_t2v(), STEPS)
    mask = "".join(str(int(all(forward.ran))) for forward in found["transformer", "cond"])
    assert mask == "11001001001111111111"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"threshold": "low"}, "bwcache.threshold='low': choose a number >= 0"),
        ({"interval": 0}, "bwcache.interval=0: choose a share of the steps"),
        ({"interval": 2}, "bwcache.interval=2: choose a share of the steps"),
    ],
)
def test_bad_setting_is_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        BWCache(**settings).validate(request(STEPS))
