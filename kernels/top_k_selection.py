"""Which KV blocks each query token of a densely trained model reads, by scores of pooled keys.

A KV block is scored once all its keys are in a query's past, by one of:

`mean`: the query times the mean of the block's keys;
`bounds`: the most that the query times a key of the block can be, from the largest and the smallest
value of each channel (Tang et al., "Quest", 2024, section 3.3).

The scores of a head become weights by a softmax over the blocks, and the weights of a group's heads
are added, so that a group has one list. Quest keeps heads apart and takes the scores as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels import range_attention, select_top_k
from sparse_compile.kernels.checks import MAX_HEAD_DIM
from sparse_compile.option_checks import SCORES as SCORES

OP = "sparse_compile::top_k_selection"
TILE_NUMBERS = 2**24  # of scores at a time, on the CPU
CHUNK_BYTES = 2**26  # of queries at a time as `bounds` takes them, on a GPU

torch.library.define(
    OP,
    "(Tensor q, Tensor k, int n_selected, int block_size, int sinks, int local, float scale, "
    "str scores) -> Tensor",
)


def largest_head_dim(scores: str) -> int:
    """The largest head size whose KV blocks can be scored: `bounds` takes twice the channels."""
    return MAX_HEAD_DIM // 2 if scores == "bounds" else MAX_HEAD_DIM


def top_k_selection_ref(
    q: Tensor, k: Tensor, n_selected: int, block_size: int, sinks: int, local: int, scale: float,
    scores: str,
) -> Tensor:  # fmt: skip
    """What the operator must compute, in plain PyTorch; equal scores go to the first KV block.

    Args:
        q: Queries, [B, Hq, T, D]. Query `t` sits at key position `t + S - T`.
        k: Keys, [B, Hkv, S, D].
        n_selected: KV blocks of each token, where its past has so many.
        block_size: Keys in a KV block.
        sinks: KV blocks at the start that are always among them.
        local: KV blocks up to the token's own that are always among them, at least 1: the token's
            own has no score before it is complete.
        scale: Multiplies the scores.
        scores: `bounds` or `mean`.
    Returns:
        KV blocks, ascending, -1 padded on the right: [B, Hkv, T, n_selected] int32.
    """
    total = block_scores(q, k, block_size, scale, scores)
    position = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
    own = position.div(block_size, rounding_mode="floor")
    return select_top_k.choose(total, own, n_selected, sinks, local)


def block_scores(q: Tensor, k: Tensor, block_size: int, scale: float, scores: str) -> Tensor:
    """The score of every KV block for every token and KV head, [B, Hkv, T, n]; 0 where it has none."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group, n_keys = q.shape[1] // k.shape[1], k.shape[2]
    position = torch.arange(q.shape[2], device=q.device) + (n_keys - q.shape[2])
    n_complete = n_keys // block_size
    blocks = k[:, :, : n_complete * block_size].to(acc).unflatten(2, (n_complete, block_size))
    blocks = blocks.repeat_interleave(group, dim=1)  # [B, Hq, n, block_size, D]
    query = scale * q.to(acc)[:, :, :, None]  # [B, Hq, T, 1, D]
    if scores == "mean":
        score = (query * blocks.mean(3)[:, :, None]).sum(-1)  # [B, Hq, T, n]
    else:
        ends = (blocks.amax(3)[:, :, None], blocks.amin(3)[:, :, None])
        # a query may be negative, so either end of a channel can give the larger product
        score = torch.maximum(query * ends[0], query * ends[1]).sum(-1)
    last = (torch.arange(n_complete, device=q.device) + 1) * block_size - 1
    past = last <= position[:, None]  # [T, n]
    weights = score.masked_fill(~past, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~past.any(-1, keepdim=True), 0.0)
    total = weights.unflatten(1, (-1, group)).sum(2)
    return torch.nn.functional.pad(total, (0, -(-n_keys // block_size) - n_complete))


def pooled(k: Tensor, block_size: int, scores: str) -> Tensor:
    """One key for each complete KV block, [B, Hkv, n, D], or 2 D channels for `bounds`."""
    n_complete = k.shape[2] // block_size
    blocks = k[:, :, : n_complete * block_size].unflatten(2, (n_complete, block_size))
    if scores == "mean":
        acc = torch.promote_types(k.dtype, torch.float32)
        return blocks.mean(3, dtype=acc).to(k.dtype)
    return torch.cat([blocks.amax(3), blocks.amin(3)], dim=-1)


def spread(q: Tensor, scores: str) -> Tensor:
    """Queries whose product with `pooled` keys is the score.

    A positive channel meets the largest value of the keys and a negative one the smallest.
    """
    if scores == "mean":
        return q
    dim = q.shape[3]
    wide = q.new_empty((*q.shape[:3], 2 * dim))
    torch.clamp(q, min=0, out=wide[..., :dim])
    torch.clamp(q, max=0, out=wide[..., dim:])
    return wide


def _select_cpu(q, k, n_selected, block_size, sinks, local, scale, scores):
    q, k = q.detach(), k.detach()  # a choice has no gradient
    with torch.autocast("cpu", enabled=False):  # it would multiply in 16 bits
        return _select_by_tiles(q, k, n_selected, block_size, sinks, local, scale, scores)


def _select_by_tiles(
    q: Tensor, k: Tensor, n_selected: int, block_size: int, sinks: int, local: int, scale: float,
    scores: str,
) -> Tensor:  # fmt: skip
    n_tokens, n_keys = q.shape[2], k.shape[2]
    acc = torch.promote_types(q.dtype, torch.float32)
    keys = pooled(k.to(acc), block_size, scores)[:, :, None]  # [B, Hkv, 1, n, D]
    n_complete, n_blocks = keys.shape[3], -(-n_keys // block_size)
    position = torch.arange(n_tokens) + (n_keys - n_tokens)
    own = position.div(block_size, rounding_mode="floor")
    last = (torch.arange(n_complete) + 1) * block_size - 1
    step = max(1, TILE_NUMBERS // max(1, q.shape[0] * q.shape[1] * n_complete))
    parts = [q.new_empty((q.shape[0], k.shape[1], 0, n_selected), dtype=torch.int32)]
    for at in range(0, n_tokens, step):
        some = slice(at, at + step)
        query = spread(scale * q[:, :, some].to(acc), scores).unflatten(1, (k.shape[1], -1))
        past = last <= position[some, None]
        # not -inf: a token without a complete block has the same weight for all, which are forced
        weights = (query @ keys.mT).masked_fill(~past, torch.finfo(acc).min).softmax(-1)
        total = torch.nn.functional.pad(weights.sum(2), (0, n_blocks - n_complete))
        parts.append(select_top_k.choose(total, own[some], n_selected, sinks, local))
    return torch.cat(parts, dim=2)


def launch(q, k, n_selected, block_size, sinks, local, scale, scores):
    """The operator by Triton kernels: those of compressed attention, for pooled keys."""
    from sparse_compile.kernels import select_kernels  # Triton takes long to load

    q, k, n_tokens = q.detach(), k.detach(), q.shape[2]  # a choice has no gradient
    if scale < 0:
        q, scale = -q, -scale
    keys = pooled(k, block_size, scores)
    position = torch.arange(n_tokens, device=q.device) + (k.shape[2] - n_tokens)
    own = position.div(block_size, rounding_mode="floor").int()
    end = (position + 1).div(block_size, rounding_mode="floor").clamp(min=0).int()
    first = torch.zeros_like(end)
    row_bytes = q.shape[0] * q.shape[1] * keys.shape[3] * q.element_size()
    step = n_tokens if scores == "mean" else max(1, CHUNK_BYTES // row_bytes // 64) * 64
    parts = [own.new_empty((q.shape[0], k.shape[1], 0, n_selected))]
    for at in range(0, n_tokens, max(1, step)):
        some = slice(at, at + step)
        query, ranges = spread(q[:, :, some], scores), (first[some], end[some])
        # the log-sum-exp alone is wanted, so one channel stands for the values
        _, lse = range_attention.launch(query, keys, keys[..., :1], *ranges, scale)
        chosen = select_kernels.select(
            query, keys, lse, *ranges, own[some], k=n_selected, runs=1, own_runs=1, sinks=sinks,
            local=local, scale=scale,
        )  # fmt: skip
        parts.append(chosen)
    return torch.cat(parts, dim=2) if len(parts) > 2 else parts[-1]


torch.library.impl(OP, "cpu", _select_cpu)
torch.library.impl(OP, "cuda", launch)


@torch.library.register_fake(OP)
def _fake(q, k, n_selected, block_size, sinks, local, scale, scores):
    return q.new_empty((q.shape[0], k.shape[1], q.shape[2], n_selected), dtype=torch.int32)
