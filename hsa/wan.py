"""Where HSA reads and writes the tokens of diffusers' `WanTransformer3DModel`.

Covers Wan 2.1, Wan 2.2 A14B and TI2V-5B, text- and image-to-video. The model's forward is not
touched: everything between `patch_embedding` and `proj_out` is per token except the K/V of `attn1`,
so four forward hooks and one attention processor are enough.

Shapes: B batch, N latent tokens in (f, h, w) order, K rows that run, H heads, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, _get_qkv_projections
from torch import Tensor, nn

from hsa.adapter import Adapter
from hsa.registry import noisy_latents


class WanAdapter(Adapter):
    processors = (WanAttnProcessor,)

    def cached_layers(self) -> Iterator[nn.Module]:
        return (block.attn1 for block in self.transformer.blocks)

    def kv_width(self, layer: nn.Module) -> int:
        return layer.kv_inner_dim

    def rows_processor(self) -> "_RowsProcessor":
        return _RowsProcessor()

    @contextmanager
    def installed(self) -> Iterator[None]:
        model = self.transformer
        handles = [
            model.rope.register_forward_hook(self._gather_rope),
            model.patch_embedding.register_forward_hook(self._gather_tokens),
            model.condition_embedder.register_forward_pre_hook(
                self._gather_timesteps, with_kwargs=True
            ),
            model.proj_out.register_forward_hook(self._scatter_velocity),
        ]
        try:
            with super().installed():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def gather(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        latents = noisy_latents(args, kwargs)
        sizes = zip(latents.shape[2:], self.transformer.config.patch_size, strict=True)
        self.forward.grid = tuple(size // patch for size, patch in sizes)
        return args, kwargs

    def _gather_rope(self, module, args, output: tuple[Tensor, Tensor]):
        """(1, N, 1, D) cos and sin, each entry twice -> (1 or B, K, 1, D / 2), each entry once."""
        cos, sin = (table[..., ::2].contiguous() for table in output)
        if self.forward.rows is None:
            return cos, sin
        index = self.forward.rows.index
        return cos[0][index], sin[0][index]

    def _gather_tokens(self, module, args, output: Tensor):
        """(B, width, F, H, W) -> (B, width, K, 1, 1), which the model flattens to (B, K, width)."""
        if self.forward.rows is None:
            return output
        tokens = self.forward.take(output.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2)[..., None, None]

    def _gather_timesteps(self, module, args, kwargs):
        """Per-token timesteps, flat (B * N,) -> (B * K,); 0 marks a token that is given (TI2V)."""
        num_tokens = kwargs.get("timestep_seq_len")
        if num_tokens is None:
            return None
        timestep = args[0].unflatten(0, (-1, num_tokens))
        self.forward.given = timestep == 0
        timestep = self.forward.take(timestep)
        kwargs = kwargs | {"timestep_seq_len": timestep.shape[1]}
        return (timestep.flatten(), *args[1:]), kwargs

    def _scatter_velocity(self, module, args, output: Tensor) -> Tensor:
        return self.forward.velocity(output)


class _RowsProcessor:
    """Wan self-attention whose queries are the rows that run and whose keys are all tokens."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        heads = (attn.heads, -1)
        query = rotate(attn.norm_q(query).unflatten(2, heads), *rotary_emb)  # (B, K, H, D)
        key = rotate(attn.norm_k(key).unflatten(2, heads), *rotary_emb)
        key, value = attn.kv_cache.exchange(key, value.unflatten(2, heads))
        output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output = output.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (B, K, H, D) by the angles of cos, sin (_, K, 1, D / 2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = torch.empty_like(x)
    rotated[..., ::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated
