"""Coarse patches for a trained Wan transformer: twice as wide and high, a quarter of the tokens.

The transformer stays as it is. While coarse patches are on, hooks put new layers beside its first
and last and low-rank branches beside its feed-forwards; `baselines.ddit` says when.

Shapes: B batch, C latent channels, F H W latent sizes, D width, N tokens, K = N / 4 coarse tokens.
A transformer's patch is one frame of 2x2 latent pixels, a coarse one of 4x4.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hsa.schedulers import EulerFlowMatch
from hsa.trace import experts

PATCH = 2
FACTOR = 2
RANK = 32


class RememberingEuler(EulerFlowMatch):
    """Also keeps the last latents.

    Attributes:
        latents: fp32, up to four, the newest last: those that the running step starts from.
    """

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.latents: deque[Tensor] = deque(maxlen=4)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any):
        if not self.latents:
            self.latents.append(sample)
        output = super().step(model_output, timestep, sample, **kwargs)
        self.latents.append(output[0])
        return output


class CoarsePatches(nn.Module):
    """What a Wan transformer needs to work on coarse patches, initialised to do so roughly.

    The embedder starts as the pseudo-inverse of bilinear enlargement, the last layer as the
    transformer's own, enlarged; the low-rank branches of the feed-forwards start at zero. The bias
    of the embedder tells the blocks which patches these are. What the tokens cannot carry, the
    detail of the noise inside a patch, goes past the blocks, scaled for each channel by the time.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        old, size = transformer.patch_embedding, (1, PATCH * FACTOR, PATCH * FACTOR)
        channels, width = transformer.config.out_channels, old.out_channels
        self.embed = nn.Conv3d(old.in_channels, width, size, stride=size)
        self.unembed = nn.Linear(width, channels * (PATCH * FACTOR) ** 2)
        self.detail = nn.Linear(width, channels)
        self.lora = nn.ModuleList(_Branch(linear) for linear in feed_forwards(transformer))
        enlarge = _enlargement()
        with torch.no_grad():
            weight = old.weight.flatten(2) @ torch.linalg.pinv(enlarge)
            self.embed.weight.copy_(weight.unflatten(2, size))
            self.embed.bias.copy_(old.bias)
            for new, own in (
                (self.unembed.weight, transformer.proj_out.weight),
                (self.unembed.bias, transformer.proj_out.bias),
            ):
                patches = enlarge @ own.unflatten(0, (PATCH**2, channels)).flatten(1)
                patches = patches.reshape(FACTOR, PATCH, FACTOR, PATCH, -1).transpose(1, 2)
                new.copy_(patches.reshape(new.shape))
            nn.init.zeros_(self.detail.weight)
            nn.init.ones_(self.detail.bias)

    @contextmanager
    def installed(self, transformer: nn.Module, coarse: Callable[[], bool]) -> Iterator[None]:
        """Run each forward of `transformer` on coarse patches where `coarse()` says so."""
        forward = _Forward(self, coarse)
        handles = [
            transformer.register_forward_pre_hook(forward.start),
            transformer.rope.register_forward_hook(forward.rotate),
            transformer.patch_embedding.register_forward_hook(forward.embed),
            transformer.condition_embedder.register_forward_pre_hook(
                forward.gather_timesteps, with_kwargs=True
            ),
            transformer.condition_embedder.register_forward_hook(forward.keep_time),
            transformer.proj_out.register_forward_hook(forward.unembed),
        ]
        for linear, branch in zip(feed_forwards(transformer), self.lora, strict=True):
            handles.append(linear.register_forward_hook(forward.adapt(branch)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save(self, path: Path, transformer: nn.Module) -> None:
        """Write the weights in bf16, with the identity of the transformer they belong to."""
        weights = {name: tensor.bfloat16() for name, tensor in self.state_dict().items()}
        save_file(weights, path, metadata={"transformer": identity(transformer)})


def load_patches(path: Path, transformer: nn.Module) -> CoarsePatches:
    """The patches of `path` on the device and in the dtype of `transformer`.

    Raises:
        ValueError: they were trained for another transformer.
    """
    with safe_open(path, "pt") as file:
        if file.metadata()["transformer"] != identity(transformer):
            raise ValueError(
                f"ddit: {path.name} was trained for another transformer than this "
                f"{type(transformer).__name__}; choose model=embedded with its own weights"
            )
        weights = {name: file.get_tensor(name) for name in file.keys()}
    patches = CoarsePatches(transformer)
    patches.load_state_dict(weights)
    return patches.requires_grad_(False).to(transformer.device, transformer.dtype)


def identity(transformer: nn.Module) -> str:
    """sha256 of the last layer's weights in bf16: no two trainings end with the same."""
    weight = transformer.proj_out.weight.detach().to("cpu", torch.bfloat16)
    return hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()


@contextmanager
def coarse_steps(pipe: DiffusionPipeline, path: Path, coarse: Callable[[], bool]) -> Iterator[None]:
    """Run forwards of the pipe on the patches of `path` where `coarse()` says so."""
    with ExitStack() as stack:
        for transformer in experts(pipe).values():
            patches = load_patches(path, transformer)
            stack.enter_context(patches.installed(transformer, coarse))
        yield


def feed_forwards(transformer: nn.Module) -> Iterator[nn.Linear]:
    """The two linear layers of the feed-forward of each block."""
    for block in transformer.blocks:
        yield block.ffn.net[0].proj
        yield block.ffn.net[2]


class _Branch(nn.Module):
    """What is added to the output of a linear layer: a map of low rank, zero to begin with."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(linear.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class _Forward:
    """The hooks, and what one forward hands from one to the next."""

    def __init__(self, patches: CoarsePatches, coarse: Callable[[], bool]) -> None:
        self.patches, self.coarse = patches, coarse
        self.on = False

    def start(self, module, args) -> None:
        self.on = self.coarse()

    def rotate(self, module, args, output: tuple[Tensor, Tensor]):
        """(1, N, 1, D) cos and sin -> (1, K, 1, D): the mean direction of the tokens in a patch."""
        if not self.on:
            return None
        frames, height, width = args[0].shape[2:]
        self.grid = frames, height // PATCH, width // PATCH
        cos, sin = (_pooled(table.reshape(*self.grid, -1)) for table in output)
        length = torch.hypot(cos, sin)
        return tuple((table / length).flatten(0, 2)[None, :, None] for table in (cos, sin))

    def embed(self, module, args, output):
        if not self.on:
            return None
        self.latents = args[0]
        return self.patches.embed(args[0])

    def gather_timesteps(self, module, args, kwargs):
        """Per-token timesteps, flat (B * N,) -> (B * K,): the same for all tokens of a frame."""
        if not self.on or kwargs.get("timestep_seq_len") is None:
            return None
        timestep = args[0].reshape(-1, *self.grid)[:, :, ::FACTOR, ::FACTOR]
        kwargs = kwargs | {"timestep_seq_len": timestep[0].numel()}
        return (timestep.flatten(), *args[1:]), kwargs

    def keep_time(self, module, args, output) -> None:
        self.time = output[0]  # (B, D) or (B, K, D)

    def adapt(self, branch: _Branch):
        def add(module, args, output):
            return output + branch(args[0]) if self.on else None

        return add

    def unembed(self, module, args, output):
        """(B, K, D) -> velocity in the transformer's own layout, (B, N, 2 * 2 * C)."""
        if not self.on:
            return None
        tokens, latents = args[0], self.latents
        frames, height, width = self.grid
        coarse = frames, height // FACTOR, width // FACTOR
        sides = (FACTOR, FACTOR, PATCH, PATCH)
        low = F.interpolate(F.avg_pool3d(latents, (1, 2, 2)), scale_factor=(1, 2, 2))
        detail = (latents - low).unflatten(4, (-1, FACTOR, PATCH)).unflatten(3, (-1, FACTOR, PATCH))
        detail = detail.permute(0, 2, 3, 6, 4, 7, 5, 8, 1)  # (B, F, ., ., 2, 2, 2, 2, C)
        scale = self.patches.detail(self.time).reshape(len(tokens), -1, detail.shape[-1])
        scale = scale.expand(-1, tokens.shape[1], -1).unflatten(1, coarse)
        velocity = self.patches.unembed(tokens).unflatten(2, (*sides, -1)).unflatten(1, coarse)
        velocity = velocity + detail * scale[:, :, :, :, None, None, None, None]
        return velocity.transpose(3, 4).reshape(*output.shape[:1], height * width * frames, -1)


def _pooled(table: Tensor) -> Tensor:
    """(F, H, W, D) -> mean over each coarse patch."""
    pooled = F.avg_pool2d(table.movedim(-1, 1), FACTOR)
    return pooled.movedim(1, -1)


def _enlargement() -> Tensor:
    """(16, 4): bilinear, from the pixels of a patch to those of a coarse one."""
    pixels = torch.eye(PATCH**2).reshape(-1, 1, PATCH, PATCH)
    return F.interpolate(pixels, scale_factor=FACTOR, mode="bilinear").flatten(1).T
