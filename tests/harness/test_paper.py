"""The paper's tables plan without weights, and what a plan says they cost is right."""

import numpy as np
import pytest

from analysis.figures.base import Plot
from experiments.config import TransformerConfig, build, load_experiment
from experiments.errors import UserError
from experiments.estimate import (
    Costs,
    forward_flops,
    guidance_passes,
    kv_memory,
    modelled_seconds,
)
from experiments.plan import plan
from experiments.store import Store
from tests.harness.helpers import hsa_bench, tiny_plan

OFFLINE = {  # table -> the model that runs it without weights
    "table1": "embedded",
    "table_i2v_wan22": "embedded",
    "table_ltx2_t2v": "tiny_ltx2",
    "table_ltx2_i2v": "tiny_ltx2",
}
SIZE = {"table1": 944, "table_i2v_wan22": 355, "table_ltx2_t2v": 944, "table_ltx2_i2v": 355}
UNINSTALLED = "prompts.suite.info=/nowhere"


def table(name, *overrides):
    return load_experiment([f"experiment=paper/{name}", *overrides])


@pytest.mark.parametrize("name, model", OFFLINE.items())
def test_a_table_has_the_settings_of_the_paper_on_a_model_that_ships_too(name, model):
    experiment = table(name, f"model={model}", "limit=2")
    planned = plan(experiment)
    cells = planned.cells
    assert experiment.config.name == name and experiment.config.schedule.steps == 40
    labels = list(dict.fromkeys(cell.label for cell in cells))
    assert labels[:4] == ["FM T=40", "FM T=30", "FM T=20", "FM T=10"]
    assert labels[-4:] == ["HSA-75", "HSA-75-B", "HSA-50", "HSA-25"]
    assert len(labels) == 11 and len(cells) == 2 * len(labels)
    assert any("random weights" in note for note in planned.notes) == (model != "embedded")
    promised = [cell.method.config.expected_fraction for cell in cells[7:11]]
    assert promised == pytest.approx([0.75, 0.75, 0.5, 0.25], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "pictures", "task"),
    [
        ("fig2", ["qkv_change"], "t2v"),
        ("fig3", ["allocation", "frontier"], "t2v"),
        ("fig4", ["vbench_profile"], "t2v"),
        ("fig5", ["first_last"], "i2v"),
        ("fig6", ["velocity_change"], "t2v"),
    ],
)
def test_a_figure_names_its_pictures_and_runs_on_models_that_ship(name, pictures, task):
    for model in ("embedded", "tiny_ltx2"):
        experiment = table(name, f"model={model}", "limit=1")
        figures = experiment.config.figure
        assert list(figures) == pictures
        assert all(isinstance(build(figures[each], each), Plot) for each in pictures)
        assert {cell.task for cell in plan(experiment).cells} == {task}


def test_figures_3_and_4_show_the_videos_of_table_1():
    keys = {
        name: {cell.key for cell in plan(table(name, "model=embedded", "limit=2")).cells}
        for name in ("table1", "fig3", "fig4")
    }
    assert keys["fig3"] == keys["table1"] < keys["fig4"]
    assert len(keys["fig4"] - keys["table1"]) == 2  # FM T=100


def test_table_1_is_the_papers():
    cells = plan(table("table1", UNINSTALLED, "limit=1"), count_only=True).cells
    request = cells[0].request
    assert (request.height, request.width, request.num_frames) == (480, 832, 81)
    official = [cell.method for cell in cells if cell.label.startswith("TeaCache")]
    assert [method.threshold for method in official] == [0.048, 0.088, 0.230]
    assert {method.coefficients for method in official} == {"wan2.1-t2v-1.3b"}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_table_is_counted_without_weights_or_suite_but_not_made(name, tmp_path, capsys):
    where = [f"experiment=paper/{name}", UNINSTALLED, "limit=3"]
    assert hsa_bench("plan", tmp_path, *where) == 0
    shown = capsys.readouterr().out
    assert "33 videos" in shown and f"the first 3 of {SIZE[name]} prompts" in shown
    for words in ("989 dense bf16 TFLOPS", "GB on disk", "counted, but cannot be made"):
        assert words in shown
    assert hsa_bench("run", tmp_path, *where) == 2
    assert capsys.readouterr().err.startswith("hsa-bench: prompts: ")


def test_a_suite_of_another_size_is_refused():
    with pytest.raises(UserError, match="size=5: the suite has 3 prompts"):
        suite = "{_target_: experiments.prompts.stand_ins, _partial_: true, size: 3}"
        plan(table("table1", f"prompts.suite={suite}", "prompts.size=5"))


