"""Which method serves which pipeline, found by asking each: `python -m tests.baselines.support`.

Writes the table between the marks in README.md, with what each method costs where
`hsa-bench bench methods` has measured that.
"""

import csv
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

from analysis.tables import MISSING, megabytes, percent
from tests.baselines import cases
from tests.baselines.cases import METHODS, PIPELINES, RATIOS

README = Path("README.md")
COSTS = Path("docs/results/bench_methods/table.csv")
BEGIN, END = "<!-- support: python -m tests.baselines.support -->", "<!-- end of support -->"
COLUMNS = {
    "wan_t2v": "Wan 2.1 T2V",
    "wan_i2v": "Wan 2.1 I2V",
    "wan22_t2v": "Wan 2.2 T2V",
    "wan22_i2v": "Wan 2.2 I2V",
    "ti2v_t2v": "TI2V T2V",
    "ti2v_i2v": "TI2V I2V",
    "ltx2_t2v": "LTX-2 T2V",
    "ltx2_i2v": "LTX-2 I2V",
}
# Where the authors measured what the method has to know of the model, if it has to.
MEASURED = {"magcache": RATIOS, "oracle": (), "sencache": ()}


class _Served(Exception):
    """Raised to leave a pipeline after its first step."""


def serves(pipeline: str, name: str) -> bool:
    """Whether the method runs the pipeline's first step instead of refusing."""

    def stop(pipe, step, timestep, tensors):
        raise _Served

    pipe, method = cases.pipe_of(pipeline), cases.method(name, pipeline)
    steps = cases.steps_of(method)
    request = cases.request(pipe, steps=steps, callback_on_step_end=stop)
    try:
        with method.attach(pipe, request):
            pipe(**request.kwargs(pipe))
    except _Served:
        return True
    except ValueError:
        return False


def table(serves: Callable[[str, str], bool] = serves) -> str:
    """Markdown; `serves` says for a pipeline and a method whether they go together."""

    def cell(pipeline: str, name: str) -> str:
        if not serves(pipeline, name):
            return "refused"
        return "yes" if pipeline in MEASURED.get(name, PIPELINES) else "calibrated"

    measured = costs()
    titles = ["method", "implementation", *COLUMNS.values()]
    titles += ["extra memory (MB)", "overhead"] if measured else []
    rows = [titles, ["---"] * len(titles)]
    for name in METHODS:
        cells = [cell(pipeline, name) for pipeline in PIPELINES]
        cells += measured.get(name, (MISSING, MISSING)) if measured else ()
        rows.append([f"`{name}`", cases.method(name).implementation, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def costs(path: Path = COSTS) -> dict[str, tuple[str, str]]:
    """method -> memory held between steps and runtime of a run that skips nothing, both beyond
    flow matching's on the embedded model; empty where nothing was measured.
    """
    if not path.is_file():
        return {}
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if not row["refusal"]]
    return {
        row["label"]: (
            megabytes(int(row["extra_bytes"])),
            percent(median(map(float, row["neutral"].split())) - 1),
        )
        for row in rows
    }


def written() -> str:
    """The table as README.md has it."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip()


def write() -> None:
    text = README.read_text()
    block = f"{BEGIN}\n{table()}\n{END}"
    README.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write()
