"""First Block Cache is diffusers' own hook, and what the hook would do if it could on LTX-2."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformerBlock

from baselines.base import Request
from baselines.first_block_cache import FirstBlockCache, first_block_rule
from hsa.schedulers import euler
from hsa.trace import experts
from tests import pipelines
from tests.baselines.forwards import forwards

SIZE = {"steps": 8, "height": 32, "width": 32, "num_frames": 9}
REQUEST = Request("t2v", "a red circle", "", 0, 8, 4.0, 32, 32, 9, 16)
ONE_STREAM = ["wan_t2v", "wan_i2v", "wan_ti2v", "ti2v_t2v", "wan22_t2v", "wan22_i2v", "ltx_i2v"]
TWO_STREAMS = ["ltx2_t2v", "ltx23_i2v", "ltx25_t2v"]


@contextmanager
def hooked(pipe, threshold):
    for transformer in experts(pipe).values():
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    yield
    for transformer in experts(pipe).values():
        transformer.disable_cache()


class Streams(TransformerBlockMetadata):
    """The second stream of LTX-2 is audio; what the hook asks for by name is the text."""

    def _get_parameter_from_args_kwargs(self, identifier, args=(), kwargs=None):
        return kwargs[identifier.replace("encoder", "audio")]


@pytest.fixture
def two_streams_registered():
    metadata = Streams(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    TransformerBlockRegistry.register(LTX2VideoTransformerBlock, metadata)
    yield
    del TransformerBlockRegistry._registry[LTX2VideoTransformerBlock]


@pytest.mark.parametrize("family", ONE_STREAM)
@pytest.mark.parametrize("threshold", [0.1, 0.2])
def test_equals_the_hook_run_directly(family, threshold):
    pipe = getattr(pipelines, family)()
    with FirstBlockCache(threshold).attach(pipe, REQUEST):
        ours = pipelines.sample(pipe, **SIZE)
    with euler(pipe):
        plain = pipelines.sample(pipe, **SIZE)
        with first_block_rule(pipe, threshold):
            rule = pipelines.sample(pipe, **SIZE)
        with hooked(pipe, threshold):
            theirs = pipelines.sample(pipe, **SIZE)
    assert torch.equal(ours, theirs)
    assert torch.equal(rule, theirs)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("family", TWO_STREAMS)
def test_equals_the_hook_told_of_two_streams(family, two_streams_registered):
    pipe = getattr(pipelines, family)()
    with FirstBlockCache(0.2).attach(pipe, REQUEST):
        ours = pipelines.sample_av(pipe, **SIZE)
    with euler(pipe):
        plain = pipelines.sample_av(pipe, **SIZE)
        with hooked(pipe, 0.2):
            theirs = pipelines.sample_av(pipe, **SIZE)
    for mine, hook, uncached in zip(ours, theirs, plain, strict=True):
        assert torch.equal(mine, hook)
        assert not torch.equal(mine, uncached)


@pytest.mark.parametrize("family", ["wan_t2v", "wan22_i2v", "ltx2_t2v", "ltx_t2v"])
def test_computes_what_the_rule_says(family):
    """What a skipped step adds to the first block's output is known: it is taken off again."""
    threshold, skipped = 0.2, 0
    found = forwards(FirstBlockCache(threshold), getattr(pipelines, family)(), 12)
    for first, *others in found.values():
        assert all(first.ran)
        reference, rest = residual(first), first.left[0] - first.outputs[0][0]
        for call in others:
            skip = not call.ran[1]
            now = residual(call) - rest if skip else residual(call)
            change = (now - reference).abs().mean() / reference.abs().mean()
            assert skip == (change <= threshold)
            assert call.ran == [True] + [not skip] * (len(call.ran) - 1)
            if not skip:
                reference, rest = now, call.left[0] - call.outputs[0][0]
            skipped += skip
    assert skipped > 0


def residual(call):
    return call.outputs[0][0] - call.entered[0]


@pytest.mark.parametrize("family", ["wan22_t2v", "ltx2_t2v", "ltx_t2v"])
def test_interrupted_video_leaves_nothing_to_the_next(family):
    def interrupt(pipe, step, timestep, tensors):
        if step == 5:
            raise KeyboardInterrupt
        return tensors

    pipe, longer = getattr(pipelines, family)(), SIZE | {"steps": 16}
    with FirstBlockCache(100.0).attach(pipe, REQUEST):
        expected = pipelines.sample(pipe, **longer)
    with FirstBlockCache(100.0).attach(pipe, REQUEST):
        with pytest.raises(KeyboardInterrupt):
            pipelines.sample(pipe, **SIZE, seed=1, callback_on_step_end=interrupt)
        assert torch.equal(pipelines.sample(pipe, **longer), expected)


@pytest.mark.parametrize("family", ["wan_t2v", "ltx2_t2v", "ltx_t2v"])
def test_batch_is_refused(family):
    pipe = getattr(pipelines, family)()
    with pytest.raises(ValueError, match="first_block_cache: batch=2: choose 1, one video a call"):
        with FirstBlockCache().attach(pipe, REQUEST):
            pipelines.sample(pipe, **SIZE, num_videos_per_prompt=2)
    assert not pipe.transformer.is_cache_enabled
