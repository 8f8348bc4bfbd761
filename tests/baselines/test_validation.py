"""Bad settings are refused in one line that names field, value and choices, without torch."""

import subprocess
import sys
from dataclasses import replace

import pytest

from baselines.base import Request
from baselines.first_block_cache import FirstBlockCache
from baselines.flow_matching import FlowMatching
from baselines.hsa import HSA
from baselines.static_mask import ExplicitMask, IntervalMask
from baselines.teacache import TeaCache
from experiments.config import load_experiment
from experiments.plan import plan
from hsa import HSAConfig
from tests.baselines import cases

REQUEST = Request("t2v", "a red circle", "", 0, 8, 4.0, 32, 32, 9, 16)


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (FlowMatching(steps=0), "flow_matching.steps=0: choose a whole number"),
        (FlowMatching(steps=2.5), "flow_matching.steps=2.5: choose a whole number"),
        (IntervalMask(interval=0), "static_mask.interval=0: choose a number >= 1"),
        (IntervalMask(interval="2"), "static_mask.interval='2': choose a number >= 1"),
        (IntervalMask(warmup_steps=0), r"static_mask.warmup_steps=0: choose .* 1\.\.8"),
        (IntervalMask(warmup_steps=9), r"static_mask.warmup_steps=9: choose .* 1\.\.8"),
        (ExplicitMask([1, 0, 1]), r"static_mask.mask=\(1, 0, 1\): choose 8 zeros and ones"),
        (ExplicitMask([0] + [1] * 7), "beginning with 1"),
        (ExplicitMask([1] * 7 + [2]), "choose 8 zeros and ones"),
        (ExplicitMask([]), "choose 8 zeros and ones"),
        (FirstBlockCache(threshold=-0.1), "first_block_cache.threshold=-0.1: choose a number"),
        (FirstBlockCache(threshold="low"), "first_block_cache.threshold='low': choose a number"),
        (TeaCache(threshold=-1), "teacache.threshold=-1: choose a number"),
        (TeaCache(threshold=float("nan")), "teacache.threshold=nan: choose a number"),
        (TeaCache(threshold=True), "teacache.threshold=True: choose a number"),
        (TeaCache(use_ret_steps="yes"), "teacache.use_ret_steps='yes': choose true or false"),
        (TeaCache(coefficients="wan2.2"), "='wan2.2': choose one of identity, wan2.1-t2v-1.3b, "),
        (TeaCache(coefficients=[]), r"teacache.coefficients=\(\): choose"),
        (TeaCache(coefficients=[1, "x"]), r"teacache.coefficients=\(1, 'x'\): choose"),
        (HSA(budgets=[8, 3], fractions=[0.5, 0.5]), r"budgets: \(8, 3\) must divide .*8, 4, 2, 1"),
        (HSA([4, 2], [0.5, 0.5], None, 2), r"hsa.budgets=\(4, 2\): choose .* 8 itself"),
        (HSA(budgets=[8, 4]), "fractions: None and thresholds: None"),
        (HSA(budgets=[8, 4], thresholds=[-0.1]), r"hsa.thresholds=\(-0.1,\): choose"),
        (HSA(budgets=[8, 4], thresholds="low"), "hsa.thresholds='low': choose a list of numbers"),
        (HSA(budgets=["8"], fractions=[1]), r"hsa.budgets=\('8',\): choose divisors"),
        (HSA(budgets=[8, 0.5], fractions=[1]), r"hsa.budgets=\(8, 0.5\): choose divisors"),
        (HSA(budgets=[8], fractions=[1], warmup_steps="2"), "hsa.warmup_steps='2': choose"),
    ],
    ids=repr,
)
def test_bad_setting_is_refused(method, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        method.validate(REQUEST)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", cases.METHODS)
def test_yaml_fits_a_request_of_40_steps(name):
    cases.method(name).validate(cases.request(cases.PIPELINES["wan_t2v"]()))


@pytest.mark.parametrize("name", cases.METHODS)
def test_both_ends_of_the_knob_can_be_had(name):
    method, request = cases.method(name), cases.request(cases.PIPELINES["wan_t2v"]())
    for end in method.knob[1:] if method.knob else ():
        turned = method.turned(end)
        turned.validate(replace(request, steps=turned.steps or request.steps))


@pytest.mark.parametrize("percent", [25, 50, 75])
def test_preset_is_what_the_solver_finds(percent):
    preset = cases.method(f"hsa_{percent}").config
    solved = HSAConfig.for_runtime(percent / 100, steps=40)
    assert preset.budgets == solved.budgets
    assert preset.fractions == pytest.approx(solved.fractions, abs=1e-6)
    assert preset.expected_fraction == pytest.approx(percent / 100, abs=1e-5)


def test_unknown_pipeline_argument_is_named():
    pipe = cases.PIPELINES["wan_t2v"]()
    with pytest.raises(ValueError, match="WanPipeline does not take frame_rate; choices: prompt, "):
        cases.request(pipe, frame_rate=24).kwargs(pipe)


def test_no_two_yamls_are_stored_under_one_key():
    overrides = ["prompts=texts", "prompts.texts=[a circle]", f"method={','.join(cases.METHODS)}"]
    cells = plan(load_experiment(overrides, multirun=True)).cells
    assert len({cell.key for cell in cells}) == len(cases.METHODS)


def test_planning_needs_no_torch():
    code = (
        "import sys; from baselines.base import Request; from experiments import config;"
        "request = Request('t2v', '', '', 0, 40, 4.0, 32, 32, 9, 16);"
        "methods = 'method=' + ','.join(config.group_choices('method'));"
        "settings = config.load_experiment([methods], multirun=True).settings;"
        "[config.build(setting.config.method, 'method').validate(request) for setting in settings];"
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
