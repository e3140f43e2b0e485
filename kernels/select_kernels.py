"""The Triton kernel of `select_top_k`: scores and the choice in one, no score leaves the program.

Matrix units leave a row of their result with four threads. The columns are put into such an order
that each of these has all runs of its KV blocks, and neighbouring KV blocks: adding and sorting
then stay within a thread. Each keeps a sorted list of the best among its own KV blocks so far; the
lists of a token are merged once, at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.launching import padded
from sparse_compile.kernels.tuning import Tuned

LANES = tl.constexpr(4)  # threads that hold a row of a product
NO_KEY = tl.constexpr(-(2**63))  # below all others
NO_KEY_64 = tl.constexpr(-(2**52))  # the same compared as float64: minus infinity
FAR = tl.constexpr(2**31 - 1)
# capabilities of the devices with half as many units for float64 as for float32
FAST_FLOAT64 = {(8, 0), (9, 0), (10, 0)}


class Tiles(NamedTuple):
    """How the work is cut; the choice does not depend on it."""

    block_m: int  # tokens of a program
    block_k: int  # KV blocks scored at a time, at least 8
    runs: int  # runs of tokens of each scored at a time
    lists: int  # sorted lists of a token: 1, 2 or 4
    as_float64: bool  # compare keys as float64: one instruction, of a unit of its own
    num_warps: int
    num_stages: int


SELECT = Tuned["Tiles"]("select_top_k")


def default_tiles(
    *, k: int, own_runs: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """Tiles whose scores and lists fit into the registers of two programs on an H100.

    Args:
        k: How many KV blocks are chosen.
        own_runs: Runs of tokens in a KV block.
        head_dim: D.
        dtype: Of queries and keys.
        device: Where it is to run.
    """
    is_wide = dtype == torch.float32  # a product of these is three, their halves are kept too
    columns = 128 if own_runs >= 4 and k <= 32 and head_dim <= 128 else 64
    columns = 32 if is_wide else columns
    block_k = max(8, columns // own_runs)
    return Tiles(
        block_m=64,
        block_k=block_k,
        runs=min(own_runs, columns // block_k),
        lists=4 if k <= 16 else 2 if k <= 32 else 1,
        as_float64=device.type != "cuda"
        or torch.cuda.get_device_capability(device) in FAST_FLOAT64,
        num_warps=4,
        num_stages=1 if is_wide else 2,
    )


@triton.jit
def _replaced(items, at: tl.constexpr, item):
    """A tuple with one item replaced."""
    return items[:at] + (item,) + items[at + 1 :]  # noqa: RUF005 (Triton cannot unpack)


@triton.jit
def _other(pairs, AXIS: tl.constexpr):
    """The other element of each pair of integers along an axis; exact, since sums wrap around."""
    return tl.sum(pairs, AXIS, keep_dims=True) - pairs


@triton.jit
def _swapped(x, WIDTH: tl.constexpr):
    """x [M, L, N] with the elements that are WIDTH apart swapped."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // (2 * WIDTH), 2, WIDTH])
    return tl.reshape(_other(pairs, 3), x.shape)


@triton.jit
def _larger(x, y, AS_FLOAT64: tl.constexpr):
    """The larger of two keys; no key is a NaN as a float64."""
    if AS_FLOAT64:
        is_first = x.to(tl.float64, bitcast=True) > y.to(tl.float64, bitcast=True)
        larger = tl.where(is_first, x, y)
    else:
        larger = tl.maximum(x, y)
    return larger


