from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from analysis import tables
from analysis.metrics.latent_error import LatentError
from analysis.metrics.psnr import PSNR
from analysis.stats import Estimate
from analysis.summary import BASELINE, summarise
from analysis.tables import Entry, Table
from tests.analysis import synthetic

TABLE = Table(
    title="Quality, T2V",
    header=("Method", "Active", "PSNR (dB) \N{UPWARDS ARROW}", "Error \N{DOWNWARDS ARROW}"),
    rows=(
        (
            Entry("FM T=10 | a_b", number=False),
            Entry("25.0 %"),
            Entry("30.12 [29.50, 31.00]", bold=True),
            Entry("\N{EN DASH}"),
        ),
        (
            Entry("HSA-25", number=False),
            Entry("24.8 %"),
            Entry("\N{MINUS SIGN}1.250", underlined=True),
            Entry("0.0312", bold=True),
        ),
    ),
    note="Means over 2 prompts.",
)

MARKDOWN = """\
## Quality, T2V

| Method | Active | PSNR (dB) ↑ | Error ↓ |
| --- | ---: | ---: | ---: |
| FM T=10 \\| a_b | 25.0 % | **30.12 [29.50, 31.00]** | – |
| HSA-25 | 24.8 % | <u>−1.250</u> | **0.0312** |

Means over 2 prompts.
"""

LATEX = r"""\begin{table*}
\centering
\caption{Quality, T2V. Means over 2 prompts.}
\begin{tabular}{lrrr}
\toprule
Method & Active & PSNR (dB) $\uparrow$ & Error $\downarrow$ \\
\midrule
FM T=10 | a\_b & 25.0 \% & \textbf{30.12 [29.50, 31.00]} & -- \\
HSA-25 & 24.8 \% & \underline{$-$1.250} & \textbf{0.0312} \\
\bottomrule
\end{tabular}
\end{table*}
"""


def test_markdown_golden() -> None:
    assert tables.markdown([TABLE]) == MARKDOWN


def test_latex_golden() -> None:
    assert tables.latex([TABLE]) == LATEX


def test_terminal_shows_every_cell() -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(tables.terminal(TABLE))
    text = output.getvalue()
    for entry in (*TABLE.rows[0], *TABLE.rows[1]):
        assert entry.text in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (34.216, "34.22"),
        (9.8764, "9.876"),
        (0.03127, "0.0313"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (math.nan, "\N{EN DASH}"),
        (math.inf, "\N{EN DASH}"),
        (0.0, "0.0000"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert tables.number(value) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(-80, "0.0"), (2.55e6, "2.5"), (-1.2e6, "\N{MINUS SIGN}1.2"), (math.nan, "–")],
)
def test_megabytes(size: float, text: str) -> None:
    assert tables.megabytes(size) == text


def test_intervals() -> None:
    assert tables.interval(Estimate(30.0, 29.0, 31.5, 4)) == "30.00 [29.00, 31.50]"
    assert tables.interval(Estimate(30.0, np.nan, np.nan, 1)) == "30.00"
    assert tables.interval(Estimate(30.0, 29.0, 31.5, 4, 0.25)) == "30.00 [29.00, 31.50] ± 0.250"
    assert tables.interval(Estimate(np.nan, np.nan, np.nan, 0)) == "\N{EN DASH}"
    assert tables.interval(Estimate(1.0, -0.5, 2.0, 3), signed=True) == (
        "+1.000 [\N{MINUS SIGN}0.500, +2.000]"
    )


@pytest.mark.parametrize(
    ("metric", "low", "high", "bold"),
    [
        (PSNR(), 0.1, 0.3, True),
        (PSNR(), -0.1, 0.3, False),
        (PSNR(), -0.3, -0.1, False),
        (LatentError(), -0.3, -0.1, True),
        (LatentError(), 0.1, 0.3, False),
    ],
)
def test_a_difference_is_bold_where_it_is_surely_better(metric, low, high, bold) -> None:
    assert tables.difference(Estimate((low + high) / 2, low, high, 9), metric).bold is bold


