"""The store as one tidy table, and the measured runtime of every setting."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.metrics.base import Metric
from analysis.score import stored_values
from experiments.match import short

if TYPE_CHECKING:
    from experiments.cell import Cell
    from experiments.plan import Plan
    from experiments.store import Store

SETTING = ["task", "label"]
VIDEO = ["prompt_id", "seed"]
NAMED = ("hsa-bench", "diffusers", "transformers")  # versions; the machine's name has torch's
TIMING = [*SETTING, "machine", "pass", "key", "reference_key", "seconds", "held_bytes"]
COLUMNS = [
    "key",  # of the sample
    "label",  # of the setting: a method with its parameters and steps
    "method",
    "implementation",
    "task",
    "prompt_id",
    "seed",
    "steps",
    "params",  # JSON of the method's parameters
    "target",  # share of the reference's runtime that the setting was matched to; NaN: none
    "turned",  # the knob's value that meets the target, as text; empty: no target
    "reference",  # True where fidelity is measured against this setting
    "active_fraction",
    "nfe",  # guidance branch -> full forwards that its computed rows amount to
    "metric",  # "psnr", or "prompt_adherence.colour" for a part of one
    "value",  # NaN: missing
]
NUMBERS = ["value", "active_fraction", "target"]


@dataclass(frozen=True)
class Runtimes:
    """Measured denoising seconds and memory per setting on one machine, from the timing pass.

    `table` has the index (task, label) and the columns runtime_s, runtime_low, runtime_high, and
    held_bytes, what is held between steps.
    """

    machine: str | None
    table: pd.DataFrame


def tidy(plan: Plan, store: Store, metrics: Iterable[Metric]) -> pd.DataFrame:
    """One row per stored cell and metric value, in the order of the plan.

    Args:
        metrics: those `available` here.
    """
    metrics = list(metrics)
    references = {cell.reference_key for cell in plan.cells}
    rows = []
    for cell in plan.cells:
        if not store.has(cell.key):
            continue
        record = store.sample(cell.key).record
        about = _describe(record) | {
            "label": cell.label,
            "target": cell.config.target,
            "turned": _turned(cell),
            "reference": cell.key in references,
        }
        scores = store.scores(cell.key)
        for metric in metrics:
            values = stored_values(cell, metric, scores)
            rows += [about | {"metric": n, "value": v} for n, v in _named(metric, values)]
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(NUMBERS, float))


def runtimes(plan: Plan, store: Store) -> Runtimes:
    """Median and quartiles of each setting's timings.

    Runtimes of two machines do not compare, so only those of the machine that timed the most
    settings count. Nor do those of two passes, between which a machine's pace differs: each is
    held against what the reference took for the same prompt in the same pass, so that the
    reference itself takes one time, and one without its reference in the pass does not count.
    Passes of other experiments, which share nothing with this one but references, do not either.
    """
    rows = [
        {
            "task": cell.task,
            "label": cell.label,
            "machine": timing["machine"],
            "pass": timing.get("pass", ""),
            "key": cell.key,
            "reference_key": cell.reference_key,
            "seconds": timing["denoise_s"],
            "held_bytes": timing.get("held_bytes", np.nan),
        }
        for cell in plan.cells
        for timing in store.timings(cell.key)
    ]
    timings = pd.DataFrame(rows, columns=TIMING).astype({"seconds": float, "held_bytes": float})
    machine = _busiest_machine(timings)
    timings = _of_own_passes(timings[timings["machine"] == machine])
    groups = _at_one_pace(timings).groupby(SETTING, sort=False)
    seconds = groups["seconds"]
    table = pd.DataFrame(
        {
            "runtime_s": seconds.median(),
            "runtime_low": seconds.quantile(0.25),
            "runtime_high": seconds.quantile(0.75),
            "held_bytes": groups["held_bytes"].max(),
        }
    )
    return Runtimes(machine, table)


def untargeted(label: str, target: float) -> str:
    """A label without the target at its end: "RAS" of "RAS, 0.5", "ras" of "ras target=0.5"."""
    return label.removesuffix(str(target)).removesuffix("target=").rstrip(" ,")


def origin(plan: Plan, store: Store) -> str:
    """Versions and machines that the stored videos are from, in words; empty if unknown."""
    made = (store.sample(cell.key).record["provenance"] for cell in plan.stored(store))
    return " and ".join(
        dict.fromkeys(
            ", ".join(f"{name} {each['versions'][name]}" for name in NAMED)
            + f" on {each['machine']}"
            for each in made
            if "versions" in each
        )
    )


def per_video(frame: pd.DataFrame) -> pd.DataFrame:
    """Quality: (task, metric, label) x (prompt_id, seed), every prompt with every seed."""
    index = ["task", "metric", "label", *VIDEO]
    values = frame.groupby(index, sort=False)["value"].mean().unstack(VIDEO, sort=False)
    videos = pd.MultiIndex.from_product([frame[name].unique() for name in VIDEO], names=VIDEO)
    return values.reindex(columns=videos)


def by_prompt(values: np.ndarray, quality: pd.DataFrame) -> np.ndarray:
    """One value per column of `per_video` as (prompts, seeds)."""
    return values.reshape(-1, quality.columns.get_level_values("seed").nunique())


def _describe(record: dict[str, Any]) -> dict[str, Any]:
    method, request = record["method"], record["request"]
    return {
        "key": record["key"],
        "method": method["name"],
        "implementation": method["implementation"],
        "task": request["task"],
        "prompt_id": request["prompt_id"],
        "seed": request["seed"],
        "steps": record["schedule"]["steps"],
        "params": json.dumps(method["params"], sort_keys=True),
        "active_fraction": record["result"]["active_fraction"],
        "nfe": _forwards(record["result"]["trace"].get("records", {})),
    }


def _turned(cell: Cell) -> str:
    if cell.config.target is None:
        return ""
    knob = cell.method.knob[0]
    return f"{knob}={short(getattr(cell.method, knob))}"


def _forwards(records: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Guidance branch -> full forwards that its computed rows amount to, from a stored trace."""
    found: dict[str, float] = {}
    for row in zip(*records.values(), strict=True):
        call = dict(zip(records, row, strict=True))
        share = call["active_tokens"] * call["block_calls"] / (call["tokens"] * call["blocks"])
        found[call["branch"]] = found.get(call["branch"], 0.0) + share
    return found


