"""Stored results to Weights & Biases: a run per setting and an overview, idempotent.

The store is the truth. A run's id is the hash of everything logged in it and a finished run
leaves a marker, so a second sync of the same results adds nothing, and a sync that was killed is
done again. Offline runs need no key; `wandb sync <out_dir>/wandb/offline-run-*` uploads them, and
so does a sync of the same store in mode online, under the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.errors import UserError, one_line

if TYPE_CHECKING:
    import wandb

    from experiments.store import Store

MODES = ("offline", "online", "disabled")
OVERVIEW = "overview"  # job type of the run that has all settings
POINT = ["label", "method", "runtime", "runtime_s", "mean", "low", "high", "spread"]


@dataclass(frozen=True)
class Preview:
    """A video to upload."""

    name: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Content:
    """All that one run holds. Missing numbers are left out of `metrics`, None in `tables`.

    `scatters` are charts of mean against runtime, `images` those of the experiment's figures.
    """

    group: str  # the experiment
    label: str
    kind: str  # the method, or OVERVIEW
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    previews: tuple[Preview, ...] = ()
    scatters: dict[str, pd.DataFrame] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """Hash of the content: another number is another run."""
        tables = {
            name: table.to_json(orient="split", double_precision=15)
            for name, table in (self.tables | self.scatters).items()
        }
        parts = [self.group, self.label, self.config, self.metrics, tables]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class WandbSink:
    """Where to log: `logger=wandb`.

    Attributes:
        previews: videos per run and task, of the first prompts.
    """

    project: str = "hsa-bench"
    mode: str = "offline"
    entity: str | None = None
    previews: int = 3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"logger.mode={self.mode!r}: choose {', '.join(MODES)}")

    def sync(
        self,
        name: str,
        frame: pd.DataFrame,
        summary: pd.DataFrame,
        store: Store,
        out_dir: Path,
        images: Mapping[str, Path],
    ) -> list[str]:
        """Log every setting that is not logged yet, and an overview; ids of the new runs.

        Args:
            name: of the experiment, the runs' group.
            frame, summary: of `frame.tidy` and `summary.summarise`.
            images: the experiment's figures by name.

        Raises:
            UserError: wandb refuses: nobody is logged in, or there is no connection.
        """
        place = Path(self.mode, self.entity or "default", self.project)
        logged = Path(out_dir) / "wandb" / "logged" / place
        logged.mkdir(parents=True, exist_ok=True)
        new = []
        runs = contents(name, frame, summary, store, self.previews)
        for content in [*runs, overview(name, summary, images)]:
            marker = logged / content.run_id
            if marker.exists():
                continue
            self._log(content, Path(out_dir))
            marker.touch()
            new.append(content.run_id)
        return new

    def _log(self, content: Content, out_dir: Path) -> None:
        import wandb

        try:
            with self._run(content, out_dir) as run:
                run.log(_items(content))
        except wandb.Error as error:
            raise UserError(f"logger.mode={self.mode}: {one_line(error)}") from error
        finally:
            wandb.teardown()  # else a finished run stays in the service's memory, half written

    def _run(self, content: Content, out_dir: Path) -> wandb.Run:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=out_dir,
            id=content.run_id,
            name=content.label,
            group=content.group,
            job_type=content.kind,
            config=content.config,
            settings=settings,
        )


def contents(
    group: str, frame: pd.DataFrame, summary: pd.DataFrame, store: Store, previews: int
) -> Iterator[Content]:
    """One for each setting, in the order of the plan.

    What is matched to a target differs from task to task: `method` and `schedule` are the first
    task's, and another's stand under its name where they are others.
    """
    for label, rows in frame.groupby("label", sort=False):
        cells = rows.drop_duplicates("key")
        firsts = cells.drop_duplicates("task").set_index("task")["key"]
        records = {task: store.sample(key).record for task, key in firsts.items()}
        made = {task: {n: r[n] for n in ("method", "schedule")} for task, r in records.items()}
        first = next(iter(made))
        yield Content(
            group=group,
            label=label,
            kind=made[first]["method"]["name"],
            config={
                "model": records[first]["model"],
                **made[first],
                **{task: each for task, each in made.items() if each != made[first]},
                "tasks": list(made),
                "prompts": int(cells["prompt_id"].nunique()),
                "seeds": sorted(int(seed) for seed in cells["seed"].unique()),
            },
            metrics=_metrics(summary[summary["label"] == label]),
            tables={"videos": _per_video(rows)},
            previews=tuple(_previews(cells, store, previews)),
        )


def overview(group: str, summary: pd.DataFrame, images: Mapping[str, Path]) -> Content:
    """All settings in one run: their table, the figures, and a scatter chart a task and metric."""
    headline = ~summary["metric"].str.contains(".", regex=False)  # not the parts of a metric
    measured = summary[headline].dropna(subset=["runtime", "mean"])
    scatters = {
        f"frontier/{task}/{metric}": _without_nan(rows[POINT].rename(columns={"mean": metric}))
        for (task, metric), rows in measured.groupby(["task", "metric"], sort=False)
    }
    tables = {"settings": _without_nan(summary)}
    return Content(group, OVERVIEW, OVERVIEW, tables=tables, scatters=scatters, images=images)


def _metrics(rows: pd.DataFrame) -> dict[str, float]:
    """Flat names such as t2v/psnr, t2v/psnr_low, t2v/psnr_gain, t2v/runtime_s."""
    found = {}
    for _, row in rows.iterrows():
        prefix = f"{row['task']}/{row['metric']}"
        found[prefix] = row["mean"]
        for column in ("low", "high", "spread", "gain", "gain_low", "gain_high", "gain_spread"):
            found[f"{prefix}_{column}"] = row[column]
        for column in ("runtime_s", "runtime", "active_fraction"):
            found[f"{row['task']}/{column}"] = row[column]
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _per_video(rows: pd.DataFrame) -> pd.DataFrame:
    index = ["task", "prompt_id", "seed", "key", "active_fraction"]
    return _without_nan(rows.pivot(index=index, columns="metric", values="value").reset_index())


def _without_nan(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype(object).where(frame.notna(), None)


def _previews(cells: pd.DataFrame, store: Store, count: int) -> Iterator[Preview]:
    for task, rows in cells.groupby("task", sort=False):
        for i, key in enumerate(rows["key"].head(count)):
            sample = store.sample(key)
            prompt = sample.record["request"]["prompt"]
            yield Preview(f"preview/{task}/{i}", prompt, sample.path / "preview.mp4")


def _items(content: Content) -> dict[str, Any]:
    """Everything of a run as what wandb logs."""
    import wandb

    def table(frame: pd.DataFrame) -> wandb.Table:
        return wandb.Table(columns=list(frame.columns), data=frame.to_numpy().tolist())

    def scatter(name: str, frame: pd.DataFrame) -> wandb.plot.CustomChart:
        metric = name.rpartition("/")[2]
        return wandb.plot.scatter(table(frame), "runtime", metric, title=name)

    def video(preview: Preview) -> wandb.Video:
        return wandb.Video(str(preview.path), caption=preview.caption, format="mp4")

    return {
        **content.metrics,
        **{name: table(frame) for name, frame in content.tables.items()},
        **{preview.name: video(preview) for preview in content.previews},
        **{name: scatter(name, frame) for name, frame in content.scatters.items()},
        **{f"figure/{name}": wandb.Image(str(path)) for name, path in content.images.items()},
    }
