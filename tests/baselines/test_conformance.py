"""What every method owes, on every pipeline: a yaml in conf/method is enough to be tested here."""

from functools import cache

import pytest
import torch

from baselines.flow_matching import FlowMatching
from tests.baselines import cases
from tests.baselines.cases import METHODS, PIPELINES, STEPS, Run, fingerprint, request, sample

pytestmark = [
    pytest.mark.parametrize("pipeline", PIPELINES),
    pytest.mark.parametrize("name", METHODS),
]


@cache
def pipe_of(pipeline: str):
    pipe = PIPELINES[pipeline]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def observed(pipeline: str, name: str) -> Run:
    pipe = pipe_of(pipeline)
    return cases.observe(cases.method(name), pipe, request(pipe))


@cache
def flow_matching(pipeline: str, steps: int) -> torch.Tensor:
    pipe = pipe_of(pipeline)
    return sample(FlowMatching(), pipe, request(pipe, steps=steps))


@pytest.fixture
def pipe(pipeline):
    return pipe_of(pipeline)


@pytest.fixture
def method(name):
    return cases.method(name)


@pytest.fixture
def run(pipeline, name):
    return observed(pipeline, name)


def test_neutral_setting_is_flow_matching(pipe, pipeline, method):
    neutral = method.neutral(request(pipe))
    assert torch.equal(sample(neutral, pipe, request(pipe)), flow_matching(pipeline, STEPS))


def test_order_does_not_matter(pipe, method, run):
    """A alone, then B and A in one attach: both A identical."""
    other, again = sample(method, pipe, request(pipe, seed=1), request(pipe))
    assert torch.equal(again, run.latents[0])
    assert not torch.equal(other, again)


def test_batch_of_two_is_two_singles(pipe, method, run):
    one, two = request(pipe), request(pipe, seed=1)
    both = one.kwargs(pipe)
    for key in ("prompt", "negative_prompt", "generator"):
        both[key] = [one.kwargs(pipe)[key], two.kwargs(pipe)[key]]
    try:
        with method.attach(pipe, one):
            batch = pipe(**both).frames
    except ValueError as refusal:
        assert "one video" in str(refusal)
    else:
        singles = torch.cat([run.latents, sample(method, pipe, two)])
        torch.testing.assert_close(batch, singles, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interrupted", [False, True])
def test_pipe_is_as_before(pipe, pipeline, method, interrupted):
    def interrupt(pipe, step, timestep, tensors):
        if step == STEPS // 2:
            raise KeyboardInterrupt
        return tensors

    plain = flow_matching(pipeline, 5)
    before = fingerprint(pipe)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            sample(method, pipe, request(pipe, callback_on_step_end=interrupt))
    else:
        sample(method, pipe, request(pipe, seed=1))
    assert fingerprint(pipe) == before
    assert torch.equal(sample(FlowMatching(), pipe, request(pipe, steps=5)), plain)


def test_trace_counts_what_ran(run, pipeline):
    assert run.trace.block_calls == run.block_calls
    assert len(run.trace.records) == 2 * STEPS
    assert {(record.step, record.branch) for record in run.trace.records} == set(run.velocities)


def test_skips_what_it_promises(pipe, method, run):
    promised = method != method.neutral(request(pipe))
    assert (run.trace.active_fraction < 1) == promised


def test_guidance_branches_stay_apart(run):
    """On every step, skipped ones included: a branch that got the other's cache would equal it."""
    for step in range(STEPS):
        assert not torch.equal(run.velocities[step, "cond"], run.velocities[step, "uncond"])


def test_expert_begins_with_a_full_step(run, pipeline):
    first = {}
    for record in run.trace.records:
        first.setdefault((record.expert, record.branch), record)
    assert len(first) == (4 if pipeline == "wan22_t2v" else 2)
    for record in first.values():
        assert (record.block_calls, record.active_tokens) == (record.blocks, record.tokens)
