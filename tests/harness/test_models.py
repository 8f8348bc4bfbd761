"""Every model of `conf/model` can be planned without its weights; checkpoints load as they are."""

import functools
from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest
import torch

from experiments.cell import Cell
from experiments.config import build, load_experiment
from experiments.errors import UserError
from experiments.execute import sample
from experiments.models import identity, load, locate
from experiments.plan import plan
from experiments.store import Store
from tests import pipelines
from tests.harness.helpers import hsa_bench

NAMES = sorted(path.stem for path in Path("conf/model").glob("*.yaml"))
DOWNLOADED = [name for name in NAMES if name.startswith(("wan", "ltx"))]
REPO, REVISION = "Org/Name", "0123456789abcdef0123456789abcdef01234567"
WAN = {"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"}
LTX2 = {"t2v": "LTX2Pipeline", "i2v": "LTX2ImageToVideoPipeline"}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@functools.cache
def cells(name: str, *overrides: str) -> tuple[Cell, ...]:
    """One cell for every task of a model."""
    chosen = [f"model={name}", "prompts=demo", "prompts.count=1", *overrides]
    tasks = load_experiment(chosen).config.model.limits.tasks
    return plan(load_experiment([*chosen, f"tasks=[{','.join(tasks)}]"])).cells


@pytest.mark.parametrize("name", NAMES)
def test_every_model_can_be_planned_without_its_weights(name, cache):
    assert {cell.config.model.name for cell in cells(name)} == {name}


@pytest.mark.parametrize("name", DOWNLOADED)
def test_diffusers_takes_every_argument_of_a_checkpoints_request(name):
    for cell in cells(name):
        classes = cell.config.model.load["pipelines"]
        arguments = cell.request.kwargs(getattr(diffusers, classes[cell.task]))
        assert set(cell.config.model.request.extra) < set(arguments)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_checkpoints_are_pinned(name):
    revision = cells(name)[0].inputs["model"]["identity"]["revision"]
    assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def test_what_is_done_to_a_checkpoint_is_part_of_a_videos_key():
    plain, shifted = cells("wan22_ti2v_5b"), cells("wan22_ti2v_5b", "model.load.flow_shift=3")
    assert not {cell.key for cell in plain} & {cell.key for cell in shifted}


OFFICIAL = {  # of the authors' tables
    "wan21_t2v_1_3b": {"teacache": "wan2.1-t2v-1.3b", "magcache": "wan2.1-t2v-1.3b"},
    "wan21_t2v_14b": {"teacache": "wan2.1-t2v-14b", "magcache": "wan2.1-t2v-14b"},
    "wan21_i2v_14b_480p": {"teacache": "wan2.1-i2v-14b-480p", "magcache": "wan2.1-i2v-14b-480p"},
    "wan21_i2v_14b_720p": {"teacache": "wan2.1-i2v-14b-720p", "magcache": "wan2.1-i2v-14b-720p"},
    "wan22_t2v_a14b": {"teacache": "identity", "magcache": "wan2.2-t2v-a14b"},
    "wan22_i2v_a14b": {"teacache": "identity", "magcache": "wan2.2-i2v-a14b"},
    "wan22_ti2v_5b": {"teacache": "identity", "magcache": "wan2.2-ti2v-5b"},
    "ltx2": {"teacache": "identity"},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_method_takes_the_constants_of_its_model(name):
    found = {}
    for method, field in (("teacache", "coefficients"), ("magcache", "ratios")):
        if method in OFFICIAL[name]:
            found[method] = getattr(cells(name, f"method={method}")[-1].method, field)
    assert found == OFFICIAL[name]


@pytest.mark.parametrize("name", ["ltx2", "ltx23", "tiny_ltx2"])
def test_a_model_without_ratios_is_refused(name):
    with pytest.raises(
        UserError, match="magcache.ratios=None: choose one of .*hsa-bench calibrate"
    ):
        cells(name, "method=magcache")


def test_methods_without_constants_leave_the_others_their_table(tmp_path):
    grid = "grid=[{method: flow_matching}, {method: [oracle, sencache], target: 0.5}]"
    chosen = [grid, "model=wan21_t2v_1_3b", "prompts=demo", f"matched={tmp_path}"]
    planned = plan(load_experiment(chosen))
    assert {cell.label for cell in planned.cells} == {"flow_matching"}
    note = planned.notes[-1]
    assert "2 without a match" in note and "oracle target=0.5 (t2v)" in note


@pytest.mark.parametrize("method", ["oracle", "sencache"])
def test_a_search_without_constants_is_one_line_before_the_model(method, tmp_path, capsys):
    arguments = [f"method={method}", "model=wan21_t2v_1_3b", "prompts=demo", "target=0.5"]
    assert hsa_bench("calibrate", tmp_path, *arguments) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "target=0.5" in line)
    assert f"{method}." in line and line.endswith(f"from `hsa-bench calibrate method={method}`")


