"""Configurations expand to the right cells; what cannot work is one line, before any model."""

import subprocess
import sys
from pathlib import Path

import pytest

from baselines.base import Method
from experiments.cli import main
from experiments.config import load_experiment
from experiments.plan import plan
from tests.harness.helpers import CONF, TINY, hsa_bench, tiny_plan

EXPERIMENTS = sorted(path.stem for path in Path("conf/experiment").glob("*.yaml"))
UNLOADABLE = "model.load={_target_: tests.harness.tiny.refuse}"


def settings(*overrides, multirun=False):
    return [setting.label for setting in load_experiment(overrides, multirun).settings]


def test_a_grid_is_the_product_of_its_lists():
    entry = "{method: static_uniform, method.interval: [2, 3], method.warmup_steps: [1, 4]}"
    assert settings(f"grid=[{entry}, {{method: flow_matching}}]") == [
        "static_uniform interval=2 warmup_steps=1",
        "static_uniform interval=2 warmup_steps=4",
        "static_uniform interval=3 warmup_steps=1",
        "static_uniform interval=3 warmup_steps=4",
        "flow_matching",
    ]


def test_a_sweep_multiplies_the_grid():
    grid = "grid=[{method: flow_matching}, {method: hsa, method.thresholds: [[0.1]]}]"
    assert settings(grid, "schedule.steps=40,20", multirun=True) == [
        "flow_matching steps=40",
        "flow_matching steps=20",
        "hsa thresholds=[0.1] steps=40",
        "hsa thresholds=[0.1] steps=20",
    ]


def test_labels_may_speak_of_the_setting():
    entry = "{method: hsa, method.thresholds: [[0.1], [0.2]], label: 'tau ${method.thresholds[0]}'}"
    assert settings(f"grid=[{entry}]") == ["tau 0.1", "tau 0.2"]


def test_a_chosen_method_forgets_the_values_of_another():
    """The reference of a run of HSA is plain flow matching."""
    (setting,) = load_experiment(["method=hsa", "method.thresholds=[0.3]"]).settings
    assert setting.config.method["thresholds"] == [0.3]
    assert setting.reference.config.method == {
        "_target_": "baselines.flow_matching.FlowMatching",
        "steps": None,
    }


def test_cells_come_by_task_then_prompt_then_setting():
    cells = tiny_plan("seeds=[3, 4]").cells
    assert [(cell.request.prompt, cell.request.seed, cell.label) for cell in cells] == [
        (prompt, seed, label)
        for prompt in ("a red circle", "a blue star")
        for seed in (3, 4)
        for label in ("FM T=4", "FM T=2", "uniform", "HSA")
    ]
    assert len({cell.key for cell in cells}) == len(cells)


def test_fidelity_is_measured_against_flow_matching_with_all_steps():
    cells = {cell.label: cell for cell in tiny_plan("limit=1").cells}
    assert {cell.reference_key for cell in cells.values()} == {cells["FM T=4"].key}
    assert cells["FM T=2"].request.steps == 2


def test_the_reference_has_the_size_of_what_it_is_compared_with():
    grid = "grid=[{method: static_uniform, model.request.height: [32, 64]}]"
    cells = {cell.key: cell for cell in tiny_plan(grid, "limit=1").cells}
    assert len(cells) == 4
    for cell in cells.values():
        assert cells[cell.reference_key].request.height == cell.request.height


def test_a_reference_that_is_not_in_the_grid_is_made_first():
    cells = tiny_plan("grid=[{method: static_uniform}]", "limit=1").cells
    assert [cell.label for cell in cells] == ["flow_matching", "static_uniform"]


@pytest.mark.parametrize(
    "override",
    [
        "model.request.height=32",
        "model.request.guidance_scale=1.5",
        "model.request.negative_prompt=ugly",
        "model.dtype=bfloat16",
        "schedule.steps=8",
        "seeds=[1]",
        "tasks=[t2v]",
        "prompts.texts=[a red star]",
        "results_dir=elsewhere",
        "limit=1",
        "engine=procs",
        "logger=wandb",
        "label=other",
    ],
)
def test_the_key_holds_what_decides_the_video_and_nothing_else(override):
    base = ["grid=[{}]", "prompts.texts=[a red circle]"]
    (before,) = tiny_plan(*base).cells
    (after,) = tiny_plan(*base, override).cells
    decides = override.startswith(("model", "schedule", "seeds", "prompts"))
    assert (before.key != after.key) == decides


