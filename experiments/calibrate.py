"""Fits what a method needs to know about a model, such as TeaCache's polynomial."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from experiments.cell import Cell
from experiments.errors import UserError
from experiments.execute import Worker


def calibrate(cells: Sequence[Cell], worker: Worker) -> dict[str, Any]:
    """What `calibrate(pipe, requests, ...)` in the method's module finds on the cells' requests.

    Further parameters of that function are fields of the method. Of its findings those that fit
    into a yaml are returned: numbers, and lists of numbers.

    Raises:
        UserError: the method has nothing to fit, or the cells are of several methods or tasks.
    """
    method, task = cells[0].method, cells[0].task
    if any(cell.method != method or cell.task != task for cell in cells):
        raise UserError(
            "calibrate takes one setting of one task, as in method=teacache tasks=[t2v]"
        )
    fit = getattr(import_module(type(method).__module__), "calibrate", None)
    if fit is None:
        raise UserError(f"{cells[0].label} has nothing to calibrate; choose one like teacache")
    _, _, *fields = inspect.signature(fit).parameters
    pipe = worker.model(cells[0].config.model).pipeline(task)
    found = fit(
        pipe, [cell.request for cell in cells], **{name: getattr(method, name) for name in fields}
    )
    return {name: value for name, value in found.items() if _is_numbers(value)}


def _is_numbers(value: Any) -> bool:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(number, (int, float)) for number in numbers)
