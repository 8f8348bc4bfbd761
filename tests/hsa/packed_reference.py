"""HSA on LTX pipelines once more, as naively as possible: the oracle of the tests.

Nothing is gathered. The pipeline runs its own loop on the untouched model; hooks overwrite what an
inactive token yields (key, value, velocity) by what it last yielded while it was active, and a
callback makes the Euler step itself, with each token's latest *guided* velocity.
"""

from contextlib import ExitStack

import torch

from hsa.schedulers import euler
from tests.hsa.reference import cut
from tests.pipelines import inputs


def sample(pipe, config, **overrides):
    """Output of the pipeline for one video, and the group of each token (N,)."""
    naive = _Naive(pipe, config)
    with ExitStack() as stack:
        stack.enter_context(euler(pipe))
        for handle in naive.hooks():
            stack.callback(handle.remove)
        output = pipe(**inputs(pipe, callback_on_step_end=naive.euler_step, **overrides))
    return output, torch.tensor(naive.groups)


class _Naive:
    def __init__(self, pipe, config):
        self.pipe, self.config = pipe, config
        self.memory = {}  # (what, guidance pass) -> latest tensor (B, N, ...)
        self.changes, self.groups = [], []
        self.guided = None

    def hooks(self):
        model = self.pipe.transformer
        yield model.register_forward_pre_hook(self.note, with_kwargs=True)
        for i, block in enumerate(model.transformer_blocks):
            for name in ("attn1", "video_to_audio_attn"):
                if hasattr(block, name):
                    attention = getattr(block, name)
                    yield attention.norm_k.register_forward_hook(self.keep(f"key {name} {i}"))
                    yield attention.to_v.register_forward_hook(self.keep(f"value {name} {i}"))
        yield model.register_forward_hook(self.keep_velocity)

    def note(self, module, args, kwargs):
        self.step = self.pipe.scheduler.step_index or 0
        stg = bool(kwargs.get("spatio_temporal_guidance_blocks"))
        self.guidance_pass = "stg" if stg else kwargs.get("isolate_modalities") or "main"
        self.x = kwargs["hidden_states"][-1:]  # of [uncond, cond] the latter; they are equal
        timestep = kwargs["timestep"]
        self.given = timestep[-1] == 0 if timestep.ndim == 2 else torch.tensor(False)

    def active(self):
        """(1, N, 1) bool."""
        config, i, steps = self.config, self.step, self.config.budgets[0]
        tokens = self.x.shape[1]
        if i < config.warmup_steps or i >= steps - config.cooldown_steps:
            return torch.ones(1, tokens, 1, dtype=torch.bool)
        due = [i % (steps // budget) == 0 for budget in config.budgets]
        return torch.tensor([due[group] for group in self.groups])[None, :, None]

    def latest(self, name, new):
        key = name, self.guidance_pass
        old = self.memory.get(key)
        self.memory[key] = new if old is None else torch.where(self.active(), new, old)
        return self.memory[key], old

    def keep(self, name):
        return lambda module, args, output: self.latest(name, output)[0]

    def keep_velocity(self, module, args, output):
        new, old = self.latest("velocity", output[0])
        if self.guidance_pass == "main" and self.step < self.config.warmup_steps:
            if old is not None:
                change = (new[-1] - old[-1]).abs().sum(-1) / old[-1].abs().sum(-1)
                self.changes.append((change * ~self.given).tolist())
            if self.step == self.config.warmup_steps - 1:
                mean = [sum(column) / len(column) for column in zip(*self.changes, strict=True)]
                self.groups = cut(mean, self.config)
        return new, *output[1:]

    def euler_step(self, pipe, i, timestep, tensors):
        size = pipe.scheduler.sigmas[i + 1] - pipe.scheduler.sigmas[i]
        new = (tensors["latents"] - self.x) / size
        old = self.guided
        self.guided = new if old is None else torch.where(self.active(), new, old)
        return {"latents": self.x + size * self.guided}
