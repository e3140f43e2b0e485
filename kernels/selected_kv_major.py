"""Selected attention in the loop order `kv_major`: a program owns a KV block.

It walks the query tokens that selected its KV block, all heads of the group at once, and writes for
each (token, slot, head) a softmax of its own: a normalised partial output and its log-sum-exp. A
second kernel merges the slots of each row as FlashDecoding does. No maximum is shared between rows,
so no logits are too large. Tokens are worked on in chunks, which bounds the scratch.

Source: loop order of FSA (Flash Sparse Attention, Yan et al., 2025, section 3). Different here: the
heads of a group share one list, all KV heads share one launch, partial outputs are normalised, and
the backward writes dQ by slots in the same way.
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
    Lists,
    build_lists,
    read_entry,
    read_position,
)

SCRATCH_BYTES = 240 * 2**20  # of partial results, unless lists would become too short
ROWS_PER_LIST = 128  # fewer would leave the tiles empty


class Tiles(NamedTuple):
    """What can be tuned."""

    block_m: int  # rows (token, head of the group) of a tile
    length: int  # entries of an item
    num_warps: int
    num_stages: int


def forward_tiles(head_dim: int, value_dim: int, group: int, itemsize: int) -> Tiles:
    """Tiles of the forward that run everywhere; small ones, so that many programs fit."""
    row_bytes = triton.next_power_of_2(max(head_dim, value_dim)) * itemsize
    block_m = 64 if row_bytes <= 512 else 32
    return Tiles(block_m, max(1, 8 * block_m // group), 4, 1)


def backward_tiles(head_dim: int, value_dim: int, group: int, itemsize: int) -> Tiles:
    """Tiles of the backward that run everywhere."""
    row_bytes = triton.next_power_of_2(max(head_dim, value_dim)) * itemsize
    block_m = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return Tiles(block_m, max(1, 16 * block_m // group), 4, 2 if row_bytes <= 256 else 1)


class Chunks(NamedTuple):
    """How the work is cut so that the scratch is bounded: launches of whole rows or of parts."""

    tokens: int  # query tokens of a chunk
    rows: int  # (batch, KV head) of a launch; 1 if a row has several chunks


def cut(n_tokens: int, n_rows: int, group: int, n_slots: int, n_blocks: int, bytes_: int) -> Chunks:
    """As much at a time as the scratch holds, but enough to fill the tiles.

    Args:
        n_tokens: T.
        n_rows: B * Hkv.
        group: Query heads of a KV head.
        n_slots: K.
        n_blocks: KV blocks.
        bytes_: Scratch of one (token, slot, head).
    """
    fits = SCRATCH_BYTES // (group * n_slots * bytes_)
    if fits >= n_tokens:
        return Chunks(n_tokens, min(n_rows, fits // max(1, n_tokens)))
    fills = -(-ROWS_PER_LIST * n_blocks // (group * n_slots))
    return Chunks(min(n_tokens, max(fits, fills)), 1)


@triton.jit
def _read_item(
    items_ptr, first_item_ptr, blocks_ptr, first_chunk, end_chunk, S, n_blocks,
    BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """This program's work: (whether there is any, row, first entry, end, first key, end of keys)."""
    item = tl.load(first_item_ptr + first_chunk) + tl.program_id(0)
    there = item < tl.load(first_item_ptr + end_chunk)
    at = items_ptr + item.to(tl.int64) * 4
    row = tl.load(at, mask=there, other=0).to(tl.int64)
    block = tl.load(at + 1, mask=there, other=0)
    first = tl.load(at + 2, mask=there, other=0)
    end = tl.load(at + 3, mask=there, other=0)
    if PACKED:
        first_key = tl.load(blocks_ptr + block)
        end_key = tl.load(blocks_ptr + n_blocks + block)
    else:
        first_key = block * BLOCK_SIZE
        end_key = tl.minimum(first_key + BLOCK_SIZE, S)
    return there, row, first, end, first_key, end_key