@pytest.fixture(scope="module")
def summary():
    return summarise(synthetic.frame(), synthetic.runtimes(), synthetic.METRICS)


def test_results_name_direction_implementation_cost_and_the_best(summary) -> None:
    table = tables.results(summary, synthetic.METRICS, "t2v")
    assert "PSNR (dB) \N{UPWARDS ARROW}" in table.header
    assert "Latent error \N{DOWNWARDS ARROW}" in table.header
    rows = {row[0].text: [entry.text for entry in row] for row in table.rows}
    cost = ["42.0 %", "16.8 + 8.4", "1.680", "42.0 % [41.6, 42.8]", "4.6"]
    assert rows["TeaCache 0.2"][1:8] == ["official-rule", "12", *cost]
    for metric in synthetic.METRICS:
        column = table.header.index(tables.heading(metric))
        view = summary[(summary["task"] == "t2v") & (summary["metric"] == metric.name)]
        best = view["mean"].max() if metric.higher_is_better else view["mean"].min()
        bold = [row[0].text for row in table.rows if row[column].bold]
        assert bold == list(view[view["mean"] == best]["label"])
        others = view[view["mean"] != best]["mean"]
        second = others.max() if metric.higher_is_better else others.min()
        underlined = [row[0].text for row in table.rows if row[column].underlined]
        assert underlined == list(view[view["mean"] == second]["label"])


def test_equal_values_share_a_place_and_missing_ones_have_none() -> None:
    values = [2.0, math.nan, 3.0, 1.0, 3.0]
    top = tables.leaders(values)
    marks = [(e.bold, e.underlined) for e in (tables.placed("", v, top) for v in values)]
    neither, best, second = (False, False), (True, False), (False, True)
    assert marks == [second, neither, best, neither, best]
    assert tables.leaders(values, higher_is_better=False) == [1.0, 2.0]
    assert tables.leaders([math.nan]) == []


def test_missing_quality_is_shown_as_missing(summary) -> None:
    table = tables.results(summary, synthetic.METRICS, "t2v")
    reference = next(row for row in table.rows if row[0].text == "FM T=40")
    psnr = table.header.index(tables.heading(PSNR()))
    assert reference[psnr] == Entry("\N{EN DASH}")


def test_fewer_scores_than_prompts_are_told() -> None:
    frame = synthetic.frame(("t2v",))
    gone = (frame["label"] == "HSA-25") & (frame["metric"] == "psnr") & (frame["prompt_id"] == "p3")
    partial = frame.assign(value=frame["value"].mask(gone))
    made = summarise(partial, synthetic.runtimes(("t2v",)), synthetic.METRICS)
    table = tables.results(made, synthetic.METRICS, "t2v")
    psnr = {row[0].text: row[8].text for row in table.rows}
    assert psnr["HSA-25"].endswith("(n=11)") and "n=" not in psnr["HSA-50"]


TARGETS = {
    0.25: ["FM T=10", "HSA-25", "TeaCache 0.3", "Mask 1/4"],
    0.5: ["FM T=20", "HSA-50", "TeaCache 0.2", "Mask 1/2"],
}


@pytest.fixture(scope="module")
def matched():
    """Two targets and the reference, which has none, in the order of the plan."""
    targets = {label: target for target, labels in TARGETS.items() for label in labels}
    frame = synthetic.frame(("t2v",))
    turned = frame["label"].map(lambda label: f"of {label}" if label in targets else "")
    frame = frame.assign(target=frame["label"].map(targets), turned=turned)
    frame = frame[frame["target"].notna() | (frame["label"] == "FM T=40")]
    return frame, summarise(frame, synthetic.runtimes(("t2v",)), synthetic.METRICS)


