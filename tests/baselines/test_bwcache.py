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
        protected = trigger is not None and forward.step >= STEPS - (trigger + 1) // 2
        if countdown and not protected:
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


def test_the_steps_before_the_trigger_say_how_many_last_ones_are_computed():
    """Triggered when 2 of 20 have run, the last one is; two are reused at a time."""
    found = forwards(BWCache(threshold=1e9), pipelines.wan_t2v(), STEPS)
    mask = "".join(str(int(all(forward.ran))) for forward in found["transformer", "cond"])
    assert mask == "11001001001001001001"


def mask(method, steps, outputs):
    """Steps that compute, where `outputs(step)` has a value for each stream of each block."""
    rule, computed = method.rule(request(steps)), ""
    for step in range(steps):
        rule.begin(step)
        ran = []
        for block, streams in enumerate(outputs(step)):
            values = tuple(torch.full((1, 2, 2), value) for value in streams)
            rule.run(block, (), lambda values=values, ran=ran: ran.append(values) or values)
        rule.end()
        computed += str(int(bool(ran)))
    return computed


@pytest.mark.parametrize(
    ("steps", "interval", "calm_from", "expected"),
    [
        (30, 0.1, 8, "1" * 10 + "0001" * 3 + "000" + "1" * 5),  # 10 have run: the last 5
        (13, 0.2, 3, "1" * 5 + "0001" + "00" + "1" * 2),  # 5 have run; 2.6 steps are 3
    ],
)
def test_reuse_ends_at_the_last_steps(steps, interval, calm_from, expected):
    method = BWCache(0.1, interval)
    assert mask(method, steps, lambda step: [(2.0 ** min(step, calm_from),)]) == expected


@pytest.mark.parametrize(
    ("before", "after", "reused"),
    [
        ([(2.0,)], [(1.0,)], True),  # half of what it was
        ([(1.0,)], [(2.0,)], False),  # as much as it was
        ([(1.0,), (1.0,)], [(2.0,), (1.0,)], True),  # half on average
        ([(1.0, 1.0)], [(1.0, 9.0)], True),  # the second stream is audio
        ([(1.0, 1.0)], [(9.0, 1.0)], False),
    ],
)
def test_change_is_the_mean_over_blocks_of_the_relative_change_of_video(before, after, reused):
    computed = mask(BWCache(0.75), STEPS, lambda step: before if step == 0 else after)
    assert computed.startswith("110" if reused else "111")


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
