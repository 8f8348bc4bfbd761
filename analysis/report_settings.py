"""What the report tells of a setting: cost, quality, configuration, provenance."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.frame import SETTING
from analysis.metrics.base import Metric
from analysis.pareto import front
from analysis.stats import Estimate
from analysis.summary import MEAN, select
from analysis.tables import heading, interval, number, percent

if TYPE_CHECKING:
    from experiments.store import Store

ORIGIN = ("command", "commit", "patch", "machine", "host", "versions")  # of a sample


def settings(
    frame: pd.DataFrame, summary: pd.DataFrame, store: Store, metrics: Sequence[Metric]
) -> list[dict[str, Any]]:
    """Every task and setting in the order of the plan, JSON-able.

    `facts` are for reading, (name, text). `cost` is [mid, low, high], in percent of the reference's
    runtime, in seconds where that is unknown, and None where nothing was timed. `metrics` has what
    was measured: name -> mean, low, high, and whether the setting is on the front of all
    (`front`) and of its own method (`own`).
    """
    fronts = _fronts(summary, metrics)
    keys = frame.groupby(SETTING, sort=False)["key"].unique()
    relative = summary.groupby("task")["runtime"].agg(lambda shares: shares.notna().all())
    found = []
    for (task, label), rows in summary.groupby(SETTING, sort=False):
        about, scores = rows.iloc[0], rows.set_index("metric")
        records = [store.sample(key).record for key in keys[task, label]]
        found.append(
            {
                "task": task,
                "label": label,
                "method": about["method"],
                "facts": _facts(about, scores, metrics),
                "cost": _cost(about, relative[task]),
                "relative": bool(relative[task]),
                "metrics": {
                    name: {
                        **{k: _json(scores.loc[name, k]) for k in ("mean", "low", "high")},
                        **fronts[name, task, label],
                    }
                    for name in (metric.name for metric in metrics)
                    if name in scores.index and math.isfinite(scores.loc[name, "mean"])
                },
                "configuration": _configuration(records),
                "origins": _origins(records),
            }
        )
    return found


def _facts(
    about: pd.Series, scores: pd.DataFrame, metrics: Sequence[Metric]
) -> list[tuple[str, str]]:
    facts = [
        ("Task", about["task"].upper()),
        ("Implementation", about["implementation"]),
        ("Prompts", str(about["prompts"])),
        ("Runtime", f"{number(about['runtime_s'])} s, {percent(about['runtime'])}"),
        ("Active tokens", percent(about["active_fraction"])),
    ]
    for metric in metrics:
        if metric.name in scores.index and math.isfinite(scores.loc[metric.name, "mean"]):
            estimate = Estimate(*scores.loc[metric.name][list(MEAN)])
            facts.append((heading(metric), interval(estimate)))
    return facts


def _cost(about: pd.Series, relative: bool) -> list[float] | None:
    if not math.isfinite(about["runtime_s"]):
        return None
    scale = 100 * about["runtime"] / about["runtime_s"] if relative else 1.0
    return [float(scale * about[k]) for k in ("runtime_s", "runtime_low", "runtime_high")]


def _fronts(
    summary: pd.DataFrame, metrics: Sequence[Metric]
) -> dict[tuple[str, str, str], dict[str, bool]]:
    """(metric, task, label) -> whether it is beaten by no setting, by none of its method."""
    found = {}
    for metric in metrics:
        for task in summary["task"].unique():
            view = select(summary, task, metric).reset_index(drop=True)
            if view.empty:
                continue
            best = _front(view, metric)
            own = pd.concat([_front(rows, metric) for _, rows in view.groupby("method")])
            for i, label in view["label"].items():
                found[metric.name, task, label] = {"front": bool(best[i]), "own": bool(own[i])}
    return found


def _front(rows: pd.DataFrame, metric: Metric) -> pd.Series:
    unbeaten = front(rows["runtime_s"], rows["mean"], metric.higher_is_better)
    return pd.Series(unbeaten, rows.index)


def _configuration(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Inputs of the samples; of their requests what all of them share."""
    first = records[0]
    shared = {
        name: value
        for name, value in first["request"].items()
        if all(record["request"].get(name) == value for record in records)
    }
    inputs = {
        name: first[name] for name in ("method", "model", "schedule", "noise") if name in first
    }
    return inputs | {"request": shared}


def _origins(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many videos each command, commit and machine made, and when."""
    groups = defaultdict(list)
    for record in records:
        origin = {name: record["provenance"].get(name) for name in ORIGIN}
        groups[json.dumps(origin, sort_keys=True)].append(record["provenance"])
    return [
        {
            "videos": len(group),
            **{name: group[0].get(name) for name in ORIGIN},
            "first": min((made["started"] for made in group if "started" in made), default=None),
            "last": max((made["finished"] for made in group if "finished" in made), default=None),
        }
        for group in groups.values()
    ]


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
