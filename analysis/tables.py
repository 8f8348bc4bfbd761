"""Result tables as markdown, LaTeX (booktabs) and for the terminal.

A `Table` says what stands in which cell; the renderers only spell it. Missing numbers are shown
as missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import pandas as pd

from analysis.metrics.base import Metric
from analysis.stats import NOTHING, Estimate
from analysis.summary import GAIN, MEAN

if TYPE_CHECKING:
    import rich.table

    from experiments.match import Match

MISSING = "\N{EN DASH}"
LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\N{UPWARDS ARROW}": r"$\uparrow$",
        "\N{DOWNWARDS ARROW}": r"$\downarrow$",
        "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
        "\N{MINUS SIGN}": "$-$",
        "\N{PLUS-MINUS SIGN}": r"$\pm$",
        MISSING: "--",
    }
)


@dataclass(frozen=True)
class Entry:
    """One cell; `number` entries align right. The best is bold, the second underlined."""

    text: str
    bold: bool = False
    number: bool = True
    underlined: bool = False


@dataclass(frozen=True)
class Table:
    """`breaks`: numbers of the rows that begin a group of their own, but for the first."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str = ""
    breaks: tuple[int, ...] = ()

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [all(entry.number for entry in column) for column in zip(*self.rows, strict=True)]


def results(summary: pd.DataFrame, metrics: Sequence[Metric], task: str, note: str = "") -> Table:
    """Quality and cost of every setting, in the order of the plan; of one target together.

    Cost: active fraction, forwards of each guidance branch, runtime, its share of the reference's
    with quartiles, and the memory held between steps beyond the reference's. Where settings have a
    target, also what meets it.

    The best mean of a metric among the settings of one target is bold, the second underlined; the
    reference setting, which has no fidelity, takes part in the others.
    """
    view = _by_target(summary[summary["task"] == task])
    targeted = view["target"].notna().any()
    rows = []
    for label, lines in view.groupby("label", sort=False):
        about, cells = lines.iloc[0], lines.set_index("metric")
        rows.append(
            (
                Entry(label, number=False),
                *([Entry(about["turned"] or MISSING, number=False)] if targeted else []),
                Entry(about["implementation"], number=False),
                Entry(str(about["prompts"])),
                Entry(percent(about["active_fraction"])),
                Entry(about["nfe"] or MISSING),
                Entry(number(about["runtime_s"])),
                Entry(_relative(about)),
                Entry(megabytes(about["extra_bytes"])),
                *(_quality(cells, metric, about["prompts"]) for metric in metrics),
            )
        )
    header = ("Method", *(["Set to"] if targeted else []), "Implementation", "Prompts", "Active")
    header += ("NFE", "Runtime (s)", "Relative", "Extra memory (MB)", *map(heading, metrics))
    return Table(f"Quality, {task.upper()}", header, tuple(rows), note, _breaks(view))


def unreached(matches: Iterable[Match], task: str) -> Table:
    """Settings of a task that do not meet their target, with the closest that was found."""
    rows = tuple(
        (
            Entry(match.label, number=False),
            Entry(match.turned, number=False),
            Entry(f"{percent(match.runtime)} [{100 * match.low:.1f}, {100 * match.high:.1f}]"),
            Entry(percent(match.work)),
            Entry("out of reach" if match.at_end else "missed", number=False),
        )
        for match in matches
        if match.task == task
    )
    header = ("Method", "Closest", "Relative", "Active", "")
    note = (
        "Relative: share of the reference's runtime in the search, with quartiles. Out of reach: "
        "the setting is at the end of its range."
    )
    return Table(f"Left out, {task.upper()}", header, rows, note)


def gains(summary: pd.DataFrame, metrics: Sequence[Metric], task: str, baseline: str) -> Table:
    """Paired difference of every setting to flow matching at the same measured runtime.

    Bold: the whole interval lies on the better side.
    """
    view = _by_target(summary[(summary["task"] == task) & (summary["method"] != baseline)])
    rows = tuple(
        (
            Entry(label, number=False),
            Entry(percent(lines["runtime"].iloc[0])),
            *(
                difference(_estimate(lines.set_index("metric"), metric.name, GAIN), metric)
                for metric in metrics
            ),
        )
        for label, lines in view.groupby("label", sort=False)
    )
    header = (
        "Method",
        "Relative",
        *(f"\N{GREEK CAPITAL LETTER DELTA} {heading(m)}" for m in metrics),
    )
    title = f"Against flow matching at the same runtime, {task.upper()}"
    return Table(title, header, rows, breaks=_breaks(view))


def leaders(values: Iterable[float], higher_is_better: bool = True) -> list[float]:
    """The best value and the one after it, as far as there are such; NaN takes no part."""
    known = {value for value in values if math.isfinite(value)}
    return sorted(known, reverse=higher_is_better)[:2]


def placed(text: str, value: float, leaders: Sequence[float]) -> Entry:
    """The entry of a value among the `leaders` of its column; equal values share a place."""
    best, second = (value in leaders[place : place + 1] for place in (0, 1))
    return Entry(text, best, underlined=second)


def heading(metric: Metric) -> str:
    """Title, unit and the direction that is better."""
    unit = f" ({metric.unit})" if metric.unit else ""
    arrow = "\N{UPWARDS ARROW}" if metric.higher_is_better else "\N{DOWNWARDS ARROW}"
    return f"{metric.title}{unit} {arrow}"


