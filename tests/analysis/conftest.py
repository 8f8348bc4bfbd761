"""One small scored store for all tests that only read it."""

from __future__ import annotations

import pytest

from analysis.score import score
from experiments.config import Config
from tests.analysis import stored


@pytest.fixture(scope="session")
def config() -> Config:
    """What `analyse` reads of a configuration; LPIPS cannot be computed here."""
    lpips = {"_target_": "analysis.metrics.lpips.LPIPS", "weights": "/none/lpips.safetensors"}
    metrics = {**stored.METRIC_NODES, "lpips": lpips}
    figures = {
        name: {"_target_": f"analysis.figures.{name}.{name.capitalize()}"}
        for name in ("frontier", "sweep")
    }
    return Config(name="rendered", metric=metrics, figure=figures, logger={"_target_": None})


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """(plan, store) of rendered videos, T2V and I2V, scored."""
    plan, store = stored.fill(tmp_path_factory.mktemp("results"), prompts=2)
    score(plan, store, stored.METRICS)
    return plan, store
