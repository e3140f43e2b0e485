"""Selections of KV blocks for benchmarks, in the patterns that matter for speed."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("random", "clustered")
NEIGHBOURS = 64  # tokens that share most of their KV blocks in `clustered`


def make(
    pattern: str, batch: int, kv_heads: int, tokens: int, slots: int, block_size: int, device: str
) -> Tensor:
    """Selections of causal self-attention, [B, Hkv, T, K] int32, ascending, -1 padded.

    Every token selects the first KV block, its own and the one before. Of the others, `random`
    draws all for itself; in `clustered` 64 neighbours share three quarters.
    """
    rows = [_one_head(pattern, tokens, slots, block_size, device) for _ in range(batch * kv_heads)]
    return torch.stack(rows).unflatten(0, (batch, kv_heads))


def _one_head(pattern: str, tokens: int, slots: int, block_size: int, device: str) -> Tensor:
    n_blocks = -(-tokens // block_size)
    block = torch.arange(n_blocks, device=device)
    own = torch.arange(tokens, device=device)[:, None] // block_size
    order = torch.rand(tokens, n_blocks, device=device)
    if pattern == "clustered":
        shared = torch.rand(-(-tokens // NEIGHBOURS), n_blocks, device=device)
        # a neighbourhood agrees on its best KV blocks, which are most of everybody's
        n_shared = 3 * (slots - 3) // 4
        best = shared.argsort(-1).argsort(-1) < n_shared
        order = order + best.repeat_interleave(NEIGHBOURS, 0)[:tokens]
    forced = (block == 0) | (block == own) | (block == own - 1)
    order = order.masked_fill(forced, 3.0).masked_fill(block > own, -1.0)
    value, chosen = order.topk(min(slots, n_blocks), dim=-1)
    chosen = chosen.masked_fill(value < 0, n_blocks).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, slots - chosen.shape[1]), value=n_blocks)
    return chosen.masked_fill(chosen == n_blocks, -1).int()
