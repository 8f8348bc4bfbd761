"""From the store to everything in results/<experiment>/: tables, figures, report, wandb."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis import comparison, literature, methods, report, report_media, report_settings, tables
from analysis.figures.base import Plot, Results, save
from analysis.frame import SETTING, Runtimes, origin, runtimes, tidy
from analysis.metrics.base import Metric
from analysis.metrics.vbench import VBench, scorecard
from analysis.metrics.vbench.metric import VBenchDimension
from analysis.score import available
from analysis.summary import BASELINE, summarise
from analysis.tables import MISSING, Table
from experiments.files import replace_file

if TYPE_CHECKING:
    from experiments.config import Config
    from experiments.plan import Plan
    from experiments.store import Store


@dataclass(frozen=True)
class Analysis:
    """What was made of the stored videos."""

    frame: pd.DataFrame
    summary: pd.DataFrame
    results: list[Table]  # one per task, for the terminal
    logged: list[str]  # ids of the new wandb runs


def analyse(cfg: Config, plan: Plan, store: Store, out_dir: Path) -> Analysis:
    """Write table.md, .csv and .tex, comparison.md, figures, and index.html with its media/.

    Reads stored samples, scores and timings only, so it may be called at any time: what is not
    there yet is missing in the output.

    Raises:
        ValueError: none of the plan's videos is in the store.
        UserError: a figure is set to show what the plan does not have.
    """
    from experiments.config import build

    built = [build(node, f"metric.{name}") for name, node in cfg.metric.items()]
    plots = [build(node, f"figure.{name}") for name, node in cfg.figure.items()]
    wanted = [part for metric in built for part in metric.parts()]
    metrics = available(wanted)
    frame = tidy(plan, store, metrics)
    if frame.empty:
        raise ValueError(f"nothing to analyse: none of the {len(plan.cells)} videos is stored")
    measured = runtimes(plan, store)
    summary = summarise(frame, measured, metrics)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    unavailable = [metric.name for metric in wanted if metric not in metrics]
    made_with = origin(plan, store)
    notes = [*plan.notes, *_omissions(plan, frame)]
    note = _note(frame, measured, made_with, unavailable, notes)
    try:
        benched = [
            table
            for m in built
            if isinstance(m, VBench)
            for table in _vbench(m, plan, store, out_dir)
        ]
    except ValueError as error:  # settings that must not stand beside each other
        benched, note = [], f"{note} {error}."
        metrics = [metric for metric in metrics if not isinstance(metric, VBenchDimension)]
    tabled = [metric for metric in metrics if not _has_its_own_table(metric)]
    results, gains = _tables(summary, tabled, note)
    left_out = [tables.unreached(plan.unreached, task) for task in summary["task"].unique()]
    left_out = [table for table in left_out if table.rows]
    compared = comparison.tables(comparison.compare(frame, summary, tabled), summary, tabled)
    gains, compared = (_sourced(each, measured, made_with) for each in (gains, compared))
    replace_file(out_dir / "table.md", tables.markdown(results + benched + gains + left_out))
    replace_file(
        out_dir / "table.tex", tables.latex(results + benched + gains + compared + left_out)
    )
    numbers = summary.assign(timed_on=measured.machine, made_with=made_with)
    replace_file(out_dir / "table.csv", numbers.to_csv(index=False, lineterminator="\n"))
    replace_file(out_dir / "comparison.md", tables.markdown(compared))
    drawn = _figures(plots, Results(plan, store, frame, summary, built, metrics), out_dir)
    sources = methods.table(cell.method for cell in plan.cells)
    page = report.render(
        title=cfg.name,
        subtitle=note,
        figures=list(drawn.values()),
        tables=results,
        details=[*benched, *gains, *compared, *left_out, sources, *literature.tables()],
        metrics=metrics,
        settings=report_settings.settings(frame, summary, store, metrics),
        videos=report_media.videos(frame, summary, store, metrics, out_dir / "media"),
        shown=report.opening(summary),
    )
    replace_file(out_dir / "index.html", page)
    sink = build(cfg.logger, "logger") if cfg.logger.get("_target_") else None
    images = {name: out_dir / f"{name}.png" for name in drawn}
    logged = sink.sync(cfg.name, frame, summary, store, out_dir, images) if sink else []
    return Analysis(frame, summary, results + benched, logged)


def _tables(
    summary: pd.DataFrame, metrics: Sequence[Metric], note: str
) -> tuple[list[Table], list[Table]]:
    tasks = summary["task"].unique()
    results = [tables.results(summary, metrics, task, note) for task in tasks]
    gains = [tables.gains(summary, metrics, task, BASELINE) for task in tasks]
    return results, [table for table in gains if table.rows]


def _has_its_own_table(metric: Metric) -> bool:
    """On VBench's prompts a dimension counts when it is complete, with weights of its own."""
    return isinstance(metric, VBenchDimension) and metric.settings.about.suite is not None


