"""A model for tests: random weights, loads in a moment, both tasks. Importing it costs no torch."""

from experiments.models import Model


def identity() -> dict:
    return {"weights": "random"}


def load() -> Model:
    from tests import pipelines

    return Model("tiny", {"t2v": pipelines.wan_t2v(), "i2v": pipelines.wan_ti2v()})
