"""The captioned videos and the classifiers that read them back."""

from dataclasses import asdict

import numpy as np
import pytest

from experiments.embedded import classify, prompts
from experiments.embedded.videos import (
    CAPTIONS,
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    coverage,
    render,
    split,
)


@pytest.fixture(scope="module")
def rendered():
    """360 videos whose captions cover every word."""
    rng = np.random.default_rng(3)
    return [
        (caption, *render(caption, rng))
        for caption in (CAPTIONS[i] for i in rng.permutation(len(CAPTIONS))[:360])
    ]


def test_splits_are_disjoint_and_complete():
    parts = [split(name) for name in ("train", "calibration", "heldout", "demo")]
    assert sum(map(len, parts)) == len(CAPTIONS)
    assert set().union(*parts) == set(CAPTIONS)


def test_every_split_covers_every_word():
    for name in ("heldout", "calibration"):
        words = {word for caption in split(name) for word in asdict(caption).values()}
        assert words == {word for caption in CAPTIONS for word in asdict(caption).values()}


def test_shapes_of_one_radius_have_about_one_area():
    y, x = np.mgrid[:SIZE, :SIZE].astype(float) - SIZE / 2 + 0.5
    areas = [coverage(shape, x, y, 12.0).sum() for shape in SHAPES]
    assert max(areas) / min(areas) < 1.4


def test_object_moves_as_the_caption_says_and_the_floor_does_not(rendered):
    for caption, frames, mask in rendered[:60]:
        assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        y, x = np.mgrid[:SIZE, :SIZE]
        centres = [((m * x).sum() / m.sum(), (m * y).sum() / m.sum()) for m in mask]
        moved = np.array(centres[-1]) - centres[0]
        assert np.dot(moved, DIRECTIONS[caption.direction]) > 12
        floor = (mask == 0).all(0)
        assert (frames[:, floor] == frames[0, floor]).all()


@pytest.mark.parametrize("word", ["colour", "shape", "direction", "background", "all"])
def test_classifiers_are_right_on_ground_truth(rendered, word):
    right = [classify.adherence(frames, asdict(caption))[word] for caption, frames, _ in rendered]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda f: f[::-1], "direction"),
        (lambda f: f[..., ::-1], "colour"),
        (lambda f: np.repeat(f[:1], NUM_FRAMES, 0), "direction"),
        (lambda f: np.random.default_rng(0).integers(0, 256, f.shape, np.uint8), "background"),
        (lambda f: np.zeros_like(f), "colour"),
    ],
)
def test_classifiers_see_what_is_wrong(rendered, change, word):
    chosen = [r for r in rendered if r[0].colour not in {"green", "magenta"}][:40]
    right = [classify.adherence(change(f), asdict(caption))[word] for caption, f, _ in chosen]
    assert np.mean(right) < 0.1


def test_classifiers_tolerate_noise_and_blur(rendered):
    rng = np.random.default_rng(0)
    right = []
    for caption, frames, _ in rendered[:100]:
        blurred = (frames + np.roll(frames, 1, 1).astype(float) + np.roll(frames, 1, 2)) / 3
        noisy = np.clip(blurred + rng.normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
        right.append(classify.adherence(noisy, asdict(caption))["all"])
    assert np.mean(right) >= 0.95


def test_prompts_carry_their_caption_and_first_frame():
    found = prompts("heldout", 5)
    assert [p.id for p in found] == [f"heldout-{i:03d}" for i in range(5)]
    assert all(p.image.size == (SIZE, SIZE) for p in found)
    assert found[0].text.split()[1] == found[0].meta["colour"]
    assert np.array_equal(np.asarray(prompts("heldout", 2)[1].image), np.asarray(found[1].image))


@pytest.mark.parametrize("arguments", [("nonsense", 1), ("heldout", 0), ("heldout", 10_000)])
def test_prompts_refuse_what_they_do_not_have(arguments):
    with pytest.raises(ValueError, match=r"split|count"):
        prompts(*arguments)
