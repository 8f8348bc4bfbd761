"""From one row per video to one row per setting and metric, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple

import numpy as np
import pandas as pd

from analysis.frame import SETTING, Runtimes, by_prompt, per_video
from analysis.metrics.base import Metric
from analysis.stats import HELD, NOTHING, at_runtime, bootstrap, paired

BASELINE = "flow_matching"
MEAN = ("mean", "low", "high", "n", "spread")  # columns of an Estimate
GAIN = ("gain", "gain_low", "gain_high", "gain_n", "gain_spread")
ABOUT = ["method", "implementation", "steps", "params", "target", "turned", "reference"]


def summarise(
    frame: pd.DataFrame, runtimes: Runtimes, metrics: Iterable[Metric], seed: int = 0
) -> pd.DataFrame:
    """One row per task, setting and metric value, in the order of the frame.

    Columns: task, label, method, implementation, steps, params, target, turned, reference, prompts,
    seeds, active_fraction, nfe (full forwards of each guidance branch, as text), runtime_s,
    runtime_low, runtime_high, held_bytes, runtime (share of the reference setting's), extra_bytes
    (held between steps beyond what the reference setting holds), metric, mean, low, high, n, spread
    (over seeds), and gain, gain_low, gain_high, gain_n, gain_spread: the paired difference to flow
    matching at the same runtime (`at_runtime`), raw, so negative is better where lower is. Then
    higher_is_better, and rank: 1 is the best mean among the settings of the same target, equal
    means share a rank, and what has no rival has none.
    """
    settings = _settings(frame, runtimes)
    higher = {metric.name: metric.higher_is_better for metric in metrics}
    rows = []
    for (task, metric), quality in per_video(frame).groupby(["task", "metric"], sort=False):
        quality = quality.droplevel(["task", "metric"])
        about = settings.loc[task]
        fm = about.index[(about["method"] == BASELINE) & about.index.isin(quality.index)]
        held = HELD * np.nan_to_num(about.loc[about["reference"], "runtime_s"].min())
        for label, values in quality.iterrows():
            mine, gain = by_prompt(values.to_numpy(), quality), NOTHING
            if label not in fm and len(fm):
                baseline = at_runtime(
                    about.loc[fm, "runtime_s"].to_numpy(),
                    quality.loc[fm].to_numpy().T,
                    about.loc[label, "runtime_s"],
                    higher[metric.split(".")[0]],  # parts of a metric go its way
                    held,
                )
                gain = paired(mine, by_prompt(baseline, quality), seed)
            rows.append(
                {"task": task, "label": label, **about.loc[label], "metric": metric}
                | dict(zip(MEAN, astuple(bootstrap(mine, seed)), strict=True))
                | dict(zip(GAIN, astuple(gain), strict=True))
            )
    return _ranked(pd.DataFrame(rows), higher)


def select(summary: pd.DataFrame, task: str, metric: Metric) -> pd.DataFrame:
    """The settings' rows for one task and metric."""
    return summary[(summary["task"] == task) & (summary["metric"] == metric.name)]


def _settings(frame: pd.DataFrame, runtimes: Runtimes) -> pd.DataFrame:
    """What is known of each (task, label) besides quality."""
    groups = frame.groupby(SETTING, sort=False)
    settings = groups[ABOUT].first()
    settings["prompts"] = groups["prompt_id"].nunique()
    settings["seeds"] = groups["seed"].nunique()
    settings["active_fraction"] = groups["active_fraction"].mean()
    settings["nfe"] = groups["nfe"].agg(_per_branch)
    settings = settings.join(runtimes.table)
    tasks = settings.index.get_level_values("task")
    reference = settings[settings["reference"]].groupby("task")[["runtime_s", "held_bytes"]].min()
    reference = reference.reindex(tasks).set_axis(settings.index)
    settings["runtime"] = settings["runtime_s"] / reference["runtime_s"]
    settings["extra_bytes"] = settings["held_bytes"] - reference["held_bytes"]
    return settings


def _ranked(rows: pd.DataFrame, higher: Mapping[str, bool]) -> pd.DataFrame:
    """With higher_is_better and rank."""
    up = rows["metric"].map(lambda name: higher[name.split(".")[0]])
    score = rows["mean"].where(up, -rows["mean"])
    rivals = score.groupby([rows["task"], rows["metric"], rows["target"]], dropna=False)
    rank = rivals.rank(method="dense", ascending=False).where(rivals.transform("count") > 1)
    return rows.assign(higher_is_better=up, rank=rank)


def _per_branch(forwards: Iterable[Mapping[str, float]]) -> str:
    """Means over videos, in the order of the branches, as in: 20 + 12.5."""
    table = pd.DataFrame(list(forwards))
    return " + ".join(f"{mean:.4g}" for mean in table.mean())
