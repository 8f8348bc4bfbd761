"""Matched runtime: the search against exhaustive ones, and what a target does to a plan."""

import json
from collections import defaultdict
from dataclasses import replace
from math import ceil
from statistics import median

import pytest

from baselines.static_mask import IntervalMask
from experiments.config import load_experiment
from experiments.match import TOLERANCE, Match, Matches, Timed, bisect, match_key, search
from experiments.plan import plan
from tests.harness.helpers import CONF, hsa_bench

TINY = ["model=tiny", "schedule.steps=8", "prompts=texts", "prompts.texts=[a circle]"]
UNIFORM = [*TINY, "method=static_uniform"]


@pytest.mark.parametrize("aim", [0.03, 0.1, 0.4, 0.5, 0.66, 0.99, 1.2])
@pytest.mark.parametrize("work", [lambda k: 1 / k, lambda k: k / 40, lambda k: (k // 7) / 5])
def test_bisection_finds_the_best_whole_number(aim, work):
    found = bisect(aim, (1, 40), work, resolution=0)
    assert abs(work(found) - aim) == min(abs(work(k) - aim) for k in range(1, 41))


@pytest.mark.parametrize("aim", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("ends", [(1e-3, 1e3), (0.0, 1e3)])
def test_bisection_of_a_threshold(aim, ends):
    calls = []

    def work(threshold):
        calls.append(threshold)
        return 1 / (1 + threshold)

    assert work(bisect(aim, ends, work, resolution=0.01)) == pytest.approx(aim, abs=0.01)
    assert len(calls) < 20


@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("overhead", [0.0, 0.1, 0.2])
def test_search_meets_the_runtime_and_not_the_work(target, overhead):
    """Skipping costs too: the runtime of a work w is w + overhead (1 - w)."""

    def work(threshold):
        return 1 / (1 + threshold)

    def time(threshold):
        runtime = work(threshold) + overhead * (1 - work(threshold))
        return Timed(runtime, runtime, runtime)

    value, timed = search(target, (1e-3, 1e3), work, time, resolution=0.002)
    assert timed == time(value)
    assert abs(timed.runtime - target) <= TOLERANCE


def test_bisection_towards_zero_ends():
    tried = []

    def work(start):
        tried.append(start)
        return 0.5 if start else 0.4  # nothing in between

    assert bisect(0.2, (0.0, 1.0), work, resolution=0.01) == 0.0
    assert len(tried) < 20


@pytest.mark.parametrize(("target", "closest"), [(0.9, 1), (0.25, 3), (0.32, 3), (0.45, 2)])
def test_search_out_of_reach_gives_the_closest(target, closest):
    def work(interval):
        return {1: 1.0, 2: 0.5, 3: 0.34}[interval]

    def time(interval):
        return Timed(work(interval), 0, 0)

    value, timed = search(target, (1, 3), work, time, resolution=0.01)
    assert (value, timed.runtime) == (closest, work(closest))


def test_search_times_again_what_a_slow_moment_made_it_leave():
    """The first run of the best value takes longer; the runs that follow do not."""
    runs = defaultdict(list)

    def work(interval):
        return 1 / interval

    def time(interval):
        slow = 1.4 if interval == 2 and not runs[2] else 1
        runs[interval].append(slow * work(interval))
        return Timed(median(runs[interval]), 0, 0)

    assert search(0.5, (1, 40), work, time, resolution=0.01)[0] == 2
    assert len(runs[2]) > 1 and len(runs) > 1


def settings(tmp_path, *overrides, target=0.5):
    return load_experiment(
        [*UNIFORM, f"matched={tmp_path}", f"target={target}", *overrides], False, str(CONF)
    )


def store(tmp_path, experiment, **found) -> Match:
    """Write the match of an experiment's only setting by hand."""
    (setting,) = experiment.settings
    config = setting.config
    (cell, *_) = plan(load_experiment(UNIFORM, False, str(CONF))).cells[1:]
    given = {
        "key": match_key(config, cell.method, "t2v", config.target),
        "label": setting.label,
        "task": "t2v",
        "target": config.target,
        "fields": {"interval": 5},
        "reached": True,
        "runtime": 0.51,
        "low": 0.5,
        "high": 0.52,
        "work": 0.25,
        "provenance": {"weights": {"weights": "random"}, "version": cell.method.version},
    }
    match = Match(**given | found)
    Matches.of(config).add(match)
    return match


def test_a_target_sets_the_method_and_not_its_reference(tmp_path):
    experiment = settings(tmp_path)
    store(tmp_path, experiment, fields={"interval": 4})
    store(tmp_path, experiment)  # the last one counts
    reference, cell = plan(experiment).cells
    assert cell.method.interval == 5
    assert cell.inputs["method"]["params"]["interval"] == 5
    assert cell.label == "static_uniform target=0.5"
    assert reference.label == "flow_matching" and reference.config.target is None
    assert cell.reference_key == reference.key
    assert plan(experiment).notes == ()


def test_what_is_out_of_reach_is_left_out_and_said(tmp_path):
    experiment = settings(tmp_path, "grid=[{}, {target: null}]")
    one = replace(experiment, settings=experiment.settings[:1])
    match = store(tmp_path, one, reached=False)
    cells = plan(experiment)
    assert [cell.label for cell in cells.cells] == ["flow_matching", "static_uniform"]
    assert cells.notes == (f"left out: {match}",)
    assert "out of reach" in str(match) and "51.0%" in str(match)


@pytest.mark.parametrize(
    "made_with",
    [
        {"weights": {"weights": "older"}, "version": IntervalMask.version},
        {"weights": {"weights": "random"}, "version": 0},
    ],
)
def test_a_match_of_other_weights_or_an_older_version_is_said(made_with, tmp_path):
    experiment = settings(tmp_path)
    store(tmp_path, experiment, provenance=made_with)
    (note,) = plan(experiment).notes
    assert note.startswith("1 settings were matched with other weights or an older version")


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], ["static_uniform target=0.5", "t2v", "calibrate"]),
        (["target=1.5"], ["target=1.5", "up to 1"]),
        (["method=breaking"], ["breaking", "no knob"]),
        (["method.warmup_steps=2"], ["1 without a match"]),  # matched with other protected steps
    ],
)
def test_a_target_that_cannot_be_met_is_one_line(overrides, words, tmp_path, capsys):
    if overrides:
        store(tmp_path, settings(tmp_path))
    arguments = [*UNIFORM, f"matched={tmp_path}", "target=0.5", *overrides]
    assert hsa_bench("plan", tmp_path, *arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert [word for word in words if word not in message] == []


def test_calibrate_stores_what_it_counted(tmp_path, capsys):
    arguments = [*UNIFORM, f"matched={tmp_path}", "timing.repeats=1"]
    assert hsa_bench("calibrate", tmp_path, "-m", *arguments, "target=0.5,0.25") == 0
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    shown = capsys.readouterr().out
    for line, target in zip(lines, (0.5, 0.25), strict=True):
        match = Match(**json.loads(line))
        interval = match.fields.get("interval", 2)
        computed = {ceil(interval * turn) for turn in range(8)}
        assert match.work == len(computed & set(range(8))) / 8
        assert match.target == target and match.low <= match.runtime <= match.high
        assert match.provenance["weights"] == {"weights": "random"}
        assert match.provenance["prompts"]["texts"] == ["a circle"]
        assert match.provenance["commit"] and match.provenance["machine"]
        assert str(match) in shown
    assert hsa_bench("calibrate", tmp_path, "-m", *arguments, "target=0.5,0.25") == 0
    assert capsys.readouterr().out == shown
    assert (tmp_path / "tiny.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("decisive", ["machine", "version", "weights"])
def test_what_was_found_elsewhere_is_searched_again(decisive, tmp_path):
    arguments = [*UNIFORM, f"matched={tmp_path}", "timing.repeats=1", "target=0.5"]
    assert hsa_bench("calibrate", tmp_path, *arguments) == 0
    path = tmp_path / "tiny.jsonl"
    match = json.loads(path.read_text())
    match["provenance"][decisive] = "another"
    path.write_text(json.dumps(match) + "\n")
    assert hsa_bench("calibrate", tmp_path, *arguments) == 0
    (_, again) = path.read_text().splitlines()
    assert json.loads(again)["provenance"][decisive] != "another"


def test_calibrate_goes_on_after_a_method_that_cannot_run(tmp_path, capsys):
    grid = "grid=[{method: hsa_50, target: 0.5}, {method: static_uniform, target: 0.5}]"
    arguments = [*TINY, grid, f"matched={tmp_path}", "timing.repeats=1"]
    assert hsa_bench("calibrate", tmp_path, *arguments) == 1
    shown = capsys.readouterr().out
    assert "hsa_50 target=0.5 (t2v): hsa.budgets" in shown
    assert "static_uniform target=0.5 t2v at 50%" in shown
    assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("target, meets", [(0.5, True), (0.54, True), (0.46, True), (0.55, False)])
def test_a_noisy_runtime_meets_what_its_quartiles_come_near(target, meets):
    assert Timed(0.49, 0.48, 0.52).meets(target) == meets