def difference(estimate: Estimate, metric: Metric) -> Entry:
    """A signed mean with its interval, bold where the interval excludes no improvement."""
    sure = estimate.low > 0 if metric.higher_is_better else estimate.high < 0
    return Entry(interval(estimate, signed=True), bool(sure))


def number(value: float, signed: bool = False) -> str:
    """Two decimals from 10 up, three below, four below 0.1."""
    if not math.isfinite(value):
        return MISSING
    decimals = 2 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 4
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else MISSING


def megabytes(size: float) -> str:
    """Of a million bytes, one decimal."""
    if not math.isfinite(size):
        return MISSING
    return f"{round(size / 1e6, 1) + 0.0:.1f}".replace("-", "\N{MINUS SIGN}")  # no minus zero


def interval(estimate: Estimate, signed: bool = False) -> str:
    """ "mean [low, high] ± spread", without what takes more than one prompt or seed."""
    text = number(estimate.mean, signed)
    if math.isfinite(estimate.low):
        bounds = ", ".join(number(bound, signed) for bound in (estimate.low, estimate.high))
        text += f" [{bounds}]"
    if math.isfinite(estimate.spread):
        text += f" \N{PLUS-MINUS SIGN} {number(estimate.spread)}"
    return text


def markdown(tables: Iterable[Table]) -> str:
    return "\n".join(_markdown(table) for table in tables)


def latex(tables: Iterable[Table]) -> str:
    r"""Tables for a paper; needs \usepackage{booktabs}."""
    return "\n".join(_latex(table) for table in tables)


def terminal(table: Table) -> rich.table.Table:
    """The same for a rich console."""
    import rich.box
    import rich.table
    from rich.text import Text

    shown = rich.table.Table(
        title=table.title,
        caption=table.note or None,
        title_justify="left",
        caption_justify="left",
        box=rich.box.SIMPLE,
    )
    for name, numeric in zip(table.header, table.numeric, strict=True):
        shown.add_column(name, justify="right" if numeric else "left")
    for number, row in enumerate(table.rows):
        if number in table.breaks:
            shown.add_section()
        styles = ["bold" * entry.bold or "underline" * entry.underlined for entry in row]
        shown.add_row(*(Text(e.text, style=s) for e, s in zip(row, styles, strict=True)))
    return shown


def _markdown(table: Table) -> str:
    rule = ("---:" if numeric else "---" for numeric in table.numeric)
    marks = {"bold": "**{}**", "underlined": "<u>{}</u>"}
    body = ((_marked(_pipes(entry.text), entry, marks) for entry in row) for row in table.rows)
    lines = ["| " + " | ".join(row) + " |" for row in chain([table.header, rule], body)]
    note = ["", table.note] if table.note else []
    return "\n".join([f"## {table.title}", "", *lines, *note, ""])


def _latex(table: Table) -> str:
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    marks = {"bold": r"\textbf{{{}}}", "underlined": r"\underline{{{}}}"}
    body = [
        " & ".join(_marked(entry.text.translate(LATEX), entry, marks) for entry in row) + r" \\"
        for row in table.rows
    ]
    for number in reversed(table.breaks):
        body.insert(number, r"\midrule")
    header = " & ".join(name.translate(LATEX) for name in table.header)
    note = f" {table.note.translate(LATEX)}" if table.note else ""
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            rf"\caption{{{table.title.translate(LATEX)}.{note}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rf"{header} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _marked(text: str, entry: Entry, marks: Mapping[str, str]) -> str:
    """The text in the format that is due to the entry."""
    mark = "bold" if entry.bold else "underlined" if entry.underlined else None
    return marks[mark].format(text) if mark else text


def _pipes(text: str) -> str:
    return text.replace("|", r"\|")


def _by_target(rows: pd.DataFrame) -> pd.DataFrame:
    """Settings without a target first, then from the slowest target to the fastest."""
    return rows.sort_values("target", ascending=False, na_position="first", kind="stable")


def _breaks(rows: pd.DataFrame) -> tuple[int, ...]:
    """Where the target of the settings changes."""
    targets = rows.drop_duplicates("label")["target"].fillna(math.inf).tolist()
    return tuple(i for i in range(1, len(targets)) if targets[i] != targets[i - 1])


def _quality(cells: pd.DataFrame, metric: Metric, prompts: int) -> Entry:
    """Mean and interval, with the number of prompts where some have no score."""
    estimate = _estimate(cells, metric.name)
    count = f" (n={estimate.n})" if 0 < estimate.n < prompts else ""
    rank = cells["rank"].get(metric.name)
    return Entry(interval(estimate) + count, bool(rank == 1), underlined=bool(rank == 2))


def _relative(about: pd.Series) -> str:
    """Share of the reference's runtime, with the quartiles of the setting's own timings."""
    low, high = (
        about["runtime"] * about[bound] / about["runtime_s"]
        for bound in ("runtime_low", "runtime_high")
    )
    if not math.isfinite(low):
        return MISSING
    return f"{percent(about['runtime'])} [{100 * low:.1f}, {100 * high:.1f}]"


def _estimate(cells: pd.DataFrame, metric: str, columns: Sequence[str] = MEAN) -> Estimate:
    """Read back what `summary` wrote; missing where the setting has no such row."""
    return Estimate(*cells.loc[metric][list(columns)]) if metric in cells.index else NOTHING
