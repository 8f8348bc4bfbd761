"""What every method owes, on every pipeline: a yaml in conf/method is enough to be tested here.

What a method cannot serve it refuses in one line; the table in README.md says who refuses what.
"""

from functools import cache

import pytest
import torch

from baselines.flow_matching import FlowMatching
from tests.baselines import cases, support
from tests.baselines.cases import (
    METHODS,
    PIPELINES,
    Run,
    fingerprint,
    interrupt,
    pipe_of,
    request,
    sample,
)

SHORT = 12  # steps of the runs that need none of the settings
every_case = pytest.mark.parametrize(
    ("pipeline", "name"), [(pipeline, name) for pipeline in PIPELINES for name in METHODS]
)


@cache
def flow_matching(pipeline: str) -> torch.Tensor:
    pipe = pipe_of(pipeline)
    return sample(FlowMatching(), pipe, request(pipe, steps=SHORT))


@cache
def observed(pipeline: str, name: str) -> Run | str:
    """Videos A, B, an interrupted one and A of one attach, the first observed, after which the pipe
    is as before; or why not.
    """
    pipe, method = pipe_of(pipeline), cases.method(name, pipeline)
    steps = cases.steps_of(method)
    one, two = request(pipe, steps=steps), request(pipe, seed=1, steps=steps)
    broken = request(pipe, seed=1, steps=steps, callback_on_step_end=interrupt(SHORT))
    before = fingerprint(pipe)
    try:
        run = cases.observe(method, pipe, one, two, broken, one)
    except ValueError as refusal:
        run = str(refusal)
    assert fingerprint(pipe) == before
    return run


@pytest.fixture
def pipe(pipeline):
    return pipe_of(pipeline)


@pytest.fixture
def method(name, pipeline):
    return cases.method(name, pipeline)


@pytest.fixture
def run(pipeline, name):
    run = observed(pipeline, name)
    if isinstance(run, str):
        pytest.skip(run)
    return run


@every_case
def test_neutral_setting_is_flow_matching(pipe, pipeline, method, run):
    request_ = request(pipe, steps=SHORT)
    neutral = method.neutral(request_)
    assert torch.equal(sample(neutral, pipe, request_), flow_matching(pipeline))


@every_case
def test_what_was_made_before_does_not_matter(run):
    first, other, again = run.latents
    assert torch.equal(again, first)
    assert not torch.equal(other, first)


@every_case
def test_batch_of_two_is_two_singles(pipe, method, run):
    one, two = request(pipe, steps=run.steps), request(pipe, seed=1, steps=run.steps)
    both = one.kwargs(pipe)
    for key in ("prompt", "negative_prompt", "generator"):
        both[key] = [one.kwargs(pipe)[key], two.kwargs(pipe)[key]]
    if "image" in both and not hasattr(pipe.transformer, "condition_embedder"):
        both["image"] = [both["image"]] * 2  # LTX takes one a prompt
    try:
        with method.attach(pipe, one):
            batch = cases.latents(pipe(**both))
    except ValueError as refusal:
        assert "one video" in str(refusal)
    else:
        singles = torch.cat(run.latents[:2])
        torch.testing.assert_close(batch, singles, rtol=0, atol=1e-5)


@every_case
def test_interrupted_pipe_is_as_before(pipe, pipeline, method, run):
    broken = request(pipe, steps=run.steps, callback_on_step_end=interrupt(SHORT))
    before = fingerprint(pipe)
    with pytest.raises(KeyboardInterrupt):
        sample(method, pipe, broken)
    assert fingerprint(pipe) == before
    plain = sample(FlowMatching(), pipe, request(pipe, steps=SHORT))
    assert torch.equal(plain, flow_matching(pipeline))


@every_case
def test_trace_counts_what_ran(pipe, run):
    assert run.trace.block_calls == run.block_calls
    assert len(run.trace.records) == len(cases.branches(pipe)) * run.steps
    assert {(record.step, record.branch) for record in run.trace.records} == set(run.velocities)


@every_case
def test_skips_what_it_promises(method, run, pipeline):
    everything = observed(pipeline, "flow_matching")
    less = run.work / run.steps < everything.work / everything.steps
    assert less != isinstance(method, FlowMatching)


@every_case
def test_guidance_branches_stay_apart(pipe, run):
    """On every step, skipped ones included: a branch that got another's cache would equal it."""
    for step in range(run.steps):
        velocities = [run.velocities[step, branch] for branch in cases.branches(pipe)]
        samples = [sample for velocity in velocities for sample in velocity]
        for index, sample_ in enumerate(samples):
            assert not any(torch.equal(sample_, other) for other in samples[:index])


@every_case
def test_expert_begins_with_a_full_step(pipe, pipeline, run):
    first = {}
    for record in run.trace.records:
        first.setdefault((record.expert, record.branch), record)
    experts = 2 if pipeline in cases.TWO_EXPERTS else 1
    assert len(first) == experts * len(cases.branches(pipe))
    for record in first.values():
        assert (record.block_calls, record.active_tokens) == (record.blocks, record.tokens)


def test_table_in_the_readme_is_up_to_date():
    """Written by `python -m tests.baselines.support`."""
    pytest.importorskip("cache_dit")  # without it DBCache refuses everything
    found = support.table(lambda pipeline, name: isinstance(observed(pipeline, name), Run))
    assert support.written() == found
