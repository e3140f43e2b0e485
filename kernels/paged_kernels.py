"""Triton kernels that write new tokens into pages and read pages back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.paged_cache import LARGEST, LEVELS

APPENDED = 16  # tokens of a program, at most
GATHERED = 32  # positions of a program
LARGEST_SCALE = tl.constexpr(LARGEST)
LARGEST_CODE = tl.constexpr(float(LEVELS))


@triton.jit
def find_pages(table_ptr, position, live, n_entries, n_pages, PAGE_SIZE: tl.constexpr):
    """The pages of positions of a sequence whose row of the table is at `table_ptr`.

    Returns:
        Pages in int64, 0 where there is none, and where there is one.
    """
    entry = position // PAGE_SIZE
    live = live & (position >= 0) & (entry < n_entries)
    page = tl.load(table_ptr + entry, mask=live, other=-1).to(tl.int64)
    live = live & (page >= 0) & (page < n_pages)
    return tl.where(live, page, 0), live


@triton.jit(do_not_specialize=["T", "n_entries", "n_pages", "stride_t_b"])
def _append_kernel(
    k_ptr, v_ptr, pool_ptr, table_ptr, seq_lens_ptr, n_new_ptr, codes_ptr, scales_ptr,
    stride_k_b, stride_k_h, stride_k_t, stride_k_d,
    stride_v_b, stride_v_h, stride_v_t, stride_v_d,
    stride_t_b,  # table [B, L], last axis contiguous
    T, n_entries, n_pages,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr, ALL_NEW: tl.constexpr,
    SKETCHED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_T tokens of one (sequence, KV head)."""
    HALF: tl.constexpr = (D + 1) // 2
    n_tiles = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0).to(tl.int64)
    b, h = program // n_tiles // HEADS, program // n_tiles % HEADS
    t = (program % n_tiles).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    count = T if ALL_NEW else tl.load(n_new_ptr + b)
    position = tl.load(seq_lens_ptr + b) - count + t
    live = (t < T) & (t < count)
    page, live = find_pages(
        table_ptr + b * stride_t_b, position, live, n_entries, n_pages, PAGE_SIZE
    )
    d = tl.arange(0, BLOCK_H)  # [BLOCK_H] of each half of the channels
    first = live[:, None] & (d[None, :] < HALF)
    second = live[:, None] & (HALF + d[None, :] < D)
    place = (page * HEADS + h) * 2 * PAGE_SIZE + position % PAGE_SIZE  # of the key
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + (t.to(tl.int64) * stride_k_t)[:, None]
    k_low = tl.load(k_at + d[None, :] * stride_k_d, mask=first, other=0.0)  # [BLOCK_T, BLOCK_H]
    k_high = tl.load(k_at + (HALF + d[None, :]) * stride_k_d, mask=second, other=0.0)
    at = pool_ptr + place[:, None] * D + d[None, :]
    number = pool_ptr.dtype.element_ty
    tl.store(at, k_low.to(number), mask=first)
    tl.store(at + HALF, k_high.to(number), mask=second)
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + (t.to(tl.int64) * stride_v_t)[:, None]
    v_low = tl.load(v_at + d[None, :] * stride_v_d, mask=first, other=0.0)
    v_high = tl.load(v_at + (HALF + d[None, :]) * stride_v_d, mask=second, other=0.0)
    tl.store(at + PAGE_SIZE * D, v_low.to(number), mask=first)
    tl.store(at + PAGE_SIZE * D + HALF, v_high.to(number), mask=second)
    if SKETCHED:
        k_low, k_high = k_low.to(tl.float32), k_high.to(tl.float32)
        inf = float("inf")
        low = tl.minimum(
            tl.min(tl.where(first, k_low, inf), 1), tl.min(tl.where(second, k_high, inf), 1)
        )
        high = tl.maximum(
            tl.max(tl.where(first, k_low, -inf), 1), tl.max(tl.where(second, k_high, -inf), 1)
        )
        lost = tl.sum((k_low - k_low) + (k_high - k_high), 1)  # 0; NaN if a channel is not finite
        step = tl.math.div_rn(high - low, tl.full([BLOCK_T], LARGEST_CODE, tl.float32))
        step = tl.minimum(tl.maximum(step, -LARGEST_SCALE), LARGEST_SCALE) + lost
        low = tl.minimum(tl.maximum(low, -LARGEST_SCALE), LARGEST_SCALE) + lost
        step, low = step.to(tl.float16), low.to(tl.float16)
        row = (page * HEADS + h) * PAGE_SIZE + position % PAGE_SIZE
        tl.store(scales_ptr + row * 2, step, mask=live)
        tl.store(scales_ptr + row * 2 + 1, low, mask=live)
        step = step.to(tl.float32)
        step = tl.where(step > 0, step, 1.0)[:, None]
        codes = _code(k_low, low, step) | (_code(k_high, low, step) << 4)
        tl.store(codes_ptr + row[:, None] * HALF + d[None, :], codes, mask=first)