@triton.jit
def _merge(
    x, LOG_N: tl.constexpr, FIRST: tl.constexpr, PERIOD: tl.constexpr, AS_FLOAT64: tl.constexpr
):
    """Sort runs of 2 ** LOG_N in x [M, L, N] that rise and then fall, or the other way round.

    In every other PERIOD elements, the smaller comes first, from element FIRST * PERIOD on.
    """
    at = tl.arange(0, x.shape[2])[None, None, :]
    for i in tl.static_range(LOG_N - 1, -1, -1):
        other = _swapped(x, 1 << i)
        is_left = at >> i & 1 == 0
        left, right = tl.where(is_left, x, other), tl.where(is_left, other, x)
        larger = _larger(left, right, AS_FLOAT64)
        smaller = left ^ right ^ larger  # a minimum would be one more comparison
        x = tl.where(is_left == (at // PERIOD % 2 != FIRST), larger, smaller)
    return x


@triton.jit
def _thin_out(x, LOG_N: tl.constexpr, LOG_RUN: tl.constexpr, AS_FLOAT64: tl.constexpr):
    """The 2 ** LOG_RUN largest, ascending, of runs that rise and fall in turn."""
    for _ in tl.static_range(LOG_N - LOG_RUN):
        # the larger of each two are the largest, and rise and fall
        pairs = tl.reshape(
            x, [x.shape[0], x.shape[1], x.shape[2] >> (LOG_RUN + 1), 2, 1 << LOG_RUN]
        )
        x = tl.reshape(tl.max(pairs, 3), [x.shape[0], x.shape[1], x.shape[2] // 2])
        x = _merge(x, LOG_RUN, 0, 1 << LOG_RUN, AS_FLOAT64)
    return x


@triton.jit
def _best_up(x, LOG_N: tl.constexpr, LOG_K: tl.constexpr, AS_FLOAT64: tl.constexpr):
    """The 2 ** LOG_K largest of the last axis, ascending; no keys come first if it is shorter."""
    LOG_RUN: tl.constexpr = min(LOG_N, LOG_K)
    for i in tl.static_range(1, LOG_RUN + 1):
        x = _merge(x, i, 0, 1 << i, AS_FLOAT64)
    x = _thin_out(x, LOG_N, LOG_RUN, AS_FLOAT64)
    for i in tl.static_range(LOG_RUN, LOG_K):
        both = tl.join(tl.full(x.shape, NO_KEY_64 if AS_FLOAT64 else NO_KEY, tl.int64), x)
        both = tl.permute(both, [0, 1, 3, 2])
        x = tl.reshape(both, [x.shape[0], x.shape[1], 2 << i])
    return x


@triton.jit
def _shift(x, before, LOG_N: tl.constexpr):
    """x [M, LANES, N] moved on by one KV block, `before` coming in; and what goes out."""
    at = tl.arange(0, 1 << LOG_N)[None, None, :]
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    shifted = bits
    for i in tl.static_range(LOG_N):
        bits = _swapped(bits, 1 << i)
        shifted = tl.where(at % (2 << i) == 1 << i, bits, shifted)
    # now they are in reverse, the last first; lane 0 gets that of lane 3
    last = tl.reshape(tl.sum(tl.where(at == 0, bits, 0), 2), [x.shape[0], 2, 2])
    near = _other(last, 2)
    across = tl.where(tl.arange(0, 2)[None, None, :] == 1, near, _other(near, 1))
    across = tl.reshape(across, [x.shape[0], LANES])
    first = tl.where(tl.arange(0, LANES)[None, :] == 0, before, across)
    shifted = tl.where(at == 0, first[:, :, None], shifted)
    return shifted.to(tl.int32).to(tl.float32, bitcast=True), across


@triton.jit
def _select_kernel(
    q_ptr, k_ptr, lse_ptr, first_ptr, end_ptr, own_ptr, out_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_c, stride_k_d,
    stride_l_b, stride_l_h, stride_l_t, scale, T, n_rows, group,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    RUNS: tl.constexpr, OWN_RUNS: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, LOG_K: tl.constexpr, LOG_N: tl.constexpr,
    LOG_LANE: tl.constexpr, LOG_LISTS: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, LISTS: tl.constexpr,
    AS_FLOAT64: tl.constexpr,
):  # fmt: skip
    """One program chooses for BLOCK_M tokens and a KV head, among BLOCK_K KV blocks at a time."""
    # the last tokens have most to choose from, so they begin
    tile = tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // n_rows
    row = (tl.program_id(0) % n_rows).to(tl.int64)  # of batch and KV head
    b, h = row // HEADS, row % HEADS
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = token < T
    token = tl.minimum(token, T - 1)  # the rest of the tile does as the last token does
    d = tl.arange(0, BLOCK_D)
    first = tl.load(first_ptr + token)

    # columns: a run, then the KV block; a thread has two neighbouring columns of every eight
    PER_LANE: tl.constexpr = 1 << LOG_LANE
    BLOCK_C: tl.constexpr = BLOCK_R * BLOCK_K
    column = tl.arange(0, BLOCK_C)
    c_block = column // 2 % LANES * PER_LANE + column % BLOCK_K // 8 * 2 + column % 2
    c_run = column // BLOCK_K
    j = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)

    k_base = k_ptr + b * stride_k_b + h * stride_k_h
    q_base = q_ptr + b * stride_q_b + h * GROUP * stride_q_h
    l_base = lse_ptr + b * stride_l_b + h * GROUP * stride_l_h + token.to(tl.int64) * stride_l_t
    scale_2 = scale * 1.4426950408889634
    best = tl.full([BLOCK_M, LISTS, 1 << LOG_K], NO_KEY, tl.int64)  # descending
    begin = tl.min(first, 0)
    while begin < FAR:  # once for each packed sequence among the tokens
        # tokens of other sequences have no KV block in this one and see nothing of it
        own = tl.where(first == begin, tl.load(own_ptr + token), -1)
        end = tl.where(first == begin, tl.load(end_ptr + token), begin)
        last = tl.max(own, 0)
        stop = tl.max(end, 0)
        # KV blocks below are for all to choose, and nothing of them is hidden
        plain = tl.min(tl.minimum(own - LOCAL + 1, (end - begin) // OWN_RUNS), 0)
        following = tl.min(tl.where(first > begin, first, FAR), 0)
        carry = (tl.zeros([BLOCK_M, LANES], tl.int64),) * LEVELS
        # more than a head's scores leave no registers for what could be computed before the loop
        for start in tl.range(0, last + 1, BLOCK_K, disable_licm=GROUP > 1):
            is_plain = (start >= SINKS) & (start + BLOCK_K <= plain)
            pooled = ()
            for run in tl.static_range(0, OWN_RUNS, BLOCK_R):
                number = begin + (start + c_block) * OWN_RUNS + run + c_run  # [BLOCK_C]
                k = tl.load(
                    k_base + number.to(tl.int64)[None, :] * stride_k_c + d[:, None] * stride_k_d,
                    mask=(number < stop)[None, :] & (d[:, None] < D), other=0.0,
                )  # [BLOCK_D, BLOCK_C]  # fmt: skip
                weights = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                for g in range(group):  # a number of its own, so that nobody unrolls this
                    q_at = q_base + g * stride_q_h + token.to(tl.int64)[:, None] * stride_q_t
                    q = tl.load(
                        q_at + d[None, :] * stride_q_d, mask=(d < D)[None, :], other=0.0
                    )  # [BLOCK_M, BLOCK_D]
                    lse_2 = tl.load(l_base + g * stride_l_h) * 1.4426950408889634
                    s = tl.dot(q, k, input_precision=PRECISION)
                    weight = tl.exp2(s * scale_2 - lse_2[:, None])
                    weights = weight if GROUP == 1 else weights + weight
                if not is_plain:
                    weights = tl.where(number[None, :] < end[:, None], weights, 0.0)
                weights = tl.reshape(weights, [BLOCK_M, BLOCK_R, PER_LANE // 2, LANES, 2])
                weights = tl.permute(weights, [0, 1, 3, 2, 4])
                weights = tl.reshape(weights, [BLOCK_M, BLOCK_R, LANES, PER_LANE])
                for level in tl.static_range(LEVELS + 1):
                    # how many runs the compressed key shares with the KV block `level` further on
                    offset = run + r - level * OWN_RUNS
                    times = tl.minimum(offset + RUNS, OWN_RUNS) - tl.maximum(offset, 0)
                    times = times[None, :, None, None]
                    part = tl.where(times > 0, weights * times.to(tl.float32), 0.0)
                    part = tl.sum(part, 1)  # [BLOCK_M, LANES, PER_LANE]
                    if run == 0:
                        pooled += (part,)
                    else:
                        pooled = _replaced(pooled, level, pooled[level] + part)
            score = pooled[LEVELS]
            for i in tl.static_range(LEVELS):
                score, out = _shift(score, carry[i], LOG_LANE)
                carry = _replaced(carry, i, out)
                score += pooled[LEVELS - 1 - i]
            score = tl.reshape(tl.maximum(score, 0.0), [BLOCK_M, BLOCK_K])
            block = (start + j)[None, :]
            if not is_plain:
                forced = (block < SINKS) | (block > own[:, None] - LOCAL)
                score = tl.where(forced, float("inf"), score)
                score = tl.where(block <= own[:, None], score, -1.0)
            # scores are not negative, so their bits order as they do; then the first block wins
            low = (block ^ FAR).to(tl.uint32).to(tl.int64)
            key = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
            key = tl.reshape(key, [BLOCK_M, LISTS, BLOCK_K // LISTS])
            best = _larger(_best_up(key, LOG_N, LOG_K, AS_FLOAT64), best, AS_FLOAT64)
            best = _merge(best, LOG_K, 1, 1 << LOG_K, AS_FLOAT64)
        begin = following
    turned = best
    for i in tl.static_range(LOG_K):
        turned = _swapped(turned, 1 << i)
    best = tl.where(tl.arange(0, LISTS)[None, :, None] % 2 == 0, turned, best)
    best = tl.reshape(best, [BLOCK_M, 1, LISTS << LOG_K])
    best = _thin_out(best, LOG_K + LOG_LISTS, LOG_K, AS_FLOAT64)
    at = tl.arange(0, 1 << LOG_K)[None, :]
    taken = (best >= 0) & (at[:, None, :] >= (1 << LOG_K) - K)
    chosen = tl.where(taken, (best & FAR).to(tl.int32) ^ FAR, FAR)
    chosen = tl.reshape(_best_up(chosen, LOG_K, LOG_K, False), [BLOCK_M, 1 << LOG_K])
    chosen = tl.where(chosen == FAR, -1, chosen)
    to = (row * T + token)[:, None] * K + at
    tl.store(out_ptr + to, chosen, mask=live[:, None] & (at < K))


def select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, first: Tensor, end: Tensor, own: Tensor,
    *, k: int, runs: int, own_runs: int, sinks: int, local: int, scale: float,
    tiles: Tiles | None = None,
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
        tiles: How the work is cut.
    """
    batch, heads, n_tokens, head_dim = *k_cmp.shape[:2], *q.shape[2:]
    if tiles is None:
        default = default_tiles(
            k=k, own_runs=own_runs, head_dim=head_dim, dtype=q.dtype, device=q.device
        )
        tiles = SELECT.choose(default, q, head_dim=head_dim, k=k, own_runs=own_runs)
    out = torch.empty((batch, heads, n_tokens, k), dtype=torch.int32, device=q.device)
    rows = batch * heads
    log_k = (k - 1).bit_length()
    _select_kernel[(rows * triton.cdiv(n_tokens, tiles.block_m),)](
        q, k_cmp, lse, first.int(), end.int(), own.int(), out,
        *q.stride(), *k_cmp.stride(), *lse.stride(), scale, n_tokens, rows, q.shape[1] // heads,
        heads, q.shape[1] // heads, head_dim, k, runs, own_runs, sinks, local,
        "tf32x3" if q.dtype == torch.float32 else "tf32",
        padded(head_dim), log_k,
        (tiles.block_k // tiles.lists).bit_length() - 1,
        (tiles.block_k // LANES.value).bit_length() - 1, tiles.lists.bit_length() - 1,
        -(-(runs - 1) // own_runs),
        tiles.block_m, tiles.block_k, tiles.runs, tiles.lists, tiles.as_float64,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out
