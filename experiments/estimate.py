"""How long missing videos will take, from the stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from experiments.cell import Cell
from experiments.store import Store

LOOKED_AT = 3  # stored videos of a setting


def estimate(missing: Sequence[Cell], stored: Sequence[Cell], store: Store) -> float | None:
    """Seconds on one worker; None as long as nothing comparable is stored.

    A setting takes what its stored videos took; one without any takes what the others took a
    step.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    per_step = []
    for cell in stored:
        known = seconds.setdefault(cell.setting, [])
        if len(known) < LOOKED_AT:
            known.append(sum(store.sample(cell.key).record["result"]["timing"].values()))
            per_step.append(known[-1] / cell.request.steps)
    if not per_step:
        return None
    typical = median(per_step)
    return sum(
        median(seconds[cell.setting]) if cell.setting in seconds else typical * cell.request.steps
        for cell in missing
    )


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds where it is less than two minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
