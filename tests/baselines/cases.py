"""Every method of conf/method on every kind of Wan pipeline, and what one run of it shows."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline
from hydra.utils import instantiate
from omegaconf import OmegaConf

from baselines.base import Method, Request
from hsa.trace import Trace, experts
from tests import pipelines

STEPS = 40
# A threshold fitted to a trained model need not skip on random weights; these do.
ON_RANDOM_WEIGHTS = {
    "foresight": {"threshold": 4.0},
    "teacache": {"threshold": 2.0},
    "teacache_embedded": {"threshold": 2.0},
}
METHODS = {path.stem: path for path in sorted(Path("conf/method").glob("*.yaml"))}


def ti2v_text() -> WanPipeline:
    """TI2V-5B style text-to-video: a timestep for every token."""
    parts = pipelines.wan_ti2v().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    return WanPipeline(**{name: parts[name] for name in names}, expand_timesteps=True)


PIPELINES = {
    "wan_t2v": pipelines.wan_t2v,
    "ti2v_t2v": ti2v_text,
    "ti2v_i2v": pipelines.wan_ti2v,
    "wan22_t2v": pipelines.wan22_t2v,
}


def method(name: str) -> Method:
    return instantiate(OmegaConf.load(METHODS[name]), **ON_RANDOM_WEIGHTS.get(name, {}))


def request(pipe, seed: int = 0, steps: int = STEPS, **extra) -> Request:
    """A short clip; another seed is another prompt too."""
    i2v = not isinstance(pipe, WanPipeline)
    return Request(
        task="i2v" if i2v else "t2v",
        prompt=f"{pipelines.PROMPT} {'very ' * seed}fast",
        negative_prompt=pipelines.NEGATIVE,
        seed=seed,
        steps=steps,
        guidance_scale=4.0,
        height=32,
        width=32,
        num_frames=9,
        max_sequence_length=16,
        image=pipelines.picture() if i2v else None,
        extra={"output_type": "latent"} | extra,
    )


def sample(method: Method, pipe, *requests: Request) -> torch.Tensor:
    """Latents (B, C, F, H, W) of the videos, all in one attach, one call each."""
    with method.attach(pipe, requests[0]):
        return torch.cat([pipe(**request.kwargs(pipe)).frames for request in requests])


@dataclass
class Run:
    """One video with everything seen from outside by plain torch hooks."""

    latents: torch.Tensor
    trace: Trace
    block_calls: int  # feed-forwards that really ran
    velocities: dict[tuple[int, str], torch.Tensor]  # (step, branch) -> (1, C, F, H, W)


def observe(method: Method, pipe, request: Request) -> Run:
    calls, velocities = Counter(), {}

    def velocity(module, args, output):
        step = pipe.scheduler.step_index or 0
        branch = "uncond" if (step, "cond") in velocities else "cond"
        velocities[step, branch] = output[0]

    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            stack.callback(transformer.register_forward_hook(velocity).remove)
            for block in transformer.blocks:
                count = block.ffn.register_forward_hook(lambda *_: calls.update(["ffn"]))
                stack.callback(count.remove)
        trace = stack.enter_context(method.attach(pipe, request))
        latents = pipe(**request.kwargs(pipe)).frames
    return Run(latents, trace, calls["ffn"], velocities)


def fingerprint(pipe) -> dict:
    """Everything of a pipe that a method might leave changed."""
    found = {"scheduler": (id(pipe.scheduler), dict(pipe.scheduler.config))}
    for expert, transformer in experts(pipe).items():
        found[expert] = transformer.is_cache_enabled
        for name, module in transformer.named_modules():
            registry = getattr(module, "_diffusers_hook", None)
            found[expert, name] = (
                getattr(module.forward, "__func__", module.forward),
                list(module._forward_hooks),
                list(module._forward_pre_hooks),
                list(registry.hooks) if registry else [],
                id(getattr(module, "processor", None)),
                [key for key, _ in module.named_buffers(recurse=False)],
            )
    return found
