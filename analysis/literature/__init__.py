"""Methods that are quoted and not run: what they are, why, and what was published about them.

The two csv files beside this module are the data; `python -m analysis.literature` writes
docs/literature.md from them, and the report shows them below our own tables.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from analysis.tables import MISSING, Entry, Table

HERE = Path(__file__).parent
NUMBERS = ("lpips", "ssim", "psnr")
HEADINGS = {
    "paper": "Paper, code",
    "speedup": "Speed-up",
    "vbench": "VBench \N{UPWARDS ARROW}",
    "lpips": "LPIPS \N{DOWNWARDS ARROW}",
    "ssim": "SSIM \N{UPWARDS ARROW}",
    "psnr": "PSNR (dB) \N{UPWARDS ARROW}",
    "why": "Why it is not run",
    "what": "What it is",
}
NOTE = (
    "Quoted, on hardware, prompts and protocols of their own; fidelity is to each model's own "
    "uncached output. No row compares with another table, ours included."
)


def tables() -> list[Table]:
    """What each quoted method is, and the published figures."""
    return [
        _table("Methods that are quoted and not run", _read("methods.csv")),
        _table("Published figures, not ours", _read("figures.csv"), NOTE),
    ]


def _read(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _table(title: str, rows: Sequence[dict[str, str]], note: str = "") -> Table:
    header = tuple(HEADINGS.get(name, name.capitalize()) for name in rows[0])
    entries = tuple(
        tuple(Entry(value or MISSING, number=name in NUMBERS) for name, value in row.items())
        for row in rows
    )
    return Table(title, header, entries, note)
