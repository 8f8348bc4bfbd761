"""Static masks: what is written is what runs."""

import json

import pytest
import torch

from baselines.dicache import DiCache
from baselines.hsa import HSA
from baselines.seacache import SeaCache
from baselines.static_mask import ExplicitMask, IntervalMask, recorded, replay
from tests.baselines.cases import PIPELINES, latents, request, sample

TWO_CALLS = {
    "step": [0, 0],
    "branch": ["cond", "uncond"],
    "blocks": [3, 3],
    "active_tokens": [4, 4],
    "tokens": [4, 4],
}


def written(mask: str) -> tuple[bool, ...]:
    return tuple(bit == "1" for bit in mask)


@pytest.mark.parametrize(
    ("interval", "warmup", "mask"),
    [
        (1, 1, "11111111"),
        (2, 1, "10101010"),
        (3, 1, "10010010"),
        (20, 1, "10000000"),
        (2, 3, "11101010"),
        (3, 2, "11001001"),
        (5, 8, "11111111"),
        (1.5, 1, "10110110"),
        (4 / 3, 2, "11011101"),
        (2.5, 1, "10010100"),
    ],
)
def test_interval_mask(interval, warmup, mask):
    assert IntervalMask(interval, warmup).computed(8) == written(mask)


@pytest.mark.parametrize(
    "method", [IntervalMask(3, 2), ExplicitMask([1, 1, 0, 0, 1, 0, 0, 1])], ids=repr
)
@pytest.mark.parametrize("pipeline", ["wan_t2v", "ti2v_i2v"])
def test_trace_shows_the_written_mask(method, pipeline):
    mask = "11001001"
    pipe = PIPELINES[pipeline]()
    with method.attach(pipe, request(pipe, steps=8)) as trace:
        pipe(**request(pipe, steps=8).kwargs(pipe))
    for branch in ("cond", "uncond"):
        ran = [record.block_calls for record in trace.records if record.branch == branch]
        assert ran == [3 * computed for computed in written(mask)]


def test_expert_switch_is_computed_against_the_mask():
    """With shift 3 and 8 steps the second expert takes over at step 3."""
    pipe = PIPELINES["wan22_t2v"]()
    mask = ExplicitMask([1, 0, 0, 0, 0, 0, 1, 0])
    with mask.attach(pipe, request(pipe, steps=8)) as trace:
        pipe(**request(pipe, steps=8).kwargs(pipe))
    cond = [record for record in trace.records if record.branch == "cond"]
    assert [record.expert for record in cond] == ["transformer"] * 3 + ["transformer_2"] * 5
    assert [record.block_calls for record in cond] == [3, 0, 0, 3, 0, 0, 3, 0]


@pytest.mark.parametrize("pipeline", ["wan_t2v", "wan22_i2v", "ltx2_t2v"])
@pytest.mark.parametrize("stored", [False, True])
def test_replayed_mask_gives_the_same_video(pipeline, stored, tmp_path):
    """Of a method that reuses the same residual; all that is left of it is its mask."""
    pipe, record = PIPELINES[pipeline](), tmp_path / "record.json"
    request_ = request(pipe, steps=12)
    with SeaCache(0.8).attach(pipe, request_) as trace:
        original = latents(pipe(**request_.kwargs(pipe)))
    content = trace.to_dict()
    record.write_text(json.dumps({"result": {"trace": content}} if stored else content))
    replayed = replay([1], str(record))
    assert 0 < sum(replayed.mask) < 12
    assert torch.equal(sample(replayed, pipe, request_), original)


def test_steps_that_ran_in_part_are_not_replayed(tmp_path):
    """DiCache's probe runs in every step, HSA's tokens do not."""
    pipe = PIPELINES["wan_t2v"]()
    request_ = request(pipe, steps=12)
    for method in (
        DiCache(threshold=1.0),
        HSA(budgets=(12, 3), fractions=(0.5, 0.5), warmup_steps=2, cooldown_steps=1),
    ):
        with method.attach(pipe, request_) as trace:
            pipe(**request_.kwargs(pipe))
        (tmp_path / "record.json").write_text(json.dumps(trace.to_dict()))
        cond = [record for record in trace.records if record.branch == "cond"]
        full = [r.active_tokens * r.block_calls == r.tokens * r.blocks for r in cond]
        assert list(recorded(str(tmp_path / "record.json")).mask) == full
        assert False in full and all(record.block_calls > 0 for record in cond)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "choose the record.json of a stored sample"),
        ("{}", "choose the record.json of a stored sample"),
        ("[1, 0]", "choose the record.json of a stored sample"),
        (
            json.dumps({"records": {**TWO_CALLS, "block_calls": [3, 0]}}),
            "choose one where all branches agree",
        ),
    ],
)
def test_useless_record_is_refused(text, complaint, tmp_path):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"static_mask.record='{path}': {complaint}"):
        recorded(str(path))