@triton.jit
def _code(k, low, step):
    """Codes of channels, 0 to 15 as uint8; 0 for what is no number."""
    away = k - low.to(tl.float32)[:, None]
    code = tl.floor(tl.math.div_rn(away, tl.broadcast_to(step, away.shape)) + 0.5)
    code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), LARGEST_CODE), 0.0)
    return code.to(tl.int32).to(tl.uint8)


@triton.jit(do_not_specialize=["n_keys", "n_entries", "n_pages", "stride_t_b"])
def _gather_kernel(
    pool_ptr, table_ptr, seq_lens_ptr, k_ptr, v_ptr, stride_t_b, n_keys, n_entries, n_pages,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program reads BLOCK_S positions of one (sequence, KV head)."""
    n_tiles = tl.cdiv(n_keys, BLOCK_S)
    program = tl.program_id(0).to(tl.int64)
    row = program // n_tiles
    b, h = row // HEADS, row % HEADS
    s = (program % n_tiles).to(tl.int32) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    wanted = s < n_keys
    page, live = find_pages(
        table_ptr + b * stride_t_b, s, wanted & (s < tl.load(seq_lens_ptr + b)), n_entries, n_pages,
        PAGE_SIZE,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    place = (page * HEADS + h) * 2 * PAGE_SIZE + s % PAGE_SIZE
    there = live[:, None] & (d[None, :] < D)
    at = pool_ptr + place[:, None] * D + d[None, :]
    k = tl.load(at, mask=there, other=0.0)  # [BLOCK_S, BLOCK_D]
    v = tl.load(at + PAGE_SIZE * D, mask=there, other=0.0)
    to = (row * n_keys + s)[:, None] * D + d[None, :]
    written = wanted[:, None] & (d[None, :] < D)
    tl.store(k_ptr + to, k, mask=written)
    tl.store(v_ptr + to, v, mask=written)


def append(
    k: Tensor, v: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    n_new: Tensor | None, codes: Tensor | None, scales: Tensor | None,
) -> None:  # fmt: skip
    """Write new tokens; arguments as of `paged_append_ref`."""
    batch, heads, n_tokens, head_dim = k.shape
    n_pages, page_size = pool.shape[0], pool.shape[3]
    block_t = min(APPENDED, triton.next_power_of_2(max(n_tokens, 1)))
    sketched = codes is not None and scales is not None
    _append_kernel[(batch * heads * triton.cdiv(n_tokens, block_t),)](
        k, v, pool, block_table, seq_lens, seq_lens if n_new is None else n_new,
        codes if sketched else pool, scales if sketched else pool,
        *k.stride(), *v.stride(), block_table.stride(0), n_tokens, block_table.shape[1], n_pages,
        heads, head_dim, page_size, n_new is None, sketched,
        triton.next_power_of_2((head_dim + 1) // 2), block_t,
    )  # fmt: skip


def gather(
    pool: Tensor, block_table: Tensor, seq_lens: Tensor, n_keys: int
) -> tuple[Tensor, Tensor]:
    """Read pages back; arguments as of `paged_gather_ref`."""
    n_pages, heads, _, page_size, head_dim = pool.shape
    batch = block_table.shape[0]
    k, v = (torch.empty((batch, heads, n_keys, head_dim), dtype=pool.dtype, device=pool.device)
            for _ in range(2))  # fmt: skip
    _gather_kernel[(batch * heads * triton.cdiv(n_keys, GATHERED),)](
        pool, block_table, seq_lens, k, v, block_table.stride(0), n_keys, block_table.shape[1],
        n_pages, heads, head_dim, page_size, triton.next_power_of_2(head_dim), GATHERED,
    )  # fmt: skip
    return k, v
