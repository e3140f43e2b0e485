"""Triton kernels of `progressive_attention`: what a round lists is read, and rounds are merged.

Programs that share the pages of a KV head keep their own online softmax from round to round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import triton_functions as printed
from sparse_compile.kernels.launching import are_compiled, n_multiprocessors, padded, precision
from sparse_compile.kernels.merge_splits import n_splits
from sparse_compile.kernels.online_softmax import add_keys, normalised
from sparse_compile.kernels.paged_kernels import find_pages
from sparse_compile.kernels.progressive_attention import LEVELS, ROUNDS
from sparse_compile.kernels.progressive_order import (
    _plan_kernel,
    _rank_kernel,
    _score_kernel,
    real_weight,
)
from sparse_compile.kernels.tuning import Tuned

PROGRESSIVE = Tuned["Tiles"]("progressive_attention")
MOST_SPLITS = 64  # of the pages of a KV head: what one program merges
SHARED_KEYS = 1024  # of a program at least, if all pages of a full table were read
RANKED = 2048  # shares of a program that gives levels
PLANNED = 8192  # shares at a time


class Tiles(NamedTuple):
    """What can be tuned."""

    block_s: int  # keys of a program that scores
    block_n: int  # keys at a time
    programs_per_sm: int  # below that many, programs share the pages of a KV head
    num_warps: int
    num_stages: int


def default_tiles(head_dim: int, rows: int, itemsize: int) -> Tiles:
    """Tiles that run everywhere.

    Args:
        head_dim: D.
        rows: Rows of a program, a power of two.
        itemsize: Bytes of a number.
    """
    block_n = 64 if padded(head_dim) * itemsize <= 256 else 32 if itemsize == 2 else 16
    is_wide = itemsize == 4 and head_dim > 128
    block_s = 128 if itemsize == 2 and rows <= 32 else 32 if is_wide else 64
    return Tiles(block_s, block_n, 4, 8 if is_wide else 4, 3 if itemsize == 2 else 1)


def rows_of(group: int) -> int:
    """Rows of a tile of queries."""
    return max(16, triton.next_power_of_2(group))


@triton.jit(do_not_specialize=["n_entries", "n_pages", "window", "splits", "stride_t_b"])
def _read_kernel(
    q_ptr, pool_ptr, table_ptr, seq_lens_ptr, pages_ptr, count_before_ptr, count_ptr, part_ptr,
    part_lse_ptr, operands, places, stride_q_b, stride_q_h, stride_q_d,
    stride_t_b,  # table [B, L], last axis contiguous
    unit, n_entries, n_pages, window, splits,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr, FIRST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program attends to a share of the pages that a round lists for a KV head.

    Partial outputs are [B, Hq, splits, D], their log-sum-exps [B, Hq, splits] in powers of two.
    """
    PAGES: tl.constexpr = BLOCK_N // PAGE_SIZE
    split = tl.program_id(0) % splits
    of = (tl.program_id(0) // splits).to(tl.int64)
    b, kv_head = of // HEADS, of % HEADS
    last = tl.load(count_ptr + of)
    first = 0 if FIRST else tl.load(count_before_ptr + of)
    n_tiles = tl.cdiv(last - first, PAGES)
    if not FIRST:  # noqa: SIM102 (the compiler knows this one, not the next)
        if split >= n_tiles:
            return
    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = row < GROUP
    h = (kv_head * GROUP).to(tl.int32) + row
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    n_keys = tl.load(seq_lens_ptr + b)
    position = n_keys - 1
    wanted = live[:, None] & (d < D)[None, :]
    q_at = q_ptr + b * stride_q_b + h.to(tl.int64)[:, None] * stride_q_h
    q = tl.load(q_at + d[None, :] * stride_q_d, mask=wanted, other=0.0)  # [BLOCK_M, BLOCK_D]
    to = (b * HEADS * GROUP + h) * splits + split  # [BLOCK_M]
    part_at = part_ptr + to[:, None] * D + d[None, :]
    if FIRST:
        highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        highest = tl.load(part_lse_ptr + to, mask=live, other=-float("inf"))
        total = tl.where(highest == -float("inf"), 0.0, 1.0)
        acc = tl.load(part_at, mask=wanted, other=0.0)
        tl.debug_barrier()  # all threads have what they load before one stores
    table_at = table_ptr + b * stride_t_b
    for tile in tl.range(split, n_tiles, splits, num_stages=STAGES):
        i = first + tile * PAGES + n // PAGE_SIZE
        entry = tl.load(pages_ptr + of * n_entries + i, mask=i < last, other=0)
        s = entry * PAGE_SIZE + n % PAGE_SIZE
        page, there = find_pages(
            table_at, s, (i < last) & (s < n_keys), n_entries, n_pages, PAGE_SIZE
        )
        place = ((page * HEADS + kv_head) * 2 * PAGE_SIZE + s % PAGE_SIZE) * D
        k = tl.load(
            pool_ptr + place[None, :] + d[:, None],
            mask=there[None, :] & (d[:, None] < D), other=0.0,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        v = tl.load(
            pool_ptr + (place + PAGE_SIZE * D)[:, None] + d[None, :],
            mask=there[:, None] & (d[None, :] < D), other=0.0,
        )  # [BLOCK_N, BLOCK_D]  # fmt: skip
        z = tl.dot(q, k, input_precision=PRECISION)
        if LOGIT is not None:
            z = LOGIT(z, b, h[:, None], position, s[None, :], operands, places)
        keep = there[None, :] & live[:, None]
        if WINDOWED:
            keep = keep & (s > position - window)[None, :]
        if KEEP is not None:
            keep = keep & KEEP(b, h[:, None], position, s[None, :], operands, places)
        z = tl.where(keep, z, -float("inf"))
        acc, total, highest = add_keys(acc, total, highest, z, v, unit, PRECISION)
    tl.store(part_at, normalised(acc, total), mask=wanted)
    tl.store(part_lse_ptr + to, highest + tl.log2(total), mask=live)


@triton.jit
def _finish_kernel(
    part_ptr, part_lse_ptr, total_ptr, rest_ptr, out_ptr, lse_ptr, mass_ptr,
    D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program merges what was found for a query head, and estimates the mass of it."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    at = row * SPLITS + split
    part_lse = tl.load(part_lse_ptr + at, mask=split < SPLITS, other=-float("inf"))  # [BLOCK_S]
    part = tl.load(
        part_ptr + at[:, None] * D + d[None, :],
        mask=(split < SPLITS)[:, None] & (d < D)[None, :], other=0.0,
    )  # [BLOCK_S, BLOCK_D]  # fmt: skip
    highest = tl.max(part_lse, 0)
    weight = tl.exp2(part_lse - tl.where(highest == -float("inf"), 0.0, highest))
    amount = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(amount == 0.0, 1.0, amount)  # [BLOCK_D]
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    lse = highest + tl.log2(amount)
    tl.store(lse_ptr + row, lse * 0.6931471805599453)
    real, rest = real_weight(lse, tl.load(total_ptr + row)), tl.load(rest_ptr + row)
    doubt = tl.sqrt(tl.maximum((1.0 - rest) / real, 1.0))
    mass = tl.minimum(real / (real + doubt * rest), 1.0 - rest)
    tl.store(mass_ptr + row, tl.where(rest == 0.0, 1.0, mass))


def forward(
    q: Tensor, pool: Tensor, codes: Tensor, scales: Tensor, block_table: Tensor, seq_lens: Tensor,
    operands: Sequence[Tensor], program: str, p: float, p_rows: Tensor | None, window: int,
    sinks: int, local: int, min_pages: int, max_pages: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp, estimated mass, how many pages were read, and which."""
    batch, query_heads, _, head_dim = q.shape
    n_pages, heads, _, page_size, _ = pool.shape
    group, n_entries = query_heads // heads, block_table.shape[1]
    out, n_rows = q.new_empty(q.shape), batch * heads
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    mass = lse.new_empty((batch, query_heads))
    pages = block_table.new_empty((batch, heads, n_entries))
    if out.numel() == 0 or n_entries == 0:
        counts = block_table.new_zeros((batch, heads))
        return out.zero_(), lse.fill_(-torch.inf), mass.fill_(1.0), counts, pages
    rows = rows_of(group)
    default = default_tiles(head_dim, rows, q.element_size())
    tiles = PROGRESSIVE.choose(default, q, head_dim=head_dim, page_size=page_size, rows=rows)
    made = printed.functions(
        printed.request(program, operands, q, n_entries * page_size, approximate=are_compiled())
    )
    parsed = printed.parsed(program)
    unit = parsed.scale * printed.LOG2_E if printed.is_plain(parsed) else 1.0
    formulas, strides = printed.arguments(operands), (q.stride(0), q.stride(1), q.stride(3))
    limits = (unit, n_entries, n_pages, window)
    facts = (made.logit, made.keep, heads, group, head_dim, page_size, window > 0)

    # levels
    scored = max(1, tiles.block_s // page_size)  # pages of a program
    n_tiles, block_g = triton.cdiv(n_entries, scored), triton.next_power_of_2(group)
    weight = lse.new_empty((batch, heads, group, n_entries))
    tile_weight = lse.new_empty((batch, heads, group, n_tiles))
    total = lse.new_empty((batch, heads, group))
    level = torch.empty((batch, heads, n_entries), dtype=torch.int16, device=q.device)
    sums = block_table.new_zeros((batch, heads, group + 1, LEVELS))
    _score_kernel[(n_rows * n_tiles,)](
        q, codes, scales, block_table, seq_lens, weight, tile_weight, pages, *formulas, *strides,
        block_table.stride(0), *limits, *facts, precision(q.dtype), padded(head_dim // 2), rows,
        scored, num_warps=max(4, tiles.block_s // 32),
    )  # fmt: skip
    ranked = max(16, RANKED // block_g)
    _rank_kernel[(n_rows * triton.cdiv(n_entries, ranked),)](
        weight, tile_weight, seq_lens, total, level, sums, n_entries, n_tiles, sinks, local, heads,
        group, page_size, scored, block_g, ranked, ranked,
    )  # fmt: skip

    # rounds
    pages_at_once = max(1, tiles.block_n // page_size)
    splits = n_splits(
        n_rows, max(1, min(MOST_SPLITS, n_entries * page_size // SHARED_KEYS)),
        tiles.programs_per_sm * n_multiprocessors(q.device),
    )  # fmt: skip
    part = lse.new_empty((batch, query_heads, splits, head_dim))
    part_lse = lse.new_empty((batch, query_heads, splits))
    counts = block_table.new_empty((ROUNDS, batch, heads))
    edges = block_table.new_empty((ROUNDS, batch, heads, 2))
    rests = lse.new_empty((ROUNDS, batch, heads, group))
    for number in range(ROUNDS):
        before = max(0, number - 1)
        _plan_kernel[(n_rows,)](
            weight, level, sums, total, seq_lens, part_lse, lse if p_rows is None else p_rows, pages,
            counts[before], edges[before], rests[before], counts[number], edges[number],
            rests[number], p, n_entries, min_pages, max_pages or n_entries, splits, heads, group,
            page_size, number == 0, number == ROUNDS - 1, p_rows is not None, block_g, MOST_SPLITS,
            max(16, PLANNED // block_g),
            num_warps=16,
        )  # fmt: skip
        _read_kernel[(n_rows * splits,)](
            q, pool, block_table, seq_lens, pages, counts[before], counts[number], part, part_lse,
            *formulas, *strides, block_table.stride(0), *limits, splits, *facts, number == 0,
            precision(q.dtype), padded(head_dim), rows, pages_at_once * page_size,
            tiles.num_stages, num_warps=tiles.num_warps,
        )  # fmt: skip
    _finish_kernel[(batch * query_heads,)](
        part, part_lse, total, rests[-1], out, lse, mass, head_dim, splits,
        triton.next_power_of_2(splits), padded(head_dim),
    )  # fmt: skip
    return out, lse, mass, counts[-1], pages
