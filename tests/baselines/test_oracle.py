"""The offline schedule against every mask there is; its costs against runs of static masks."""

from itertools import product

import numpy as np
import pytest
import torch

from baselines.oracle import (
    LENGTHS,
    OracleSchedule,
    calibrate,
    interpolated,
    measured_spans,
    schedules,
)
from baselines.static_mask import ExplicitMask
from tests.baselines.cases import PIPELINES, fingerprint, request

STEPS = 6


def spans(costs: np.ndarray, mask: tuple[bool, ...]) -> list[float]:
    """What the spans of a mask cost, largest first."""
    computed = [step for step, compute in enumerate(mask) if compute]
    if computed[:1] != [0]:
        return [np.inf]
    ends = [*computed[1:], len(mask)]
    return sorted((costs[span] for span in zip(computed, ends, strict=True)), reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("switch", [None, 3], ids=["one expert", "two experts"])
def test_best_of_all_masks(seed, switch):
    steps = 9
    costs = np.random.default_rng(seed).exponential(size=(steps, steps + 1))
    if switch:
        costs[:switch, switch + 1 :] = np.inf
    found = schedules(costs)
    for budget in range(1, steps + 1):
        masks = [mask for mask in product([True, False], repeat=steps) if sum(mask) == budget]
        best = min(spans(costs, mask) for mask in masks)
        if np.isinf(best[0]):
            assert budget not in found
        else:
            assert sum(found[budget]) == budget
            assert spans(costs, found[budget]) == pytest.approx(best)


@pytest.mark.parametrize("pipeline", ["wan_i2v", "wan22_t2v", "ltx2_t2v"])
def test_costs_are_what_a_span_does_to_the_video(pipeline):
    pipe = PIPELINES[pipeline]()
    before = fingerprint(pipe)
    requests = [request(pipe, seed, steps=STEPS) for seed in (0, 1)]
    costs = calibrate(pipe, requests)["costs"]
    assert fingerprint(pipe) == before

    def video(mask):
        with ExplicitMask(mask).attach(pipe, requests[0]):
            return [pipe(**one.kwargs(pipe) | {"output_type": "latent"}).frames for one in requests]

    full = video([1] * STEPS)
    switch = 2 if pipeline == "wan22_t2v" else None
    for start, end in [(0, 2), (2, 4), (4, 6), (2, 6) if switch else (1, 6)]:
        one_span = video([int(not start < step < end) for step in range(STEPS)])
        errors = [
            (torch.dist(out, x) / x.norm()).item() for out, x in zip(one_span, full, strict=True)
        ]
        assert costs[start, end] == pytest.approx(sum(errors) / 2, rel=1e-3)
        assert costs[start, end] > 0
    assert (costs[range(STEPS), range(1, STEPS + 1)] == 0).all()
    assert np.isinf(costs[np.tril_indices(STEPS)]).all()
    if switch:
        assert np.isinf(costs[:switch, switch + 1 :]).all()


def test_costs_between_are_those_of_a_power_law():
    """c = a^end * length^p: straight lines in the logarithms, exact where all lengths are near."""

    def cost(start, end):
        return 1.1**end * (end - 1 - start) ** 1.5

    experts = (range(4), range(4, 30))
    costs = interpolated({span: cost(*span) for span in measured_spans(experts)}, experts)
    for start in range(30):
        for end in range(start + 1, 31):
            if start + 1 == end:
                assert costs[start, end] == 0
            elif start < 4 < end or end - 1 - start > LENGTHS[-1]:
                assert np.isinf(costs[start, end])
            elif end >= 4 + LENGTHS[-1] + 2:
                assert costs[start, end] == pytest.approx(cost(start, end))
            else:
                assert 0 < costs[start, end] < np.inf


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
