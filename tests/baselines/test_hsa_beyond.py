"""Variations of HSA: each against its definition, written down once more as loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from baselines.beyond import SparseSchedule, block_means, dilated
from baselines.hsa import HSA
from baselines.hsa_beyond import HSABeyond
from baselines.static_mask import IntervalMask
from experiments.config import load_experiment
from experiments.plan import plan
from hsa.schedule import Schedule
from tests.baselines.cases import latents, pipe_of, request

SETTING = {"budgets": (8, 4, 1), "fractions": (0.1, 0.3, 0.6), "warmup_steps": 3}


class Run:
    """A video, and the guided velocity of each step."""

    def __init__(self, method, pipeline="wan_t2v"):
        pipe = pipe_of(pipeline)
        self.velocities = []

        def follow(pipe, step, timestep, tensors):
            self.velocities.append(pipe.scheduler.velocity.clone())
            return {}

        asked = request(pipe, steps=method.budgets[0], callback_on_step_end=follow)
        with method.attach(pipe, asked) as self.trace:
            self.latents = latents(pipe(**asked.kwargs(pipe)))
        self.allocation = self.trace.allocation

    def ran(self, step):
        """(F, H, W) bool: whose velocity is another than in the step before."""
        changed = self.velocities[step] != self.velocities[step - 1]
        return changed[0].any(0)[:, ::2, ::2]


@pytest.mark.parametrize("pipeline", ["wan_t2v", "ltx2_t2v"])
def test_default_is_hsa(pipeline):
    assert torch.equal(
        Run(HSABeyond(**SETTING), pipeline).latents, Run(HSA(**SETTING), pipeline).latents
    )


@pytest.mark.parametrize("interval", [1, 1.5, 2, 3])
def test_skipped_steps_are_those_of_the_static_mask(interval):
    """Where all tokens are in the full group, what runs is the front-loaded mask."""
    schedule = SparseSchedule((40, 20, 10), 5, 1, interval)
    mask = IntervalMask(interval, warmup_steps=5).computed(40)
    runs = [0 in schedule.active_groups(step) for step in range(39)]
    assert runs == list(mask[:39])
    assert schedule.is_full(39)
    assert (interval > 1) == any(schedule.active_groups(step) == () for step in range(40))


def test_groups_count_the_computed_steps():
    plain, sparse = Schedule((40, 20, 10), 5, 1), SparseSchedule((40, 20, 10), 5, 1, 2)
    computed = [step for step in range(5, 39) if sparse.active_groups(step)]
    for number, step in enumerate(computed, start=5):
        assert sparse.active_groups(step) == plain.active_groups(number)


def test_a_skipped_step_moves_every_token_by_its_last_velocity():
    method = HSABeyond(**SETTING, step_interval=2)
    run = Run(method)
    schedule = SparseSchedule(method.budgets, 3, 1, 2)
    skipped = [step for step in range(8) if not schedule.active_groups(step)]
    assert skipped
    for step in range(1, 8):
        assert bool(run.ran(step).any()) == (step not in skipped)
    active = {record.step: record.active_tokens for record in run.trace.records}
    assert {active[step] for step in skipped} == {1}


def naive_means(value, block, given):
    means = value.copy()
    for f, h, w in np.ndindex(value.shape):
        inside = [
            place
            for place in np.ndindex(value.shape)
            if all(a // s == b // s for a, b, s in zip(place, (f, h, w), block, strict=True))
            and not given[place]
        ]
        if not given[f, h, w]:
            means[f, h, w] = sum(value[place] for place in inside) / len(inside)
    return means


@pytest.mark.parametrize("block", [(1, 2, 2), (2, 2, 3), (5, 5, 5)])
def test_block_means_leave_given_tokens_out(block):
    rng = np.random.default_rng(0)
    value, given = rng.random((3, 4, 5)).astype("float32"), rng.random((3, 4, 5)) < 0.2
    value[given] = -np.inf
    found = block_means(torch.tensor(value)[None], block, torch.tensor(given).flatten()[None])[
        0
    ].numpy()
    np.testing.assert_allclose(found, naive_means(value, block, given), rtol=1e-6)


def test_neighbours_share_a_group():
    allocation = Run(HSABeyond(**SETTING, block=(1, 2, 2))).allocation[0]
    blocks = allocation.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)  # (F, H/2, W/2, 4)
    mixed = (blocks != blocks[..., :1]).any(-1).sum()
    assert mixed <= 2  # where a group ends within a block
    scattered = Run(HSA(**SETTING)).allocation[0].unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert (scattered != scattered[..., :1]).any(-1).sum() > 2


def test_dilated():
    active = torch.zeros(1, 2, 5, 6, dtype=torch.bool)
    active[0, 1, 2, 0] = True
    expected = torch.zeros_like(active)
    expected[0, 1, 1:4, :2] = True
    assert torch.equal(dilated(active, 1), expected)
    assert torch.equal(dilated(active, 0), active)


def test_dilation_costs_what_the_fractions_cost():
    method = HSABeyond(budgets=(8, 4, 2), fractions=(0.2, 0.3, 0.5), warmup_steps=2, dilation=1)
    usual = Run(HSA(method.budgets, method.fractions, warmup_steps=2)).trace
    run = Run(method)
    share = run.trace.expected_fraction
    num_tokens = run.allocation[0].numel()
    assert share <= usual.expected_fraction + 1e-9
    assert share > usual.expected_fraction - 20 / num_tokens
    assert run.trace.active_fraction == pytest.approx(share)
    schedule = method.config.schedule
    for step in range(2, 7):
        due = torch.isin(run.allocation, torch.tensor(schedule.active_groups(step)))
        expected = due if due.all() else dilated(due, 1)
        assert torch.equal(run.ran(step), expected[0])


@pytest.mark.parametrize("every", [1, 2])
def test_regrouping_goes_by_the_change_at_the_last_run(every):
    method = HSABeyond(**SETTING | {"budgets": (8, 4, 2)}, regroup_every=every)
    pipe = pipe_of("wan_t2v")
    velocities = []  # of the conditional branch
    calls = iter(range(99))

    def note(module, args, output):
        if next(calls) % 2 == 0:
            velocities.append(output[0][0].clone())

    handle = pipe.transformer.register_forward_hook(note)
    try:
        run = Run(method)
    finally:
        handle.remove()

    def tokens(step):
        return velocities[step].unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5).flatten(3)

    ran = [torch.ones_like(run.ran(1)), *map(run.ran, range(1, 8))]
    for step in range(3 + every, 7):
        if (step - 3) % every:
            continue
        rate = torch.zeros(ran[0].shape)
        for place in np.ndindex(*rate.shape):
            runs = [past for past in range(step) if ran[past][place]]
            last, before = runs[-1], runs[-2]
            new, old = tokens(last)[place], tokens(before)[place]
            rate[place] = (new - old).abs().sum() / old.abs().sum() / (last - before)
        order = rate.flatten().argsort(descending=True)
        ends = [round(sum(method.fractions[: k + 1]) * len(order)) for k in range(2)]
        groups = torch.zeros(len(order), dtype=torch.long)
        groups[order[ends[0] :]], groups[order[ends[1] :]] = 1, 2
        due = torch.tensor(method.config.schedule.active_groups(step))
        assert torch.equal(ran[step], torch.isin(groups, due).view(ran[step].shape))
    assert run.trace.active_fraction == pytest.approx(
        Run(replace(method, regroup_every=None)).trace.active_fraction
    )


@pytest.mark.parametrize(
    "field", [{"regroup_every": 2}, {"block": (1, 2, 2)}, {"dilation": 1}, {"step_interval": 2}]
)
def test_each_changes_the_video(field):
    assert not torch.equal(Run(HSABeyond(**SETTING, **field)).latents, Run(HSA(**SETTING)).latents)


@pytest.mark.parametrize(
    ("field", "value"),
    [("regroup_every", 0), ("block", (1, 2)), ("dilation", -1), ("step_interval", 0.5)],
)
def test_bad_values_are_named(field, value):
    asked = request(pipe_of("wan_t2v"), steps=8)
    with pytest.raises(ValueError, match=f"hsa_beyond.{field}"):
        HSABeyond(**SETTING, **{field: value}).validate(asked)


def test_what_the_experiment_compares_costs_the_same():
    """Up to the rounding of the fractions; dilation is fitted to it while a video is made."""
    cells = plan(load_experiment(["experiment=ablation/beyond", "limit=1", "tasks=[t2v]"])).cells
    variations = {cell.label: cell.method for cell in cells if isinstance(cell.method, HSABeyond)}
    assert len(variations) == 14
    for label, method in variations.items():
        windows = method.warmup_steps, method.cooldown_steps
        schedule = SparseSchedule(method.budgets, *windows, method.step_interval)
        share = schedule.expected_fraction(method.fractions)
        assert share == pytest.approx(0.5 if "HSA-50" in label else 0.25, abs=2e-4), label
