"""First Block Cache is diffusers' own hook and nothing else."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from baselines.first_block_cache import FirstBlockCache
from hsa.schedulers import euler
from hsa.trace import experts
from tests.baselines.cases import PIPELINES, request, sample


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("threshold", [0.05, 0.1])
def test_equals_the_hook_run_directly(pipeline, threshold):
    pipe = PIPELINES[pipeline]()
    request_ = request(pipe, steps=8)
    ours = sample(FirstBlockCache(threshold), pipe, request_)
    with euler(pipe):
        for transformer in experts(pipe).values():
            transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        theirs = pipe(**request_.kwargs(pipe)).frames
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, sample_without_cache(pipe, request_))


def sample_without_cache(pipe, request_):
    for transformer in experts(pipe).values():
        transformer.disable_cache()
    with euler(pipe):
        return pipe(**request_.kwargs(pipe)).frames


def test_batch_is_refused():
    pipe = PIPELINES["wan_t2v"]()
    one = request(pipe, steps=8)
    with pytest.raises(ValueError, match="first_block_cache: batch=2: choose 1, one video a call"):
        with FirstBlockCache().attach(pipe, one):
            pipe(**one.kwargs(pipe) | {"num_videos_per_prompt": 2})
    assert not pipe.transformer.is_cache_enabled
