"""MagCache against masks replayed from the authors' scripts, and against diffusers' hook."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import MagCacheConfig
from diffusers.hooks.mag_cache import nearest_interp
from omegaconf import OmegaConf

from baselines.magcache import OFFICIAL, MagCache, calibrate, nearest
from hsa.schedulers import euler
from hsa.trace import Trace, record_calls
from tests.baselines import cases
from tests.baselines.cases import PIPELINES, fingerprint, request, sample

OWN = "wan2.1-t2v-1.3b"


def mask(method: MagCache, *spans: int, branch: str = "cond") -> str:
    ends = np.cumsum((0, *spans)).tolist()
    steps = [range(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]
    return "".join("01"[computed] for computed in method.computed(branch, steps))


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize(
    ("model", "threshold", "limit", "retention", "expected"),
    [
        ("wan2.1-t2v-1.3b", 0.12, 2, 0.2, "11111111110010010010010010010010010010010010101011"),
        ("wan2.1-t2v-1.3b", 0.12, 4, 0.2, "11111111110000100001000010000100001000100100101011"),
        ("wan2.1-t2v-14b", 0.24, 6, 0.2, "11111111110000001000000100000010000010000100100101"),
        ("wan2.1-i2v-14b-480p", 0.24, 6, 0.2, "1111111100000010000010000100001000100101"),
        ("wan2.1-i2v-14b-720p", 0.24, 6, 0.2, "1111111100000010000001000001000010010010"),
        ("wan2.1-i2v-14b-480p", 0.12, 4, 0.2, "1111111100001000010001000100100100101010"),
        ("wan2.1-vace-1.3b", 0.02, 3, 0.2, "11111111110001000100010010010010010101010111111111"),
    ],
)
def test_masks_of_the_released_recipes(model, threshold, limit, retention, expected, branch):
    method = MagCache(model, threshold, limit, retention)
    assert mask(method, len(expected), branch=branch) == expected


def released(
    model: str, threshold: float, limit: int, retention: float, split=None, first=True
) -> dict[str, str]:
    """The authors' rule on their own terms: calls that alternate between cond and uncond.

    ``split``: calls of the first of two experts. ``first``: whether that one is cached.
    """
    ratios = [1.0, 1.0, *OFFICIAL[model]]
    error, skipped, product = [0.0, 0.0], [0, 0], [1.0, 1.0]
    computed, total = ["", ""], len(ratios)
    for cnt in range(total):
        branch = cnt % 2
        skip = False
        if split is None:
            free = cnt >= int(total * retention)
        elif first:
            low = split + (total - split) * retention
            free = cnt >= int(split * retention) and (cnt < split or cnt > low)
        else:
            free = cnt >= int(split + (total - split) * retention)
        if free:
            product[branch] *= ratios[cnt]
            skipped[branch] += 1
            error[branch] += abs(1 - product[branch])
            skip = error[branch] < threshold and skipped[branch] <= limit
            if not skip:
                error[branch], skipped[branch], product[branch] = 0.0, 0, 1.0
        computed[branch] += "10"[skip]
    return dict(zip(("cond", "uncond"), computed, strict=True))


@pytest.mark.parametrize("model", [name for name in OFFICIAL if "a14b" not in name])
@pytest.mark.parametrize(
    "recipe", [(0.12, 2, 0.2), (0.12, 4, 0.2), (0.24, 6, 0.2), (0.02, 3, 0.2), (0.06, 2, 0.2)]
)
def test_replays_every_released_model(model, recipe):
    """T2V slow and fast, 14B, VACE, TI2V: each recipe on each model that is one expert."""
    expected = released(model, *recipe)
    method = MagCache(model, *recipe)
    assert {branch: mask(method, len(expected[branch]), branch=branch) for branch in expected} == (
        expected
    )
    assert 0 < expected["cond"].count("0") < len(expected["cond"])


def test_masks_of_two_experts():
    """Wan 2.2 at its own shift: 26 of 40 steps, or 15, before the switch."""
    t2v = MagCache("wan2.2-t2v-a14b", 0.06, 2, 0.4)
    for branch in ("cond", "uncond"):
        expected = "1111111111001001001001001011111101010111"
        assert mask(t2v, 26, 14, branch=branch) == expected
    i2v = MagCache("wan2.2-i2v-a14b", 0.06, 2, 0.1, cache_first_expert=False)
    assert mask(i2v, 15, 25) == "1111111111111111110010010010101010111111"
    expected = "1111111111111111100100100100101010111111"
    assert mask(i2v, 15, 25, branch="uncond") == expected


@pytest.mark.parametrize("retention", [0.1, 0.2, 0.25, 0.4])
@pytest.mark.parametrize("switch", [13, 15, 17, 26])
@pytest.mark.parametrize("first", [True, False])
def test_replays_two_experts(retention, switch, first):
    """Wherever the boundary lies: the released comparisons at the switch are not alike."""
    for model in ("wan2.2-t2v-a14b", "wan2.2-i2v-a14b"):
        recipe = model, 0.06, 2, retention
        expected = released(*recipe, split=2 * switch, first=first)
        method = MagCache(*recipe, cache_first_expert=first)
        found = {b: mask(method, switch, 40 - switch, branch=b) for b in expected}
        assert found == expected


def test_a_step_with_nothing_to_reuse_is_computed_and_begins_anew():
    """Without retention: the first step of each expert."""
    ratios = [1.0] * 4 + [0.95] * 4
    method = MagCache({"cond": ratios}, 0.12, 9, 0.0)
    # The errors are 0.05 and then 0.05 + 0.0975, which is too large.
    assert mask(method, 8) == "10000101"
    assert mask(method, 4, 4) == "10001010"


def test_error_equal_to_the_threshold_is_too_large():
    method = MagCache({"cond": [1.0, 0.75, 1.0]}, 0.25, 9, 0.0)
    assert mask(method, 3) == "110"


def test_table_is_as_it_was_compared_with_the_authors_scripts():
    """All nine lists, as text, at df81cb1."""
    digest = hashlib.sha256(json.dumps(OFFICIAL).encode()).hexdigest()
    assert digest == "c4d330af7b429a753f5246630fde2987be9266d9787487460819a7390ee9d15b"


@pytest.mark.parametrize(
    ("method", "steps", "computed"),
    [
        (MagCache("wan2.1-t2v-1.3b", 0.12, 2, 0.2, sqrt_ratios=True), 50, 24),
        (MagCache("wan2.1-t2v-1.3b", 0.12, 4, 0.2, sqrt_ratios=True), 50, 19),
        (MagCache("wan2.1-i2v-14b-720p", 0.12, 4, 0.2), 40, 17),
        (MagCache("wan2.2-ti2v-5b-t2v", 0.06, 2, 0.2), 50, 25),
    ],
    ids=repr,
)
def test_computed_steps_of_the_other_recipes(method, steps, computed):
    """The square roots are those of the paper's evaluation: 3.94 and 3.11 of 8.21 PFLOPs."""
    assert mask(method, steps).count("1") == computed


