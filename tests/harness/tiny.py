"""A model for tests: random weights, loads in a moment, both tasks. Importing it costs no torch."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from baselines.base import Method
from experiments.models import Model


def identity() -> dict:
    return {"weights": "random"}


def load() -> Model:
    from tests import pipelines

    return Model("tiny", {"t2v": pipelines.wan_t2v(), "i2v": pipelines.wan_ti2v()})


def refuse() -> Model:
    """In the place of `load` where nothing may be loaded."""
    raise AssertionError("a model was loaded")


@dataclass(frozen=True)
class Breaking(Method):
    """Fails on prompts that contain a word."""

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = "native"
    paper: ClassVar[str] = ""
    source: ClassVar[str] = ""

    word: str = "blue"

    def neutral(self, request):
        return self

    @contextmanager
    def install(self, pipe, request):
        if self.word in request.prompt:
            raise RuntimeError("velocity is\nnot finite")
        yield
