"""Measures the shipped coarse patches of DDiT: `python -m experiments.embedded.card_ddit`.

Writes docs/results/ddit/velocity_error.md. On the trajectories of flow matching with 40 steps, for
held-out captions, every step is computed once more on coarse patches: how far is its velocity from
that on fine ones? Beside it, what a cache would risk: how far is the velocity of the step before?
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from baselines.base import Request
from baselines.ddit import WEIGHTS, DDiT, detail
from baselines.patches import CoarsePatches, RememberingEuler, load_patches
from experiments.config import load_experiment
from experiments.embedded import load
from experiments.plan import plan
from hsa.schedulers import euler

OUT = Path("docs/results/ddit/velocity_error.md")
COUNT = 4
STEPS_A_ROW = 5

CARD = """\
# Coarse patches of the embedded model: velocity error

`python -m experiments.embedded.card_ddit`: {count} held-out captions a task, flow matching with
{steps} steps. *Branches* and *guided*: distance of the velocity on coarse patches to that on fine
ones, as a share of the latter's norm; of the two guidance branches, and of what guidance makes of
them. *Step before*: the same for the guided velocity of the step before, which a cache would use.
*Detail*: what the rule compares with its threshold to choose the patches of the row's steps, at
percentile {percentile}. A given first frame is left out. Means over captions and steps.

| task | steps | branches | guided | step before | detail |
|---|---|---:|---:|---:|---:|
{rows}
"""


def write_card() -> None:
    model = load()
    settings = ["method=flow_matching", "prompts=heldout", f"limit={COUNT}", "tasks=[t2v,i2v]"]
    cells = plan(load_experiment([*settings, "reference=null"])).cells
    patches = load_patches(WEIGHTS, model.pipeline("t2v").transformer)
    rows = []
    for task in model.pipelines:
        requests = [cell.request for cell in cells if cell.task == task]
        pipe = model.pipeline(task)
        found = np.stack([measure(pipe, request, patches) for request in requests])
        for first in range(0, found.shape[1], STEPS_A_ROW):
            last = first + STEPS_A_ROW - 1
            means = np.nanmean(found[:, first : last + 1], axis=(0, 1))
            numbers = " | ".join(f"{mean:.4f}" for mean in means)
            rows.append(f"| {task} | {first}-{last} | {numbers} |")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(
        CARD.format(
            count=COUNT,
            steps=cells[0].request.steps,
            percentile=DDiT.percentile,
            rows="\n".join(rows),
        )
    )


@torch.no_grad()
def measure(pipe: DiffusionPipeline, request: Request, patches: CoarsePatches) -> np.ndarray:
    """(T, 4): the columns of the card at each step, nan where there is nothing yet."""
    transformer, calls, details = pipe.transformer, [], []
    given = int(request.task == "i2v")

    def keep(module, args, kwargs: Mapping[str, Any], output) -> None:
        calls.append((kwargs, output[0]))
        latents = [latents[:, :, given:] for latents in pipe.scheduler.latents]
        details.append(detail(latents, DDiT.percentile) if len(latents) == 4 else np.nan)

    handle = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        with euler(pipe, RememberingEuler):
            pipe(**request.kwargs(pipe), output_type="latent")
    finally:
        handle.remove()
    with patches.installed(transformer, lambda: True):
        coarse = [transformer(**kwargs)[0][:, :, given:] for kwargs, _ in calls]
    fine = [velocity[:, :, given:] for _, velocity in calls]
    branches = np.array([_distance(c, f) for c, f in zip(coarse, fine, strict=True)])
    coarse, fine = _guided(coarse, request), _guided(fine, request)
    guided = [_distance(c, f) for c, f in zip(coarse, fine, strict=True)]
    before = [_distance(b, f) for b, f in zip(fine[:-1], fine[1:], strict=True)]
    columns = branches.reshape(-1, 2).mean(1), guided, [np.nan, *before], details[::2]
    return np.stack([np.array(column) for column in columns], axis=1)


def _guided(velocities: list[torch.Tensor], request: Request) -> list[torch.Tensor]:
    """Of the velocities of all calls, captioned and not in turn, what the scheduler gets."""
    pairs = zip(velocities[::2], velocities[1::2], strict=True)
    return [empty + request.guidance_scale * (text - empty) for text, empty in pairs]


def _distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


if __name__ == "__main__":
    write_card()
