"""What VBench says of every setting: dimensions, coverage, scores, and differences.

A dimension's value is upstream's aggregate of its videos. It counts only when every video that
belongs to it was scored, and a score only when all of its dimensions count; what is incomplete is
shown as missing, with how much of it there is. Settings whose videos or scores come about in
different ways are refused a common table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.metrics.vbench.dimensions import DIMENSIONS
from analysis.metrics.vbench.metric import FLAVOUR, STATIC_FILTER, VBench, suite_entry
from analysis.metrics.vbench.presets import Preset
from analysis.score import stored_values
from analysis.stats import LEVEL, NOTHING, Estimate, resamples
from analysis.tables import MISSING, Entry, Table, interval, leaders, placed

if TYPE_CHECKING:
    from experiments.plan import Cell, Plan
    from experiments.store import Store

Sums = dict[str, tuple[float, float]]  # prompt -> sums of value * weight and of weight
SEED = 0


@dataclass(frozen=True)
class Card:
    """One setting on one task.

    Attributes:
        reference: it is what others are compared with.
        protocol: how videos and scores came about; only equal ones are compared.
        videos: dimension -> how many were scored.
        expected: dimension -> how many belong to it.
        sums: dimension -> sums of each prompt.
        groups: prompt -> the group that it is drawn from in the bootstrap.
        allow_partial: incomplete dimensions count too.
    """

    task: str
    label: str
    reference: bool
    preset: Preset
    protocol: Mapping[str, Any]
    videos: Mapping[str, int]
    expected: Mapping[str, int]
    sums: Mapping[str, Sums] = field(repr=False)
    groups: Mapping[str, str] = field(repr=False)
    allow_partial: bool

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """Dimensions with a value."""
        return tuple(
            name
            for name, sums in self.sums.items()
            if sum(weight for _, weight in sums.values()) > 0
            and (self.allow_partial or self.videos[name] == self.expected[name])
        )

    @cached_property
    def values(self) -> dict[str, float]:
        """Raw dimension values in 0..1, by upstream's aggregation."""
        totals = {name: np.sum(list(self.sums[name].values()), axis=0) for name in self.counted}
        return {name: float(total / weight) for name, (total, weight) in totals.items()}

    @cached_property
    def scores(self) -> dict[str, float]:
        return self.preset.scores(self.values)

    @property
    def complete(self) -> bool:
        return all(self.videos[name] == self.expected[name] for name in self.expected)

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Dimensions and scores of resampled prompts, (draws,) each.

        Every group is resampled by itself, and cards of the same prompts draw the same.
        """
        weights = _weights(self.groups)
        values = {}
        for name in self.counted:
            sums = self.sums[name]
            drawn = np.stack([weights[prompt] for prompt in sums], axis=1)  # (draws, prompts)
            total, weight = (drawn @ np.array(list(sums.values()))).T
            with np.errstate(invalid="ignore"):  # a draw without any frame that counts
                values[name] = total / weight
        return values | self.preset.scores(values)


def cards(plan: Plan, store: Store, vbench: VBench) -> list[Card]:
    """A card for every setting of the plan, in its order."""
    settings = plan.by_setting().items()
    return [_card(task, label, cells, store, vbench) for (task, label), cells in settings]


def tables(found: Sequence[Card]) -> list[Table]:
    """Values and differences to the reference setting, a pair of tables a task.

    Raises:
        ValueError: the cards of a task follow different protocols.
    """
    made = []
    for task in dict.fromkeys(card.task for card in found):
        group = [card for card in found if card.task == task]
        if not any(card.groups for card in group):
            continue  # none of the prompts is one for VBench
        require_one_protocol(group)
        made.append(_values(task, group))
        reference = next((card for card in group if card.reference), None)
        others = [card for card in group if not card.reference]
        if reference and reference.counted and others:
            made.append(_differences(task, reference, others))
    return made


def require_one_protocol(found: Iterable[Card]) -> None:
    """Raises ValueError naming the first thing in which two cards differ."""
    first, *others = found
    for card in others:
        for key in first.protocol.keys() | card.protocol.keys():
            here, there = first.protocol.get(key), card.protocol.get(key)
            if here != there:
                raise ValueError(
                    f"VBench: {first.label} and {card.label} cannot share a table, "
                    f"their {key} differ: {here} and {there}"
                )


def difference(card: Card, other: Card) -> dict[str, Estimate]:
    """Paired differences of dimensions and scores, with bootstrap intervals over prompts.

    A dimension that does not have the same prompts on both sides is left out, and then the scores
    are too.
    """
    if card.groups != other.groups:
        return {}
    names = [
        name
        for name in card.counted
        if name in other.counted and card.sums[name].keys() == other.sums[name].keys()
    ]
    if set(names) == {*card.counted, *other.counted}:
        names += card.scores
    mine, theirs = card.values | card.scores, other.values | other.scores
    return {
        name: _estimate(
            mine[name] - theirs[name], card.draws[name] - other.draws[name], len(card.groups)
        )
        for name in names
    }


def record(found: Sequence[Card]) -> list[dict[str, Any]]:
    """The cards as JSON: what a number is worth nothing without, and every paired difference."""
    return [
        {
            "task": card.task,
            "label": card.label,
            "scores": card.scores,
            "dimensions": card.values,
            "videos": dict(card.videos),
            "expected": dict(card.expected),
            "complete": card.complete,
            "allow_partial": card.allow_partial,
            "protocol": dict(card.protocol),
            "minus": {
                other.label: {name: _bounds(each) for name, each in difference(card, other).items()}
                for other in found
                if other is not card and (other.task, other.protocol) == (card.task, card.protocol)
            },
        }
        for card in found
    ]


def _bounds(estimate: Estimate) -> list[float | None]:
    """Mean, low, high; None instead of NaN, which is no JSON."""
    bounds = (estimate.mean, estimate.low, estimate.high)
    return [float(bound) if np.isfinite(bound) else None for bound in bounds]


def _card(task: str, label: str, cells: Sequence[Cell], store: Store, vbench: VBench) -> Card:
    preset = vbench.about
    parts = [part for part in vbench.parts() if part.unavailable() is None]
    seeds = {cell.request.seed for cell in cells}
    sums: dict[str, Sums] = {part.dimension: {} for part in parts}
    videos = dict.fromkeys(sums, 0)
    planned = dict.fromkeys(sums, 0)
    groups: dict[str, str] = {}
    protocols = []
    for cell in cells:
        prompt = cell.inputs["request"]["prompt_id"]
        mine = [part for part in parts if part.applies(cell.inputs)]
        if mine:
            groups[prompt] = ",".join(sorted(part.dimension for part in mine))
        for part in mine:
            planned[part.dimension] += 1
        if not store.has(cell.key):
            continue
        scores = store.scores(cell.key)
        for part in mine:
            if (values := stored_values(cell, part, scores)) is not None:
                weight = values.get("weight", 1)
                add = values.get(part.name, 0.0) * weight, weight
                before = sums[part.dimension].get(prompt, (0.0, 0.0))
                sums[part.dimension][prompt] = before[0] + add[0], before[1] + add[1]
                videos[part.dimension] += 1
        protocols.append(_made(store.sample(cell.key).record))
    expected = {
        name: planned[name] if (count := preset.expected(name)) is None else count * len(seeds)
        for name in planned
    }
    return Card(
        task=task,
        label=label,
        reference=all(cell.reference_key == cell.key for cell in cells),
        preset=preset,
        protocol=_protocol(protocols, seeds, vbench),
        videos=videos,
        expected=expected,
        sums=sums,
        groups=groups,
        allow_partial=vbench.allow_partial,
    )


def _made(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a video's record says of the protocol."""
    result, entry = record["result"], suite_entry(record) or {}
    frames, height, width, _ = result["shape"]
    return {
        "suite_sha256": entry.get("suite_sha256"),
        "rewritten_sha256": entry.get("rewritten_sha256"),
        "ratio": entry.get("ratio"),
        "frames": frames,
        "size": f"{width}x{height}",
        "fps": result["fps"],
    }


