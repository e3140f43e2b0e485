"""Ranges of keys, one per query token: where windows, packed sequences and compressed keys begin.

Both ends ascend with the token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Query tokens of one row of the batch."""

    position: Tensor  # in the keys of their sequence, int64 [T]
    sequence: Tensor  # its number, int64 [T]
    first_key: Tensor  # of each sequence, int64 [n]
    n_keys: Tensor  # of each sequence, int64 [n]


def tokens(n_queries: int, n_keys: int, cu_seqlens: Tensor | None, device: torch.device) -> Tokens:
    """Where query tokens are.

    Args:
        n_queries: T.
        n_keys: S; the last query is at the last key.
        cu_seqlens: Starts of packed sequences and the end of the last, int32 [n + 1]; T is S.
        device: Of the result.
    """
    token = torch.arange(n_queries, device=device)
    if cu_seqlens is None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return Tokens(token + (n_keys - n_queries), torch.zeros_like(token), zero, zero + n_keys)
    bounds = cu_seqlens.long()
    of = torch.searchsorted(bounds[1:], token, right=True).clamp(max=bounds.numel() - 2)
    return Tokens(token - bounds[of], of, bounds[:-1], bounds.diff())


def window(where: Tokens, size: int) -> tuple[Tensor, Tensor]:
    """The `size` keys up to a token's own: first and end, int64 [T]."""
    base = where.first_key[where.sequence]
    first = base + (where.position - (size - 1)).clamp(min=0)
    end = base + torch.minimum(where.position + 1, where.n_keys[where.sequence])
    return first, torch.maximum(end, first)


def n_compressed(n_keys: Tensor, block: int, stride: int) -> Tensor:
    """How many compressed keys stand for `n_keys` keys; those that would reach beyond do not."""
    return torch.where(n_keys < block, 0, (n_keys - block) // stride + 1)


def compressed(where: Tokens, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """The compressed keys that end at a token or before: first and end, int64 [T]."""
    number = n_compressed(where.n_keys, block, stride)
    first = (number.cumsum(0) - number)[where.sequence]
    return first, first + n_compressed(where.position + 1, block, stride)
