"""Staggered HSA against a model of its schedule in Python lists."""

from types import SimpleNamespace

import pytest
import torch

from baselines.hsa import HSA
from baselines.hsa_stagger import HSAStagger
from baselines.stagger import StaggeredRule, StaggeredSchedule
from hsa import HSAConfig
from hsa.trace import Trace
from tests import pipelines
from tests.baselines import cases

SETTING = {"budgets": (16, 8, 4), "fractions": (0.25, 0.25, 0.5), "warmup_steps": 3}
STRIDES = (1, 2, 4)


def run(method, build=pipelines.wan_t2v):
    pipe = build()
    request = cases.request(pipe, steps=16)
    with method.attach(pipe, request) as trace:
        latents = pipe(**request.kwargs(pipe)).frames
    return latents, trace


def naive_counts(allocation):
    """Tokens that run at each step: the j-th of a group with stride m at steps i = j mod m."""
    counts = []
    for step in range(16):
        seen, running = [0, 0, 0], 0
        for group in allocation:
            due = step % STRIDES[group] == seen[group] % STRIDES[group]
            seen[group] += 1
            running += due or step < 3 or step == 15
        counts.append(running)
    return counts


@pytest.mark.parametrize("build", [pipelines.wan_t2v, pipelines.wan_ti2v, pipelines.ltx23_t2v])
def test_tokens_of_a_group_run_by_turns(build):
    _, trace = run(HSAStagger(**SETTING), build)
    counts = naive_counts(trace.allocation.flatten().tolist())
    first = trace.records[0].branch
    assert [r.active_tokens for r in trace.records if r.branch == first] == counts
    assert trace.expected_fraction == pytest.approx(sum(counts) / (16 * counts[0]))
    assert trace.active_fraction == pytest.approx(trace.expected_fraction)


def test_allocation_is_that_of_hsa_and_the_video_is_not():
    staggered, trace = run(HSAStagger(**SETTING))
    aligned, expected = run(HSA(**SETTING))
    assert torch.equal(trace.allocation, expected.allocation)
    assert torch.equal(trace.velocity_change, expected.velocity_change)
    assert not torch.equal(staggered, aligned)


def test_more_parts_than_an_int8_counts():
    """Budgets 100, 2, 1 have 1 + 50 + 100 parts."""
    config = HSAConfig((100, 2, 1), fractions=(0, 0.5, 0.5), warmup_steps=2)
    trace = Trace()
    rule = StaggeredRule(config, SimpleNamespace(num_inference_steps=100), trace)
    rule.grid, rule.change.changes = (2, 10, 10), [torch.linspace(1, 0, 200)[None]]
    rule.rows(step=2, copies=1)
    assert rule.groups.max() == 150
    assert trace.allocation.flatten().tolist() == [1] * 100 + [2] * 100


def test_a_group_of_the_full_budget_has_no_turns():
    whole = {"budgets": (16,), "fractions": (1.0,)}
    staggered, trace = run(HSAStagger(**SETTING | whole))
    assert torch.equal(staggered, run(HSA(**SETTING | whole))[0])
    assert trace.active_fraction == 1


@pytest.mark.parametrize("warmup, cooldown", [(2, 0), (5, 1), (3, 7)])
def test_parts_are_disjoint_and_run_as_often_as_counted(warmup, cooldown):
    schedule = StaggeredSchedule((16, 8, 4), warmup, cooldown)
    assert len(schedule.parts) == sum(STRIDES)
    between = range(warmup, 16 - cooldown)
    for part, (group, turn) in enumerate(schedule.parts):
        runs = [step for step in range(16) if part in schedule.active_groups(step)]
        due = [step for step in between if step % STRIDES[group] == turn]
        assert [step for step in runs if step in between] == due
        assert schedule.executed_steps()[part] == len(runs) == len(due) + warmup + cooldown


@pytest.mark.parametrize("name, percent", [("hsa_stagger", 50)])
def test_preset_costs_what_it_says(name, percent):
    method = cases.method(name)
    full = method.warmup_steps + method.cooldown_steps
    costs = [(full + (40 - full) * budget / 40) / 40 for budget in method.budgets]
    cost = sum(share * cost for share, cost in zip(method.fractions, costs, strict=True))
    assert cost == pytest.approx(percent / 100, abs=1e-5)
