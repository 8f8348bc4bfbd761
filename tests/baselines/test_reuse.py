"""The residual-reuse engine against residuals taken by plain torch hooks."""

from contextlib import ExitStack
from weakref import WeakSet

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from baselines.flow_matching import FlowMatching
from baselines.policy import Policy, modulated_input
from baselines.reuse import residual_reuse
from baselines.static_mask import ExplicitMask, IntervalMask
from hsa.schedulers import euler
from hsa.trace import Trace, blocks, record_calls
from tests import pipelines
from tests.baselines.cases import PIPELINES, fingerprint, request, sample

MASK = (1, 0, 1, 0, 0, 1)
STREAMS = ("hidden_states", "audio_hidden_states")


class Written(Policy):
    """Computes the steps of a mask and keeps what it was told."""

    def __init__(self, mask=MASK, calls=None):
        self.mask = mask
        self.calls = [] if calls is None else calls

    def decide(self, call):
        self.calls.append(call)
        return bool(self.mask[call.step])


@pytest.fixture(params=["wan_t2v", "ti2v_i2v"])
def pipe(request):
    return PIPELINES[request.param]()


def spied(pipe, before, after):
    """Streams into and out of each call of two modules, two lists of tuples."""
    entered, left = [], []

    def enter(module, args, kwargs):
        streams = args[:1] or tuple(kwargs[name] for name in STREAMS if name in kwargs)
        entered.append(streams)

    stack = ExitStack()
    stack.callback(before.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(after.register_forward_hook(lambda m, a, out: left.append(out)).remove)
    return stack, entered, left


@pytest.mark.parametrize("name", ["wan_t2v", "wan_ti2v", "ltx_t2v", "ltx2_t2v", "ltx23_i2v"])
def test_skipped_step_adds_the_residual_of_the_last_computed_one(name):
    """Of its own branch and stream, on the way from the first block to the heads."""
    pipe = pipelines.ALL[name]()
    transformer = pipe.transformer
    stack, entered, _ = spied(pipe, blocks(transformer)[0], transformer.proj_out)
    left = {"video": [], "audio": []}
    with stack:
        for stream, norm in (("video", "norm_out"), ("audio", "audio_norm_out")):
            if hasattr(transformer, norm):
                hook = getattr(transformer, norm).register_forward_pre_hook(
                    lambda module, args, out=left[stream]: out.append(args[0])
                )
                stack.callback(hook.remove)
        with euler(pipe), residual_reuse(pipe, Written):
            pipelines.sample(pipe, steps=len(MASK))
    branches = len(entered) // len(MASK)
    assert branches == (3 if "ltx2" in name else 1 if "ltx" in name else 2)
    outputs = list(zip(*(tensors for tensors in left.values() if tensors), strict=True))
    assert len(outputs) == len(entered) == branches * len(MASK)
    assert len(outputs[0]) == (2 if "ltx2" in name else 1)
    for branch in range(branches):
        for step, computed in enumerate(MASK):
            now = branches * step + branch
            if computed:
                residual = [out - x for out, x in zip(outputs[now], entered[now], strict=True)]
            else:
                for out, x, kept in zip(outputs[now], entered[now], residual, strict=True):
                    assert torch.equal(out, x + kept)


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v", "wan_ti2v", "ltx_i2v", "ltx2_t2v"])
def test_whole_model_is_skipped_by_velocity_minus_latents(name):
    pipe = pipelines.ALL[name]()
    channels = pipe.transformer.config.out_channels
    stack, entered, left = spied(pipe, pipe.transformer, pipe.transformer)
    trace = Trace()
    with stack, euler(pipe), residual_reuse(pipe, Written, boundary="model"):
        with record_calls(pipe, trace):
            pipelines.sample(pipe, steps=len(MASK))
    branches = len(entered) // len(MASK)
    ran = [record.block_calls > 0 for record in trace.records]
    assert ran == [bool(computed) for computed in MASK for _ in range(branches)]
    for branch in range(branches):
        for step, computed in enumerate(MASK):
            now = branches * step + branch
            latents = [x[:, :channels] if x.ndim == 5 else x for x in entered[now]]
            if computed:
                kept = [v - x for v, x in zip(left[now], latents, strict=True)]
            else:
                for v, x, delta in zip(left[now], latents, kept, strict=True):
                    assert torch.equal(v, x + delta)


def test_first_branch_decides_for_all_where_joint():
    class Alternating(Policy):
        made = 0

        def __init__(self):
            Alternating.made += 1
            self.asked = 0

        def decide(self, call):
            assert call.branch == "cond_uncond"
            self.asked += 1
            return self.asked % 2 == 1

    pipe = pipelines.ltx2_t2v()
    trace = Trace()
    with euler(pipe), residual_reuse(pipe, Alternating, joint=True), record_calls(pipe, trace):
        pipelines.sample(pipe, steps=4)
    assert Alternating.made == 1
    assert [record.block_calls for record in trace.records] == [3, 3, 3, 0, 0, 0] * 2


@pytest.mark.parametrize("name", ["wan_t2v", "wan_i2v", "ltx_t2v", "ltx2_i2v", "ltx25_t2v"])
def test_call_tells_what_runs(name):
    pipe = pipelines.ALL[name]()
    calls = []
    with euler(pipe) as scheduler, residual_reuse(pipe, lambda: Written(MASK, calls)):
        pipelines.sample(pipe, steps=len(MASK))
        sigmas = scheduler.sigmas.tolist()
    branches = len(calls) // len(MASK)
    for index, call in enumerate(calls):
        assert call.step == index // branches
        assert call.sigma == sigmas[call.step]
        assert call.spans == (range(len(MASK)),)
        assert (call.grid, call.videos) == ((3, 4, 4), 1)
        assert call.tokens.shape[1] == 3 * 4 * 4
        assert call.latents.shape[-1] == pipe.transformer.config.out_channels
        assert call.latents[0, ..., 0].numel() % (3 * 4 * 4) == 0


def test_spans_end_where_the_expert_changes():
    pipe = pipelines.wan22_t2v()
    calls, trace = [], Trace()
    with euler(pipe), residual_reuse(pipe, lambda: Written((1,) * 8, calls)):
        with record_calls(pipe, trace):
            pipelines.sample(pipe, steps=8)
    for expert, span in zip(("transformer", "transformer_2"), calls[-1].spans, strict=True):
        assert {record.step for record in trace.records if record.expert == expert} == set(span)


def test_expert_that_is_done_is_forgotten():
    """Its residuals take memory that the other one needs."""
    alive, counts = WeakSet(), []

    class Counted(Written):
        def __init__(self):
            super().__init__((1,) * 8)
            alive.add(self)

        def decide(self, call):
            counts.append((call.step, len(alive)))
            return True

    pipe = pipelines.wan22_t2v()
    with euler(pipe), residual_reuse(pipe, Counted):
        pipelines.sample(pipe, steps=8)
        assert counts[-1] == (7, 2)
        assert not alive


@pytest.mark.parametrize("name", ["wan_t2v", "wan_ti2v", "ltx_t2v", "ltx2_i2v", "ltx23_t2v"])
def test_modulated_input_is_what_self_attention_sees(name):
    pipe = pipelines.ALL[name]()
    seen, calls = [], []
    attention = blocks(pipe.transformer)[0].attn1
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("hidden_states", *args[:1])),
        with_kwargs=True,
    )
    with euler(pipe), residual_reuse(pipe, lambda: Written((1,) * 3, calls), modulated_input):
        pipelines.sample(pipe, steps=3)
    hook.remove()
    assert len(seen) == len(calls)
    for attended, call in zip(seen, calls, strict=True):
        torch.testing.assert_close(call.signal, attended)


