"""The residual-reuse engine against residuals taken by plain torch hooks."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from baselines.flow_matching import FlowMatching
from baselines.policy import Policy
from baselines.reuse import residual_reuse
from baselines.static_mask import ExplicitMask, IntervalMask
from tests.baselines.cases import PIPELINES, request, sample

MASK = (1, 0, 1, 0, 0, 1)


@pytest.fixture(params=["wan_t2v", "ti2v_i2v"])
def pipe(request):
    return PIPELINES[request.param]()


def test_skipped_step_adds_the_residual_of_the_last_computed_one(pipe):
    """Tokens (B, N, D) into the first block and into the head, two calls (branches) a step."""
    entered, left = [], []
    blocks, head = pipe.transformer.blocks, pipe.transformer.norm_out
    request_ = request(pipe, steps=len(MASK))
    with ExitStack() as stack:
        stack.callback(
            blocks[0].register_forward_pre_hook(lambda m, a: entered.append(a[0])).remove
        )
        stack.callback(head.register_forward_pre_hook(lambda m, a: left.append(a[0])).remove)
        sample(ExplicitMask(MASK), pipe, request_)
    assert len(entered) == len(left) == 2 * len(MASK)
    for branch in (0, 1):
        for step, computed in enumerate(MASK):
            now = 2 * step + branch
            if computed:
                residual = left[now] - entered[now]
            else:
                assert torch.equal(left[now], entered[now] + residual)


class Once(Policy):
    """Computes the first call that it is asked about, and no other."""

    asked = False

    def decide(self, call):
        first, self.asked = not self.asked, True
        return first


def test_interrupted_video_leaves_nothing_to_the_next(pipe):
    def interrupt(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    clean = request(pipe, steps=6).kwargs(pipe)
    other = request(pipe, seed=1, steps=6, callback_on_step_end=interrupt).kwargs(pipe)
    with residual_reuse(pipe, Once):
        expected = pipe(**clean).frames
    with residual_reuse(pipe, Once):
        with pytest.raises(KeyboardInterrupt):
            pipe(**other)
        again = pipe(**request(pipe, steps=6).kwargs(pipe)).frames
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


def test_failed_installation_leaves_nothing(pipe):
    with pytest.raises(AttributeError):
        with residual_reuse(pipe, lambda: None, tap="no.such.module"):
            pass
    assert all("forward" not in vars(module) for module in pipe.transformer.modules())
