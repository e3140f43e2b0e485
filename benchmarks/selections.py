"""Selections of KV blocks for benchmarks, in the patterns that matter for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile import ops

PATTERNS = ("random", "clustered")  # and `model`: what `by_model` chooses
TOPICS, PASSAGE = 64, 256  # of a planted text; tokens of a passage
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
        # a neighbourhood agrees on its best KV blocks, which are most of everybody's; all of its
        # tokens can read them, and none must read them anyhow
        first_own = own[::NEIGHBOURS]
        shared = shared.masked_fill((block == 0) | (block >= first_own - 1), 2.0)
        n_shared = 3 * (slots - 3) // 4
        best = shared.argsort(-1).argsort(-1) < n_shared
        order = order + best.repeat_interleave(NEIGHBOURS, 0)[:tokens]
    forced = (block == 0) | (block == own) | (block == own - 1)
    order = order.masked_fill(forced, 3.0).masked_fill(block > own, -1.0)
    value, chosen = order.topk(min(slots, n_blocks), dim=-1)
    chosen = chosen.masked_fill(value < 0, n_blocks).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, slots - chosen.shape[1]), value=n_blocks)
    return chosen.masked_fill(chosen == n_blocks, -1).int()


def planted_heads(
    batch: int, query_heads: int, kv_heads: int, tokens: int, dim: int, device: str
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a text in passages, [B, Hq, T, D] and [B, Hkv, T, D] float32.

    A passage has one of 64 topics, and each KV head a direction for it. A query's score of a key
    with its own topic is 0.3 * sqrt(D) higher on average (3.4 for D = 128), beside noise of about
    one: a token wants the passages of its topic, and its neighbours mostly agree.
    """
    topic = torch.randint(TOPICS, (-(-tokens // PASSAGE),), device=device)
    topic = topic.repeat_interleave(PASSAGE)[:tokens]
    direction = torch.randn(batch, kv_heads, TOPICS, dim, device=device)
    planted = direction[:, :, topic]  # [B, Hkv, T, D]
    k = torch.randn(batch, kv_heads, tokens, dim, device=device) + 0.5 * planted
    q = torch.randn(batch, query_heads, tokens, dim, device=device)
    return q + 0.6 * planted.repeat_interleave(query_heads // kv_heads, 1), k


def pooled(x: Tensor, block: int, stride: int) -> Tensor:
    """Compressed keys or values: means of `block` tokens every `stride`, [B, H, C, D]."""
    return x.unfold(2, block, stride).mean(-1)


def by_model(
    q: Tensor, k: Tensor, slots: int, block_size: int, block: int = 32, stride: int = 16
) -> Tensor:
    """What our own choice of KV blocks gives for means of keys, [B, Hkv, T, K] int32."""
    k_cmp = pooled(k, block, stride)
    sizes = {"block": block, "stride": stride}
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, **sizes)
    return ops.select_top_k(q, k_cmp, lse, k=slots, block_size=block_size, **sizes)
