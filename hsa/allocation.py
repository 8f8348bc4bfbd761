"""Which token belongs to which budget group, from how much its velocity changes. Pure.

Shapes: B batch, N latent tokens, K rows that run (the active tokens), C channels of one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


def velocity_change(velocity: Tensor, previous: Tensor) -> Tensor:
    """L1 change of each token's velocity relative to the previous step's: (B, N, C) -> (B, N) fp32.

    |v_i - v_{i-1}|_1 / |v_{i-1}|_1 over the channels of a token (arXiv 2605.06892).
    """
    velocity, previous = velocity.float(), previous.float()
    norm = previous.abs().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (velocity - previous).abs().sum(-1) / norm


def groups_by_threshold(change: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Group of each token, (B, N) -> (B, N) int64: the number of thresholds above its change."""
    groups = torch.zeros_like(change, dtype=torch.long)
    for threshold in thresholds:
        groups += change < threshold
    return groups


def groups_by_fraction(change: Tensor, fractions: Sequence[float]) -> Tensor:
    """Group of each token, (B, N) -> (B, N) int64: each sample's tokens ranked and cut by share.

    Group 0 takes the largest changes; ties go to the earlier token. Group sizes are the rounded
    cumulative shares of N and the same for every sample.
    """
    num_tokens = change.shape[1]
    ends = [round(share * num_tokens) for share in accumulate(fractions)][:-1]
    rank = torch.arange(num_tokens, device=change.device)
    group_of_rank = sum((rank >= end).long() for end in ends) + torch.zeros_like(rank)
    order = change.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, group_of_rank.expand_as(order))


@dataclass(frozen=True, eq=False)
class Rows:
    """The active tokens of a batch, as one rectangle of rows to run.

    Samples may have different numbers of active tokens. The shorter ones are padded with their
    token 0; padding rows run and are never written back, so a sample's result does not depend on
    its neighbours. At least one row is run.

    Args:
        active: (B, N) bool.
    """

    active: Tensor

    @cached_property
    def counts(self) -> list[int]:
        """Active tokens of each sample."""
        return self.active.sum(1).tolist()

    @cached_property
    def index(self) -> Tensor:
        """(B, K) token index of each row, in ascending order, padding last."""
        index = self.active.new_zeros(len(self.counts), max(*self.counts, 1), dtype=torch.long)
        for row, sample in zip(index, self.active, strict=True):
            tokens = sample.nonzero().flatten()
            row[: len(tokens)] = tokens
        return index

    @cached_property
    def _flat(self) -> Tensor:
        """(B * K,) row index into a tensor of shape (B * N, ...)."""
        offset = torch.arange(len(self.index), device=self.index.device) * self.active.shape[1]
        return (self.index + offset[:, None]).flatten()

    @cached_property
    def _kept(self) -> Tensor | None:
        """Positions in (B * K,) of the rows that are not padding, None where there is none."""
        num_rows = self.index.shape[1]
        if min(self.counts) == num_rows:
            return None
        rank = torch.arange(num_rows, device=self.index.device)
        counts = torch.tensor(self.counts, device=self.index.device)
        return (rank < counts[:, None]).flatten().nonzero().flatten()

    @cached_property
    def _target(self) -> Tensor:
        return self._flat if self._kept is None else self._flat[self._kept]

    def take(self, full: Tensor) -> Tensor:
        """Gather rows: (B, N, ...) -> (B, K, ...)."""
        rows = full.flatten(0, 1).index_select(0, self._flat)
        return rows.unflatten(0, self.index.shape)

    def put(self, full: Tensor, rows: Tensor) -> None:
        """Write rows (B, K, ...) into contiguous `full` (B, N, ...) in place, padding left out."""
        rows = rows.flatten(0, 1)
        if self._kept is not None:
            rows = rows.index_select(0, self._kept)
        full.flatten(0, 1).index_copy_(0, self._target, rows)
