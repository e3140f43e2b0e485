"""Which KV blocks each query token selects, from its attention to compressed keys.

The weights of all heads of a group are added, then those of the compressed keys that share tokens
with a KV block: each counts as often as it holds a run of `stride` tokens of the block.

Source: Yuan et al., "Native Sparse Attention" (2025), equations 9 to 12. Compressed key `c` holds
the tokens from `c * stride` on, counted from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.kernels import key_ranges

OP = "sparse_compile::select_top_k"
TILE_NUMBERS = 2**24  # of weights at a time, on the CPU

torch.library.define(
    OP,
    "(Tensor q, Tensor k_cmp, Tensor lse, int k, int block_size, int block, int stride, int sinks, "
    "int local, float scale, int n_keys, Tensor? cu_seqlens) -> Tensor",
)


def pooling(block_size: int, block: int, stride: int) -> list[tuple[int, int]]:
    """Which compressed keys a KV block counts and how often: (number less the first, times)."""
    runs, own = block // stride, block_size // stride
    times = [0] * (runs + own - 1)
    for m in range(own):
        for n in range(runs):
            times[m - n + runs - 1] += 1
    return [(offset - runs + 1, count) for offset, count in enumerate(times)]


def select_top_k_ref(
    q: Tensor, k_cmp: Tensor, lse: Tensor, k: int, block_size: int, block: int, stride: int,
    sinks: int, local: int, scale: float, n_keys: int, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What the operator must compute, in plain PyTorch; equal scores go to the first KV block."""
    scores = block_scores(q, k_cmp, lse, block_size, block, stride, scale, n_keys, cu_seqlens)
    where = key_ranges.tokens(q.shape[2], n_keys, cu_seqlens, q.device)
    own = where.position.div(block_size, rounding_mode="floor")
    return choose(scores, own, k, sinks, local)


def block_scores(
    q: Tensor, k_cmp: Tensor, lse: Tensor, block_size: int, block: int, stride: int, scale: float,
    n_keys: int, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The score of every KV block for every token and KV head, [B, Hkv, T, n]."""
    n_tokens, group = q.shape[2], q.shape[1] // k_cmp.shape[1]
    acc = torch.promote_types(q.dtype, torch.float32)
    where = key_ranges.tokens(n_tokens, n_keys, cu_seqlens, q.device)
    first, end = key_ranges.compressed(where, block, stride)
    number = torch.arange(k_cmp.shape[2], device=q.device)
    keep = (number >= first[:, None]) & (number < end[:, None])
    wide = k_cmp.to(acc).repeat_interleave(group, dim=1)
    scores = (scale * q.to(acc) @ wide.mT).masked_fill(~keep, float("-inf"))
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    weights = weights.unflatten(1, (-1, group)).sum(2)  # [B, Hkv, T, C]
    n_blocks = -(-n_keys // block_size)
    total = weights.new_zeros((*weights.shape[:3], n_blocks))
    if not k_cmp.shape[2]:
        return total
    for offset, times in pooling(block_size, block, stride):
        at = torch.arange(n_blocks, device=q.device) * (block_size // stride) + offset
        at = at + first[:, None]  # [T, n_blocks]
        inside = (at >= first[:, None]) & (at < end[:, None])
        index = at.clamp(0, k_cmp.shape[2] - 1).expand(*weights.shape[:2], -1, -1)
        total += times * weights.gather(3, index).masked_fill(~inside, 0.0)
    return total


def choose(total: Tensor, own: Tensor, k: int, sinks: int, local: int) -> Tensor:
    """The `k` best KV blocks of each token by their scores [B, Hkv, T, n], ascending, as int32.

    The first `sinks` and the last `local` up to its own come before all others.
    """
    n_blocks = total.shape[3]
    number = torch.arange(n_blocks, device=total.device)
    forced = (number < sinks) | (number > own[:, None] - local)
    total = total.masked_fill(forced, float("inf")).masked_fill(number > own[:, None], -1.0)
    value, chosen = total.sort(dim=-1, descending=True, stable=True)
    value, chosen = value[..., :k], chosen[..., :k]
    chosen = chosen.masked_fill(value < 0, n_blocks).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[3]), value=n_blocks)
    return chosen.masked_fill(chosen == n_blocks, -1).int()


def _select_cpu(
    q, k_cmp, lse, k, block_size, block, stride, sinks, local, scale, n_keys, cu_seqlens
):
    n_tokens = q.shape[2]
    options = (k, block_size, block, stride, sinks, local, scale)
    if cu_seqlens is not None:
        return select_top_k_ref(q, k_cmp, lse, *options, n_keys, cu_seqlens)
    step = max(1, TILE_NUMBERS // max(1, q.shape[0] * q.shape[1] * k_cmp.shape[2]))
    parts = []
    for at in range(0, n_tokens, step):
        some = slice(at, at + step)
        keys = min(at + step, n_tokens) + n_keys - n_tokens  # up to the last of these tokens
        parts.append(select_top_k_ref(q[:, :, some], k_cmp, lse[:, :, some], *options, keys))
    return torch.cat(parts, dim=2)


def launch(q, k_cmp, lse, k, block_size, block, stride, sinks, local, scale, n_keys, cu_seqlens):
    """The operator by a Triton kernel."""
    from sparse_compile.kernels import select_kernels  # Triton takes long to load

    where = key_ranges.tokens(q.shape[2], n_keys, cu_seqlens, q.device)
    own = where.position.div(block_size, rounding_mode="floor")
    return select_kernels.select(
        q, k_cmp, lse, *key_ranges.compressed(where, block, stride), own,
        k=k, runs=block // stride, own_runs=block_size // stride, sinks=sinks, local=local,
        scale=scale,
    )  # fmt: skip


torch.library.impl(OP, "cpu", _select_cpu)
torch.library.impl(OP, "cuda", launch)


@torch.library.register_fake(OP)
def _fake(q, k_cmp, lse, k, block_size, block, stride, sinks, local, scale, n_keys, cu_seqlens):
    return q.new_empty((q.shape[0], k_cmp.shape[1], q.shape[2], k), dtype=torch.int32)