@pytest.mark.parametrize("length", [1, 2, 13, 25, 40, 50, 77, 100])
def test_other_lengths_take_the_nearest_entry(length):
    values = [1.0, *OFFICIAL["wan2.1-t2v-14b"][0::2]]
    assert len(values) == 50
    expected = nearest_interp(torch.tensor(values, dtype=torch.float64), length)
    np.testing.assert_array_equal(nearest(values, length), expected)


def test_last_steps_are_protected_on_demand():
    method = MagCache("wan2.1-i2v-14b-720p", 0.24, 6)
    released = mask(method, 40)
    assert released.endswith("010010")
    assert mask(replace(method, cache_end_steps=3), 40) == released[:-3] + "111"


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan22_i2v", "ltx2_i2v"])
def test_trace_shows_the_mask(pipeline):
    pipe, steps = PIPELINES[pipeline](), 20
    method = MagCache(cases.RATIOS.get(pipeline, cases.MEASURED), 0.06, 2, 0.3)
    with method.attach(pipe, request(pipe, steps=steps)) as trace:
        pipe(**request(pipe, steps=steps).kwargs(pipe))
    first = [record.expert for record in trace.records].count("transformer")
    switch = first // len(cases.branches(pipe))
    spans = (switch, steps - switch) if switch < steps else (steps,)
    for branch in cases.branches(pipe):
        ran = [record.block_calls > 0 for record in trace.records if record.branch == branch]
        assert "".join("01"[computed] for computed in ran) == mask(method, *spans, branch=branch)
        assert not all(ran)


def test_where_the_table_has_a_model_for_both_tasks_the_task_decides():
    masks = {}
    for task in ("t2v", "i2v"):
        pipe, steps = PIPELINES[f"ti2v_{task}"](), 20
        method = MagCache(cases.RATIOS[f"ti2v_{task}"], 0.03, 4, 0.2)
        with method.attach(pipe, request(pipe, steps=steps)) as trace:
            pipe(**request(pipe, steps=steps).kwargs(pipe))
        records = [record for record in trace.records if record.branch == "uncond"]
        masks[task] = "".join("01"[record.block_calls > 0] for record in records)
        named = replace(method, ratios=f"wan2.2-ti2v-5b-{task}")
        assert masks[task] == mask(named, steps, branch="uncond")
    assert masks["t2v"] != masks["i2v"]