def test_keys_do_not_depend_on_how_a_value_is_written():
    written = ("steps=4", "steps=null")
    keys = {tiny_plan("grid=[{}]", f"method.{steps}").cells[0].key for steps in written}
    assert len(keys) == 1
    guidance = {
        tiny_plan("grid=[{}]", f"model.request.guidance_scale={value}").cells[0].key
        for value in ("4", "4.0", "4e0")
    }
    assert len(guidance) == 1


def test_golden_key():
    """This key changes only with SCHEMA or a method's version: stored results depend on it."""
    assert tiny_plan("limit=1").cells[0].key == GOLDEN


GOLDEN = "c91bb5d88f01c90a7c573b44350811bc6ac301dac36741686dc465101190f4d7"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method=teacahe"], ["method=teacahe", "teacache", "hsa"]),
        (["experiment=tinny"], ["experiment=tinny", "tiny", "demo"]),
        (["metric=[psnr,lpip]"], ["metric=lpip", "lpips"]),
        (["method=hsa", "method.treshold=0.3"], ["method.treshold=0.3", "thresholds", "budgets"]),
        (["schedule.step=3"], ["schedule.step=3", "steps"]),
        (["grid=[{method: hsa, method.tau: 1}]"], ["method.tau=1", "thresholds"]),
        (["schedule.steps=many"], ["schedule.steps", "many", "Integer"]),
        (["schedule.steps=0"], ["steps", "0"]),
        (["model.request.height=2.5"], ["model.request.height", "2.5"]),
        (["limit=few"], ["limit", "few"]),
        (["limit=0"], ["limit=0", "from 1"]),
        (["seeds=[]"], ["seeds"]),
        (["seeds=3"], ["seeds=3", "list"]),
        (["method=hsa", "method.budgets=[4,3]", "schedule.steps=4"], ["budgets", "3", "4"]),
        (["method=hsa", "method.budgets=[40,10]"], ["budgets", "40", "4"]),
        (["method=hsa", "method.thresholds=low"], ["thresholds", "low"]),
        (["method=teacache", "method.threshold=x"], ["threshold", "x"]),
        (["model.request.height=60"], ["model.request.height=60", "multiples of 16"]),
        (["model.request.width=80"], ["model.request.width=80", "up to 64"]),
        (["model.request.num_frames=8"], ["model.request.num_frames=8", "multiples of 4"]),
        (["model.request.num_frames=81"], ["model.request.num_frames=81", "up to 17"]),
        (["model.request.guidance_scale=nan"], ["model.request.guidance_scale=nan", "finite"]),
        (["method=teacache", "method.threshold=inf"], ["method.threshold=inf", "finite number"]),
        (["method=[hsa,teacache]"], ["['hsa', 'teacache']", "swept with -m"]),
        (["method=hsa", "method._target_=baselines.hsa.Hsa"], ["method", "baselines.hsa.Hsa"]),
        (["method=hsa", "method._target_=os.getcwd"], ["method: ", "getcwd"]),
        (["method=hsa", "method._target_=null"], ["method._target_=None", "module.Class"]),
        (["timing.repeats=-1"], ["timing.repeats=-1", "0 or more"]),
        (["timing.prompts=0"], ["timing.prompts=0", "1 or more"]),
        (["seeds=[1,1]"], ["seeds=[1, 1]", "once"]),
        (["model.dtype=float8"], ["model.dtype='float8'", "bfloat16"]),
        (["tasks=[v2v]"], ["tasks='v2v'", "t2v, i2v"]),
        (["tasks=[i2v]"], ["no image", "i2v"]),
        (["prompts.texts=['']"], ["prompt 0000", "''"]),
        (["prompts.texts=['  ']"], ["prompt 0000", "a text"]),
        (["prompts.texts=[]"], ["prompts", "none"]),
        (["prompts=file", "prompts.path=missing.txt"], ["missing.txt", "no such file"]),
        (["prompts=texts", "prompts.texts=???"], ["prompts.texts", "missing"]),
        (["model=embedded", "model.path=/nowhere"], ["model.path", "/nowhere"]),
        (["engine=shard"], ["shard=None", "0/8"]),
        (["engine=shard", "shard=8/8"], ["shard=8/8", "0/8 to 7/8"]),
        (["shard=1/8"], ["shard=1/8", "engine=shard"]),
        (["engine=procs", "engine.workers=0"], ["engine.workers=0"]),
        (["logger=wandb", "logger.mode=onlin"], ["logger.mode='onlin'", "offline"]),
        (["method.interval=1,2"], ["-m"]),
        (["grid=[{label: a}, {label: a, method: hsa}]"], ["'a'", "label"]),
        (["grid=[{label: a}, {label: b}]"], ["'a'", "'b'", "same"]),
        (["grid=7"], ["grid=7"]),
        (["+new=1"], ["+new=1"]),
        (["no equals sign"], ["no equals sign"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_bad_input_is_one_line_before_the_model(overrides, words, tmp_path, capsys):
    base = [] if any("experiment=" in override for override in overrides) else BASE
    chosen = tuple(override.split("=")[0] for override in overrides)
    base = [override for override in base if not override.startswith(chosen)]
    assert hsa_bench("run", tmp_path, *base, *overrides) == 2
    message = capsys.readouterr().err
    assert message.startswith("hsa-bench: ") and message.count("\n") == 1
    assert [word for word in words if word not in message] == []
    assert not list(tmp_path.iterdir())


BASE = ["model=tiny", UNLOADABLE, "schedule.steps=4", "prompts=texts", "prompts.texts=[a circle]"]


def test_what_is_said_of_a_swept_group_holds_for_each_choice():
    swept = ["method=teacache,easycache", "method.threshold=0.3"]
    found = load_experiment(swept, multirun=True).settings
    assert [setting.config.method["threshold"] for setting in found] == [0.3, 0.3]
    labels = ["teacache threshold=0.3", "easycache threshold=0.3"]
    assert [setting.label for setting in found] == labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_target_: baselines.nowhere.Method", ["baselines.nowhere"]),
        ("threshold: 1", ["method._target_=None"]),
        ("_target_: [", ["not a configuration file"]),
        ("_target_: tests.harness.test_config.Nameless", ["without version", "source"]),
    ],
)
def test_a_method_that_cannot_be_made_is_one_line(text, words, tmp_path, capsys):
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/mine.yaml").write_text(text)
    assert main(["plan", "method=mine", f"--config-dir={tmp_path / 'conf'}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert [word for word in words if word not in message] == []


class Nameless(Method):
    """Does not say what it is."""

    def neutral(self, request):
        return self


@pytest.mark.parametrize("name", ["methods", "methods_protected"])
@pytest.mark.parametrize("model", ["embedded", "wan21_t2v_1_3b"])
def test_an_experiment_can_be_matched_on_other_prompts(name, model):
    """Its own number of prompts holds for those too, as far as there are so many."""
    chosen = [f"experiment={name}", f"model={model}", "tasks=[t2v]", "grid=[{}]"]
    searched, evaluated = (
        {cell.request.prompt for cell in plan(load_experiment([*chosen, *prompts])).cells}
        for prompts in (["prompts=calibration"], [])
    )
    assert len(searched) == len(evaluated) == 8 and not searched & evaluated


def test_captions_of_shapes_on_another_model_are_told():
    demo = plan(load_experiment(["model=wan21_t2v_1_3b", "prompts=demo"]))
    assert "wan21_t2v_1_3b on the embedded model's captions of shapes" in demo.notes
    for prompts in ("calibration", "scenes"):
        cells = plan(load_experiment(["model=wan21_t2v_1_3b", f"prompts={prompts}"]))
        assert cells.notes == () and len(cells.cells) == 8


def test_values_that_the_grid_replaces_are_refused(tmp_path, capsys):
    assert hsa_bench("plan", tmp_path, TINY, "method=hsa") == 2
    assert "method=hsa has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--help"], ["fly"]])
def test_help_and_unknown_commands(argv, capsys):
    from experiments.cli import main

    with pytest.raises(SystemExit) as end:
        main(argv)
    output = capsys.readouterr()
    assert "run" in output.out + output.err and "doctor" in output.out + output.err
    assert end.value.code == (0 if argv == ["--help"] else 2)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_plans(name):
    experiment = load_experiment([f"experiment={name}"])
    cells = plan(experiment).cells
    assert experiment.config.name == name
    always = {setting.label for setting in experiment.settings if setting.config.target is None}
    assert always <= {cell.label for cell in cells}
    keys = {cell.key for cell in cells}
    assert all(cell.reference_key in keys for cell in cells)


def test_planning_imports_no_torch(tmp_path):
    code = (
        "import sys; from experiments.cli import main\n"
        f"code = main(['plan', '--config-dir', {str(CONF)!r}, {TINY!r}, 'results_dir=none'])\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'diffusers', 'pandas')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_doctor_finds_missing_weights(tmp_path, capsys):
    assert hsa_bench("doctor", tmp_path, TINY) == 0
    assert "random" in capsys.readouterr().out
    assert hsa_bench("doctor", tmp_path, "model.path=/nowhere") == 1
    assert "/nowhere" in capsys.readouterr().out
