"""Every method of conf/method on every kind of pipeline, and what one run of it shows."""

from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from baselines.base import Method, Request
from hsa.trace import Trace, blocks, experts
from tests import pipelines

STEPS = (16, 40)  # the first that a method takes: settings made for 40 steps are few
# A threshold fitted to a trained model need not skip on random weights; these do. What a method can
# do beyond its default is on.
ON_RANDOM_WEIGHTS = {
    "easycache": {"threshold": 0.5},
    "first_block_cache": {"threshold": 0.2},
    "foresight": {"threshold": 4.0},
    "hsa_beyond": {"regroup_every": 4, "block": [1, 2, 2], "dilation": 1, "step_interval": 1.5},
    "hsa_context": {"context": "frozen"},
    "sencache": {"threshold": 2.0},
    "teacache": {"threshold": 2.0},
    "teacache_protected": {"threshold": 2.0},
    "teacache_ret": {"threshold": 2.0},
}
# MagCache has to know a model: by its name in the official table, or on LTX-2 by
# `hsa-bench calibrate`.
RATIOS = {
    "wan_t2v": "wan2.1-t2v-1.3b",
    "wan_i2v": "wan2.1-i2v-14b-480p",
    "wan22_t2v": "wan2.2-t2v-a14b",
    "wan22_i2v": "wan2.2-i2v-a14b",
    "ti2v_t2v": "wan2.2-ti2v-5b",
    "ti2v_i2v": "wan2.2-ti2v-5b",
}
MEASURED = {
    "cond_uncond": [1.0, 0.99, 0.98, 0.97],
    "uncond_stg": [1.0, 0.98, 0.99, 0.97],
    "uncond_modality": [1.0, 0.97, 0.99, 0.98],
}
with initialize_config_module("conf", version_base="1.3"):
    METHODS = {  # with the constants of the embedded model
        name: compose("config", [f"method={name}"]).method
        for name in sorted(path.stem for path in Path("conf/method").glob("*.yaml"))
    }

PIPELINES = {
    "wan_t2v": pipelines.wan_t2v,
    "wan_i2v": pipelines.wan_i2v,
    "wan22_t2v": pipelines.wan22_t2v,
    "wan22_i2v": pipelines.wan22_i2v,
    "ti2v_t2v": pipelines.ti2v_t2v,
    "ti2v_i2v": pipelines.wan_ti2v,
    "ltx2_t2v": pipelines.ltx23_t2v,  # in 2.0 the third guidance pass equals the first
    "ltx2_i2v": pipelines.ltx23_i2v,
}
LTX2 = ("cond_uncond", "uncond_stg", "uncond_modality")
TWO_EXPERTS = ("wan22_t2v", "wan22_i2v")


@cache
def pipe_of(pipeline: str):
    """Two blocks deep: enough for a method that always runs some of them."""
    pipe = PIPELINES[pipeline]()
    for transformer in experts(pipe).values():
        del blocks(transformer)[2:]
    return pipe


def branches(pipe) -> tuple[str, ...]:
    """Cache contexts of one step of `request`, in the order of the calls."""
    if hasattr(pipe.transformer, "condition_embedder"):
        return "cond", "uncond"
    return ("cond_uncond",) if pipelines.is_i2v(pipe) else LTX2


def method(name: str, pipeline: str = "wan_t2v") -> Method:
    """As its yaml has it, but for what skips something on random weights of this pipeline."""
    settings = ON_RANDOM_WEIGHTS.get(name, {})
    if name == "magcache":
        settings = {"ratios": RATIOS.get(pipeline, MEASURED)}
    return instantiate(METHODS[name], **settings)


def steps_of(method: Method) -> int:
    pipe = pipe_of("wan_t2v")
    for steps in STEPS[:-1]:
        try:
            method.validate(request(pipe, steps=steps))
        except ValueError:
            continue
        return steps
    return STEPS[-1]


def request(pipe, seed: int = 0, steps: int = STEPS[-1], **extra) -> Request:
    """A short clip; another seed is another prompt too.

    LTX-2 runs all its guidance passes for text, and the batched one alone for images.
    """
    i2v = pipelines.is_i2v(pipe)
    fixed = pipelines.inputs(pipe)
    if i2v and pipelines.is_ltx2(pipe):
        fixed |= pipelines.guidance(pipe, on=False)
        fixed |= {"guidance_scale": 3.0, "audio_guidance_scale": 7.0}
    known = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps")
    known += ("guidance_scale", "max_sequence_length", "generator", "image")
    return Request(
        task="i2v" if i2v else "t2v",
        prompt=f"{pipelines.PROMPT} {'very ' * seed}fast",
        negative_prompt=pipelines.NEGATIVE,
        seed=seed,
        steps=steps,
        guidance_scale=fixed["guidance_scale"],
        height=32,
        width=32,
        num_frames=9,
        max_sequence_length=fixed["max_sequence_length"],
        image=fixed.get("image"),
        extra={key: value for key, value in fixed.items() if key not in known} | extra,
    )


def latents(output) -> torch.Tensor:
    """What a pipeline returned: (B, C, F, H, W), or (B, everything) with the audio of LTX-2."""
    audio = getattr(output, "audio", None)
    if audio is None:
        return output.frames
    return torch.cat([output.frames.flatten(1), audio.flatten(1)], dim=1)


def sample(method: Method, pipe, *requests: Request) -> torch.Tensor:
    """Latents of the videos, all in one attach, one call each."""
    with method.attach(pipe, requests[0]):
        return torch.cat([latents(pipe(**request.kwargs(pipe))) for request in requests])


@dataclass
class Run:
    """Videos of one attach, the first of them seen from outside by plain torch hooks."""

    latents: list[torch.Tensor]
    trace: Trace
    block_calls: float  # self-attentions and feed-forwards that really ran, half a call each
    work: int  # numbers that entered a linear layer of a block
    velocities: dict[tuple[int, str], torch.Tensor]  # (step, branch) -> (B, ...)
    steps: int


def interrupt(step: int):
    """For `callback_on_step_end`: ends the call of a pipeline after a step, as Ctrl-C does."""

    def callback(pipe, at, timestep, tensors):
        if at == step:
            raise KeyboardInterrupt
        return tensors

    return callback


def observe(method: Method, pipe, *requests: Request) -> Run:
    """The videos that are not interrupted."""
    calls, velocities = Counter(), {}

    def velocity(module, args, output):
        step = pipe.scheduler.step_index or 0
        seen = sum(at == step for at, _ in velocities)
        velocities[step, branches(pipe)[seen]] = output[0]

    def work(module, args, output):
        calls["work"] += args[0].numel()

    with method.attach(pipe, requests[0]) as trace:
        with ExitStack() as stack:
            for transformer in experts(pipe).values():
                stack.callback(transformer.register_forward_hook(velocity).remove)
                for block in blocks(transformer):
                    feed_forward = block.ffn if hasattr(block, "ffn") else block.ff
                    for layer in (block.attn1.to_v, feed_forward.net[0]):
                        hook = layer.register_forward_hook(lambda *_: calls.update(["half"]))
                        stack.callback(hook.remove)
                    for module in block.modules():
                        if isinstance(module, torch.nn.Linear):
                            stack.callback(module.register_forward_hook(work).remove)
            videos = [latents(pipe(**requests[0].kwargs(pipe)))]
        observed = replace(trace, records=list(trace.records))
        for request in requests[1:]:
            with suppress(KeyboardInterrupt):
                videos.append(latents(pipe(**request.kwargs(pipe))))
    return Run(videos, observed, calls["half"] / 2, calls["work"], velocities, requests[0].steps)


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
