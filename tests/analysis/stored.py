"""A small store with real records: rendered ground truth, blurred in time as runtime falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.metrics.latent_error import LatentError
from analysis.metrics.prompt_adherence import PromptAdherence
from analysis.metrics.psnr import PSNR
from baselines.base import Method, Request
from baselines.flow_matching import FlowMatching
from baselines.hsa import HSA
from baselines.teacache import TeaCache
from experiments.cell import Cell, content_key
from experiments.config import Config
from experiments.embedded.videos import FPS, render, split
from experiments.plan import Plan
from experiments.store import Store

METRICS = (PSNR(), LatentError(), PromptAdherence())
METRIC_NODES = {
    metric.name: {"_target_": f"{type(metric).__module__}.{type(metric).__name__}"}
    for metric in METRICS
}
# label, method's name, method, steps, share of the runtime
SETTINGS: tuple[tuple[str, str, Method, int, float], ...] = (
    ("FM T=40", "flow_matching", FlowMatching(), 40, 1.0),
    ("FM T=20", "flow_matching", FlowMatching(steps=20), 20, 0.5),
    ("FM T=10", "flow_matching", FlowMatching(steps=10), 10, 0.25),
    *(
        (f"HSA {tau}", "hsa", HSA(budgets=(40, 10), thresholds=(tau,)), 40, share)
        for tau, share in ((0.1, 0.8), (0.2, 0.5), (0.3, 0.3))
    ),
    ("TeaCache 0.2", "teacache", TeaCache(threshold=0.2), 40, 0.4),
)


def fill(
    root: Path, tasks: tuple[str, ...] = ("t2v", "i2v"), prompts: int = 3
) -> tuple[Plan, Store]:
    """Plan and store of all settings, every video stored and timed on one machine.

    Runtimes are the share of one second; HSA's allocation marks the object's tokens.
    """
    store = Store(root)
    cells = []
    for task in tasks:
        for p, caption in enumerate(split("heldout")[:prompts]):
            reference = None
            for label, name, method, steps, share in SETTINGS:
                inputs = {
                    "schema": 1,
                    "model": {"name": "rendered"},
                    "method": {
                        "name": name,
                        "version": 1,
                        "implementation": method.implementation,
                        "params": {k: v for k, v in vars(method).items() if k != "steps"},
                    },
                    "schedule": {"steps": steps},
                    "request": {
                        "task": task,
                        "prompt_id": f"heldout-{p}",
                        "prompt": caption.text,
                        "seed": 0,
                        "meta": vars(caption),
                    },
                }
                key = content_key(inputs)
                reference = reference or key
                _write(store, inputs, p, share, tokens=8 if name == "hsa" else None)
                for repeat in range(3):
                    seconds = share * (1 + 0.01 * repeat)
                    store.write_timing(key, "box", {"denoise_s": seconds, "text_s": 0.1})
                request = _request(task, caption.text, steps)
                cells.append(
                    Cell(key, label, inputs, Config(), method, request, reference_key=reference)
                )
    return Plan(tuple(cells)), store


def _write(store: Store, inputs: dict, prompt: int, share: float, tokens: int | None) -> None:
    caption = split("heldout")[prompt]
    frames, mask = render(caption, np.random.default_rng(prompt))
    noise = np.random.default_rng(1).normal(0, 30 * (1 - share), frames.shape)
    frames = np.clip(frames + noise, 0, 255).astype(np.uint8)
    latents = frames[..., 0].astype(np.float32)[None] / 255  # (1, F, H, W)
    arrays = {"latents": latents}
    if tokens:
        cells = mask.reshape(len(mask), tokens, 64 // tokens, tokens, 64 // tokens)
        arrays["allocation"] = (cells.max((2, 4)) < 0.5).astype(np.int8)
        arrays["velocity_change"] = cells.mean((2, 4)).astype(np.float32)
    result = {"active_fraction": share, "block_calls": 480, "timing": {}, "trace": {}}
    store.write_sample(inputs, frames, arrays, FPS, result, provenance={})


def _request(task: str, prompt: str, steps: int) -> Request:
    return Request(
        task=task,
        prompt=prompt,
        negative_prompt="",
        seed=0,
        steps=steps,
        guidance_scale=4.0,
        height=64,
        width=64,
        num_frames=9,
        max_sequence_length=16,
    )
