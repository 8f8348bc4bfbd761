"""Whose rule each method is and how it differs, as its class says.

`python -m analysis.methods` writes docs/methods.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from analysis.tables import MISSING, Entry, Table
from baselines.base import Method
from experiments.config import build, group_choices, load_experiment

PAGE = """\
# Methods

What the classes in `baselines/` say of themselves, by `python -m analysis.methods`. Which of them
runs on which model, and what it costs beside its work, is in the [README](../README.md).
*official-rule* is the authors' rule in our code, *diffusers-hook* and *cache-dit* are the rules of
those libraries, *from-paper* was written from the text, *native* is nothing but the sampler.
"""


def table(methods: Iterable[Method]) -> Table:
    """One row a class, in the order in which they come."""
    rows = tuple(
        tuple(
            Entry(text or MISSING, number=False)
            for text in (
                kind.__name__,
                kind.implementation,
                kind.paper,
                kind.source,
                "; ".join(kind.deviations),
            )
        )
        for kind in dict.fromkeys(map(type, methods))
    )
    header = ("Method", "Implementation", "Paper", "Source", "Deviations")
    return Table("Where the methods come from", header, rows)


def page(methods: Mapping[str, Method]) -> str:
    """A section for each class, below the names of its yamls."""
    names: dict[type[Method], list[str]] = {}
    for name, method in methods.items():
        names.setdefault(type(method), []).append(name)
    return "\n".join([PAGE, *(_section(kind, of) for kind, of in names.items())])


def shipped() -> dict[str, Method]:
    """Name -> method of every yaml in conf/method, on the embedded model."""
    every = f"method={','.join(group_choices('method'))}"
    settings = load_experiment([every], multirun=True).settings
    return {setting.label: build(setting.config.method, "method") for setting in settings}


def _section(kind: type[Method], names: Sequence[str]) -> str:
    about = inspect.getdoc(kind).replace("``", "`")
    lines = [f"## {', '.join(f'`{name}`' for name in names)}", "", about, ""]
    lines += [f"*Implementation:* {kind.implementation}. *Paper:* {kind.paper}.", ""]
    lines += [f"*Source:* {kind.source}.", ""]
    if kind.deviations:
        lines += ["Deviations:", "", *(f"* {text}" for text in kind.deviations), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path("docs/methods.md").write_text(page(shipped()), encoding="utf-8")