def _vbench(vbench: VBench, plan: Plan, store: Store, out_dir: Path) -> list[Table]:
    """VBench's own tables, and vbench.json with coverage and protocol; none without a dimension.

    Raises:
        ValueError: the settings follow different protocols.
    """
    if vbench.unavailable():
        return []
    cards = scorecard.cards(plan, store, vbench)
    replace_file(out_dir / "vbench.json", json.dumps(scorecard.record(cards), indent=1))
    return scorecard.tables(cards)


def _figures(plots: Sequence[Plot], results: Results, out_dir: Path) -> dict[str, report.Figure]:
    made, note = {}, results.plan.cells[0].config.model.note
    for plot in plots:
        for drawing in plot.drawings(results):
            _, svg = save(drawing.draw, out_dir / drawing.name, note)
            made[drawing.name] = report.Figure(svg.read_bytes(), drawing.caption)
    return made


def _sourced(made: Sequence[Table], measured: Runtimes, origin: str) -> list[Table]:
    """With hardware and versions in every caption."""
    timed = f"Runtime measured on {measured.machine}." if measured.machine else ""
    parts = [timed, f"Made with {origin}." if origin else ""]
    return [replace(t, note=" ".join(filter(None, [t.note, *parts]))) for t in made]


def _note(
    frame: pd.DataFrame,
    measured: Runtimes,
    origin: str,
    unavailable: Sequence[str],
    notes: Sequence[str],
) -> str:
    prompts, seeds = frame["prompt_id"].nunique(), frame["seed"].nunique()
    alike = " among the settings of one target runtime" if frame["target"].notna().any() else ""
    spread = " \N{PLUS-MINUS SIGN}: standard deviation of the seeds' means." if seeds > 1 else ""
    about = f"Means over {prompts} prompts" if prompts > 1 else "One prompt"
    about += f", averaged over {seeds} seeds" if seeds > 1 else ""
    about += ", with 95 % bootstrap intervals over prompts" if prompts > 1 else ""
    parts = [
        f"{about}; best bold, second underlined{alike}.{spread}",
        "NFE: forwards of each guidance branch. Runtime: median of the denoising loop with "
        f"quartiles, measured on {measured.machine}; memory: what is held between steps."
        if measured.machine
        else "Runtime was not measured.",
        f"{MISSING}: not measured; fidelity of the reference to itself is no measurement.",
    ]
    if origin:
        parts.append(f"Made with {origin}.")
    if unavailable:
        parts.append(f"Not available on this machine: {', '.join(unavailable)}.")
    parts += [f"{note[0].upper()}{note[1:]}." for note in notes]
    return " ".join(parts)


def _omissions(plan: Plan, frame: pd.DataFrame) -> Iterator[str]:
    """Settings that the tables do not have."""
    if plan.unreached:
        yield f"left out, and listed below: {len(plan.unreached)} settings that miss their target"
    stored = set(frame[SETTING].itertuples(index=False, name=None))
    if missing := [f"{label} ({task})" for task, label in plan.by_setting().keys() - stored]:
        yield f"without any video: {', '.join(sorted(missing))}"
