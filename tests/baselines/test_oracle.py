"""The oracle against every mask there is; its costs against residuals taken by plain hooks."""

from itertools import product

import numpy as np
import pytest
import torch

from baselines.flow_matching import FlowMatching
from baselines.oracle import OracleSchedule, calibrate, schedules
from baselines.static_mask import ExplicitMask
from tests.baselines.cases import PIPELINES, fingerprint, request, sample

STEPS = 6


def total(costs: np.ndarray, mask: tuple[bool, ...]) -> float:
    """What a mask costs, said step by step."""
    spent, last = 0.0, None
    for step, computed in enumerate(mask):
        if computed:
            last = step
        elif last is None:
            return np.inf
        else:
            spent += costs[last, step]
    return spent


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
        least = min(total(costs, mask) for mask in masks)
        if np.isinf(least):
            assert budget not in found
        else:
            assert sum(found[budget]) == budget
            assert total(costs, found[budget]) == pytest.approx(least)


def test_costs_are_distances_in_units_of_the_outcome():
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
    full = sample(FlowMatching(), pipe, one)
    for handle in handles:
        handle.remove()
    residuals = [out - x for x, out in zip(entered, left, strict=True)]

    def distance(i: int, k: int) -> float:
        """Mean of both branches."""
        pairs = [(residuals[2 * i + b], residuals[2 * k + b]) for b in (0, 1)]
        return sum(torch.dist(a, b).item() for a, b in pairs) / 2

    costs = calibrate(pipe, [one])["costs"]
    for i, k in [(0, 1), (4, 5), (0, 5), (2, 4)]:
        mask = [int(step != k) for step in range(STEPS)]
        outcome = torch.dist(sample(ExplicitMask(mask), pipe, one), full) / full.norm()
        expected = outcome.item() * distance(i, k) / distance(k - 1, k)
        assert costs[i, k] == pytest.approx(expected, rel=1e-4)
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
