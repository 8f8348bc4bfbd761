"""The oracle against every mask there is; its costs against residuals taken by plain hooks."""

from itertools import product

import numpy as np
import pytest
import torch

from baselines.flow_matching import FlowMatching
from baselines.oracle import OracleSchedule, calibrate, schedules
from tests.baselines.cases import PIPELINES, fingerprint, request, sample

STEPS = 6


def spans(costs: np.ndarray, mask: tuple[bool, ...]) -> list[float]:
    """What the spans of a mask cost, largest first, said step by step."""
    spent = []
    for step, computed in enumerate(mask):
        if computed:
            last = step
            spent.append(0.0)
        elif not spent:
            return [np.inf]
        else:
            spent[-1] += costs[last, step]
    return sorted(spent, reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("switch", [None, 3], ids=["one expert", "two experts"])
def test_best_of_all_masks(seed, switch):
    steps = 9
    costs = np.random.default_rng(seed).exponential(size=(steps, steps))
    if switch:
        costs[:switch, switch:] = np.inf
    found = schedules(costs)
    for budget in range(1, steps + 1):
        masks = [mask for mask in product([True, False], repeat=steps) if sum(mask) == budget]
        best = min(spans(costs, mask) for mask in masks)
        if np.isinf(best[0]):
            assert budget not in found
        else:
            assert sum(found[budget]) == budget
            assert spans(costs, found[budget]) == pytest.approx(best)


def test_costs_are_relative_distances_of_the_residuals():
    """Tokens into the first block and into the head, cond and uncond in turn."""
    pipe = PIPELINES["wan_t2v"]()
    before = fingerprint(pipe)
    one = request(pipe, steps=STEPS)
    entered, left = [], []
    first, head = pipe.transformer.blocks[0], pipe.transformer.norm_out
    handles = [
        first.register_forward_pre_hook(lambda m, args: entered.append(args[0])),
        head.register_forward_pre_hook(lambda m, args: left.append(args[0])),
    ]
    sample(FlowMatching(), pipe, one)
    for handle in handles:
        handle.remove()
    residuals = [out - x for x, out in zip(entered, left, strict=True)]
    costs = calibrate(pipe, [one])["costs"]
    for i, k in [(0, 1), (4, 5), (0, 5), (2, 4)]:
        pairs = [(residuals[2 * i + b], residuals[2 * k + b]) for b in (0, 1)]
        expected = [(torch.dist(old, new) / new.norm()).item() for old, new in pairs]
        assert costs[i, k] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert np.isinf(costs[np.tril_indices(STEPS)]).all()
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("pipeline", ["wan_t2v", "ti2v_i2v", "wan22_t2v"])
def test_replays_its_mask(pipeline):
    pipe = PIPELINES[pipeline]()
    one = request(pipe, steps=STEPS)
    masks = calibrate(pipe, [one])["masks"]
    experts = 2 if pipeline == "wan22_t2v" else 1
    assert [mask.count("1") for mask in masks[one.task]] == list(range(experts, STEPS + 1))
    for budget in (experts, 4):
        method = OracleSchedule(budget, masks)
        with method.attach(pipe, one) as trace:
            pipe(**one.kwargs(pipe))
        for branch in ("cond", "uncond"):
            ran = [r.block_calls > 0 for r in trace.records if r.branch == branch]
            assert ran == [bit == "1" for bit in masks[one.task][budget - experts]]
    assert method.knob == ("budget", experts, STEPS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 7}, ["oracle.budget=7", "[1, 2]"]),
        ({"masks": {}}, ["oracle.masks", "calibrate"]),
        ({"masks": {"i2v": ["10"]}}, ["oracle.masks", "t2v"]),
        ({"masks": {"t2v": ["100", "110"]}}, ["oracle.masks", "masks of 2 steps"]),
    ],
)
def test_refusals(settings, words):
    method = OracleSchedule(**{"budget": 1, "masks": {"t2v": ["10", "11"]}} | settings)
    with pytest.raises(ValueError) as refusal:
        method.validate(request(PIPELINES["wan_t2v"](), steps=2))
    assert [word for word in words if word not in str(refusal.value)] == []
