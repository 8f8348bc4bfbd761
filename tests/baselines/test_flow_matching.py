"""Flow matching adds nothing to diffusers' own loop; what differs is the scheduler alone."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from baselines.flow_matching import FlowMatching
from baselines.native_sampler import NativeSampler
from hsa.schedulers import EulerFlowMatch
from tests.baselines.cases import PIPELINES, latents, request, sample


@pytest.mark.parametrize(
    ("pipeline", "native"),
    [("wan_t2v", UniPCMultistepScheduler), ("ltx2_i2v", FlowMatchEulerDiscreteScheduler)],
)
def test_native_sampler_is_the_pipeline_as_it_comes(pipeline, native):
    pipe = PIPELINES[pipeline]()
    request_ = request(pipe, steps=6)
    untouched = latents(pipe(**request_.kwargs(pipe)))
    assert type(pipe.scheduler) is native
    assert torch.equal(sample(NativeSampler(), pipe, request_), untouched)


def test_flow_matching_samples_with_euler():
    pipe = PIPELINES["wan_t2v"]()
    request_ = request(pipe, steps=6)
    ours = sample(FlowMatching(), pipe, request_)
    assert not torch.equal(ours, sample(NativeSampler(), pipe, request_))
    pipe.scheduler = EulerFlowMatch.like(pipe.scheduler)
    assert torch.equal(ours, latents(pipe(**request_.kwargs(pipe))))
