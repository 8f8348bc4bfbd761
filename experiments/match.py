"""Matched runtime: the setting of a method that takes a given share of the reference's runtime.

`hsa-bench calibrate target=0.5` searches for it on calibration prompts and appends what it found,
with how it was found, to `<model>.jsonl` in the folder `matched`; a setting with `target=0.5` reads
it there, or else among those that ship in `conf/matched`. Importing this module costs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from baselines.base import Method, Request
from experiments.cell import content_key
from experiments.config import Config, Setting, method_name
from experiments.errors import UserError

TOLERANCE = 0.025  # of the reference's runtime; half a step of 40 is half of it
ROUNDS = 4  # of timing, each aimed by what the last one showed
SHIPPED = Path(__file__).parents[1] / "conf" / "matched"


@dataclass(frozen=True)
class Timed:
    """Runtime as a share of the reference's: median and quartiles over pairs of runs."""

    runtime: float
    low: float
    high: float

    def meets(self, target: float) -> bool:
        return self.low - TOLERANCE <= target <= self.high + TOLERANCE


@dataclass(frozen=True)
class Match:
    """What a search found for one method, task and target.

    Attributes:
        key: of what was asked for, see `match_key`.
        label: of the setting, for the reader.
        fields: of the method, with the values that meet the target.
        reached: whether the target lies within the quartiles of the runtime, or no further than
            TOLERANCE outside; else it is the closest.
        at_end: whether the knob is at an end of its range: what is missed there is out of reach.
        work: share of the reference's block rows that was computed.
        provenance: weights, prompts, machine, commit, ...
    """

    key: str
    label: str
    task: str
    target: float
    fields: Mapping[str, Any]
    reached: bool
    at_end: bool
    runtime: float
    low: float
    high: float
    work: float
    provenance: Mapping[str, Any]

    def made_with(self, **now: Any) -> bool:
        """Whether these parts of the provenance are what they were: weights, version, machine."""
        return all(self.provenance[name] == value for name, value in now.items())

    @property
    def turned(self) -> str:
        """What the method is set to."""
        return ", ".join(f"{name}={short(value)}" for name, value in self.fields.items())

    def __str__(self) -> str:
        line = f"{self.label} {self.task} at {self.target:.0%}: {self.turned}, "
        line += f"measured {self.runtime:.1%} [{self.low:.1%}, {self.high:.1%}], "
        line += f"work {self.work:.1%}"
        if self.reached:
            return line
        return f"{line}; {'out of reach' if self.at_end else 'missed'}, this is the closest"


class Matches:
    """The matches of one model: files with one JSON object a line, of which the last counts.

    New ones go to `path`; what was found there goes before what is in `others`.

    Raises:
        UserError: a line that is no match.
    """

    def __init__(self, path: Path, *others: Path):
        self.path = path
        self._found = {match.key: match for file in (*others, path) for match in _read(file)}

    @classmethod
    def of(cls, config: Config) -> Matches:
        """Those of the configured model: its user's in the folder `matched`, and the shipped."""
        name = f"{config.model.name}.jsonl"
        return cls(Path(config.matched) / name, SHIPPED / name)

    def get(self, key: str) -> Match | None:
        return self._found.get(key)

    def add(self, match: Match) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(match)) + "\n")
        self._found[match.key] = match


def match_key(setting: Setting, method: Method, task: str) -> str:
    """Of everything that decides which value of the knob meets the setting's target, but for the
    weights and the machine. Where the knob stands before it is turned decides nothing.
    """
    config, (_, end, _) = setting.config, method.knob
    made = config.model.request
    return content_key(
        {
            "method": method_name(config),
            "params": asdict(method.turned(end)),
            "reference": setting.reference and setting.reference.config.method,
            "steps": config.schedule.steps,
            "dtype": config.model.dtype,
            "size": [made.num_frames, made.height, made.width],
            "guidance_scale": made.guidance_scale,
            "extra": made.extra,
            "task": task,
            "target": config.target,
        }
    )[:16]


def require_knob(method: Method, label: str, target: float) -> None:
    """Raises UserError for a method whose runtime nothing sets, or a target that is no share."""
    try:
        knob = method.knob
    except ValueError as error:
        raise UserError(f"{label}: {error}") from error
    if knob is None:
        raise UserError(f"target={target}: {label} has no knob to turn; leave target out for it")
    if not 0 < target <= 1:
        raise UserError(f"target={target}: choose a share of the runtime, above 0 and up to 1")


def turned_fields(method: Method, value: float) -> dict[str, Any]:
    """The fields that change, or stay, when the knob of a method is turned to a value."""
    knob, before, after = method.knob[0], asdict(method), asdict(method.turned(value))
    return {name: new for name, new in after.items() if name == knob or new != before[name]}


def matched(method: Method, match: Match) -> Method:
    return replace(method, **match.fields)


def with_steps(request: Request, method: Method) -> Request:
    """A request in the number of steps that the method says, if it says one."""
    return request if method.steps is None else replace(request, steps=method.steps)


def search(
    target: float,
    ends: tuple[float, float],
    work: Callable[[float], float],
    time: Callable[[float], Timed],
    resolution: float,
) -> tuple[float, Timed]:
    """The knob's value whose runtime is closest to the target among those timed, and that time.

    First by bisection on counted work, which is exact and cheap to compare; then the value found
    is timed, and where its runtime misses the target the bisection is aimed higher or lower by as
    much, until it meets the target or the same value comes up twice running. One that comes up
    later is timed again: its first runs may have been slow ones.

    Args:
        ends: of the knob's range; whole numbers where only those may be tried.
        work: share of the reference's work at a value, monotone; asked again for the same values.
        time: times a value some more and tells what all its runs say.
        resolution: difference in work that is as good as none.
    """
    timed: dict[float, Timed] = {}
    aim, value = target, None
    for _ in range(ROUNDS):
        last, value = value, bisect(aim, ends, work, resolution)
        if value == last:
            break
        timed[value] = time(value)
        miss = target - timed[value].runtime
        if abs(miss) <= TOLERANCE:
            break
        aim += miss
    best = min(timed, key=lambda value: abs(timed[value].runtime - target))
    return best, timed[best]


def bisect(
    aim: float, ends: tuple[float, float], work: Callable[[float], float], resolution: float
) -> float:
    """Value between the ends whose work is closest to the aim, of those that bisection tries."""
    tried = {end: work(end) for end in ends}
    least, most = sorted(ends, key=tried.get)  # by work: below the aim, and not below it
    finest = 0 if min(ends) > 0 else 1e-4 * max(ends)  # halving towards 0 would find no end
    while abs(least - most) > finest and (middle := _between(least, most)) not in (least, most):
        if min(abs(done - aim) for done in tried.values()) <= resolution:
            break
        tried[middle] = work(middle)
        if tried[middle] < aim:
            least = middle
        else:
            most = middle
    return min(tried, key=lambda value: abs(tried[value] - aim))


def _between(a: float, b: float) -> float:
    """The middle, on a logarithmic scale where both are positive; an end when they are close."""
    if isinstance(a, int) and isinstance(b, int):
        return (a + b) // 2
    if abs(a - b) <= 0.005 * max(abs(a), abs(b)):
        return a
    return (a * b) ** 0.5 if min(a, b) > 0 else (a + b) / 2


def short(value: Any) -> str:
    """A setting's value with four digits."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(short, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> Iterator[Match]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            yield Match(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no match; remove it") from error
