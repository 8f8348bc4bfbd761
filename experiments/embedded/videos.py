"""Procedural captioned videos: a coloured shape moves over a static patterned floor.

The data of the embedded model, and the ground truth its classifiers are tested on. Needs numpy
only. Legend: F frames, H W pixels; colours are RGB in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

SIZE = 64
NUM_FRAMES = 9
FPS = 8

COLOURS = {
    "red": (0.90, 0.16, 0.16),
    "yellow": (0.95, 0.87, 0.16),
    "green": (0.16, 0.80, 0.28),
    "cyan": (0.20, 0.83, 0.92),
    "blue": (0.24, 0.36, 0.98),
    "magenta": (0.92, 0.24, 0.83),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FLOORS = {
    "grey": (0.46, 0.46, 0.46),
    "brown": (0.46, 0.29, 0.16),
    "navy": (0.13, 0.17, 0.42),
    "olive": (0.37, 0.40, 0.13),
    "plum": (0.41, 0.16, 0.37),
}
PATTERNS = ("plain", "striped", "checkered")
CONTRAST = 0.35
PERIOD = 16.0


@dataclass(frozen=True)
class Caption:
    """What a video shows, in words."""

    colour: str
    shape: str
    direction: str
    pattern: str
    floor: str

    @property
    def text(self) -> str:
        return (
            f"a {self.colour} {self.shape} moves {self.direction} "
            f"over a {self.pattern} {self.floor} floor"
        )


CAPTIONS = tuple(
    Caption(*words) for words in product(COLOURS, SHAPES, DIRECTIONS, PATTERNS, FLOORS)
)
WORDS = sorted({word for caption in CAPTIONS for word in caption.text.split()})


def split(name: str) -> tuple[Caption, ...]:
    """The captions of "train", "calibration", "heldout" or "demo", in a fixed shuffled order.

    The four are disjoint: no caption of an evaluation is ever trained on or calibrated with.
    """
    order = np.random.default_rng(0).permutation(len(CAPTIONS))
    bounds = {
        "heldout": (0, 96),
        "demo": (96, 112),
        "calibration": (112, 160),
        "train": (160, len(CAPTIONS)),
    }
    if name not in bounds:
        raise ValueError(f"split={name!r}: choose one of {', '.join(bounds)}")
    start, stop = bounds[name]
    return tuple(CAPTIONS[i] for i in order[start:stop])


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel that the shape covers, 0..1, given pixel offsets x, y from its centre.

    Circle, square and cross of one radius have about the same area; the triangle has 3/4 of it.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - 0.95 * radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius
    elif shape == "triangle":  # equilateral, apex up
        slanted = np.abs(x) * 0.8660254 - (y + 1.28 * radius) * 0.5
        distance = np.maximum(slanted, y - 0.64 * radius)
    elif shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        distance = np.maximum(long - 1.10 * radius, short - 0.36 * radius)
    else:
        raise ValueError(f"shape={shape!r}: choose one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def floor_brightness(pattern: str, rng: np.random.Generator) -> np.ndarray:
    """(H, W) multiplier of the floor's colour: the pattern under a soft oblique light."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    shift_x, shift_y = rng.uniform(0, PERIOD, 2)
    wave_x = np.sin(2 * np.pi * (x + shift_x) / PERIOD)
    wave_y = np.sin(2 * np.pi * (y + shift_y) / PERIOD)
    wave = {"plain": 0 * x, "striped": wave_x, "checkered": wave_x * wave_y}[pattern]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.12)
    light = strength * ((x - SIZE / 2) * np.cos(angle) + (y - SIZE / 2) * np.sin(angle)) / SIZE * 2
    return 1 + CONTRAST * np.clip(3 * wave, -1, 1) + light


def render(
    caption: Caption, rng: np.random.Generator, times: Sequence[int] = range(NUM_FRAMES)
) -> tuple[np.ndarray, np.ndarray]:
    """One video of the caption, or only its frames at the given times.

    Returns the frames, uint8 (F, H, W, 3), and the object's coverage, float32 (F, H, W) in 0..1.
    """
    radius = rng.uniform(9.5, 12.5)
    heading = np.array(DIRECTIONS[caption.direction], np.float32)
    step = rng.uniform(2.0, 2.8) * heading
    # Along its way the object starts near the middle, so that only the caption tells where it goes.
    room = np.where(heading != 0, 8, SIZE / 2 - radius - 1)
    start = SIZE / 2 + rng.uniform(-room, room)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    centres = start[None] + step[None] * np.array(times)[:, None]
    mask = np.stack([coverage(caption.shape, x - cx, y - cy, radius) for cx, cy in centres])
    floor = floor_brightness(caption.pattern, rng)[..., None] * np.array(FLOORS[caption.floor])
    colour = np.array(COLOURS[caption.colour], np.float32)
    frames = floor[None] * (1 - mask[..., None]) + colour * mask[..., None]
    frames = np.clip(frames * 255, 0, 255).round().astype(np.uint8)
    return frames, mask.astype(np.float32)
