import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import product

import pytest

from hsa import HSAConfig
from hsa.schedule import SMALLEST_FULL, Schedule, divisors


def brute_force(budgets, warmup, cooldown):
    """The set of active groups of each step, written down step by step."""
    steps = budgets[0]
    plan = [set() for _ in range(steps)]
    for group, budget in enumerate(budgets):
        stride = steps / budget
        for visit in range(budget):
            plan[int(visit * stride)].add(group)
        for step in [*range(warmup), *range(steps - cooldown, steps)]:
            plan[step].add(group)
    return plan


@pytest.mark.parametrize("budgets", [(40, 10, 5), (40, 20, 8, 5), (12, 6, 4, 3), (7, 1), (8,)])
@pytest.mark.parametrize("windows", [(2, 0), (2, 1), (5, 2), (4, 3)])
def test_schedule_equals_brute_force(budgets, windows):
    schedule = Schedule(budgets, *windows)
    plan = brute_force(budgets, *windows)
    assert [set(schedule.active_groups(step)) for step in range(schedule.steps)] == plan
    counts = [sum(group in groups for groups in plan) for group in range(len(budgets))]
    assert list(schedule.executed_steps()) == counts
    tokens = [3, 5, 7, 11][: len(budgets)]  # tokens in each group
    run = sum(sum(tokens[group] for group in groups) for groups in plan)
    fractions = [count / sum(tokens) for count in tokens]
    share = run / sum(tokens) / schedule.steps
    assert schedule.expected_fraction(fractions) == pytest.approx(share)


def test_executed_steps_by_hand():
    # 40 steps, windows 0-4 and 39. Stride 4 adds 8, 12, ..., 36; stride 8 adds 8, 16, 24, 32.
    assert Schedule((40, 10, 5), 5, 1).executed_steps() == (40, 6 + 8, 6 + 4)


@pytest.mark.parametrize("runtime", [0.26, 0.3, 0.5, 0.6180, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("steps", [40, 50, 30])
def test_for_runtime_meets_the_runtime(runtime, steps):
    config = HSAConfig.for_runtime(runtime, steps=steps)
    assert config.expected_fraction == pytest.approx(runtime)
    assert config.budgets[0] == steps
    assert SMALLEST_FULL <= config.fractions[0] <= 1


def test_for_runtime_refreshes_as_often_as_it_can():
    config = HSAConfig.for_runtime(0.35, steps=40, warmup_steps=5, cooldown_steps=1)
    chosen = config.budgets[:0:-1]
    for middle, low in product(divisors(40)[1:], repeat=2):
        if middle > low and (low, middle) > chosen:
            rest = Schedule((40, middle, low), 5, 1).expected_fraction((0, 1 / 3, 2 / 3))
            assert (0.35 - rest) / (1 - rest) < SMALLEST_FULL


def test_for_runtime_between_windows_that_leave_nothing():
    assert HSAConfig.for_runtime(1.0, steps=6).budgets == (6,)
    with pytest.raises(ValueError, match="runtime: 0.5 .* choices: 1.0000 to 1.0"):
        HSAConfig.for_runtime(0.5, steps=6, warmup_steps=5)


def test_for_runtime_with_a_prime_number_of_steps():
    config = HSAConfig.for_runtime(0.7, steps=13, warmup_steps=2)
    assert config.budgets == (13, 1)
    assert config.expected_fraction == pytest.approx(0.7)


@pytest.mark.parametrize("runtime", [0.1, 0.0, -1, 1.01, float("nan")])
def test_for_runtime_names_what_can_be_met(runtime):
    with pytest.raises(ValueError, match=rf"runtime: {runtime} .* choices: 0.2004 to 1.0"):
        HSAConfig.for_runtime(runtime, steps=40, warmup_steps=5)
    with pytest.raises(ValueError, match=rf"runtime: {runtime} .* choices: 0.1292 to 1.0"):
        HSAConfig.for_runtime(runtime, steps=40)


@pytest.mark.parametrize(
    "runtime, steps, windows",
    [
        (0.25, 40, (3, 1)),
        (0.5, 40, (7, 2)),
        (0.75, 40, (11, 3)),
        (0.5, 100, (18, 6)),
        (0.5, 8, (2, 1)),
    ],
)
def test_for_runtime_spends_half_of_it_in_windows(runtime, steps, windows):
    config = HSAConfig.for_runtime(runtime, steps)
    assert (config.warmup_steps, config.cooldown_steps) == windows
    assert config.expected_fraction == pytest.approx(runtime)


def test_for_runtime_keeps_the_windows_it_is_given():
    config = HSAConfig.for_runtime(0.5, 40, warmup_steps=10, cooldown_steps=4)
    assert (config.warmup_steps, config.cooldown_steps) == (10, 4)


F = (0.1, 0.3, 0.6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budgets": ()}, r"budgets: \(\) must be one or more"),
        ({"budgets": (40, 0, 5)}, r"budgets: \(40, 0, 5\) .* positive"),
        ({"budgets": (40, 12, 5)}, r"budgets: \(40, 12, 5\) must divide .* choices: \(40, 20, 10"),
        ({"budgets": (40, 5, 10)}, r"budgets: \(40, 5, 10\) must decrease"),
        ({"fractions": None}, r"fractions: None and thresholds: None; give exactly one"),
        ({"thresholds": (0.3, 0.1)}, r"thresholds: \(0.3, 0.1\); give exactly one"),
        ({"fractions": (0.4, 0.6)}, r"fractions: \(0.4, 0.6\) must have 3 entries"),
        ({"fractions": (0.4, 0.4, 0.4)}, r"fractions: \(0.4, 0.4, 0.4\) .* sum to 1"),
        ({"fractions": (-0.2, 0.6, 0.6)}, r"fractions: .* at least 0"),
        ({"fractions": (float("nan"), 0.4, 0.6)}, r"fractions: .* sum to 1"),
        ({"fractions": None, "thresholds": (0.3,)}, r"thresholds: \(0.3,\) must have 2 entries"),
        ({"fractions": None, "thresholds": (0.1, 0.3)}, r"thresholds: .* must not increase"),
        ({"fractions": None, "thresholds": (0.1, -0.3)}, r"thresholds: .* at least 0"),
        ({"fractions": None, "thresholds": (float("nan"),) * 2}, r"thresholds: .* at least 0"),
        ({"warmup_steps": 1}, r"warmup_steps: 1 must lie in 2..40"),
        ({"warmup_steps": 41}, r"warmup_steps: 41 must lie in 2..40"),
        ({"cooldown_steps": -1}, r"cooldown_steps: -1 must lie in 0..35"),
        ({"cooldown_steps": 36}, r"cooldown_steps: 36 must lie in 0..35"),
    ],
)
def test_errors_name_field_value_and_choices(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        HSAConfig(**{"fractions": F} | arguments)
    assert "\n" not in str(error.value)


def test_config_is_a_frozen_value():
    config = HSAConfig([40, 10, 5], [0.1, 0.3, 0.6])
    assert config == HSAConfig((40, 10, 5), F)
    assert len({config, HSAConfig((40, 10, 5), F)}) == 1
    with pytest.raises(FrozenInstanceError):
        config.warmup_steps = 3
    assert config.expected_fraction == pytest.approx((0.1 * 40 + 0.3 * 14 + 0.6 * 10) / 40)
    assert HSAConfig(thresholds=(0.3, 0.1)).expected_fraction is None


def test_configuring_does_not_import_torch():
    code = (
        "import sys; from hsa import HSAConfig; HSAConfig.for_runtime(0.25, steps=40);"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