@triton.jit
def _read_rows(
    entries_ptr, first, end, tile, chunk_start,
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows of a tile: (alive, token, head in the group, row of the scratch), each [BLOCK_M]."""
    r = tile + tl.arange(0, BLOCK_M)
    entry = first + r // GROUP
    live = entry < end
    code = tl.load(entries_ptr + entry, mask=live, other=0)
    token = code // K
    scratch = (code - chunk_start * K).to(tl.int64) * GROUP + r % GROUP
    return live, token, r % GROUP, scratch


@triton.jit(do_not_specialize=["T", "S", "n_blocks", "first_chunk", "end_chunk", "chunk_size"])
def _slot_forward_kernel(
    q_ptr, k_ptr, v_ptr, entries_ptr, items_ptr, first_item_ptr, blocks_ptr, part_ptr, part_lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    scale, T, S, n_blocks, first_chunk, end_chunk, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program attends with an item's rows to its KV block."""
    there, row, first, end, first_key, end_key = _read_item(
        items_ptr,
        first_item_ptr,
        blocks_ptr,
        first_chunk,
        end_chunk,
        S,
        n_blocks,
        BLOCK_SIZE,
        PACKED,
    )
    if not there:
        return
    b, h = row // HEADS, row % HEADS
    shift = 0 if PACKED else S - T
    n_chunks = tl.cdiv(T, chunk_size)
    chunk_start = (first_chunk % n_chunks) * chunk_size
    # log-sum-exps of the scratch are of base 2
    scale = scale * 1.4426950408889634
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    key = first_key + tl.arange(0, BLOCK_SIZE)  # [BLOCK_SIZE]
    keep = key < end_key
    at = key.to(tl.int64)
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + at[None, :] * stride_k_s
    k = tl.load(
        k_at + d[:, None] * stride_k_d, mask=(d[:, None] < D) & keep[None, :], other=0.0
    )  # [BLOCK_D, BLOCK_SIZE]
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + at[:, None] * stride_v_s
    v = tl.load(
        v_at + dv[None, :] * stride_v_d, mask=(dv[None, :] < DV) & keep[:, None], other=0.0
    )  # [BLOCK_SIZE, BLOCK_DV]
    q_base = q_ptr + b * stride_q_b + h * GROUP * stride_q_h
    scratch_base = (row - first_chunk // n_chunks) * chunk_size * K * GROUP
    for tile in tl.range(0, (end - first) * GROUP, BLOCK_M, num_stages=STAGES):
        live, token, head, scratch = _read_rows(
            entries_ptr, first, end, tile, chunk_start, K, GROUP, BLOCK_M
        )
        q_at = q_base + head.to(tl.int64) * stride_q_h + token.to(tl.int64) * stride_q_t
        q = tl.load(
            q_at[:, None] + d[None, :] * stride_q_d,
            mask=live[:, None] & (d[None, :] < D),
            other=0.0,
        )  # [BLOCK_M, BLOCK_D]
        s = tl.dot(q, k, input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_SIZE]
        if not LOCAL:  # else the KV blocks are full, and before every token
            visible = keep[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= (token + shift)[:, None])
            s = tl.where(visible, s, -float("inf"))
        highest = tl.max(s, 1)  # [BLOCK_M]
        highest = tl.where(highest == -float("inf"), 0.0, highest)  # of rows that are not alive
        p = tl.exp2(s - highest[:, None])
        total = tl.sum(p, 1)
        total = tl.where(total == 0.0, 1.0, total)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        place = scratch_base + scratch
        tl.store(
            part_ptr + place[:, None] * DV + dv[None, :], out.to(part_ptr.dtype.element_ty),
            mask=live[:, None] & (dv[None, :] < DV),
        )  # fmt: skip
        tl.store(part_lse_ptr + place, highest + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["T", "S"])
def _local_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, scale, T, S,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_M neighbouring tokens and a head to what they have in common.

    That is a token's own KV block, the one before and, unless packed, the first, where selected.
    The log-sum-exp that it writes is of base 2.
    """
    shift = 0 if PACKED else S - T
    before = shift % BLOCK_M  # tiles begin where KV blocks may
    n_tiles = tl.cdiv(T + before, BLOCK_M)
    begin = tl.program_id(0) % n_tiles * BLOCK_M - before
    head = (tl.program_id(0) // n_tiles % GROUP).to(tl.int64)
    row = (tl.program_id(0) // n_tiles // GROUP).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    token = begin + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = (token >= 0) & (token < T)
    token = tl.where(live, token, 0)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_K)
    position, n_keys, _, first_key = read_position(rows_ptr, token, T, S, PACKED)
    blocks, _ = read_entry(
        indices_ptr, row, token[:, None], slot[None, :], live[:, None] & (slot[None, :] < K),
        position[:, None], n_keys[:, None], stride_i_b, stride_i_h, stride_i_t, stride_i_k,
        HEADS, BLOCK_SIZE, True, PACKED, True,
    )  # fmt: skip
    own = position // BLOCK_SIZE
    reads_own = live & (tl.max((blocks == own[:, None]).to(tl.int32), 1) > 0)
    reads_previous = live & (tl.max((blocks == own[:, None] - 1).to(tl.int32), 1) > 0)
    reads_previous = reads_previous & (own > 0)
    reads_first = live & (tl.max((blocks == 0).to(tl.int32), 1) > 0) & (own > 1)
    q_at = q_ptr + b * stride_q_b + (h * GROUP + head) * stride_q_h
    q = tl.load(
        q_at + token.to(tl.int64)[:, None] * stride_q_t + d[None, :] * stride_q_d,
        mask=live[:, None] & (d[None, :] < D), other=0.0,
    )  # [BLOCK_M, BLOCK_D]  # fmt: skip
    k_base = k_ptr + b * stride_k_b + h * stride_k_h
    v_base = v_ptr + b * stride_v_b + h * stride_v_h
    scale = scale * 1.4426950408889634
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # keys of the own KV blocks and those before: the last ones up to the tile's end
    end = tl.minimum(begin + BLOCK_M + shift, S)
    reach: tl.constexpr = BLOCK_SIZE * (2 if PACKED or BLOCK_SIZE > BLOCK_M else 1)
    near = tl.maximum((begin + shift - reach) // BLOCK_N, 0) * BLOCK_N
    n_near = tl.cdiv(tl.maximum(end - near, 0), BLOCK_N)
    n_first = 0 if PACKED else BLOCK_SIZE // BLOCK_N
    for i in range(n_near + n_first):
        is_near = i < n_near
        key = tl.where(is_near, near + i * BLOCK_N, (i - n_near) * BLOCK_N) + n  # [BLOCK_N]
        in_sequence = key[None, :] - first_key[:, None]
        block = in_sequence // BLOCK_SIZE
        visible = ((block == own[:, None]) & reads_own[:, None]) | (
            (block == own[:, None] - 1) & reads_previous[:, None]
        )
        visible = visible & (in_sequence >= 0) & (in_sequence <= position[:, None])
        visible = tl.where(is_near, visible, reads_first[:, None])
        inside = key < S
        at = key.to(tl.int64)
        k = tl.load(
            k_base + at[None, :] * stride_k_s + d[:, None] * stride_k_d,
            mask=inside[None, :] & (d[:, None] < D), other=0.0,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        v = tl.load(
            v_base + at[:, None] * stride_v_s + dv[None, :] * stride_v_d,
            mask=inside[:, None] & (dv[None, :] < DV), other=0.0,
        )  # [BLOCK_N, BLOCK_DV]  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        s = tl.where(visible, s, -float("inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        reference = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        highest = new
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    to = (row * GROUP + head) * T + token  # out [B, Hq, T, Dv], lse [B, Hq, T]
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + to, highest + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["T", "S", "first_chunk", "chunk_size"])
def _merge_kernel(
    part_ptr, part_lse_ptr, indices_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, T, S, first_chunk, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program merges the slots of BLOCK_M rows (token, head of the group) of a KV head.

    If LOCAL, what `_local_kernel` wrote to the output is one slot more.
    """
    n_tiles = tl.cdiv(chunk_size * GROUP, BLOCK_M)
    n_chunks = tl.cdiv(T, chunk_size)
    in_launch = (tl.program_id(0) // n_tiles).to(tl.int64)
    row = in_launch + first_chunk // n_chunks
    r = (tl.program_id(0) % n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_chunk, head = r // GROUP, r % GROUP
    token = (first_chunk % n_chunks) * chunk_size + in_chunk
    live = (in_chunk < chunk_size) & (token < T)
    dv = tl.arange(0, BLOCK_DV)
    slot = tl.arange(0, BLOCK_K)
    position, n_keys, _base, _first = read_position(rows_ptr, token, T, S, PACKED)
    _block, listed = read_entry(
        indices_ptr, row, token[:, None], slot[None, :], live[:, None] & (slot[None, :] < K),
        position[:, None], n_keys[:, None], stride_i_b, stride_i_h, stride_i_t, stride_i_k,
        HEADS, BLOCK_SIZE, CAUSAL, PACKED, LOCAL,
    )  # fmt: skip
    place = (in_launch * chunk_size + in_chunk) * K * GROUP + head  # [BLOCK_M] int64
    place = place[:, None] + slot[None, :] * GROUP  # [BLOCK_M, BLOCK_K]
    part_lse = tl.load(part_lse_ptr + place, mask=listed, other=-float("inf"))
    part = tl.load(
        part_ptr + place[:, :, None] * DV + dv[None, None, :],
        mask=listed[:, :, None] & (dv[None, None, :] < DV), other=0.0,
    )  # [BLOCK_M, BLOCK_K, BLOCK_DV]  # fmt: skip
    to = (row * GROUP + head) * T + token  # out [B, Hq, T, Dv], lse [B, Hq, T]
    out_at = out_ptr + to[:, None] * DV + dv[None, :]
    in_out = live[:, None] & (dv[None, :] < DV)
    highest = tl.max(part_lse, 1)
    if LOCAL:
        local_lse = tl.load(lse_ptr + to, mask=live, other=-float("inf"))
        highest = tl.maximum(highest, local_lse)
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp2(part_lse - reference[:, None])
    total = tl.sum(weight, 1)
    acc = tl.sum(part.to(tl.float32) * weight[:, :, None], 1)
    if LOCAL:
        local_weight = tl.exp2(local_lse - reference)
        total += local_weight
        local = tl.load(out_at, mask=in_out, other=0.0)
        acc += local.to(tl.float32) * local_weight[:, None]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_out)
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=live)


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
    there, row, first, end, first_key, end_key = _read_item(
        items_ptr,
        first_item_ptr,
        blocks_ptr,
        first_chunk,
        end_chunk,
        S,
        n_blocks,
        BLOCK_SIZE,
        PACKED,
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
        live, token, head, scratch = _read_rows(
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


LOCAL_TOKENS = 64  # of a program
DELTA_ROWS = 32  # of a program
MERGED_NUMBERS = 2**14  # of partial results that a program holds


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, n_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, n_slots, rows = query_heads // heads, block_indices.shape[3], batch * heads
    tiles = forward_tiles(head_dim, value_dim, group, q.element_size())
    chunks = cut(n_tokens, rows, group, n_slots, place.n_blocks, value_dim * q.element_size() + 4)
    local = causal and n_keys >= n_tokens
    lists = _lists(block_indices, place, n_keys, block_size, causal, local, chunks.tokens, tiles)
    out = q.new_empty((batch, query_heads, n_tokens, value_dim))
    lse = q.new_empty((batch, query_heads, n_tokens), dtype=torch.float32)
    part = q.new_empty((chunks.rows * chunks.tokens * n_slots * group, value_dim))
    part_lse = q.new_empty(part.shape[0], dtype=torch.float32)
    block_d, block_dv = _padded(head_dim), _padded(value_dim)
    block_k = triton.next_power_of_2(n_slots)
    problem = (heads, group, n_slots, head_dim, value_dim, block_size)
    if local:
        n_tiles = triton.cdiv(n_tokens + (place.shift % LOCAL_TOKENS), LOCAL_TOKENS)
        _local_kernel[(rows * group * n_tiles,)](
            q, k, v, block_indices, place.rows, out, lse,
            *q.stride(), *k.stride(), *v.stride(), *block_indices.stride(),
            scale, n_tokens, n_keys, *problem, place.packed, _precision(q),
            block_k, block_d, block_dv, LOCAL_TOKENS, min(64, block_size), num_stages=1,
        )  # fmt: skip
    options = (causal, place.packed, local)
    merged = _merged_rows(block_k, block_dv)
    for first, end in _launches(rows * lists.n_chunks, chunks.rows):
        _slot_forward_kernel[((end - first) * lists.max_items,)](
            q, k, v, lists.entries, lists.items, lists.first_item, place.blocks, part, part_lse,
            *q.stride(), *k.stride(), *v.stride(),
            scale, n_tokens, n_keys, place.n_blocks, first, end, chunks.tokens,
            *problem, *options, _precision(q), block_d, block_dv, tiles.block_m, tiles.num_stages,
            num_warps=tiles.num_warps,
        )  # fmt: skip
        _merge_kernel[((end - first) * triton.cdiv(chunks.tokens * group, merged),)](
            part, part_lse, block_indices, place.rows, out, lse, *block_indices.stride(),
            n_tokens, n_keys, first, chunks.tokens, heads, group, n_slots, value_dim, block_size,
            *options, block_k, block_dv, merged,
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, out: Tensor, lse: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v; sums into those of k and v run in any order."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, n_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, n_slots, rows = query_heads // heads, block_indices.shape[3], batch * heads
    tiles = backward_tiles(head_dim, value_dim, group, q.element_size())
    chunks = cut(n_tokens, rows, group, n_slots, place.n_blocks, head_dim * q.element_size())
    lists = _lists(block_indices, place, n_keys, block_size, causal, False, chunks.tokens, tiles)
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


def _lists(
    block_indices: Tensor, place: Geometry, n_keys: int, block_size: int, causal: bool,
    local: bool, chunk: int, tiles: Tiles,
) -> Lists:  # fmt: skip
    return build_lists(
        block_indices, place, n_keys,
        block_size=block_size, causal=causal, local=local, chunk=chunk, length=tiles.length,
    )  # fmt: skip


def _launches(n_chunks: int, step: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + step, n_chunks)) for first in range(0, n_chunks, step))


def _merged_rows(block_k: int, width: int) -> int:
    return max(1, MERGED_NUMBERS // (block_k * width))


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _precision(q: Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"
