"""The gradients of selected attention: a program owns a KV block.

It walks the query tokens that selected its KV block, all heads of the group at once, sums the
gradients of keys and values, and writes that of each query by slots. A second kernel adds the slots
and rounds the sums that are complete. Tokens are worked on in chunks, which bounds the scratch.

Source: loop order of FSA (Flash Sparse Attention, Yan et al., 2025, section 3), in five products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.delta import delta
from sparse_compile.kernels.launching import Repeated, padded, precision
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
ROUNDED = 4096  # sums of dK or dV that a program rounds
SCRATCH_BYTES = 512 * 2**20  # of partial results, unless lists would become too short
PREFERRED_ROWS = 1024  # of a list; more of them read more queries than the L2 cache holds


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
    return Tiles(32, max(1, 1536 // group), warps, 1)


@triton.jit(
    do_not_specialize=["T", "S", "n_blocks", "first_chunk", "end_chunk", "chunk_size", "n_sums"]
)
def _gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, entries_ptr, items_ptr,
    first_item_ptr, blocks_ptr, part_ptr, dk_ptr, dv_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    scale, T, S, n_blocks, first_chunk, end_chunk, chunk_size, n_sums,
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
    before = ((row * tl.cdiv(T, chunk_size) - first_chunk) * chunk_size * K).to(tl.int32)
    dk = tl.zeros([BLOCK_SIZE, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_SIZE, BLOCK_DV], tl.float32)
    r = tl.arange(0, BLOCK_M)  # row of the item: entry, head of the group
    code = tl.load(entries_ptr + first + r // GROUP, mask=first + r // GROUP < end, other=0)
    for _ in tl.range(0, (end - first) * GROUP, BLOCK_M, num_stages=STAGES):
        live = first + r // GROUP < end
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
        place = widened(before + code, WIDE) * GROUP + head
        r += BLOCK_M
        there = first + r // GROUP < end
        code = tl.load(entries_ptr + first + r // GROUP, mask=there, other=0)  # of the next tile
        tl.store(
            part_ptr + (place[:, None] * D + d[None, :]), dq.to(part_ptr.dtype.element_ty),
            mask=in_q,
        )  # fmt: skip
    to = (row % n_sums) * S + at
    tl.atomic_add(dk_ptr + (to[:, None] * D + d[None, :]), dk * scale, mask=in_k, sem="relaxed")
    tl.atomic_add(dv_ptr + (to[:, None] * DV + e[None, :]), dv, mask=in_v, sem="relaxed")


@triton.jit
def _sum_slots(
    part_ptr, indices_ptr, rows_ptr, dq_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, scale, T, S, tile, row, chunk_start, chunk_size,
    scratch_base,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums the slots of BLOCK_R rows (token, head of the group) of dQ."""
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    in_chunk, head = r // GROUP, r % GROUP
    token = chunk_start + in_chunk
    live = (in_chunk < chunk_size) & (token < T)
    d = tl.arange(0, BLOCK_D)
    position, n_keys, _base, _first = read_position(rows_ptr, token, T, S, PACKED)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    place = scratch_base + in_chunk * K * GROUP + head
    some: tl.constexpr = UNROLLED if K > UNROLLED else K
    for slots in range(0, K, some):
        for i in tl.static_range(some):
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


