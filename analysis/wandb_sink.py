"""Stored results to Weights & Biases: one run per setting, written from the store, idempotent.

The store is the truth. A run's id is the hash of everything logged in it and a finished run
leaves a marker, so a second sync of the same results adds nothing, and a sync that was killed is
done again. Offline runs need no key; `wandb sync <out_dir>/wandb/offline-run-*` uploads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import wandb

    from experiments.store import Store

MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class Preview:
    """A video to upload."""

    name: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Content:
    """All that one run holds. Missing numbers are left out of `metrics` and None in `table`."""

    label: str
    method: str
    config: dict[str, Any]
    metrics: dict[str, float]
    table: pd.DataFrame  # a row per video
    previews: tuple[Preview, ...]

    @property
    def run_id(self) -> str:
        """Hash of the content: another number is another run."""
        table = self.table.to_json(orient="split", double_precision=15)
        parts = [self.label, self.config, self.metrics, table]
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
    ) -> list[str]:
        """Log every setting that is not logged yet; ids of the new runs.

        Args:
            name: of the experiment, the runs' group.
            frame, summary: of `frame.tidy` and `summary.summarise`.
        """
        logged = Path(out_dir) / "wandb" / "logged" / self.mode
        logged.mkdir(parents=True, exist_ok=True)
        new = []
        for content in contents(frame, summary, store, self.previews):
            marker = logged / content.run_id
            if marker.exists():
                continue
            self._log(content, name, Path(out_dir))
            marker.touch()
            new.append(content.run_id)
        return new

    def _log(self, content: Content, group: str, out_dir: Path) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        with wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=out_dir,
            id=content.run_id,
            name=content.label,
            group=group,
            job_type=content.method,
            config=content.config,
            settings=settings,
        ) as run:
            run.log(content.metrics | {"videos": _table(content.table)} | _videos(content.previews))
        wandb.teardown()  # finishing a run leaves it in the service's memory; only this writes it


def contents(
    frame: pd.DataFrame, summary: pd.DataFrame, store: Store, previews: int
) -> Iterator[Content]:
    """One for each setting, in the order of the plan."""
    for label, rows in frame.groupby("label", sort=False):
        cells = rows.drop_duplicates("key")
        first = store.sample(cells["key"].iloc[0]).record
        yield Content(
            label=label,
            method=first["method"]["name"],
            config={
                "model": first["model"],
                "method": first["method"],
                "schedule": first["schedule"],
                "tasks": list(cells["task"].unique()),
                "prompts": int(cells["prompt_id"].nunique()),
                "seeds": sorted(int(seed) for seed in cells["seed"].unique()),
            },
            metrics=_metrics(summary[summary["label"] == label]),
            table=_per_video(rows),
            previews=tuple(_previews(cells, store, previews)),
        )


def _metrics(rows: pd.DataFrame) -> dict[str, float]:
    """Flat names such as t2v/psnr, t2v/psnr_low, t2v/psnr_gain, t2v/runtime_s."""
    found = {}
    for _, row in rows.iterrows():
        prefix = f"{row['task']}/{row['metric']}"
        found[prefix] = row["mean"]
        for column in ("low", "high", "gain", "gain_low", "gain_high"):
            found[f"{prefix}_{column}"] = row[column]
        for column in ("runtime_s", "runtime", "active_fraction"):
            found[f"{row['task']}/{column}"] = row[column]
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _per_video(rows: pd.DataFrame) -> pd.DataFrame:
    index = ["task", "prompt_id", "seed", "key", "active_fraction"]
    wide = rows.pivot(index=index, columns="metric", values="value").reset_index()
    return wide.astype(object).where(wide.notna(), None)


def _previews(cells: pd.DataFrame, store: Store, count: int) -> Iterator[Preview]:
    for task, rows in cells.groupby("task", sort=False):
        for i, key in enumerate(rows["key"].head(count)):
            sample = store.sample(key)
            prompt = sample.record["request"]["prompt"]
            yield Preview(f"preview/{task}/{i}", prompt, sample.path / "preview.mp4")


def _table(frame: pd.DataFrame) -> wandb.Table:
    import wandb

    return wandb.Table(columns=list(frame.columns), data=frame.to_numpy().tolist())


def _videos(previews: tuple[Preview, ...]) -> dict[str, Any]:
    import wandb

    return {
        preview.name: wandb.Video(str(preview.path), caption=preview.caption, format="mp4")
        for preview in previews
    }