def _named(metric: Metric, values: Mapping[str, float] | None) -> Iterator[tuple[str, float]]:
    """Headline value under the metric's name, its parts behind a dot."""
    if values is None:
        yield metric.name, np.nan
        return
    for name, value in values.items():
        yield (name if name == metric.name else f"{metric.name}.{name}"), value


def _of_own_passes(timings: pd.DataFrame) -> pd.DataFrame:
    """Those of passes that timed more than references, as far as there are such."""
    own = timings.loc[timings["key"] != timings["reference_key"], "pass"]
    return timings if own.empty else timings[timings["pass"].isin(own)]


def _at_one_pace(timings: pd.DataFrame) -> pd.DataFrame:
    """Seconds as shares of what the reference took beside them, times what it usually takes."""
    references = timings[timings["key"] == timings["reference_key"]]
    usual = references.groupby("task")["seconds"].median()
    in_pass = references.groupby(["key", "pass"])["seconds"].median().rename("in_pass")
    beside = timings.join(in_pass, on=["reference_key", "pass"])["in_pass"]
    return timings.assign(seconds=timings["seconds"] / beside * timings["task"].map(usual))


def _busiest_machine(timings: pd.DataFrame) -> str | None:
    settings = timings[["machine", *SETTING]].drop_duplicates()
    counts = Counter(settings["machine"])
    return min(counts, key=lambda machine: (-counts[machine], machine), default=None)
