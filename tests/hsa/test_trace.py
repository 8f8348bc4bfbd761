import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import ModelHook

from hsa.registry import registered
from hsa.schedulers import euler
from hsa.trace import StepRecord, Trace, record_calls
from tests.pipelines import sample, wan22_t2v, wan_t2v, wan_ti2v


def record(active_tokens, block_calls, step=0):
    return StepRecord(step, "cond", "transformer", active_tokens, 100, block_calls, 4)


def test_active_fraction_by_hand():
    trace = Trace([record(100, 4), record(25, 4), record(0, 0), record(100, 1)])
    assert trace.active_fraction == (400 + 100 + 0 + 100) / 1600
    assert trace.block_calls == 9
    assert Trace().active_fraction == 1


def test_to_dict_is_json_without_tensors():
    arrays = {"allocation": torch.zeros(1, 1, 1, 1)}
    trace = Trace([record(100, 4), record(25, 4, step=1)], arrays)
    columns = json.loads(json.dumps(trace.to_dict()))["records"]
    assert columns["step"] == [0, 1]
    assert columns["active_tokens"] == [100, 25]


@pytest.mark.parametrize("build", [wan_t2v, wan_ti2v])
@pytest.mark.parametrize("guidance_scale, branches", [(1.0, ["cond"]), (4.0, ["cond", "uncond"])])
def test_plain_pipeline_runs_everything(build, guidance_scale, branches):
    pipe, trace = build(), Trace()
    with euler(pipe), record_calls(pipe, trace):
        sample(pipe, steps=3, guidance_scale=guidance_scale)
    expected = [
        StepRecord(step, branch, "transformer", 48, 48, 3, 3)
        for step in range(3)
        for branch in branches
    ]
    assert trace.records == expected
    assert trace.active_fraction == 1


def test_both_experts_are_recorded():
    pipe, trace = wan22_t2v(), Trace()
    with euler(pipe), record_calls(pipe, trace):
        sample(pipe, guidance_scale=1.0)
    # sigma is below the boundary of 0.875 from step 3 of 8 on
    assert [r.expert for r in trace.records] == ["transformer"] * 3 + ["transformer_2"] * 5


@pytest.mark.parametrize("cache_first", [True, False])
def test_blocks_skipped_by_a_cache_are_not_counted(cache_first):
    pipe, trace = wan_t2v(), Trace()
    cache = FirstBlockCacheConfig(threshold=1e9)  # from step 1 on, only the first block runs
    if cache_first:
        pipe.transformer.enable_cache(cache)
    with euler(pipe), record_calls(pipe, trace):
        if not cache_first:
            pipe.transformer.enable_cache(cache)
        sample(pipe, steps=3)
    assert [r.block_calls for r in trace.records] == [3, 3, 1, 1, 1, 1]
    assert trace.active_fraction == pytest.approx(10 / 18)


class Skip(ModelHook):
    """Answers every forward from nowhere."""

    def new_forward(self, module, *args, **kwargs):
        return (kwargs["hidden_states"],)


@pytest.mark.parametrize("hook_first", [True, False])
def test_forwards_that_never_run_are_recorded_as_skipped(hook_first):
    pipe, trace = wan_t2v(), Trace()
    skip = registered(pipe.transformer, Skip(), "skip")
    with euler(pipe):
        contexts = [record_calls(pipe, trace), skip]
        first, second = reversed(contexts) if hook_first else contexts
        with first, second:
            sample(pipe, steps=2)
    assert trace.records[-1] == StepRecord(1, "uncond", "transformer", 0, 48, 0, 3)
    assert len(trace.records) == 4
    assert trace.active_fraction == 0


def test_recording_changes_nothing_and_leaves_nothing():
    pipe = wan_t2v()
    with euler(pipe):
        expected = sample(pipe, steps=2)
        attributes = set(vars(pipe.transformer))
        with record_calls(pipe, Trace()):
            assert torch.equal(sample(pipe, steps=2), expected)
        assert torch.equal(sample(pipe, steps=2), expected)
    assert set(vars(pipe.transformer)) == attributes
    assert not pipe.transformer._diffusers_hook.hooks
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())