def test_limit_is_told_as_a_subset():
    limited = plan(table("table1", "model=embedded", "limit=8"))
    assert limited.notes == ("subset: the first 8 of 32 prompts (limit=8)",)
    assert plan(table("table1", "model=embedded", "limit=32")).notes == ()


@pytest.mark.parametrize(
    "model, passes, gigabytes",
    [  # 2 bytes x K and V x tokens x width x layers, each guidance pass by itself
        ("wan21_t2v_1_3b", 2, 2 * 6.04),
        ("wan22_t2v_a14b", 2, 2 * 26.84),
        ("wan22_ti2v_5b", 2, 2 * 10.06),
        ("ltx2", 2, 2 * (4.83 + 2.42)),
        ("ltx23", 4, 4 * (4.83 + 2.42)),
    ],
)
def test_keys_and_values_take_what_was_computed_by_hand(model, passes, gigabytes):
    (cell,) = plan(
        load_experiment(
            [f"model={model}", "prompts=texts", "prompts.texts=[a cat]", "reference=null"]
        )
    ).cells
    assert guidance_passes(cell.request) == passes
    memory = kv_memory(cell.config.model, cell.request)
    assert memory.total() / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_modelled_time_is_linear_in_steps_and_in_the_tokens_that_run():
    cells = plan(table("table1", UNINSTALLED, "limit=1"), count_only=True).cells
    seconds = {cell.label: modelled_seconds(cell) for cell in cells}
    assert seconds["FM T=20"] == pytest.approx(seconds["FM T=40"] / 2)
    assert seconds["HSA-25"] == pytest.approx(seconds["FM T=10"], rel=0.01)
    assert seconds["TeaCache 0.088"] == seconds["FM T=40"]  # decides while it runs: at most
    total = Costs((), Store("/nowhere")).of(cells)
    assert total.at_most and total.modelled == len(cells)
    assert total.seconds == pytest.approx(sum(seconds.values()))


def test_stored_videos_tell_the_time_of_missing_ones(tmp_path):
    cells = {cell.label: cell for cell in tiny_plan("limit=1").cells}
    store = Store(tmp_path)
    done = cells["FM T=4"]
    result = {"timing": {"denoise_s": 3.0, "decode_s": 1.0}}
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    store.write_sample(done.inputs, frames, {"latents": np.zeros(3)}, 8, result, {})
    costs = Costs([done], store)
    half = costs.of([cells["FM T=2"]])  # as long a step as the stored one
    assert (half.seconds, half.modelled, half.at_most) == (2.0, 0, False)
    stored = sum(path.stat().st_size for path in store.sample_dir(done.key).iterdir())
    record = (store.sample_dir(done.key) / "record.json").stat().st_size
    assert half.disk == pytest.approx(stored - record)
    assert Costs([], store).of([cells["FM T=2"]]).seconds is None  # fp32, no GPU's


def test_operations_are_those_that_torch_counts():
    import torch
    from diffusers import WanTransformer3DModel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=512,
        num_layers=3,
    )
    latents, text = torch.zeros(1, 4, 4, 16, 16), torch.zeros(1, 40, 16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, torch.tensor([500]), text)
    counted = counter.get_flop_counts()
    blocks = sum(sum(ops.values()) for name, ops in counted.items() if _is_block(name))
    shape = TransformerConfig(layers=3, width=128, heads=4, ffn=512, token=[4, 16, 16])
    assert forward_flops(shape, 4 * 8 * 8, text_tokens=40) == pytest.approx(blocks)


def _is_block(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[1] == "blocks"


def test_shape_of_ltx2_is_that_of_its_transformer():
    """Every weight that a video token meets in a block, which is twice its operations."""
    import torch
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(num_layers=1)
    block, met = model.transformer_blocks[0], 0
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            own = ("attn1.", "attn2.to_q", "attn2.to_out", "ff.")
            streams = ("audio_to_video_attn.to_q", "audio_to_video_attn.to_out")
            streams += ("video_to_audio_attn.to_k", "video_to_audio_attn.to_v")
            met += module.weight.numel() * name.startswith(own + streams)
    ltx2 = load_experiment(["model=ltx2"]).config.model.transformer
    attention = 4 * ltx2.width  # of one token to itself
    assert forward_flops(ltx2, 1, text_tokens=0) == ltx2.layers * (2 * met + attention)