def test_the_best_is_that_of_its_target(matched) -> None:
    frame, summary = matched
    table = tables.results(summary, synthetic.METRICS, "t2v")
    means = frame.groupby(["metric", "label"])["value"].mean()
    for metric in synthetic.METRICS:
        column = table.header.index(tables.heading(metric))
        cells = {row[0].text: row[column] for row in table.rows}
        assert not cells["FM T=40"].bold and not cells["FM T=40"].underlined
        for labels in TARGETS.values():
            values = sorted({means[metric.name, label] for label in labels})
            best, second = values[:-3:-1] if metric.higher_is_better else values[:2]
            for label in labels:
                value = means[metric.name, label]
                marks = (cells[label].bold, cells[label].underlined)
                assert marks == (value == best, value == second), (metric.name, label)


def test_settings_of_a_target_stand_together(matched) -> None:
    _, summary = matched
    table = tables.results(summary, synthetic.METRICS, "t2v")
    assert [row[0].text for row in table.rows] == ["FM T=40", *TARGETS[0.5], *TARGETS[0.25]]
    assert table.breaks == (1, 5)
    assert table.header[1] == "Set to"
    assert [row[1].text for row in table.rows[:2]] == [tables.MISSING, "of FM T=20"]
    body = tables.latex([table]).split(r"\midrule")
    assert len(body) == 4  # below the header, below the reference, between the targets
    assert "FM T=20" in body[2] and "Mask 1/2" in body[2] and "FM T=10" in body[3]
    shown = tables.gains(summary, synthetic.METRICS, "t2v", BASELINE)
    assert [row[0].text for row in shown.rows] == [*TARGETS[0.5][1:], *TARGETS[0.25][1:]]
    assert shown.breaks == (3,)
    assert tables.markdown([table]).count("\n| ") == len(table.rows) + 2
    Console(file=io.StringIO()).print(tables.terminal(table))


def test_what_has_no_rival_has_no_rank(matched) -> None:
    _, summary = matched
    assert summary[summary["label"] == "FM T=40"]["rank"].isna().all()
    alone = synthetic.frame(("t2v",))
    alone = alone[alone["label"] == "HSA-25"]
    made = summarise(alone, synthetic.runtimes(("t2v",)), synthetic.METRICS)
    assert made["mean"].notna().all() and made["rank"].isna().all()


def test_csv_says_what_is_best_and_which_way(matched, tmp_path) -> None:
    import pandas as pd

    _, summary = matched
    summary.to_csv(tmp_path / "table.csv", index=False)
    rows = pd.read_csv(tmp_path / "table.csv")
    assert set(rows["implementation"]) == {"native", "from-paper", "official-rule"}
    directions = rows.groupby("metric")["higher_is_better"].unique().str[0]
    assert directions["psnr"] and not directions["latent_error"]
    for _, group in rows.dropna(subset=["target"]).groupby(["metric", "target"]):
        better = group["mean"].max() if group["higher_is_better"].all() else group["mean"].min()
        assert set(group[group["rank"] == 1]["mean"]) == {better}


def test_gains_leave_the_baseline_out(summary) -> None:
    table = tables.gains(summary, synthetic.METRICS, "i2v", BASELINE)
    labels = [row[0].text for row in table.rows]
    assert labels and not any(label.startswith("FM") for label in labels)
    hsa = next(row for row in table.rows if row[0].text == "HSA-25")
    assert hsa[2].bold and hsa[2].text.startswith("+")


def test_csv_keeps_raw_numbers(summary, tmp_path) -> None:
    import pandas as pd

    path = tmp_path / "table.csv"
    summary.to_csv(path, index=False)
    read = pd.read_csv(path).assign(turned="")  # empty, which csv cannot tell from missing
    pd.testing.assert_frame_equal(read, summary, check_dtype=False)


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("suffix, write", [("md", tables.markdown), ("tex", tables.latex)])
def test_tables_are_the_same_bytes_everywhere(suffix, write, summary) -> None:
    made = [tables.results(summary, synthetic.METRICS, "t2v", "A note: 95 % & more.")]
    made += [tables.gains(summary, synthetic.METRICS, "t2v", BASELINE)]
    golden = GOLDEN / f"table.{suffix}"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(write(made), encoding="utf-8")
        pytest.fail(f"{golden} is new: look at it and commit it")
    assert write(made) == golden.read_text(encoding="utf-8")
