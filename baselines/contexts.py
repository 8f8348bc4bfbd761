"""The attention contexts of `baselines.hsa_context`: what active tokens see of the inactive ones.

Shapes: B batch, N latent tokens, K rows that run, H heads, D head width, W width of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from baselines.policy import modulated_input
from hsa.adapter import Branch, Forward
from hsa.allocation import Rows
from hsa.kv_cache import LayerCache
from hsa.trace import blocks, experts
from hsa.wan import rotate


@contextmanager
def branches(context: str, pipe: DiffusionPipeline) -> Iterator[Callable[..., Branch]]:
    """What makes the memory of a guidance branch, see `hsa.engine.token_sampler`; in the block."""
    with ExitStack() as stack:
        if context == "refreshed":
            for transformer in experts(pipe).values():
                for block in blocks(transformer):
                    stack.callback(block.register_forward_pre_hook(_Refreshed.enter).remove)
        yield {
            "synchronised": Branch,
            "frozen": partial(_Caching, _Frozen),
            "invisible": partial(_Caching, _Invisible),
            "extrapolated": partial(_Extrapolating, pipe),
            "refreshed": _Refreshing,
            "fresh": _Fresh,
        }[context]


class _Caching(Branch):
    def __init__(self, cache: Callable[[], LayerCache], *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.new_cache = cache


class _Frozen(LayerCache):
    """Keeps what the last full step computed."""

    def _fetch(self) -> tuple[Tensor, ...]:
        return tuple(full.clone() for full in self.stored)


class _Invisible(LayerCache):
    """Keeps nothing."""

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is not None and len(set(self.rows.counts)) > 1:
            raise ValueError(
                f"hsa_context.context='invisible': samples of a batch have {self.rows.counts} "
                "active tokens; make one video at a time, or give fractions"
            )
        return key, value


class _Extrapolating(Branch):
    def __init__(self, pipe: DiffusionPipeline, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.pipe = pipe
        self.sigma = 1.0  # of the running step

    def new_cache(self) -> LayerCache:
        return _Extrapolated(self)

    def new_forward(self, rows: Rows | None, step: int, name: str, copies: int) -> Forward:
        self.sigma = self.pipe.scheduler.sigmas[step].item()
        return super().new_forward(rows, step, name, copies)


class _Extrapolated(LayerCache):
    """Keeps the K/V of each token's last two runs, and the sigmas (B, N, 1, 1) of those.

    A token that ran once so far keeps what it has.
    """

    def __init__(self, branch: _Extrapolating) -> None:
        super().__init__()
        self.branch = branch
        self.last: tuple[Tensor, ...] = ()  # key, value, sigma
        self.before: tuple[Tensor, ...] = ()

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.full_like(key[..., :1, :1], self.branch.sigma, dtype=torch.float32)
        fresh = key, value, sigma
        if self.rows is None:
            last = tuple(x.clone(memory_format=torch.contiguous_format) for x in fresh)
            self.before, self.last = self.last or tuple(map(torch.clone, last)), last
            return key, value
        weight = self._weight().to(key.dtype)
        now = tuple(map(partial(torch.lerp, weight=weight), self.before[:2], self.last[:2]))
        for full, rows in zip(now, fresh, strict=False):
            self.rows.put(full, rows)
        for before, last, rows in zip(self.before, self.last, fresh, strict=True):
            self.rows.put(before, self.rows.take(last))
            self.rows.put(last, rows)
        return now

    def _weight(self) -> Tensor:
        """(B, N, 1, 1): where sigma lies from each token's run before the last (0) to that (1)."""
        before, last = self.before[-1], self.last[-1]
        once = before == last
        return torch.where(once, 1, (self.branch.sigma - before) / (last - before + once))


class _Refreshing(Branch):
    """Wan's, which knows the running forward."""

    running: Forward

    def new_cache(self) -> LayerCache:
        return _Refreshed(self)

    def new_forward(self, rows: Rows | None, step: int, name: str, copies: int) -> Forward:
        self.running = super().new_forward(rows, step, name, copies)
        return self.running


class _Refreshed(LayerCache):
    """Keeps each token's input of the block, and its K/V for those tokens that are given.

    The timestep of given tokens is always 0, so that nothing changes for them.
    """

    def __init__(self, branch: _Refreshing) -> None:
        super().__init__()
        self.branch = branch
        self.block: nn.Module | None = None
        self.inputs: Tensor | None = None  # (B, N, W)
        self.angles: tuple[Tensor, Tensor] | None = None  # of every token's RoPE
        self.temb: Tensor | None = None  # (1, 6, W) of tokens that are denoised; None: none runs

    @staticmethod
    def enter(block: nn.Module, args: tuple) -> None:
        """Pre-hook of a Wan block, called with (tokens, text, temb, RoPE)."""
        cache, (tokens, _, temb, angles) = block.attn1.kv_cache, args
        cache.block = block
        if cache.rows is None:
            cache.inputs, cache.angles = tokens.clone(), angles
            return
        cache.rows.put(cache.inputs, tokens)
        if temb.ndim == 4:  # (B, K, 6, W)
            temb = temb[~cache.rows.take(cache.branch.running.given)]
        cache.temb = temb[:1] if len(temb) else None

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is not None and self.temb is not None:
            self._refresh()
        return super().exchange(key, value)

    def _refresh(self) -> None:
        attn, tokens = self.block.attn1, self.inputs
        temb = self.temb.expand(len(tokens), -1, -1)
        inputs = modulated_input(self.block, {"hidden_states": tokens, "temb": temb})
        inputs = inputs.type_as(tokens)
        key = attn.norm_k(attn.to_k(inputs)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(inputs).unflatten(2, (attn.heads, -1))
        given = self.branch.running.given
        for stored, new in zip(self.stored, (rotate(key, *self.angles), value), strict=True):
            if given is not None:
                new = torch.where(given[..., None, None], stored, new)
            stored.copy_(new)


class _Fresh(Branch):
    def new_forward(self, rows: Rows | None, step: int, name: str, copies: int) -> Forward:
        return _FullForward(self, rows, step, name, copies)


class _FullForward(Forward):
    """Runs every token, and keeps the velocity of the rows that are due."""

    def __init__(self, branch: Branch, due: Rows | None, *args) -> None:
        super().__init__(branch, None, *args)
        self.due = due

    def velocity(self, fresh: Tensor) -> Tensor:
        self.rows = self.due  # the others are stale from here on
        return super().velocity(self.take(fresh))
