"""The gradients of selected attention: a program owns a KV block.

It walks the query tokens that selected its KV block, all heads of the group at once, sums the
gradients of keys and values, and writes that of each query by slots. A second kernel adds the slots.
Tokens are worked on in chunks, which bounds the scratch.

Source: loop order of FSA (Flash Sparse Attention, Yan et al., 2025, section 3), in five products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.selected_lists import (
    Geometry,
    build_lists,
    cut,
    read_entry,
    read_item,
    read_position,
    read_rows,
)

SCRATCH_BYTES = 240 * 2**20  # of partial results, unless lists would become too short
DELTA_ROWS = 32  # of a program
MERGED_NUMBERS = 2**14  # of partial results that a program holds


class Tiles(NamedTuple):
    """What can be tuned."""

    block_m: int  # rows (token, head of the group) of a tile
    length: int  # entries of an item
    num_warps: int
    num_stages: int


def default_tiles(head_dim: int, value_dim: int, group: int, itemsize: int) -> Tiles:
    """Tiles that run everywhere."""
    row_bytes = triton.next_power_of_2(max(head_dim, value_dim)) * itemsize
    block_m = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return Tiles(block_m, max(1, 16 * block_m // group), 4, 2 if row_bytes <= 256 else 1)


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    out_ptr, grad_ptr, grad_lse_ptr, delta_ptr,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d, T, n_rows,
    HEADS: tl.constexpr, DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums dO * O over every row, less the gradient of the log-sum-exp."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # row of [B, Hq, T]
    live = at < n_rows
    dv = tl.arange(0, BLOCK_DV)
    there = live[:, None] & (dv[None, :] < DV)
    out = tl.load(out_ptr + at[:, None] * DV + dv[None, :], mask=there, other=0.0)
    bh = at // T
    g_at = (bh // HEADS) * stride_g_b + (bh % HEADS) * stride_g_h + (at % T) * stride_g_t
    grad = tl.load(grad_ptr + g_at[:, None] + dv[None, :] * stride_g_d, mask=there, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=live, other=0.0)
    tl.store(delta_ptr + at, delta, mask=live)


@triton.jit(do_not_specialize=["T", "S", "n_blocks", "first_chunk", "end_chunk", "chunk_size"])
def _slot_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, entries_ptr, items_ptr, first_item_ptr,
    blocks_ptr, part_ptr, dk_ptr, dv_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    scale, T, S, n_blocks, first_chunk, end_chunk, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program gives the gradients of its KV block from an item's rows, and dQ by slots."""
    item = tl.load(first_item_ptr + first_chunk) + tl.program_id(0)
    there = item < tl.load(first_item_ptr + end_chunk)
    row, first, end, first_key, end_key = read_item(
        items_ptr, blocks_ptr, item, there, S, n_blocks, BLOCK_SIZE, PACKED
    )
    if not there:
        return
    b, h = row // HEADS, row % HEADS
    shift = 0 if PACKED else S - T
    n_chunks = tl.cdiv(T, chunk_size)
    chunk_start = (first_chunk % n_chunks) * chunk_size
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    e = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    key = first_key + tl.arange(0, BLOCK_SIZE)  # [BLOCK_SIZE]
    keep = key < end_key
    at = key.to(tl.int64)
    in_k = keep[:, None] & (d[None, :] < D)
    in_v = keep[:, None] & (e[None, :] < DV)
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + at[:, None] * stride_k_s
    k = tl.load(k_at + d[None, :] * stride_k_d, mask=in_k, other=0.0)  # [BLOCK_SIZE, BLOCK_D]
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + at[:, None] * stride_v_s
    v = tl.load(v_at + e[None, :] * stride_v_d, mask=in_v, other=0.0)  # [BLOCK_SIZE, BLOCK_DV]
    q_base = q_ptr + b * stride_q_b + h * GROUP * stride_q_h
    g_base = grad_ptr + b * stride_g_b + h * GROUP * stride_g_h
    scratch_base = (row - first_chunk // n_chunks) * chunk_size * K * GROUP
    dk = tl.zeros([BLOCK_SIZE, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_SIZE, BLOCK_DV], tl.float32)
    for tile in tl.range(0, (end - first) * GROUP, BLOCK_M, num_stages=STAGES):
        live, token, head, scratch = read_rows(
            entries_ptr, first, end, tile, chunk_start, K, GROUP, BLOCK_M
        )
        in_q = live[:, None] & (d[None, :] < D)
        q_at = q_base + head.to(tl.int64) * stride_q_h + token.to(tl.int64) * stride_q_t
        q = tl.load(q_at[:, None] + d[None, :] * stride_q_d, mask=in_q, other=0.0)
        g_at = g_base + head.to(tl.int64) * stride_g_h + token.to(tl.int64) * stride_g_t
        grad = tl.load(
            g_at[:, None] + e[None, :] * stride_g_d,
            mask=live[:, None] & (e[None, :] < DV), other=0.0,
        )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
        of = (row * GROUP + head) * T + token
        lse = tl.load(lse_ptr + of, mask=live, other=0.0)
        delta = tl.load(delta_ptr + of, mask=live, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = live[:, None] & keep[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= (token + shift)[:, None])
        # the difference is small, so only its rounding counts, not that of large logits
        p = tl.exp2((s - lse[:, None]) * 1.4426950408889634)  # [BLOCK_M, BLOCK_SIZE]
        p = tl.where(visible, p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None]) * scale).to(k.dtype)
        dv += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        tl.store(
            part_ptr + (scratch_base + scratch)[:, None] * D + d[None, :],
            dq.to(part_ptr.dtype.element_ty), mask=in_q,
        )  # fmt: skip
    dk_at = dk_ptr + (row * S + at)[:, None] * D + d[None, :]
    tl.atomic_add(dk_at, dk, mask=in_k, sem="relaxed")
    dv_at = dv_ptr + (row * S + at)[:, None] * DV + e[None, :]
    tl.atomic_add(dv_at, dv, mask=in_v, sem="relaxed")


