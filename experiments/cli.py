"""hsa-bench: from a configuration to a table. Commands import what they need when they run."""

from __future__ import annotations

import argparse
import errno
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baselines.hsa import HSA
from experiments import doctor, setup
from experiments.cell import Cell
from experiments.config import Config, Experiment, build, group_choices, load_experiment
from experiments.errors import UserError, one_line
from experiments.estimate import Costs, duration, kv_memory, size
from experiments.plan import Plan, plan
from experiments.store import Store, StoreError

if TYPE_CHECKING:
    from analysis.metrics.base import Metric
    from analysis.pipeline import Analysis
    from analysis.tables import Table as ResultTable
    from experiments.engines import Engine
    from experiments.execute import Worker

USAGE = """\
hsa-bench COMMAND [-m] [--config-dir DIR] [key=value ...]

  run        generate what is missing, time it, score it, make tables, figures and report
  plan       list the settings, what is stored and missing, and how long it will take
  score      score what is stored, or with engine=shard a share of it
  table      tables, figures and report of what is stored; print the tables
  report     the same; print where the report is
  log        the same; send to wandb what is not there yet (logger.mode=online or WANDB_MODE)
  verify     read the whole store and set aside what was altered
  doctor     check this installation
  setup      vbench [small]: make the environment that VBench runs in
  calibrate  on prompts=calibration: fit what a method needs for a model; with target=0.5 find and
             store the setting that takes half of the reference's runtime
  bench      engine: time and memory of a step of HSA, by the share of tokens that run;
             methods: memory and overhead of all methods, or of method=...

Keys are those of conf/, in Hydra's grammar; -m allows several values a key, --config-dir adds a
folder with groups of your own:

  hsa-bench run experiment=demo
  hsa-bench run method=teacache method.threshold=0.1 limit=2
  hsa-bench run -m method=hsa method.thresholds=[0.02],[0.03],[0.04]
  hsa-bench calibrate -m method=teacache,hsa target=0.75,0.5,0.25
"""
SETUP = "setup"  # the command that needs no configuration
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """One command: what it is about, and where results are and messages go."""

    experiment: Experiment
    console: Console

    @property
    def config(self) -> Config:
        return self.experiment.config

    @cached_property
    def store(self) -> Store:
        return Store(self.config.store)

    @cached_property
    def engine(self) -> Engine:
        engine = build(self.config.engine, "engine")
        if self.config.shard and not engine.partial:
            raise UserError(f"shard={self.config.shard} has no effect without engine=shard")
        return engine

    def metrics(self) -> list[Metric]:
        built = (build(node, f"metric.{name}") for name, node in self.config.metric.items())
        return [part for metric in built for part in metric.parts()]

    def track(self, items: Iterable[T], total: int, title: str) -> Iterator[T]:
        """Yield items under a progress bar that tells how long the rest will take."""
        with self.progress() as bar:
            yield from bar.track(items, total=total, description=title)

    def progress(self) -> progress.Progress:
        columns = (
            progress.TextColumn("{task.description:<9}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        return progress.Progress(*columns, console=self.console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Errors that are the user's to mend take one line and exit code 2."""
    command, overrides, multirun, config_dir = _arguments(argv)
    try:
        doctor.check_packages()
        if command == SETUP:
            return setup.main(overrides)
        overrides, multirun = _with_defaults(command, overrides, multirun)
        experiment = load_experiment(overrides, multirun, config_dir)
        return COMMANDS[command](Session(experiment, _console()))
    except (UserError, StoreError) as error:
        return _fail(one_line(error))
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        return _fail(f"cannot write {error.filename}: {error.strerror}; what is stored is intact")
    except KeyboardInterrupt:
        return _fail("interrupted; the same command again goes on from here", 130)


def run(session: Session) -> int:
    """generate -> time -> score -> report; whatever is stored already is not done again.

    With `metric=[]` there is nothing to score and report.
    """
    config, store, engine = session.config, session.store, session.engine
    session.metrics()
    if config.logger.get("_target_"):
        build(config.logger, "logger")
    cells = plan(session.experiment)
    _require_weights(cells.missing(store))
    store.clean()
    _set_aside_damaged(session, cells)
    missing = engine.share(cells.missing(store))
    _announce(session, cells, missing)
    worker = _worker(session)
    failed = _generate(session, missing, worker) if missing else 0
    if engine.partial:
        session.console.print(f"shard {config.shard} is done; a run without shard reports")
        return 1 if failed else 0
    _time(session, cells, worker)
    if config.metric:
        _score(session, cells)
        _report(session, cells, show_tables=True)
    return 1 if failed else 0


def show_plan(session: Session) -> int:
    """Settings with what they will cost; the last lines sum up and say where times come from."""
    cells, store = plan(session.experiment, count_only=True), session.store
    share = session.engine.share(cells.missing(store))
    table = Table(box=None, header_style="bold")
    for name in ("setting", "task"):
        table.add_column(name)
    for name in ("videos", "stored", "time left", "HSA's K/V"):
        table.add_column(name, justify="right")
    costs = Costs(cells.stored(store), store)
    for (task, label), group in cells.by_setting().items():
        missing = [cell for cell in group if not store.has(cell.key)]
        seconds = costs.of(missing).seconds if missing else None
        table.add_row(
            label,
            task,
            str(len(group)),
            str(len(group) - len(missing)),
            duration(seconds) if seconds else "",
            _kept(group[0]),
        )
    session.console.print(table)
    _announce(session, cells, share)
    return 0


def _kept(cell: Cell) -> str:
    """Keys and values that a cell of HSA keeps, in words."""
    memory = kv_memory(cell.config.model, cell.request)
    if memory is None or not isinstance(cell.method, HSA):
        return ""
    here, host = memory.needed(cell.method.kv_dtype, cell.method.kv_device)
    return f"{size(here)}, host {size(host)}" if host else size(here)


def score(session: Session) -> int:
    """All of it, or the engine's share: machines that score divide the videos among themselves."""
    cells = plan(session.experiment)
    _score(session, replace(cells, cells=tuple(session.engine.share(cells.cells))))
    return 0


def table(session: Session) -> int:
    _report(session, plan(session.experiment), show_tables=True)
    return 0


def report(session: Session) -> int:
    _report(session, plan(session.experiment), show_tables=False)
    return 0


def log(session: Session) -> int:
    """The runs of an experiment are one group; `analysis.wandb_sink`."""
    logger = session.config.logger
    if not logger.get("_target_"):
        raise UserError("logger=none: nowhere to log to; choose logger=wandb")
    build(logger, "logger")
    new = _analyse(session, plan(session.experiment)).logged
    session.console.print(f"{session.config.name}: {len(new)} new runs logged")
    return 0


def verify(session: Session) -> int:
    """Exit code 1 where something was altered; the next run makes it again."""
    store, problems = session.store, 0
    for problem in store.verify():
        problems += 1
        session.console.print(str(problem))
        store.quarantine(problem.path)
    if problems:
        session.console.print(f"{problems} altered, moved to {store.root / 'quarantine'}")
        session.console.print("the next run makes them again")
        return 1
    count = sum(1 for _ in store.samples())
    session.console.print(f"{store.root}: {count} videos, all as they were written")
    return 0


def show_doctor(session: Session) -> int:
    findings = list(doctor.examine(session.config))
    marks = {True: Text("ok", "green"), False: Text("no", "red"), None: Text()}
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        table.add_row(finding.name, marks[finding.ok], finding.detail)
    session.console.print(table)
    return 1 if any(finding.ok is False for finding in findings) else 0


def calibrate(session: Session) -> int:
    """Print as yaml what the method's module fits on the prompts, or match each target runtime."""
    from omegaconf import OmegaConf

    from experiments.calibrate import calibrate, match

    settings = session.experiment.settings
    targets = sum(len(s.config.tasks) for s in settings if s.config.target is not None)
    if targets:
        failed = False
        for found in session.track(match(session.experiment, _worker(session)), targets, "match"):
            session.console.print(str(found))
            failed |= isinstance(found, UserError)
        return 1 if failed else 0
    if len(settings) > 1:
        labels = ", ".join(setting.label for setting in settings)
        raise UserError(f"calibrate fits one method, not {labels}; or give a target")
    (setting,) = settings
    cells = plan(session.experiment, neutral=True).cells
    cells = [cell for cell in cells if cell.label == setting.label]
    fields, remarks = calibrate(cells, _worker(session))
    for name, value in remarks.items():
        print(f"# {name}: {value:.3g}")
    constants = {"constants": {setting.label.split()[0]: fields}}  # of the model's yaml
    print(OmegaConf.to_yaml(OmegaConf.create(constants)), end="")
    return 0


def bench_engine(session: Session) -> int:
    """Time steps of HSA; written to results/bench_engine."""
    from experiments.bench import engine

    config = session.config.bench
    results = list(engine.bench(config.sizes, config.shares, config.repeats))
    return _bench(session, "bench_engine", engine.tables(results), engine.rows(results))


def bench_methods(session: Session) -> int:
    """Measure what methods cost beside their work; written to results/bench_methods."""
    from experiments.bench import methods

    worker = _worker(session)
    settings = session.experiment.settings
    costs = list(session.track(methods.bench(session.experiment, worker), len(settings), "measure"))
    return _bench(session, "bench_methods", methods.tables(costs), methods.rows(costs))


COMMANDS: dict[str, Callable[[Session], int]] = {
    "run": run,
    "plan": show_plan,
    "score": score,
    "table": table,
    "report": report,
    "log": log,
    "verify": verify,
    "doctor": show_doctor,
    "calibrate": calibrate,
    "bench engine": bench_engine,
    "bench methods": bench_methods,
}


def _arguments(argv: Sequence[str] | None) -> tuple[str, list[str], bool, str | None]:
    commands = [*COMMANDS, SETUP]
    parser = argparse.ArgumentParser("hsa-bench", usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("command", choices=commands)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir")
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or {"-h", "--help"} & set(given):
        print(f"usage: {USAGE}", end="")
        raise SystemExit(0 if given else 2)
    if given[0] == "bench":
        given = [" ".join(given[:2]), *given[2:]]
    if given[0] not in commands:
        raise SystemExit(_fail(f"{given[0]}: no such command; choose {', '.join(commands)}"))
    arguments = parser.parse_intermixed_args(given)
    return arguments.command, arguments.overrides, arguments.multirun, arguments.config_dir


def _require_weights(cells: Sequence[Cell]) -> None:
    """Refuse before anything runs what would fail at its first cell: weights not downloaded."""
    for model in {repr(cell.config.model): cell.config.model for cell in cells}.values():
        if model.weights:
            build(model.weights, f"model={model.name}")


def _with_defaults(command: str, overrides: list[str], multirun: bool) -> tuple[list[str], bool]:
    """What a command is about where nothing is said: calibration prompts, wandb, all methods."""
    chosen = {override.partition("=")[0] for override in overrides}
    if command == "calibrate" and "prompts" not in chosen:
        return ["prompts=calibration", *overrides], multirun
    if command == "log" and "logger" not in chosen:
        return ["logger=wandb", *overrides], multirun
    if command == "bench methods" and not chosen & {"method", "experiment", "grid"}:
        return [f"method={','.join(group_choices('method'))}", *overrides], True
    return overrides, multirun


def _bench(
    session: Session, name: str, tables: Sequence[ResultTable], rows: Sequence[Mapping]
) -> int:
    from analysis.tables import terminal
    from experiments import bench

    folder = Path(session.config.results_dir) / name
    bench.write(folder, tables, rows)
    for table in tables:
        session.console.print(terminal(table))
    session.console.print(str(folder / "table.md"))
    return 0


def _set_aside_damaged(session: Session, cells: Plan) -> None:
    store = session.store
    for cell in cells.stored(store):
        if damage := store.damage(cell.key):
            folder = store.sample_dir(cell.key)
            session.console.print(f"{folder}: {damage}; made again")
            store.quarantine(folder)


def _announce(session: Session, cells: Plan, missing: Sequence[Cell]) -> None:
    total = len(cells.cells)
    stored = total - len(cells.missing(session.store))
    line = f"{session.config.name}: {total} videos, "
    if not missing:
        line += "all cached" if stored == total else f"{stored} cached, none in this share"
    else:
        cost = Costs(cells.stored(session.store), session.store).of(missing)
        line += f"{stored} cached, {len(missing)} to make, "
        if cost.seconds:
            line += "at most " if cost.at_most else "about "
            line += duration(cost.seconds / session.engine.workers)
            line += f" ({cost.basis()})"
        else:
            line += "time unknown yet"
        line += f"; {size(cost.disk)} on disk"
    session.console.print(line)
    for note in cells.notes:
        session.console.print(note)
    for match in cells.unreached:
        session.console.print(f"left out: {match}")


def _generate(session: Session, missing: Sequence[Cell], worker: Worker) -> int:
    """Make the missing cells; returns how many failed."""
    session.store.require_writable()
    failed = 0
    outcomes = session.engine.generate(missing, worker)
    for outcome in session.track(outcomes, len(missing), "generate"):
        if outcome.error:
            failed += 1
            message = f"failed: {outcome.label}: {outcome.error}"
            session.console.print(message)
    if failed:
        folder = session.store.root / "failures"
        session.console.print(f"{failed} of {len(missing)} failed, see {folder}")
    return failed


def _time(session: Session, cells: Plan, worker: Worker) -> None:
    from experiments import provenance, timing

    machine = provenance.machine().name
    for other in sorted(cells.matched_on - {machine}):
        session.console.print(
            f"targets were matched on {other} and may be missed on this machine ({machine}); "
            "`hsa-bench calibrate` with the same arguments matches them here"
        )
    runs = timing.untimed(cells, session.store, session.config.timing, machine)
    if runs:
        session.store.require_writable()
        for _ in session.track(timing.measure(runs, worker), len(runs), "time"):
            pass


def _worker(session: Session) -> Worker:
    import torch

    from experiments.execute import Worker

    if session.engine.threads:
        torch.set_num_threads(session.engine.threads)
    return Worker(session.store)


def _score(session: Session, cells: Plan) -> None:
    import analysis.score

    metrics = session.metrics()
    with warnings.catch_warnings(record=True) as caught, session.progress() as bar:
        task = bar.add_task("score", total=len(cells.cells))
        analysis.score.score(
            cells,
            session.store,
            metrics,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    for warning in caught:
        session.console.print(f"warning: {warning.message}")


def _report(session: Session, cells: Plan, show_tables: bool) -> None:
    from analysis.tables import terminal

    analysis = _analyse(session, cells)
    if show_tables:
        for results in analysis.results:
            session.console.print(terminal(results))
    session.console.print(str(session.config.out_dir / "index.html"))


def _analyse(session: Session, cells: Plan) -> Analysis:
    from analysis.pipeline import analyse

    if not cells.stored(session.store):
        raise UserError(f"none of the {len(cells.cells)} videos is stored; `run` makes them")
    return analyse(session.config, cells, session.store, session.config.out_dir)


def _console() -> Console:
    """As wide as the terminal, or wide enough for a table where the output is a file."""
    return Console(
        width=None if sys.stdout.isatty() else 160, markup=False, highlight=False, soft_wrap=True
    )


def _fail(message: str, code: int = 2) -> int:
    print(f"hsa-bench: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
