"""The benches' counts against known ones; times are theirs alone and not tested."""

import csv

import pytest
import torch

from experiments.bench import engine, loops
from experiments.tiny_ltx2.build import components
from hsa.engine import token_sampler
from hsa.schedulers import euler
from tests import pipelines
from tests.baselines import support
from tests.harness.helpers import hsa_bench

SHARES = [0.75, 0.5, 0.25, 0.125]
TINY = ["model=tiny", "schedule.steps=4", "prompts=texts", "prompts.texts=[a circle]"]


def wan_loop() -> loops.Loop:
    return loops.wan(pipelines.wan_t2v().transformer, (3, 8, 8), text=16)


def ltx2_loop() -> loops.Loop:
    return loops.ltx2(components("2.0")["transformer"], (3, 4, 4), audio=8, text=16)


LOOPS = pytest.mark.parametrize("make", [wan_loop, ltx2_loop])


@LOOPS
def test_steps_run_the_share_of_tokens_that_they_say(make):
    loop = make()
    found = engine.measure(loop, SHARES, repeats=2)
    assert found.tokens == 3 * 4 * 4
    kinds = ["all active", "75.0% active", "50.0% active", "25.0% active", "12.5% active"]
    assert found.active == dict(zip(kinds, [1.0, *SHARES], strict=True))
    assert list(found.seconds) == ["plain", *kinds]
    assert {len(seconds) for seconds in found.seconds.values()} == {2}
    assert found.ratio("plain") == 1.0


@LOOPS
def test_announced_memory_is_that_of_the_keys_and_values(make):
    """fp32 K and V of all tokens in every layer that reads video tokens."""
    loop = make()
    config = loop.transformer.config
    if make is wan_loop:
        layers = config.num_layers * [config.num_attention_heads * config.attention_head_dim]
    else:  # self-attention, and video-to-audio attention
        video = config.num_attention_heads * config.attention_head_dim
        audio = config.audio_num_attention_heads * config.audio_attention_head_dim
        layers = config.num_layers * [video, audio]
    found = engine.measure(loop, [0.5], repeats=1)
    assert found.announced == sum(2 * 4 * loop.tokens * width for width in layers)


@LOOPS
def test_the_step_with_all_tokens_is_the_plain_one(make):
    loop = make()
    with euler(loop):
        _, plain = loop.steps(3)
    with token_sampler(loop, engine._Shares(loop, [1.0] * 3)):
        _, all_active = loop.steps(3)
    with token_sampler(loop, engine._Shares(loop, [1.0, 1.0, 0.5])):
        _, half = loop.steps(3)
    assert torch.equal(plain, all_active)
    assert not torch.equal(plain, half)


def test_sizes_are_the_published_ones():
    """Wan2.1-1.3B at 480 x 832 x 81 has 32 760 tokens, and 1.42 billion parameters."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(**loops.WAN_1_3B)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert parameters == pytest.approx(1.42e9, rel=0.005)
    assert 21 * (60 // 2) * (104 // 2) == 32760


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured where there is a CUDA device")
def test_what_needs_a_gpu_is_said_to_be_unmeasured(tmp_path, capsys):
    assert hsa_bench("bench engine", tmp_path, "bench.sizes=[wan2.1-1.3b,ltx2]") == 0
    written = (tmp_path / "bench_engine" / "table.md").read_text()
    assert written.count("unmeasured: no CUDA device") == 2
    assert "unmeasured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("bench.sizes=[wan]", ["bench.sizes='wan'", "embedded, wan-slice, wan2.1-1.3b"]),
        ("bench.shares=[1.5]", ["bench.shares=1.5"]),
        ("bench.repeats=0", ["bench.repeats=0"]),
    ],
)
def test_bad_input_is_one_line(override, words, tmp_path, capsys):
    assert hsa_bench("bench engine", tmp_path, override) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert [word for word in words if word not in message] == []


def test_methods_tell_their_memory_and_refusals(tmp_path):
    """The uniform mask holds one residual a branch; HSA's preset is for 40 steps, not for 4."""
    methods = "method=flow_matching,static_uniform,hsa_50"
    assert hsa_bench("bench methods", tmp_path, "-m", *TINY, methods, "bench.repeats=1") == 0
    with (tmp_path / "bench_methods" / "table.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    config = pipelines.wan_t2v().transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    residual = 3 * 4 * 4 * width * 4  # fp32
    assert int(rows["flow_matching"]["extra_bytes"]) == 0
    assert int(rows["static_uniform"]["extra_bytes"]) == 2 * residual
    assert rows["flow_matching"]["skipped"] == ""
    assert len(rows["static_uniform"]["skipped"].split()) == 2  # of 4 steps
    assert "hsa.budgets" in rows["hsa_50"]["refusal"]
    in_readme = support.costs(tmp_path / "bench_methods" / "table.csv")
    assert in_readme.keys() == {"flow_matching", "static_uniform"}
    assert in_readme["flow_matching"][0] == "0.0"
    assert all(overhead.endswith(" %") for _, overhead in in_readme.values())
    assert "Cost of the methods" in (tmp_path / "bench_methods" / "table.md").read_text()