@triton.jit
def _round(sums_ptr, to_ptr, at, first, S, D: tl.constexpr, BLOCK: tl.constexpr):
    """Moves BLOCK numbers of a row's sums [S, D] to the gradient; leaves zeros."""
    some = first + tl.arange(0, BLOCK)  # [BLOCK]
    inside = some < S.to(tl.int64) * D
    value = tl.load(sums_ptr + some, mask=inside, other=0.0)
    tl.store(to_ptr + at + some, value.to(to_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # another thread may be the one that loads what this one clears
    tl.store(sums_ptr + some, tl.zeros_like(value), mask=inside)


@triton.jit(do_not_specialize=["T", "S", "first_chunk", "end_chunk", "chunk_size", "n_sums"])
def _finish_kernel(
    part_ptr, indices_ptr, rows_ptr, dq_ptr, dk_sums_ptr, dv_sums_ptr, dk_ptr, dv_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k,
    scale, T, S, first_chunk, end_chunk, chunk_size, n_sums,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the slots of dQ after a launch, and rounds dK and dV of the rows that end in it."""
    n_chunks = tl.cdiv(T, chunk_size)
    per_chunk = tl.cdiv(chunk_size * GROUP, BLOCK_R)
    program = tl.program_id(0).to(tl.int64)
    in_launch = program // per_chunk
    chunk = first_chunk + in_launch
    if chunk < end_chunk:
        _sum_slots(
            part_ptr, indices_ptr, rows_ptr, dq_ptr,
            stride_i_b, stride_i_h, stride_i_t, stride_i_k, scale, T, S,
            (program % per_chunk).to(tl.int32), chunk // n_chunks,
            (chunk % n_chunks).to(tl.int32) * chunk_size, chunk_size,
            in_launch * chunk_size * K * GROUP,
            HEADS, GROUP, K, D, BLOCK_SIZE, CAUSAL, PACKED, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        program -= (end_chunk - first_chunk).to(tl.int64) * per_chunk
        of_keys = tl.cdiv(S.to(tl.int64) * D, BLOCK)
        per_row = of_keys + tl.cdiv(S.to(tl.int64) * DV, BLOCK)
        row = first_chunk // n_chunks + program // per_row
        tile = program % per_row
        if tile < of_keys:
            sums = dk_sums_ptr + (row % n_sums) * S * D
            _round(sums, dk_ptr, row * S * D, tile * BLOCK, S, D, BLOCK)
        else:
            sums = dv_sums_ptr + (row % n_sums) * S * DV
            _round(sums, dv_ptr, row * S * DV, (tile - of_keys) * BLOCK, S, DV, BLOCK)


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
    chunks = cut(
        n_tokens, rows, group, n_slots, place.n_blocks, bytes_, SCRATCH_BYTES,
        preferred=PREFERRED_ROWS,
    )  # fmt: skip
    lists = build_lists(
        block_indices, place, n_keys, block_size=block_size, causal=causal, local=False,
        chunk=chunks.tokens, length=tiles.length, whole=max(1, tiles.block_m // group),
    )  # fmt: skip
    block_d, block_dv = padded(head_dim), padded(value_dim)
    row_delta = delta(out, grad_out, grad_lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    n_chunks = rows * lists.n_chunks
    n_sums = min(rows, triton.cdiv(chunks.at_once, lists.n_chunks) + 1)  # rows of a launch
    dk_sums, dv_sums = (x.new_zeros((n_sums, *x.shape[2:]), dtype=torch.float32) for x in (k, v))
    part = q.new_empty((chunks.at_once * chunks.tokens * n_slots * group, head_dim))
    widest = max(span(q[0, :group]), span(grad_out[0, :group]), part.numel(), group * n_tokens)
    per_chunk = triton.cdiv(chunks.tokens * group, SUMMED_ROWS)
    per_row = triton.cdiv(n_keys * head_dim, ROUNDED) + triton.cdiv(n_keys * value_dim, ROUNDED)
    attend = Repeated(_gradient_kernel, num_warps=tiles.num_warps)
    finish = Repeated(_finish_kernel)
    tensors = (
        q, k, v, grad_out, lse, row_delta, lists.entries, lists.items, lists.first_item,
        place.blocks, part, dk_sums, dv_sums,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(),
        scale, n_tokens, n_keys, place.n_blocks,
    )  # fmt: skip
    finished = (
        part, block_indices, place.rows, dq, dk_sums, dv_sums, dk, dv, *block_indices.stride(),
        scale, n_tokens, n_keys,
    )  # fmt: skip
    common = (
        heads, group, n_slots, head_dim, value_dim, block_size, causal, place.packed,
    )  # fmt: skip
    constants = (
        *common, precision(q.dtype), widest >= 2**31, block_d, block_dv, tiles.block_m,
        tiles.num_stages,
    )  # fmt: skip
    for first in range(0, n_chunks, chunks.at_once):
        end = min(first + chunks.at_once, n_chunks)
        these = (first, end, chunks.tokens, n_sums)
        attend((end - first) * lists.max_items, *tensors, *these, *constants)
        ended = end // lists.n_chunks - first // lists.n_chunks  # rows
        n_programs = (end - first) * per_chunk + ended * per_row
        finish(n_programs, *finished, *these, *common, block_d, SUMMED_ROWS, ROUNDED)
    return dq, dk, dv