def _protocol(
    made: Sequence[Mapping[str, Any]], seeds: Iterable[int], vbench: VBench
) -> dict[str, Any]:
    """Of a setting; where its own videos differ, all that there is."""
    known: dict[str, Any] = {}
    for key in made[0] if made else ():
        values = list({repr(video[key]): video[key] for video in made}.values())
        known[key] = values[0] if len(values) == 1 else values
    return {
        "preset": vbench.preset,
        "flavour": FLAVOUR,
        "encoder": vbench.encoding,
        "static_filter": STATIC_FILTER,
        "seeds": sorted(seeds),
        "device": vbench.device,
        "versions": vbench.environment.versions,
        **known,
    }


def _weights(groups: Mapping[str, str]) -> dict[str, np.ndarray]:
    """prompt -> (draws,), how often it is drawn; groups of one size do not draw alike."""
    members: dict[str, list[str]] = {}
    for prompt, group in sorted(groups.items()):
        members.setdefault(group, []).append(prompt)
    return {
        prompt: column * len(prompts)
        for seed, prompts in enumerate(members.values(), start=SEED)
        for prompt, column in zip(prompts, resamples(len(prompts), seed).T, strict=True)
    }


def _estimate(mean: float, draws: np.ndarray, n: int) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if n < 2 or not len(draws):
        return Estimate(mean, np.nan, np.nan, n)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(mean, float(low), float(high), n)


