"""The Triton kernel of `select_top_k`: scores and the choice in one, no score leaves the program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 64  # tokens of a program


@triton.jit
def _times(offset, RUNS: tl.constexpr, OWN_RUNS: tl.constexpr):
    """How many runs of tokens a compressed key and a KV block share, by their distance."""
    times = tl.minimum(offset + RUNS, OWN_RUNS) - tl.maximum(offset, 0)
    return tl.maximum(times, 0).to(tl.float32)


@triton.jit
def _select_kernel(
    q_ptr, k_ptr, lse_ptr, first_ptr, end_ptr, own_ptr, out_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_c, stride_k_d,
    stride_l_b, stride_l_h, stride_l_t, scale, T,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    RUNS: tl.constexpr, OWN_RUNS: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program chooses for BLOCK_M tokens and a KV head, among BLOCK_K KV blocks at a time."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    # the last tokens have most to choose from, so they begin
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    row = (tl.program_id(0) // n_tiles).to(tl.int64)  # of batch and KV head
    b, h = row // HEADS, row % HEADS
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = token < T
    d = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_K)
    BLOCK_C: tl.constexpr = BLOCK_K * OWN_RUNS
    c = tl.arange(0, BLOCK_C)
    far: tl.constexpr = 2147483647
    first = tl.load(first_ptr + token, mask=live, other=far)
    end = tl.load(end_ptr + token, mask=live, other=0)
    own = tl.load(own_ptr + token, mask=live, other=-1)
    in_tile = _times(c[:, None] - j[None, :] * OWN_RUNS, RUNS, OWN_RUNS)  # [BLOCK_C, BLOCK_K]
    in_next = _times(c[:, None] - (j[None, :] + BLOCK_K) * OWN_RUNS, RUNS, OWN_RUNS)
    k_base = k_ptr + b * stride_k_b + h * stride_k_h
    q_base = q_ptr + b * stride_q_b + h * GROUP * stride_q_h
    l_base = lse_ptr + b * stride_l_b + h * GROUP * stride_l_h + token.to(tl.int64) * stride_l_t
    best = tl.full([BLOCK_M, BLOCK_K], -1, tl.int64)  # score and, inverted, number; descending
    begin = tl.min(first, 0)
    while begin < far:  # once for each packed sequence among the tokens
        mine = first == begin
        stop = tl.max(tl.where(mine, end, 0), 0)
        last = tl.max(tl.where(mine, own, -1), 0)
        carry = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)  # from the compressed keys before
        for start in range(0, last + 1, BLOCK_K):
            number = begin + start * OWN_RUNS + c  # [BLOCK_C]
            there = number < stop
            k = tl.load(
                k_base + number.to(tl.int64)[None, :] * stride_k_c + d[:, None] * stride_k_d,
                mask=there[None, :] & (d[:, None] < D), other=0.0,
            )  # [BLOCK_D, BLOCK_C]  # fmt: skip
            visible = mine[:, None] & (number[None, :] < end[:, None])
            weights = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for g in range(GROUP):
                q_at = q_base + g * stride_q_h + token.to(tl.int64)[:, None] * stride_q_t
                q = tl.load(
                    q_at + d[None, :] * stride_q_d, mask=live[:, None] & (d[None, :] < D), other=0.0
                )  # [BLOCK_M, BLOCK_D]
                lse = tl.load(l_base + g * stride_l_h, mask=live, other=0.0)
                s = tl.dot(q, k, input_precision=PRECISION) * scale - lse[:, None]
                weights += tl.where(visible, tl.exp2(s * 1.4426950408889634), 0.0)
            if RUNS * OWN_RUNS == 1:  # a compressed key for each KV block
                score = weights  # [BLOCK_M, BLOCK_K]
            else:
                score = tl.dot(weights, in_tile, carry, input_precision="tf32x3")
                carry = tl.dot(weights, in_next, input_precision="tf32x3")
            block = (start + j)[None, :]
            forced = (block < SINKS) | (block > own[:, None] - LOCAL)
            # not negative, so its bits order as it does
            score = tl.where(forced, float("inf"), tl.maximum(score, 0.0))
            key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (far - block).to(tl.int64)
            key = tl.where(mine[:, None] & (block <= own[:, None]), key, -1)
            both = tl.reshape(tl.join(best, key), [BLOCK_M, 2 * BLOCK_K])
            best = tl.topk(both, BLOCK_K)
        begin = tl.min(tl.where(first > begin, first, far), 0)
    chosen = far - (best & far).to(tl.int32)
    chosen = tl.where((best >= 0) & (j[None, :] < K), chosen, far)
    chosen = tl.sort(chosen)
    chosen = tl.where(chosen == far, -1, chosen)
    to = (row * T + token)[:, None] * K + j[None, :]
    tl.store(out_ptr + to, chosen, mask=live[:, None] & (j[None, :] < K))


def select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, first: Tensor, end: Tensor, own: Tensor,
    *, k: int, runs: int, own_runs: int, sinks: int, local: int, scale: float,
) -> Tensor:  # fmt: skip
    """The KV blocks of each token and KV head, int32 [B, Hkv, T, K].

    Args:
        q: Queries, [B, Hq, T, D].
        k_cmp: Compressed keys, [B, Hkv, C, D].
        lse: Log-sum-exps of the attention to them, [B, Hq, T].
        first: First compressed key of each token's sequence, [T].
        end: End of what each token reads, [T].
        own: KV block of each token in its sequence, [T].
        k: How many to choose.
        runs: Runs of tokens in a compressed key.
        own_runs: Runs of tokens in a KV block.
        sinks: KV blocks at the start that are always chosen.
        local: KV blocks up to the token's own that are always chosen.
        scale: Multiplies the scores.
    """
    batch, heads, n_tokens, head_dim = *k_cmp.shape[:2], *q.shape[2:]
    out = torch.empty((batch, heads, n_tokens, k), dtype=torch.int32, device=q.device)
    block_k = max(16, triton.next_power_of_2(k))
    _select_kernel[(batch * heads * triton.cdiv(n_tokens, BLOCK_M),)](
        q, k_cmp, lse, first.int(), end.int(), own.int(), out,
        *q.stride(), *k_cmp.stride(), *lse.stride(), scale, n_tokens,
        heads, q.shape[1] // heads, head_dim, k, runs, own_runs, sinks, local,
        "ieee" if q.dtype == torch.float32 else "tf32",
        max(16, triton.next_power_of_2(head_dim)), block_k, BLOCK_M,
        num_warps=8 if block_k * own_runs > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out
