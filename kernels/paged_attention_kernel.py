"""The Triton kernel of `paged_attention`: a program owns some rows of a KV head, or a share of it.

Rows are the heads of a group for some tokens, so that keys and values are read once for all of
them. Where there are few, as in decoding, several programs share the keys.
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
from sparse_compile.kernels.merge_splits import merge, n_splits
from sparse_compile.kernels.online_softmax import add_keys, add_sink, normalised
from sparse_compile.kernels.paged_kernels import find_pages
from sparse_compile.kernels.tuning import Tuned

PAGED = Tuned["Tiles"]("paged_attention")
MOST_SPLITS = 64  # of the keys of a row: what one program merges
SHARED_KEYS = 256  # of a program at least, where the table is full


class Tiles(NamedTuple):
    """What can be tuned."""

    block_n: int  # keys at a time
    programs_per_sm: int  # below that many, programs share the keys of a row
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
    return Tiles(block_n, 2, 4 if rows <= 64 else 8, 3 if itemsize == 2 else 1)


def rows_of(n_tokens: int, group: int) -> int:
    """The (token, head) rows that a program would like to own."""
    return max(16, min(128, triton.next_power_of_2(n_tokens * group)))


@triton.jit(do_not_specialize=["T", "n_entries", "n_pages", "window", "stride_t_b"])
def _paged_kernel(
    q_ptr, pool_ptr, table_ptr, seq_lens_ptr, n_new_ptr, out_ptr, lse_ptr, operands, places,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_t_b,  # table [B, L], last axis contiguous
    unit, T, n_entries, n_pages, window,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, SINK: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, ALL_NEW: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_M (token, head) rows of a KV head to a share of the keys.

    The output is [B, Hq, T, SPLITS, D], the log-sum-exp [B, Hq, T, SPLITS]; `unit` makes powers of
    two of logits.
    """
    n_tiles = tl.cdiv(T * GROUP, BLOCK_M)
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % n_tiles
    of = (tl.program_id(0) // (SPLITS * n_tiles)).to(tl.int64)
    b, kv_head = of // HEADS, of % HEADS
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    t, h = row // GROUP, (kv_head * GROUP).to(tl.int32) + row % GROUP
    n_keys = tl.load(seq_lens_ptr + b)
    count = T if ALL_NEW else tl.load(n_new_ptr + b)
    position = n_keys - count + t
    live = (t < T) & (t < count) & (position >= 0)
    position = tl.maximum(position, 0)  # formulas load by it
    first_token = tile * BLOCK_M // GROUP
    last_token = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUP, count - 1)
    begin = 0
    end = tl.minimum(n_keys, n_entries * PAGE_SIZE)
    if CAUSAL:
        end = tl.minimum(end, n_keys - count + last_token + 1)
    if WINDOWED:
        begin = tl.maximum(n_keys - count + first_token - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.where(first_token < count, end, begin)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), SPLITS) * BLOCK_N
    first = begin + split * share
    last = tl.minimum(first + share, end)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    q_at = q_ptr + b * stride_q_b + h.to(tl.int64) * stride_q_h + t.to(tl.int64) * stride_q_t
    q = tl.load(
        q_at[:, None] + d[None, :] * stride_q_d, mask=live[:, None] & (d[None, :] < D), other=0.0
    )  # [BLOCK_M, BLOCK_D]
    table_at = table_ptr + b * stride_t_b
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        s = start + n
        page, there = find_pages(table_at, s, s < last, n_entries, n_pages, PAGE_SIZE)
        place = ((page * HEADS + kv_head) * 2 * PAGE_SIZE + s % PAGE_SIZE) * D
        k = tl.load(
            pool_ptr + place[None, :] + d[:, None],
            mask=there[None, :] & (d[:, None] < D),
            other=0.0,
        )  # [BLOCK_D, BLOCK_N]
        v = tl.load(
            pool_ptr + (place + PAGE_SIZE * D)[:, None] + d[None, :],
            mask=there[:, None] & (d[None, :] < D), other=0.0,
        )  # [BLOCK_N, BLOCK_D]  # fmt: skip
        z = tl.dot(q, k, input_precision=PRECISION)
        if LOGIT is not None:
            z = LOGIT(z, b, h[:, None], position[:, None], s[None, :], operands, places)
        keep = there[None, :] & live[:, None]
        if CAUSAL:
            keep = keep & (s[None, :] <= position[:, None])
        if WINDOWED:
            keep = keep & (s[None, :] > position[:, None] - window)
        if KEEP is not None:
            keep = keep & KEEP(b, h[:, None], position[:, None], s[None, :], operands, places)
        z = tl.where(keep, z, -float("inf"))
        acc, total, highest = add_keys(acc, total, highest, z, v, unit, PRECISION)
    if SINK is not None:
        sink = SINK(b, h[:, None], position[:, None], operands, places)
        sink = tl.sum(tl.zeros([BLOCK_M, 1], tl.float32) + sink, 1)  # [BLOCK_M], also of a number
        sink = tl.where(live & (split == 0), sink, -float("inf"))  # counted once
        acc, total, highest = add_sink(acc, total, highest, sink)
    acc = normalised(acc, total)
    to = ((b * HEADS * GROUP + h) * T + t) * SPLITS + split  # [BLOCK_M]
    tl.store(
        out_ptr + to[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=(t < T)[:, None] & (d[None, :] < D),
    )  # fmt: skip
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=t < T)


def forward(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor, n_new: Tensor | None,
    operands: Sequence[Tensor], program: str, causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, D] and its natural log-sum-exp; arguments as of the reference."""
    batch, query_heads, n_tokens, head_dim = q.shape
    n_pages, heads, _, page_size, _ = pool.shape
    group, n_entries = query_heads // heads, block_table.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    wanted = rows_of(n_tokens, group)
    rows = min(wanted, 128 if q.element_size() == 2 and head_dim <= 128 else 32)
    default = default_tiles(head_dim, rows, q.element_size())
    tiles = PAGED.choose(default, q, head_dim=head_dim, page_size=page_size, rows=wanted)
    n_programs = batch * heads * triton.cdiv(n_tokens * group, rows)
    splits = n_splits(
        n_programs, max(1, min(MOST_SPLITS, n_entries * page_size // SHARED_KEYS)),
        tiles.programs_per_sm * n_multiprocessors(q.device),
    )  # fmt: skip
    part, part_lse = out, lse
    if splits > 1:
        part = out.new_empty((*lse.shape, splits, head_dim), dtype=torch.float32)
        part_lse = lse.new_empty((*lse.shape, splits))
    made = printed.functions(
        printed.request(program, operands, q, n_entries * page_size, approximate=are_compiled())
    )
    parsed = printed.parsed(program)
    unit = parsed.scale * printed.LOG2_E if printed.is_plain(parsed) else 1.0
    _paged_kernel[(n_programs * splits,)](
        q, pool, block_table, seq_lens, seq_lens if n_new is None else n_new, part, part_lse,
        *printed.arguments(operands), *q.stride(), block_table.stride(0),
        unit, n_tokens, n_entries, n_pages, window,
        made.logit, made.keep, made.sink, heads, group, head_dim, page_size, causal,
        window > 0, n_new is None, precision(q.dtype), splits,
        padded(head_dim), rows, tiles.block_n, tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip
    if splits > 1:
        merge(part, part_lse, out, lse)
    return out, lse
