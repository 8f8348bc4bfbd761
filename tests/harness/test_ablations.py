"""What the ablations compare costs the same, and each plans on a checkpoint as it does here."""

from dataclasses import replace

import pytest

from baselines.hsa import HSA
from baselines.hsa_stagger import HSAStagger
from baselines.teacache import TeaCache
from experiments.config import load_experiment
from experiments.plan import plan

EQUAL = ["signal", "measure", "windows", "groups", "stagger", "seeds"]
EXPERIMENTS = [*EQUAL, "euler_error", "thresholds"]


def settings(name, *overrides):
    """Label -> method of every setting of an ablation."""
    cells = plan(load_experiment([f"experiment=ablation/{name}", "limit=1", *overrides])).cells
    return {cell.label: cell.method for cell in cells}


def expected_fraction(method):
    """By counting, for each group, the steps on which it runs; turns of a staggered one by m."""
    steps, warmup, cooldown = method.budgets[0], method.warmup_steps, method.cooldown_steps
    between = range(warmup, steps - cooldown)
    total = 0.0
    for budget, share in zip(method.budgets, method.fractions, strict=True):
        stride = steps // budget
        due = len(between) / stride
        if not isinstance(method, HSAStagger):
            due = sum(step % stride == 0 for step in between)
        total += share * (warmup + cooldown + due)
    return total / steps


@pytest.mark.parametrize("name", EQUAL)
def test_settings_to_compare_cost_the_same(name):
    costs = {
        label: expected_fraction(method)
        for label, method in settings(name).items()
        if isinstance(method, HSA)
    }
    assert len(costs) > 1
    for label, cost in costs.items():
        percent = label[4:6] if label.startswith("HSA-") else 50
        assert cost == pytest.approx(int(percent) / 100, abs=2e-5), label


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_is_the_same_on_a_checkpoint(name):
    """But for TeaCache's coefficients, which are the model's."""
    offline, there = (
        {
            label: replace(method, coefficients="identity")
            if isinstance(method, TeaCache)
            else method
            for label, method in settings(name, "tasks=[t2v]", f"model={model}").items()
        }
        for model in ("embedded", "wan21_t2v_1_3b")
    )
    assert there == offline


def test_failure_cases_differ_in_their_prompts_alone():
    for model, word in (("embedded", "checkered"), ("wan21_t2v_1_3b", "camera pan")):
        cells = plan(load_experiment(["experiment=ablation/failure", f"model={model}"])).cells
        methods = {"busy": {}, "calm": {}}
        for cell in cells:
            setting, _, kind = cell.label.rpartition(", ")
            methods[kind][setting] = cell.method
        assert methods["busy"] == methods["calm"]
        assert any(word in cell.request.prompt for cell in cells if cell.label.endswith("busy"))
        assert not any(word in cell.request.prompt for cell in cells if cell.label.endswith("calm"))