def _values(task: str, group: Sequence[Card]) -> Table:
    dimensions = group[0].preset.dimensions
    present = [name for name in dimensions if name in group[0].expected]
    scores = list(dict.fromkeys(name for card in group for name in card.scores))
    names = [*scores, *present]
    known = [card.scores | card.values for card in group]
    top = {name: leaders(k[name] for k in known if name in k) for name in names}
    rows = tuple(
        (Entry(card.label, number=False), *(_cell(card, name, top[name]) for name in names))
        for card in group
    )
    absent = [name for name in dimensions if name not in present]
    title = f"VBench, {task.upper()}"
    return Table(title, ("Method", *map(_title, names)), rows, _note(group, absent, scores))


def _cell(card: Card, name: str, top: Sequence[float]) -> Entry:
    """A value in percent; beside or instead of it how many videos there are, if some lack."""
    known = card.scores | card.values
    text = f"{100 * known[name]:.2f}" if name in known else MISSING
    if name in card.expected and card.videos[name] != card.expected[name]:
        text += f" ({card.videos[name]} of {card.expected[name]})"
    return placed(text, known.get(name, np.nan), top)


def _note(group: Sequence[Card], absent: Sequence[str], scores: Sequence[str]) -> str:
    """The protocol in words, and what is not there."""
    preset, protocol = group[0].preset, group[0].protocol
    prompts = "rewritten prompts" if protocol.get("rewritten_sha256") else "prompts as they are"
    parts = [
        f"Percent. Preset {protocol['preset']}, {prompts},",
        f"{len(protocol['seeds'])} to a prompt,",
        f"{protocol.get('frames')} frames of {protocol.get('size')} at {protocol.get('fps')} fps,",
        f"{protocol['flavour']} VBench {protocol['versions'].get('vbench')}",
        f"on {protocol['encoder']},",
        "no static filter.",
    ]
    if absent:
        parts.append(f"Not available on this machine: {', '.join(absent)}.")
    if preset.suite is None:
        parts.append("Not VBench's prompts: these values compare with each other only.")
    elif not scores:
        parts.append("No total: it needs all of its dimensions on all of their videos.")
    if any(card.allow_partial and not card.complete for card in group):
        parts.append("PARTIAL (allow_partial): some videos are missing.")
    return " ".join(parts)


def _differences(task: str, reference: Card, others: Sequence[Card]) -> Table:
    found = {card.label: difference(card, reference) for card in others}
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    ordered = [name for name in names if name not in DIMENSIONS]
    ordered += [name for name in names if name in DIMENSIONS]
    rows = tuple(
        (
            Entry(card.label, number=False),
            *(_shift(found[card.label].get(name, NOTHING)) for name in ordered),
        )
        for card in others
    )
    note = "Points, with 95 % bootstrap intervals over prompts; bold where they exclude 0."
    title = f"VBench against {reference.label}, {task.upper()}"
    return Table(title, ("Method", *map(_title, ordered)), rows, note)


def _shift(estimate: Estimate) -> Entry:
    points = Estimate(*(100 * v for v in (estimate.mean, estimate.low, estimate.high)), estimate.n)
    return Entry(interval(points, signed=True), bool(points.low > 0 or points.high < 0))


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()
