"""Model CPU offload under a method: diffusers puts accelerate's hooks on anew after every call."""

import accelerate
import pytest
import torch

from baselines.dbcache import DBCache
from hsa.trace import experts
from tests.baselines.cases import PIPELINES, latents, method, request, sample, steps_of

FAMILIES = ("wan_t2v", "wan22_t2v", "ltx2_t2v")
# Every engine, and rules that keep something from step to step.
RUN = ("bwcache", "first_block_cache", "foresight", "pab", "seacache", "taylorseer", "teacache")


def offload(pipe):
    """What `enable_model_cpu_offload` does to transformers, here to a CPU."""
    for transformer in experts(pipe).values():
        accelerate.hooks.remove_hook_from_module(transformer, recurse=True)
        accelerate.cpu_offload_with_hook(transformer, execution_device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RUN)
def test_second_video_is_that_without_offload(name, family):
    pipe, caching = PIPELINES[family](), method(name, family)
    steps = steps_of(caching)
    requests = [request(pipe, seed=seed, steps=steps) for seed in (0, 1)]
    expected = [sample(caching, pipe, request_) for request_ in requests]
    offload(pipe)
    with caching.attach(pipe, requests[0]) as trace:
        for request_, video in zip(requests, expected, strict=True):
            assert torch.equal(latents(pipe(**request_.kwargs(pipe))), video)
            offload(pipe)
    assert trace.active_fraction < 1


@pytest.mark.parametrize("name", ["dbcache", "easycache", "fastercache"])
def test_method_that_replaces_a_forward_is_refused(name):
    if name == "dbcache" and not DBCache().installed:
        pytest.skip("needs cache-dit: pip install 'hsa-bench[cache-dit]'")
    pipe, caching = PIPELINES["wan_t2v"](), method(name)
    offload(pipe)
    with pytest.raises(ValueError, match=f"{name}: transformer='with CPU offload': choose one wit"):
        with caching.attach(pipe, request(pipe, steps=steps_of(caching))):
            pass
