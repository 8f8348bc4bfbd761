"""Which token belongs to which budget group, from how much its velocity changes. Pure.

Shapes: B batch, N latent tokens, K rows that run (the active tokens), C channels of one token.
"""

from collections.abc import Sequence
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


class Rows:
    """The active tokens of a batch, as one rectangle of rows to run.

    Samples may have different numbers of active tokens. The shorter ones are padded with their
    token 0; padding rows run and are never written back, so a sample's result does not depend on
    its neighbours. At least one row is run.

    Args:
        active: (B, N) bool.

    Attributes:
        counts: active tokens of each sample.
        index: (B, K) token index of each row, in ascending order, padding last.
    """

    def __init__(self, active: Tensor) -> None:
        self.active = active
        num_samples, num_tokens = active.shape
        self.counts: list[int] = active.sum(1).tolist()
        num_rows = max(*self.counts, 1)
        self.index = active.new_zeros(num_samples, num_rows, dtype=torch.long)
        for row, sample in zip(self.index, active, strict=True):
            tokens = sample.nonzero().flatten()
            row[: len(tokens)] = tokens
        offset = torch.arange(num_samples, device=active.device) * num_tokens
        self._flat = (self.index + offset[:, None]).flatten()  # rows of a (B * N, ...) tensor
        self._kept: Tensor | None = None  # those that are not padding, None where there is none
        self._target = self._flat
        if min(self.counts) < num_rows:
            rank = torch.arange(num_rows, device=active.device)
            counts = torch.tensor(self.counts, device=active.device)
            self._kept = (rank < counts[:, None]).flatten().nonzero().flatten()
            self._target = self._flat[self._kept]

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
