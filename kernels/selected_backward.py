"""The gradients of selected attention: a program owns a KV block.

It walks the query tokens that selected its KV block, all heads of the group at once, sums the
gradients of keys and values, and writes that of each query by slots. A second kernel adds the slots.
Tokens are worked on in chunks, which bounds the scratch.

Source: loop order of FSA (Flash Sparse Attention, Yan et al., 2025, section 3), in five products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.delta import delta
from sparse_compile.kernels.launching import padded, precision
from sparse_compile.kernels.selected_lists import (
    UNROLLED,
    Geometry,
    build_lists,
    cut,
    read_entry,
    read_item,
    read_position,
    span,
    widened,
)
from sparse_compile.kernels.tuning import Tuned

SUMMED_ROWS = 8  # of a program
SCRATCH_BYTES = 240 * 2**20  # of partial results, unless lists would become too short


BACKWARD = Tuned["Tiles"]("selected_backward")


class Tiles(NamedTuple):
    """What can be tuned."""

    block_m: int  # rows (token, head of the group) of a tile
    length: int  # entries of an item
    num_warps: int
    num_stages: int


def default_tiles(head_dim: int, value_dim: int, group: int, itemsize: int) -> Tiles:
    """Tiles that run everywhere."""
    if itemsize == 4:  # without matrix units all is in registers; larger tiles spill
        return Tiles(16, max(1, 512 // group), 8, 1)
    warps = 4 if max(head_dim, value_dim) <= 128 else 8
    return Tiles(32, max(1, 1024 // group), warps, 1)


@triton.jit(do_not_specialize=["T", "S", "n_blocks", "first_chunk", "end_chunk", "chunk_size"])
def _gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, entries_ptr, items_ptr,
    first_item_ptr, blocks_ptr, part_ptr, dk_ptr, dv_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    scale, T, S, n_blocks, first_chunk, end_chunk, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program gives the gradients of its KV block from an item's rows, and dQ by slots.

    That of the queries is not yet scaled.
    """
    item = tl.load(first_item_ptr + first_chunk) + tl.program_id(0)
    if item >= tl.load(first_item_ptr + end_chunk):
        return
    n_chunks = tl.cdiv(T, chunk_size)
    chunk_start = first_chunk % n_chunks * chunk_size
    row, first, end, first_key, end_key = read_item(
        items_ptr, blocks_ptr, item, S, n_blocks, BLOCK_SIZE, PACKED
    )
    b, h = row // HEADS, row % HEADS
    shift = 0 if PACKED else S - T
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
    lse_base = lse_ptr + row * GROUP * T
    delta_base = delta_ptr + row * GROUP * T
    part_base = part_ptr + (row - first_chunk // n_chunks) * chunk_size * K * GROUP * D
    dk = tl.zeros([BLOCK_SIZE, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_SIZE, BLOCK_DV], tl.float32)
    for tile in tl.range(0, (end - first) * GROUP, BLOCK_M, num_stages=STAGES):
        r = tile + tl.arange(0, BLOCK_M)  # row of the item: entry, head of the group
        live = first + r // GROUP < end
        code = tl.load(entries_ptr + first + r // GROUP, mask=live, other=0)
        head, token = r % GROUP, code // K
        q_at = widened(head, WIDE) * stride_q_h + widened(token, WIDE) * stride_q_t
        in_q = live[:, None] & (d[None, :] < D)
        q = tl.load(
            q_base + (q_at[:, None] + d[None, :] * stride_q_d), mask=in_q, other=0.0
        )  # [BLOCK_M, BLOCK_D]
        g_at = widened(head, WIDE) * stride_g_h + widened(token, WIDE) * stride_g_t
        grad = tl.load(
            g_base + (g_at[:, None] + e[None, :] * stride_g_d),
            mask=live[:, None] & (e[None, :] < DV), other=0.0,
        )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
        of = head * T + token
        lse = tl.load(lse_base + of, mask=live, other=0.0)
        delta = tl.load(delta_base + of, mask=live, other=0.0)
        # keys down and rows across: the weights go into the products as they lie in registers
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_SIZE, BLOCK_M]
        visible = live[None, :] & keep[:, None]
        if CAUSAL:
            visible = visible & (key[:, None] <= (token + shift)[None, :])
        # the difference is small, so only its rounding counts, not that of large logits
        p = tl.exp2((s * scale - lse[None, :]) * 1.4426950408889634)
        p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(k.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        place = widened(code - chunk_start * K, WIDE) * GROUP + head
        tl.store(
            part_base + (place[:, None] * D + d[None, :]), dq.to(part_ptr.dtype.element_ty),
            mask=in_q,
        )  # fmt: skip
    dk_at = dk_ptr + (row * S + at)[:, None] * D + d[None, :]
    tl.atomic_add(dk_at, dk * scale, mask=in_k, sem="relaxed")
    dv_at = dv_ptr + (row * S + at)[:, None] * DV + e[None, :]
    tl.atomic_add(dv_at, dv, mask=in_v, sem="relaxed")


@triton.jit(do_not_specialize=["T", "S", "first_chunk", "chunk_size"])
def _sum_slots_kernel(
    part_ptr, indices_ptr, rows_ptr, dq_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, scale, T, S, first_chunk, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program sums the slots of BLOCK_R rows of dQ."""
    per_row = tl.cdiv(chunk_size * GROUP, BLOCK_R)
    n_chunks = tl.cdiv(T, chunk_size)
    in_launch = (tl.program_id(0) // per_row).to(tl.int64)
    row = in_launch + first_chunk // n_chunks
    chunk_start = first_chunk % n_chunks * chunk_size
    scratch_base = in_launch * chunk_size * K * GROUP
    r = tl.program_id(0) % per_row * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    in_chunk, head = r // GROUP, r % GROUP
    token = chunk_start + in_chunk
    live = (in_chunk < chunk_size) & (token < T)
    d = tl.arange(0, BLOCK_D)
    position, n_keys, _base, _first = read_position(rows_ptr, token, T, S, PACKED)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    place = scratch_base + in_chunk * K * GROUP + head
    for slots in range(0, K, UNROLLED):
        for i in tl.static_range(UNROLLED):
            slot = token * 0 + slots + i
            _block, listed = read_entry(
                indices_ptr, row, token, slot, live & (slot < K), position, n_keys,
                stride_i_b, stride_i_h, stride_i_t, stride_i_k,
                HEADS, BLOCK_SIZE, CAUSAL, PACKED, False,
            )  # fmt: skip
            part = tl.load(
                part_ptr + (place + slot * GROUP)[:, None] * D + d[None, :],
                mask=listed[:, None] & (d[None, :] < D), other=0.0,
            )  # [BLOCK_R, BLOCK_D]  # fmt: skip
            acc += part.to(tl.float32)
    to = (row * GROUP + head) * T + token
    tl.store(
        dq_ptr + to[:, None] * D + d[None, :], (acc * scale).to(dq_ptr.dtype.element_ty),
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
    default = default_tiles(head_dim, value_dim, group, q.element_size())
    tiles = BACKWARD.choose(
        default, q, head_dim=head_dim, value_dim=value_dim, block_size=block_size, group=group,
        n_tokens=n_tokens,
    )  # fmt: skip
    bytes_ = head_dim * q.element_size()
    chunks = cut(n_tokens, rows, group, n_slots, place.n_blocks, bytes_, SCRATCH_BYTES)
    lists = build_lists(
        block_indices, place, n_keys, block_size=block_size, causal=causal, local=False,
        chunk=chunks.tokens, length=tiles.length,
    )  # fmt: skip
    block_d, block_dv = padded(head_dim), padded(value_dim)
    row_delta = delta(out, grad_out, grad_lse)
    dq = q.new_empty(q.shape)
    dk = q.new_zeros(k.shape, dtype=torch.float32)
    dv = q.new_zeros(v.shape, dtype=torch.float32)
    part = q.new_empty((chunks.rows * chunks.tokens * n_slots * group, head_dim))
    widest = max(span(q[0, :group]), span(grad_out[0, :group]), part.numel(), group * n_tokens)
    per_row = triton.cdiv(chunks.tokens * group, SUMMED_ROWS)
    common = (block_size, causal, place.packed)
    n_chunks = rows * lists.n_chunks
    for first in range(0, n_chunks, chunks.rows):
        end = min(first + chunks.rows, n_chunks)
        _gradient_kernel[((end - first) * lists.max_items,)](
            q, k, v, grad_out, lse, row_delta, lists.entries, lists.items, lists.first_item,
            place.blocks, part, dk, dv,
            *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(),
            scale, n_tokens, n_keys, place.n_blocks, first, end, chunks.tokens,
            heads, group, n_slots, head_dim, value_dim, *common,
            precision(q.dtype), widest >= 2**31,
            block_d, block_dv, tiles.block_m, tiles.num_stages, num_warps=tiles.num_warps,
        )  # fmt: skip
        _sum_slots_kernel[((end - first) * per_row,)](
            part, block_indices, place.rows, dq, *block_indices.stride(),
            scale, n_tokens, n_keys, first, chunks.tokens,
            heads, group, n_slots, head_dim, *common, block_d, SUMMED_ROWS,
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)
