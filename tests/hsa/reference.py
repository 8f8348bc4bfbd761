"""HSA on Wan once more, from its definition and as naively as possible: the oracle of the tests.

Nothing is gathered. Every token runs through the untouched model; where a token is not active, its
key, value and velocity are overwritten by the ones last computed while it was active; another
attention context overwrites something else. Loops and Python lists stand where `hsa` has tensors.
"""

from contextlib import contextmanager

import torch

PATCH = 2  # of the tiny pipelines: one token is 1 x 2 x 2 latent pixels


def wan_latents(pipe, config, arguments, context=None):
    """Latents (1, C, F, H, W) and the group of each token (N,) of one video sampled with HSA.

    `context` installs what makes the attention context, as `stale_rows_kept`; the memory that it is
    given has the step's "sigma".
    """
    context = context or stale_rows_kept
    prompts = pipe.encode_prompt(
        arguments["prompt"],
        arguments["negative_prompt"],
        do_classifier_free_guidance=arguments["guidance_scale"] > 1,
        max_sequence_length=arguments["max_sequence_length"],
    )
    names = ("cond", "uncond") if arguments["guidance_scale"] > 1 else ("cond",)
    prompts = dict(zip(names, prompts, strict=False))
    x, condition, mask = _start(pipe, arguments)
    steps = arguments["num_inference_steps"]
    grid = [1 - i / steps * 0.999 for i in range(steps)]
    sigmas = torch.tensor([3 * s / (1 + 2 * s) for s in grid] + [0.0])  # shift 3
    everyone = torch.ones(x[0, 0, :, ::PATCH, ::PATCH].numel(), dtype=torch.bool)
    groups, changes, expert = None, [], None
    for i in range(steps):
        t = sigmas[i] * 1000
        model = pipe.transformer
        if pipe.config.boundary_ratio is not None and sigmas[i] < pipe.config.boundary_ratio:
            model = pipe.transformer_2
        if model is not expert:
            expert, memory = model, {name: {} for name in prompts}
        window = i < config.warmup_steps or i >= steps - config.cooldown_steps
        if window or "velocity" not in memory["cond"]:
            active = everyone
        else:
            due = [i % (steps // budget) == 0 for budget in config.budgets]
            active = torch.tensor([due[group] for group in groups])
        velocity = {}
        for name, text in prompts.items():
            old, memory[name]["sigma"] = memory[name].get("velocity"), float(sigmas[i])
            with context(model, active, memory[name]), torch.no_grad():
                if condition is None:
                    new = model(x, t.expand(1), text, return_dict=False)[0]
                else:
                    given = (1 - mask) * condition + mask * x
                    per_token = (mask[0, 0, :, ::PATCH, ::PATCH] * t).flatten()[None]
                    new = model(given, per_token, text, return_dict=False)[0]
            if old is not None:
                new = torch.where(pixels(active, x), new, old)
            if name == "cond" and old is not None and i < config.warmup_steps:
                changes.append(relative_change(new, old, mask))
            velocity[name] = memory[name]["velocity"] = new
        if i == config.warmup_steps - 1:
            mean = [sum(column) / len(column) for column in zip(*changes, strict=True)]
            groups = cut(mean, config)
        guided = velocity["cond"]
        if "uncond" in velocity:
            guided = velocity["uncond"] + arguments["guidance_scale"] * (
                velocity["cond"] - velocity["uncond"]
            )
        x = x + (sigmas[i + 1] - sigmas[i]) * guided
    return (x if condition is None else (1 - mask) * condition + mask * x), torch.tensor(groups)


@contextmanager
def stale_rows_kept(model, active, memory):
    """Inactive rows keep their old keys and values (keys before RoPE, which is fixed per token)."""

    def keep(name):
        def hook(module, args, output):
            if name in memory:
                output = torch.where(active[None, :, None], output, memory[name])
            memory[name] = output
            return output

        return hook

    handles = []
    for i, block in enumerate(model.blocks):
        handles.append(block.attn1.norm_k.register_forward_hook(keep(f"key {i}")))
        handles.append(block.attn1.to_v.register_forward_hook(keep(f"value {i}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative_change(new, old, mask):
    """Relative L1 change of each token, a list of N floats; 0 for tokens that are given."""
    frames, height, width = new[0, 0, :, ::PATCH, ::PATCH].shape
    changes = []
    for f in range(frames):
        for h in range(height):
            for w in range(width):
                token = (0, slice(None), f, slice(2 * h, 2 * h + 2), slice(2 * w, 2 * w + 2))
                change = (new[token] - old[token]).abs().sum() / old[token].abs().sum()
                denoised = mask is None or bool(mask[0, 0, f, 2 * h, 2 * w])
                changes.append(float(change) if denoised else 0.0)
    return changes


def cut(change, config):
    """Group of each token from its mean change."""
    if config.thresholds is not None:
        return [sum(d < threshold for threshold in config.thresholds) for d in change]
    ranked = sorted(range(len(change)), key=lambda token: -change[token])
    groups = [0] * len(change)
    for place, token in enumerate(ranked):
        ends = [round(sum(config.fractions[: k + 1]) * len(change)) for k in range(3)]
        groups[token] = next(k for k, end in enumerate(ends) if place < end)
    return groups


def pixels(tokens, x):
    """(N,) per token -> (1, 1, F, H, W) per latent pixel of x."""
    frames, height, width = x[0, 0, :, ::PATCH, ::PATCH].shape
    grid = tokens.view(1, 1, frames, height, width)
    return grid.repeat_interleave(PATCH, 3).repeat_interleave(PATCH, 4)


def _start(pipe, arguments):
    """Noise, and for TI2V the clean first frame with the mask that is 0 on it."""
    size = arguments["height"], arguments["width"], arguments["num_frames"]
    generator = torch.Generator().manual_seed(arguments["generator"].initial_seed())
    if "image" not in arguments:
        noise = pipe.prepare_latents(1, 16, *size, torch.float32, "cpu", generator)
        return noise, None, None
    image = pipe.video_processor.preprocess(arguments["image"], *size[:2])
    with torch.no_grad():
        return pipe.prepare_latents(image, 1, 16, *size, torch.float32, "cpu", generator)
