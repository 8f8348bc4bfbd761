"""Matched runtime: the search against exhaustive ones, and what a target does to a plan."""

import json
from collections import defaultdict
from dataclasses import replace
from math import ceil
from statistics import median

import pytest

from analysis.tables import unreached
from baselines.static_mask import IntervalMask
from experiments.config import load_experiment
from experiments.errors import UserError
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
        "key": match_key(setting, cell.method, "t2v"),
        "label": setting.label,
        "task": "t2v",
        "target": config.target,
        "fields": {"interval": 5},
        "reached": True,
        "at_end": False,
        "runtime": 0.51,
        "low": 0.5,
        "high": 0.52,
        "work": 0.25,
        "provenance": {
            "weights": {"weights": "random"},
            "version": cell.method.version,
            "machine": "another",
        },
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


@pytest.mark.parametrize(("at_end", "word"), [(True, "out of reach"), (False, "missed")])
def test_what_does_not_meet_its_target_is_left_out_and_said(at_end, word, tmp_path):
    experiment = settings(tmp_path, "grid=[{}, {target: null}]")
    one = replace(experiment, settings=experiment.settings[:1])
    match = store(tmp_path, one, reached=False, at_end=at_end)
    cells = plan(experiment)
    assert [cell.label for cell in cells.cells] == ["flow_matching", "static_uniform"]
    assert cells.unreached == (match,) and cells.notes == ()
    assert word in str(match) and "interval=5, measured 51.0%" in str(match)
    (row,) = unreached(cells.unreached, "t2v").rows
    assert [entry.text for entry in row][:3] == [match.label, "interval=5", "51.0 % [50.0, 52.0]"]
    assert row[-1].text == word
    assert not unreached(cells.unreached, "i2v").rows


@pytest.mark.parametrize(
    "made_with",
    [
        {"weights": {"weights": "older"}, "version": IntervalMask.version},
        {"weights": {"weights": "random"}, "version": 0},
    ],
)
def test_a_match_of_other_weights_or_an_older_version_is_said(made_with, tmp_path):
    experiment = settings(tmp_path)
    store(tmp_path, experiment, provenance=made_with | {"machine": "another"})
    (note,) = plan(experiment).notes
    assert note.startswith("1 settings were matched with other weights or an older version")


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], ["static_uniform target=0.5", "t2v", "calibrate"]),
        (["target=1.5"], ["target=1.5", "up to 1"]),
        (["method=breaking"], ["breaking", "no knob"]),
        (["method=hsa_50", "method.budgets=[]"], ["hsa.budgets=()", "divisors"]),
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
        interval = match.fields["interval"]
        computed = {ceil(interval * turn) for turn in range(8)}
        assert match.work == len(computed & set(range(8))) / 8
        assert match.target == target and match.low <= match.runtime <= match.high
        assert match.provenance["weights"] == {"weights": "random"}
        assert match.provenance["prompts"]["texts"] == ["a circle"]
        assert match.provenance["commit"] and match.provenance["machine"]
        assert str(match) in shown
    assert hsa_bench("calibrate", tmp_path, "-m", *arguments, "target=0.5,0.25") == 0
    assert str(match) in capsys.readouterr().out
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


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=bfloat16"],
        ["reference={method: static_front_loaded}"],
        ["model.request.guidance_scale=3"],
        ["schedule.steps=9"],
    ],
)
def test_a_match_is_for_what_decides_the_runtime(overrides, tmp_path):
    store(tmp_path, settings(tmp_path))
    with pytest.raises(UserError, match="1 without a match"):
        plan(settings(tmp_path, *overrides))


def test_where_the_knob_stood_before_decides_nothing(tmp_path):
    store(tmp_path, settings(tmp_path))
    _, cell = plan(settings(tmp_path, "method.interval=3")).cells
    assert cell.method.interval == 5


def test_what_was_found_here_goes_before_what_ships(tmp_path):
    def match(key, runtime):
        return Match(key, "a", "t2v", 0.5, {}, True, False, runtime, 0, 0, 0, {})

    shipped, own = Matches(tmp_path / "shipped"), tmp_path / "own"
    for key in "ab":
        shipped.add(match(key, 0.4))
    Matches(own, shipped.path).add(match("b", 0.6))
    both = Matches(own, shipped.path)
    assert [both.get(key).runtime for key in "ab"] == [0.4, 0.6]
    assert [Matches(shipped.path).get(key).runtime for key in "ab"] == [0.4, 0.4]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "tiny.jsonl").write_text('{"key": "a"')
    with pytest.raises(UserError, match="tiny.jsonl: line 1 is no match; remove it"):
        plan(settings(tmp_path))


def test_another_machine_is_said(tmp_path, capsys):
    store(tmp_path, settings(tmp_path), fields={"interval": 4})
    arguments = [*UNIFORM, f"matched={tmp_path}", "target=0.5", "metric=[]", "timing.repeats=0"]
    assert hsa_bench("run", tmp_path, *arguments) == 0
    assert "targets were matched on another and may be missed on this" in capsys.readouterr().out


def test_a_target_wants_timings(tmp_path, capsys):
    arguments = [*UNIFORM, f"matched={tmp_path}", "target=0.5", "timing.repeats=0"]
    assert hsa_bench("calibrate", tmp_path, *arguments) == 1
    assert "timing.repeats=0: choose 1 or more" in capsys.readouterr().out


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
