"""VBench's dimensions: how each is normalised, weighted and grouped, and what it needs.

Ranges, weights and groups: `scripts/constant.py` of github.com/Vchitect/VBench at 45e79ec, where
the I2V suite has its own file with the same values. Prompt counts: `VBench_full_info.json` of
vbench 0.1.5 and `vbench2_i2v_full_info.json` at the same commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SMALL, FULL, GRIT, CHECKOUT = "small", "full", "grit", "checkout"  # what must be installed


class Group(StrEnum):
    QUALITY = "quality"
    SEMANTIC = "semantic"
    I2V = "i2v"


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        group: the score it goes into.
        low, high: raw values, in 0..1, that count as 0 and 1; not clipped.
        weight: within its group.
        prompts: how many of the whole text-to-video (T2V) and image-to-video (I2V) suites it has.
        needs: part of the environment: SMALL < FULL < GRIT (detectron2), or CHECKOUT of VBench.
        weights: names in `weights.FILES`.
        custom: defined for any video, without a suite's prompt.
    """

    group: Group
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    prompts: int = 0
    prompts_i2v: int = 0
    needs: str = FULL
    weights: tuple[str, ...] = ()
    custom: bool = False


_DINO = ("dino", "dino_code")
_GRIT = ("grit", "bert_tokenizer")
Q, S = Group.QUALITY, Group.SEMANTIC
DIMENSIONS = {
    "subject_consistency": Dimension(Q, 0.1462, 1.0, 1, 72, 246, FULL, _DINO, True),
    "background_consistency": Dimension(Q, 0.2615, 1.0, 1, 86, 109, FULL, ("clip_b32",), True),
    "temporal_flickering": Dimension(Q, 0.6293, 1.0, 1, 75, 355, SMALL, (), True),
    "motion_smoothness": Dimension(Q, 0.706, 0.9975, 1, 72, 246, FULL, ("amt",), True),
    "dynamic_degree": Dimension(Q, 0.0, 1.0, 0.5, 72, 246, FULL, ("raft",), True),
    "aesthetic_quality": Dimension(Q, 0, 1, 1, 93, 355, FULL, ("clip_l14", "aesthetic"), True),
    "imaging_quality": Dimension(Q, 0, 1, 1, 93, 355, FULL, ("musiq",), True),
    "object_class": Dimension(S, prompts=79, needs=GRIT, weights=_GRIT),
    "multiple_objects": Dimension(S, prompts=82, needs=GRIT, weights=_GRIT),
    "human_action": Dimension(S, prompts=100, weights=("umt",)),
    "color": Dimension(S, prompts=85, needs=GRIT, weights=_GRIT),
    "spatial_relationship": Dimension(S, prompts=84, needs=GRIT, weights=_GRIT),
    "scene": Dimension(S, 0.0, 0.8222, 1, 86, weights=("tag2text", "bert", "bert_tokenizer")),
    "appearance_style": Dimension(S, 0.0009, 0.2855, 1, 90, weights=("clip_b32",)),
    "temporal_style": Dimension(S, 0.0, 0.364, 1, 100, weights=("viclip",)),
    "overall_consistency": Dimension(S, 0.0, 0.364, 1, 93, weights=("viclip",)),
    "i2v_subject": Dimension(Group.I2V, 0.1462, 1.0, 1, 0, 246, FULL, _DINO),
    "i2v_background": Dimension(Group.I2V, 0.2615, 1.0, 1, 0, 109, FULL, ("dreamsim", *_DINO)),
    "camera_motion": Dimension(
        Group.I2V, 0.0, 1.0, 0.1, 0, 763, CHECKOUT, ("cotracker", "cotracker_code")
    ),
}


def in_group(group: Group) -> tuple[str, ...]:
    return tuple(name for name, dimension in DIMENSIONS.items() if dimension.group is group)


QUALITY7 = in_group(Group.QUALITY)
SEMANTIC9 = in_group(Group.SEMANTIC)
I2V3 = in_group(Group.I2V)
QUALITY6 = tuple(name for name in QUALITY7 if name != "temporal_flickering")
SUITES = {  # name -> the scores that make up its total, with their dimensions and shares
    "t2v": {"quality": (QUALITY7, 4 / 5), "semantic": (SEMANTIC9, 1 / 5)},
    "i2v": {"i2v": (I2V3, 1 / 2), "quality": (QUALITY6, 1 / 2)},
}
