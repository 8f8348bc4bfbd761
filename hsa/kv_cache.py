"""What one guidance branch remembers of every token, and the forward that refreshes some of it.

Shapes: B batch, N latent tokens, K rows that run, H heads, D head width, C channels of one token.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from hsa.allocation import Rows


class KVCache:
    """Keys and values (B, N, H, D) of every token, one pair a self-attention layer."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def update(
        self, layer: nn.Module, rows: Rows | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in fresh rows (B, K, H, D) and return the keys and values of all N tokens.

        With `rows` None every token is fresh and the given tensors become the cache, uncopied;
        otherwise the rows are written in place and the others keep their last value.
        """
        if rows is None:
            self.layers[layer] = key.contiguous(), value.contiguous()
        else:
            for cached, fresh in zip(self.layers[layer], (key, value), strict=True):
                rows.put(cached, fresh)
        return self.layers[layer]


@dataclass(eq=False)
class Branch:
    """Memory of one guidance branch ("cond", "uncond", ...): K/V and velocity, each token's latest.

    `velocity` is (B, N, C) in the model's dtype, None before the first forward.
    """

    cache: KVCache = field(default_factory=KVCache)
    velocity: Tensor | None = None


@dataclass(eq=False)
class Forward:
    """One running forward: its branch and the rows it runs (None: every token).

    The adapter of the model family calls the methods at the right places and fills in `grid`,
    the (F, H, W) of the tokens, and `given`, (B, N) bool, true where a token is a condition
    and not denoised (None: nowhere).
    """

    branch: Branch
    rows: Rows | None
    grid: tuple[int, int, int] | None = None
    given: Tensor | None = None

    def take(self, full: Tensor) -> Tensor:
        """The rows that run: (B, N, ...) -> (B, K, ...)."""
        return full if self.rows is None else self.rows.take(full)

    def keys_and_values(self, layer: nn.Module, key: Tensor, value: Tensor):
        """(B, K, H, D) fresh -> (B, N, H, D) of all tokens, stale rows included."""
        return self.branch.cache.update(layer, self.rows, key, value)

    def velocity(self, fresh: Tensor) -> Tensor:
        """(B, K, C) fresh -> (B, N, C), cached rows included: the cached Euler update."""
        if self.rows is None:
            self.branch.velocity = fresh
        else:
            self.rows.put(self.branch.velocity, fresh)
        return self.branch.velocity