def test_a_table_of_two_models_says_so():
    grid = "grid=[{model.dtype: [float32, bfloat16], label: '${model.dtype}'}]"
    (note,) = plan(load_experiment([grid, "prompts=demo"])).notes
    assert note.startswith("2 models in one table")


def test_missing_weights_are_refused_before_any_video_is_made(cache, tmp_path, capsys):
    grid = "grid=[{model: [embedded, wan21_t2v_1_3b], label: '${model.name}'}]"
    chosen = [grid, "prompts=demo", "limit=1", "schedule.steps=2", "reference=null"]
    assert hsa_bench("run", tmp_path, *chosen) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "(29 GB)" in error
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --revision 0fad780a" in error
    assert not list(Store(tmp_path / "store").samples())


def test_a_snapshot_is_found_only_whole(cache):
    folder = cache / "models--Org--Name" / "snapshots" / REVISION
    pipelines.wan_t2v().save_pretrained(folder)
    assert locate(REPO, REVISION, "1 MB") == folder
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no vae/\*\.safetensors .*`hf download Org/Name"):
        locate(REPO, REVISION, "1 MB")


def test_a_shard_that_is_missing_is_named(tmp_path):
    pipelines.wan_t2v().save_pretrained(tmp_path, max_shard_size="50KB")
    assert locate(REPO, REVISION, "", path=str(tmp_path)) == tmp_path
    shard = sorted((tmp_path / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"no transformer/{shard.name} there"):
        locate(REPO, REVISION, "", path=str(tmp_path))


def test_a_folder_is_known_by_its_content(tmp_path):
    for folder, build_pipe in (("a", pipelines.wan_t2v), ("b", pipelines.wan22_t2v)):
        build_pipe().save_pretrained(tmp_path / folder)
    (tmp_path / "a").rename(tmp_path / "c")
    one, other = (identity(REPO, REVISION, str(tmp_path / folder)) for folder in "cb")
    (tmp_path / "c").rename(tmp_path / "d")
    assert one == identity(REPO, REVISION, str(tmp_path / "d")) != other


@pytest.mark.parametrize(
    ("tasks", "classes"),
    [
        ({"t2v": "ti2v_t2v", "i2v": "wan_ti2v"}, WAN),
        ({"t2v": "ltx23_t2v", "i2v": "ltx23_i2v"}, LTX2),
        ({"t2v": "wan22_t2v"}, WAN),
        ({"i2v": "wan22_i2v"}, WAN),
        ({"i2v": "wan_i2v"}, WAN),
    ],
    ids=["ti2v", "ltx23", "wan22_t2v", "wan22_i2v", "wan21_i2v"],
)
def test_a_loaded_checkpoint_makes_the_videos_of_the_saved_one(tasks, classes, tmp_path):
    saved = {task: pipelines.ALL[name]() for task, name in tasks.items()}
    next(iter(saved.values())).save_pretrained(tmp_path)
    model = load("tiny", tmp_path, {task: classes[task] for task in tasks}, dtype="float32")
    for task, pipe in saved.items():
        loaded = pipelines.sample(model.pipeline(task), steps=3)
        assert torch.equal(loaded, pipelines.sample(pipe, steps=3))


def test_dtype_and_noise_schedule_are_those_asked_for(tmp_path):
    pipelines.ti2v_t2v().save_pretrained(tmp_path)
    model = load("tiny", tmp_path, WAN, dtype="bfloat16", float32=["vae"], flow_shift=7.0)
    for pipe in model.pipelines.values():
        assert pipe.vae.dtype == torch.float32
        assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert pipe.text_encoder.shared.weight.dtype == torch.bfloat16
        assert pipe.scheduler.config.flow_shift == 7.0


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_ltx2_latents_are_stored_on_the_token_grid(version):
    """diffusers' own unpacking is the truth: the tiny VAE's mean is 0 and its deviation 1."""
    made = cells("tiny_ltx2", "schedule.steps=2", f"model.identity.version='{version}'")
    with pytest.warns(UserWarning, match="random weights"):
        model = build(made[0].config.model.load, "model")
    for cell in made:
        video = sample(model, cell, output_type="latent")
        assert torch.equal(video.watch.latents[0], video.output)


def test_an_ltx2_experiment_runs_offline(tmp_path):
    chosen = ["model=tiny_ltx2", "tasks=[t2v,i2v]", "prompts=demo", "limit=1", "schedule.steps=2"]
    with pytest.warns(UserWarning, match="random weights"):
        assert hsa_bench("run", tmp_path, *chosen, "timing.repeats=0", "metric=[]") == 0
    stored = list(Store(tmp_path / "store").samples())
    assert [sample.arrays["latents"].shape for sample in stored] == [(8, 3, 4, 4)] * 2