@pytest.mark.parametrize("limit", [1, 3])
def test_equals_the_hook_of_diffusers_where_its_rule_is_the_same(limit):
    """One list for both branches, a retention that both round to the same step, one expert."""
    pipe, steps = PIPELINES["wan_t2v"](), 12
    ratios = [1.0, *np.linspace(1.0, 0.9, steps - 1)]
    method = MagCache({"cond": ratios, "uncond": ratios}, 0.13, limit, 0.25)
    request_ = request(pipe, steps=steps)
    ours = sample(method, pipe, request_)
    trace = Trace()
    with euler(pipe), record_calls(pipe, trace):
        pipe.transformer.enable_cache(MagCacheConfig(0.13, limit, 0.25, steps, ratios))
        theirs = pipe(**request_.kwargs(pipe)).frames
        pipe.transformer.disable_cache()
    assert torch.equal(ours, theirs)
    ran = [record.block_calls > 0 for record in trace.records if record.branch == "cond"]
    assert "".join("01"[computed] for computed in ran) == mask(method, steps)
    assert 0.3 < trace.active_fraction < 0.9


def test_calibration_finds_what_the_hook_of_diffusers_prints(capsys):
    pipe, steps = PIPELINES["wan_i2v"](), 6
    before = fingerprint(pipe)
    request_ = request(pipe, steps=steps)
    found = calibrate(pipe, [request_])["ratios"]
    assert fingerprint(pipe) == before
    with euler(pipe):
        pipe.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
        pipe(**request_.kwargs(pipe))
        pipe.transformer.disable_cache()
    printed = [
        json.loads(line) for line in re.findall(r"^\[[-\d., ]+\]$", capsys.readouterr().out, re.M)
    ]
    assert list(found) == ["cond", "uncond"]
    np.testing.assert_allclose(list(found.values()), printed, atol=1e-5)


def test_calibration_is_the_mean_of_the_requests_and_fits_the_method():
    pipe = PIPELINES["ltx2_t2v"]()
    requests = [request(pipe, seed, steps=5) for seed in (0, 1)]
    both, *single = (
        calibrate(pipe, some)["ratios"] for some in (requests, *([one] for one in requests))
    )
    assert list(both) == list(cases.branches(pipe))
    for branch, ratios in both.items():
        assert ratios[0] == 1.0
        mean = np.mean([found[branch] for found in single], axis=0)
        np.testing.assert_allclose(ratios, mean, atol=1e-5)
    method = MagCache(OmegaConf.create(both), threshold=100.0, max_skip_steps=1)
    assert sample(method, pipe, requests[0]).isfinite().all()


def test_second_expert_starts_its_own_list():
    pipe = PIPELINES["wan22_t2v"]()
    found = calibrate(pipe, [request(pipe, steps=8)])["ratios"]
    assert [step for step, ratio in enumerate(found["cond"]) if ratio == 1.0] == [0, 3]


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (MagCache(), "magcache.ratios=None: choose one of wan2.1-t2v-14b, "),
        (MagCache("wan3"), "magcache.ratios='wan3': choose one of wan2.1-t2v-14b, "),
        (MagCache({}), "magcache.ratios={}: choose one of"),
        (MagCache({"cond": []}), "magcache.ratios="),
        (MagCache({"cond": ["1"]}), "magcache.ratios="),
        (MagCache(OWN, threshold=-1), "magcache.threshold=-1: choose a number >= 0"),
        (MagCache(OWN, max_skip_steps=1.5), "magcache.max_skip_steps=1.5: choose a whole number"),
        (
            MagCache(OWN, retention_ratio=2),
            r"magcache.retention_ratio=2: choose a number in 0\.\.1",
        ),
        (MagCache(OWN, sqrt_ratios=1), "magcache.sqrt_ratios=1: choose true or false"),
    ],
    ids=repr,
)
def test_bad_setting_is_refused(method, complaint):
    with pytest.raises(ValueError, match=complaint):
        method.validate(request(PIPELINES["wan_t2v"]()))


def test_model_with_other_branches_is_refused():
    pipe = PIPELINES["ltx2_t2v"]()
    with pytest.raises(ValueError, match="magcache.ratios of branch cond_uncond='wan2.1"):
        sample(MagCache(OWN), pipe, request(pipe, steps=4))