def test_forecast_sees_the_last_residuals_of_each_stream(pipe):
    class Line(Written):
        memory = 2

        def forecast(self, step, history):
            asked.append((step, [at for at, _ in history]))
            return super().forecast(step, history)

    asked = []
    with euler(pipe), residual_reuse(pipe, Line):
        pipelines.sample(pipe, steps=len(MASK))
    assert asked == [(1, [0])] * 2 + [(3, [0, 2])] * 2 + [(4, [0, 2])] * 2


class Once(Policy):
    """Computes the first call that it is asked about, and no other."""

    asked = False

    def decide(self, call):
        first, self.asked = not self.asked, True
        return first


@pytest.mark.parametrize("name", ["wan_t2v", "wan_ti2v", "wan22_t2v", "ltx2_t2v"])
@pytest.mark.parametrize("interrupted_at", [0, 4])
def test_interrupted_video_leaves_nothing_to_the_next(name, interrupted_at):
    def interrupt(pipe, step, timestep, tensors):
        if step == interrupted_at:
            raise KeyboardInterrupt
        return tensors

    pipe = pipelines.ALL[name]()
    with residual_reuse(pipe, Once):
        expected = pipelines.sample(pipe, steps=6)
    with residual_reuse(pipe, Once):
        with pytest.raises(KeyboardInterrupt):
            pipelines.sample(pipe, seed=1, steps=8, callback_on_step_end=interrupt)
        again = pipelines.sample(pipe, steps=6)
    assert torch.equal(again, expected)


def test_pipe_with_a_cache_is_refused(pipe):
    request_ = request(pipe, steps=6)
    plain = sample(FlowMatching(), pipe, request_)
    with IntervalMask().attach(pipe, request_):
        with pytest.raises(ValueError, match="already"):
            sample(IntervalMask(), pipe, request_)
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="transformer: a cache is enabled already"):
        sample(IntervalMask(), pipe, request_)
    pipe.transformer.disable_cache()
    assert torch.equal(sample(FlowMatching(), pipe, request_), plain)


@pytest.mark.parametrize("boundary", ["blocks", "model"])
def test_failed_installation_leaves_nothing(pipe, boundary):
    before = fingerprint(pipe)
    with pytest.raises(AttributeError):
        with residual_reuse(pipe, lambda: None, tap="no.such.module", boundary=boundary):
            pass
    assert fingerprint(pipe) == before


def test_static_mask_agrees_with_the_engine(pipe):
    request_ = request(pipe, steps=len(MASK))
    with euler(pipe), residual_reuse(pipe, Written):
        expected = pipe(**request_.kwargs(pipe)).frames
    assert torch.equal(sample(ExplicitMask(MASK), pipe, request_), expected)
