"""`hsa-bench bench engine|methods`: what a step and a method cost, apart from any experiment."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.tables import Table, markdown
from experiments import provenance
from experiments.files import replace_file


def note() -> str:
    """Hardware, versions and commit, for the foot of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
    code = provenance.code()
    changed = " with uncommitted changes" if code.patch else ""
    return f"{provenance.machine().name}; {versions}; commit {code.commit}{changed}."


def write(folder: Path, tables: Sequence[Table], rows: Sequence[Mapping[str, object]]) -> None:
    """table.md as people read it, table.csv with the raw numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, content in (("table.md", markdown(tables)), ("table.csv", text.getvalue())):
        replace_file(folder / name, content)
