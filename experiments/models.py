"""What the harness needs to know about a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A loaded model: one diffusers pipeline per task, sharing their components.

    Built by the `load` target of a `conf/model` yaml. Everything that decides a video and is
    known without loading (weights identity, sizes, guidance) stands in that yaml instead.
    """

    name: str
    pipelines: Mapping[str, Any]  # task ("t2v", "i2v") -> diffusers pipeline

    def pipeline(self, task: str) -> Any:
        """The pipeline of a task; ValueError names the tasks the model has."""
        if task not in self.pipelines:
            raise ValueError(f"model {self.name} has no task {task!r}: {', '.join(self.pipelines)}")
        return self.pipelines[task]