@triton.jit(do_not_specialize=["T", "S", "first_chunk", "chunk_size"])
def _sum_slots_kernel(
    part_ptr, indices_ptr, rows_ptr, dq_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, T, S, first_chunk, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program sums the slots of BLOCK_M rows of dQ."""
    n_tiles = tl.cdiv(chunk_size * GROUP, BLOCK_M)
    n_chunks = tl.cdiv(T, chunk_size)
    in_launch = (tl.program_id(0) // n_tiles).to(tl.int64)
    row = in_launch + first_chunk // n_chunks
    r = (tl.program_id(0) % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_chunk, head = r // GROUP, r % GROUP
    token = (first_chunk % n_chunks) * chunk_size + in_chunk
    live = (in_chunk < chunk_size) & (token < T)
    d = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, BLOCK_K)
    position, n_keys, _base, _first = read_position(rows_ptr, token, T, S, PACKED)
    _block, listed = read_entry(
        indices_ptr, row, token[:, None], slot[None, :], live[:, None] & (slot[None, :] < K),
        position[:, None], n_keys[:, None], stride_i_b, stride_i_h, stride_i_t, stride_i_k,
        HEADS, BLOCK_SIZE, CAUSAL, PACKED, False,
    )  # fmt: skip
    place = (in_launch * chunk_size + in_chunk) * K * GROUP + head  # [BLOCK_M] int64
    place = place[:, None] + slot[None, :] * GROUP  # [BLOCK_M, BLOCK_K]
    part = tl.load(
        part_ptr + place[:, :, None] * D + d[None, None, :],
        mask=listed[:, :, None] & (d[None, None, :] < D), other=0.0,
    )  # [BLOCK_M, BLOCK_K, BLOCK_D]  # fmt: skip
    acc = tl.sum(part.to(tl.float32), 1)
    to = (row * GROUP + head) * T + token
    tl.store(
        dq_ptr + to[:, None] * D + d[None, :], acc.to(dq_ptr.dtype.element_ty),
        mask=live[:, None] & (d[None, :] < D),
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, out: Tensor, lse: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v; sums into those of k and v run in any order."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, n_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, n_slots, rows = query_heads // heads, block_indices.shape[3], batch * heads
    tiles = default_tiles(head_dim, value_dim, group, q.element_size())
    bytes_ = head_dim * q.element_size()
    chunks = cut(n_tokens, rows, group, n_slots, place.n_blocks, bytes_, SCRATCH_BYTES)
    lists = build_lists(
        block_indices, place, n_keys, block_size=block_size, causal=causal, local=False,
        chunk=chunks.tokens, length=tiles.length,
    )  # fmt: skip
    block_d, block_dv = _padded(head_dim), _padded(value_dim)
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(lse.numel(), DELTA_ROWS),)](
        out, grad_out, lse if grad_lse is None else grad_lse.contiguous(), delta,
        *grad_out.stride(), n_tokens, lse.numel(),
        query_heads, value_dim, grad_lse is not None, block_dv, DELTA_ROWS,
    )  # fmt: skip
    dq = q.new_empty(q.shape)
    dk = q.new_zeros(k.shape, dtype=torch.float32)
    dv = q.new_zeros(v.shape, dtype=torch.float32)
    part = q.new_empty((chunks.rows * chunks.tokens * n_slots * group, head_dim))
    common = (block_size, causal, place.packed)
    block_k = triton.next_power_of_2(n_slots)
    merged = _merged_rows(block_k, block_d)
    for first, end in _launches(rows * lists.n_chunks, chunks.rows):
        sizes = (n_tokens, n_keys, place.n_blocks, first, end, chunks.tokens)
        _slot_backward_kernel[((end - first) * lists.max_items,)](
            q, k, v, grad_out, lse, delta, lists.entries, lists.items, lists.first_item,
            place.blocks, part, dk, dv,
            *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), scale, *sizes,
            heads, group, n_slots, head_dim, value_dim, *common, _precision(q),
            block_d, block_dv, tiles.block_m, tiles.num_stages, num_warps=tiles.num_warps,
        )  # fmt: skip
        _sum_slots_kernel[((end - first) * triton.cdiv(chunks.tokens * group, merged),)](
            part, block_indices, place.rows, dq, *block_indices.stride(),
            n_tokens, n_keys, first, chunks.tokens,
            heads, group, n_slots, head_dim, *common, block_k, block_d, merged,
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _launches(n_chunks: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, n_chunks)) for first in range(0, n_chunks, step))


def _merged_rows(block_k: int, width: int) -> int:
    return max(1, MERGED_NUMBERS // (block_k * width))


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"
