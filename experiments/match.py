"""Matched runtime: the setting of a method that takes a given share of the reference's runtime.

`hsa-bench calibrate target=0.5` searches for it on calibration prompts and appends what it found,
with how it was found, to `conf/matched/<model>.jsonl`; a setting with `target=0.5` reads it there.
Importing this module costs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from baselines.base import Method, Request
from experiments.cell import content_key
from experiments.config import Config, method_name
from experiments.errors import UserError

TOLERANCE = 0.025  # of the reference's runtime; half a step of 40 is half of it
ROUNDS = 4  # of timing, each aimed by what the last one showed
FOLDER = Path(__file__).parents[1] / "conf" / "matched"


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
        work: share of the reference's block rows that was computed.
        provenance: weights, prompts, machine, commit, ...
    """

    key: str
    label: str
    task: str
    target: float
    fields: Mapping[str, Any]
    reached: bool
    runtime: float
    low: float
    high: float
    work: float
    provenance: Mapping[str, Any]

    def made_with(self, **now: Any) -> bool:
        """Whether these parts of the provenance are what they were: weights, version, machine."""
        return all(self.provenance[name] == value for name, value in now.items())

    def __str__(self) -> str:
        values = ", ".join(f"{name}={_short(value)}" for name, value in self.fields.items())
        line = f"{self.label} {self.task} at {self.target:.0%}: {values or 'as it is'}, "
        line += f"measured {self.runtime:.1%} [{self.low:.1%}, {self.high:.1%}], "
        line += f"work {self.work:.1%}"
        return line if self.reached else f"{line}; out of reach, this is the closest"


class Matches:
    """The matches of one model: a file with one JSON object a line, of which the last counts."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = (Match(**json.loads(line)) for line in lines)
        self._found = {match.key: match for match in found}

    @classmethod
    def of(cls, config: Config) -> Matches:
        """Those of the configured model, in the folder `matched` or the one that ships."""
        return cls(Path(config.matched or FOLDER) / f"{config.model.name}.jsonl")

    def get(self, key: str) -> Match | None:
        return self._found.get(key)

    def add(self, match: Match) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(match)) + "\n")
        self._found[match.key] = match


def match_key(config: Config, method: Method, task: str, target: float) -> str:
    """Of everything that decides which setting meets the target, but the weights."""
    made = config.model.request
    return content_key(
        {
            "method": method_name(config),
            "params": asdict(method),
            "steps": config.schedule.steps,
            "size": [made.num_frames, made.height, made.width],
            "guidance_scale": made.guidance_scale,
            "task": task,
            "target": target,
        }
    )[:16]


def require_knob(method: Method, label: str, target: float) -> None:
    """Raises UserError for a method whose runtime nothing sets, or a target that is no share."""
    if method.knob is None:
        raise UserError(f"target={target}: {label} has no knob to turn; leave target out for it")
    if not 0 < target <= 1:
        raise UserError(f"target={target}: choose a share of the runtime, above 0 and up to 1")


def turned_fields(method: Method, turned: Method) -> dict[str, Any]:
    """The fields in which two settings of one method differ, with the values of the second."""
    before, after = asdict(method), asdict(turned)
    return {name: value for name, value in after.items() if value != before[name]}


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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
