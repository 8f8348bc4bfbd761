"""Where HSA reads and writes the tokens of diffusers' LTX-2 and LTX-Video transformers.

Both take packed tokens, so the rows that run are cut out of the arguments and the model's own
forward does the rest. LTX-2's audio tokens are few: they run at every step and attend to the keys
and values of all video tokens.

Shapes: B batch, N latent tokens in (f, h, w) order, K rows that run, H heads, D head width,
A audio tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_ltx, transformer_ltx2
from torch import Tensor, nn

from hsa.adapter import Adapter


class _PackedAdapter(Adapter):
    """Tokens come as `hidden_states` (B, N, C); a timestep of 0 marks one that is given (I2V)."""

    per_token = ("timestep",)  # further arguments that may be of shape (B, N, ...)

    def kv_width(self, layer: nn.Module) -> int:
        return layer.inner_kv_dim

    def gather(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        forward = self.forward
        forward.grid = tuple(kwargs[name] for name in ("num_frames", "height", "width"))
        num_tokens = kwargs["hidden_states"].shape[1]
        if prod(forward.grid) != num_tokens:
            raise ValueError(
                f"hidden_states: {num_tokens} tokens for a grid of {forward.grid}; HSA runs on the "
                "tokens of the video alone, without any appended as a condition"
            )
        if kwargs["timestep"].ndim == 2:
            forward.given = kwargs["timestep"] == 0
        if forward.rows is None:
            return args, kwargs
        return args, kwargs | {
            name: forward.take(kwargs[name])
            for name in ("hidden_states", *self.per_token)
            if kwargs.get(name) is not None and kwargs[name].shape[1:2] == (num_tokens,)
        }

    def scatter(self, output: tuple) -> tuple:
        return (self.forward.velocity(output[0]), *output[1:])


class LTXAdapter(_PackedAdapter):
    """LTX-Video, text- and image-to-video."""

    processors = (transformer_ltx.LTXVideoAttnProcessor,)

    def cached_layers(self) -> Iterator[nn.Module]:
        return (block.attn1 for block in self.transformer.transformer_blocks)

    def rows_processor(self) -> "_LTXRowsProcessor":
        return _LTXRowsProcessor()

    @contextmanager
    def installed(self) -> Iterator[None]:
        handle = self.transformer.rope.register_forward_hook(self._gather_rope)
        try:
            with super().installed():
                yield
        finally:
            handle.remove()

    def _gather_rope(self, module, args, output: tuple[Tensor, Tensor]):
        """cos and sin of the rows: (B, N, width) -> (B, K, width)."""
        return tuple(self.forward.take(table) for table in output)


class LTX2Adapter(_PackedAdapter):
    """LTX-2.0, 2.3 and 2.5, text- and image-to-video, audio included."""

    processors = (
        transformer_ltx2.LTX2AudioVideoAttnProcessor,
        transformer_ltx2.LTX2PerturbedAttnProcessor,
    )
    per_token = ("timestep", "video_self_attention_mask", "video_keyframes_mask")

    def cached_layers(self) -> Iterator[nn.Module]:
        for block in self.transformer.transformer_blocks:
            yield block.attn1
            yield block.video_to_audio_attn

    def rows_processor(self) -> "_LTX2RowsProcessor":
        return _LTX2RowsProcessor()

    def gather(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        coords = kwargs["video_coords"]  # (B, 3, N, 2)
        args, kwargs = super().gather(args, kwargs)
        rows = self.forward.take(coords.transpose(1, 2)).transpose(1, 2)
        return args, kwargs | {"video_coords": rows}


class _LTXRowsProcessor:
    """LTX-Video's self-attention whose queries are the rows that run and whose keys all tokens."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        heads = (attn.heads, -1)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key = (
            transformer_ltx.apply_rotary_emb(x, image_rotary_emb).unflatten(2, heads)
            for x in (query, key)
        )
        key, value = attn.kv_cache.exchange(key, attn.to_v(hidden_states).unflatten(2, heads))
        output = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](output.flatten(2, 3).type_as(query)))


class _LTX2RowsProcessor:
    """LTX-2's attention to video tokens: from the rows that run (self), or from audio (v2a)."""

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        video = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, -1)
        value = attn.to_v(video)
        if all_perturbed:  # spatio-temporal guidance: the values stand for the attention
            output = value
        else:
            query = _rotate(attn, attn.norm_q(attn.to_q(hidden_states)), query_rotary_emb)
            key = attn.norm_k(attn.to_k(video))
            key = _rotate(attn, key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
            keys, values = attn.kv_cache.exchange(
                key.unflatten(2, heads), value.unflatten(2, heads)
            )
            output = dispatch_attention_fn(
                query.unflatten(2, heads),
                keys,
                values,
                attn_mask=_per_head(attn, attention_mask, keys),
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            output = output.flatten(2, 3).type_as(query)
            if perturbation_mask is not None:
                output = torch.lerp(value, output, perturbation_mask)
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            output = (output.unflatten(2, heads) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](output))


def _rotate(attn, x: Tensor, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
    if rotary_emb is None:
        return x
    if attn.rope_type == "split":
        return transformer_ltx2.apply_split_rotary_emb(x, rotary_emb)
    return transformer_ltx2.apply_interleaved_rotary_emb(x, rotary_emb)


def _per_head(attn, mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """(B, K, N) -> (B, H, K, N), as diffusers' processors do."""
    if mask is None:
        return None
    mask = attn.prepare_attention_mask(mask, keys.shape[1], len(keys))
    return mask.view(len(keys), attn.heads, -1, mask.shape[-1])
