"""Does a video show what its caption says? Answered from pixels, without a learned model.

Every pixel gets the nearest colour of a palette of all object and floor colours (the floors in the
shades their patterns and light give them). Object pixels then tell colour, shape and direction;
the rest tells the floor. On rendered ground truth each answer is right in at least 99 % of videos
(tests/embedded/test_videos.py). Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from experiments.embedded.videos import (
    COLOURS,
    CONTRAST,
    DIRECTIONS,
    FLOORS,
    PATTERNS,
    SHAPES,
    coverage,
)

SHADES = np.linspace(1 - CONTRAST - 0.12, 1 + CONTRAST + 0.12, 7)
PALETTE = np.concatenate(
    [np.array(list(COLOURS.values()))]
    + [np.clip(shade * np.array(list(FLOORS.values())), 0, 1) for shade in SHADES]
).astype(np.float32)
MIN_AREA = 60  # pixels; the smallest whole object covers about 190
MIN_TRAVEL = 6.0  # pixels over the whole video; the slowest rendered object moves 16


def read_video(frames: np.ndarray) -> dict[str, str]:
    """The caption's words as a video shows them; "none" where nothing can be told.

    Args:
        frames: uint8 (F, H, W, 3).
    """
    nearest = _nearest_palette(frames.astype(np.float32) / 255)  # (F, H, W)
    is_object = nearest < len(COLOURS)
    counts = np.bincount(nearest[is_object], minlength=len(COLOURS))
    colour = int(counts.argmax())
    mask = nearest == colour
    visible = mask.sum((1, 2)) >= MIN_AREA
    words = dict.fromkeys(("colour", "shape", "direction"), "none")
    if visible.mean() > 0.5:
        words["colour"] = list(COLOURS)[colour]
        words["shape"] = _shape(mask[visible])
        words["direction"] = _direction(mask, visible)
    words["pattern"], words["floor"] = _floor(frames, is_object)
    return words


def adherence(frames: np.ndarray, meta: Mapping[str, str]) -> dict[str, float]:
    """1.0 where the video agrees with its caption, else 0.0.

    Args:
        frames: uint8 (F, H, W, 3).
        meta: the caption's colour, shape, direction, pattern and floor.

    Returns:
        colour, shape, direction, background (floor and pattern), and `all` of them at once.
    """
    seen = read_video(frames)
    right = {name: float(seen[name] == meta[name]) for name in ("colour", "shape", "direction")}
    right["background"] = float(all(seen[name] == meta[name] for name in ("pattern", "floor")))
    return right | {"all": float(all(right.values()))}


def object_mask(frames: np.ndarray) -> np.ndarray:
    """bool (F, H, W): pixels nearest to an object's colour."""
    return _nearest_palette(frames.astype(np.float32) / 255) < len(COLOURS)


def floor_mask(frames: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels that show the floor in every frame, two pixels away from the object."""
    return ~_dilate(object_mask(frames).any(0), 2)


def _nearest_palette(pixels: np.ndarray) -> np.ndarray:
    flat = pixels.reshape(-1, 3)
    distance = (PALETTE**2).sum(1) - 2 * flat @ PALETTE.T
    return distance.argmin(1).reshape(pixels.shape[:-1])


def _centre(mask: np.ndarray) -> tuple[float, float]:
    y, x = np.nonzero(mask)
    return float(x.mean()), float(y.mean())


def _shape(masks: np.ndarray) -> str:
    """The shape whose drawing at the mask's centre and area overlaps best, summed over frames."""
    y, x = np.mgrid[: masks.shape[1], : masks.shape[2]].astype(np.float32)
    scores = np.zeros(len(SHAPES))
    for mask in masks:
        cx, cy = _centre(mask)
        radius = np.sqrt(mask.sum() / np.pi) / 0.95
        for k, shape in enumerate(SHAPES):
            drawn = coverage(shape, x - cx, y - cy, radius) > 0.5
            scores[k] += (drawn & mask).sum() / max((drawn | mask).sum(), 1)
    return SHAPES[int(scores.argmax())]


def _direction(mask: np.ndarray, visible: np.ndarray) -> str:
    """Direction of the least-squares line through the object's centres."""
    times = np.flatnonzero(visible)
    centres = np.array([_centre(mask[t]) for t in times])
    slope = np.polyfit(times, centres, 1)[0] * (len(mask) - 1)
    if np.abs(slope).max() < MIN_TRAVEL:
        return "none"
    return max(DIRECTIONS, key=lambda name: float(np.dot(slope, DIRECTIONS[name])))


def _floor(frames: np.ndarray, is_object: np.ndarray) -> tuple[str, str]:
    """Pattern and colour of the floor, from the mean over time of pixels not near the object."""
    floor = np.stack([~_dilate(m, 2) for m in is_object])  # (F, H, W)
    seen = floor.any(0)
    if seen.mean() < 0.2:
        return "none", "none"
    total = (frames * floor[..., None]).sum(0) / np.maximum(floor.sum(0), 1)[..., None] / 255
    colour = total[seen].mean(0)
    names = list(FLOORS)
    name = names[int(np.abs(np.array(list(FLOORS.values())) - colour).sum(1).argmin())]
    return _pattern(total.mean(-1), seen), name


def _pattern(grey: np.ndarray, seen: np.ndarray) -> str:
    """Variance explained by columns tells stripes; variance that neither explains, checks.

    A plane (the light) is taken away first. Masked means keep the object's path out.
    """
    y, x = np.nonzero(seen)
    plane = np.stack([x, y, np.ones_like(x)], 1).astype(np.float64)
    values = grey[seen]
    values = values - plane @ np.linalg.lstsq(plane, values, rcond=None)[0]
    if values.std() <= 0.10 * grey[seen].mean():
        return PATTERNS[0]
    count = np.maximum(np.bincount(x, minlength=grey.shape[1]), 1)
    columns = np.bincount(x, values, grey.shape[1]) / count
    explained = (columns[x] ** 2).mean() / (values**2).mean()
    return "striped" if explained > 0.5 else "checkered"


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(mask, radius)
    height, width = mask.shape
    return np.any(
        [
            padded[dy : dy + height, dx : dx + width]
            for dy in range(2 * radius + 1)
            for dx in range(2 * radius + 1)
        ],
        axis=0,
    )
