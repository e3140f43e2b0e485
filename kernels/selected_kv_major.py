"""Selected attention in the loop order `kv_major`: a program owns a KV block.

It walks the query tokens that selected its KV block, all heads of the group at once, and writes for
each (token, slot, head) a softmax of its own: a normalised partial output and its log-sum-exp. A
second step merges the slots of each row as FlashDecoding does. No maximum is shared between rows,
so no logits are too large. Tokens are worked on in chunks, which bounds the scratch; a launch
attends in one chunk and merges the one before.

Source: loop order of FSA (Flash Sparse Attention, Yan et al., 2025, section 3). Different here: the
heads of a group share one list, all KV heads share one launch, partial outputs are normalised, and
the KV blocks that neighbours have in common are read densely.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.launching import Repeated, padded, precision
from sparse_compile.kernels.online_softmax import add_keys, normalised
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
    # a factor above zero, so that the largest score is the largest product
    sign = tl.where(scale < 0, -1.0, 1.0)
    scale = tl.maximum(tl.abs(scale), 1e-30) * 1.4426950408889634
    q = (q * sign).to(q.dtype)
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
        begin_key = tl.where(is_near, near + i * BLOCK_N, (i - n_near) * BLOCK_N)
        key = begin_key + n  # [BLOCK_N]
        if PACKED:
            in_sequence = key[None, :] - first_key[:, None]
            block = in_sequence // BLOCK_SIZE
            visible = ((block == own[:, None]) & reads_own[:, None]) | (
                (block == own[:, None] - 1) & reads_previous[:, None]
            )
            visible = visible & (in_sequence >= 0) & (in_sequence <= position[:, None])
        else:  # the keys are of one KV block
            block = begin_key // BLOCK_SIZE
            reads = ((block == own) & reads_own) | ((block == own - 1) & reads_previous)
            reads = tl.where(is_near, reads, reads_first)
            visible = reads[:, None] & (key[None, :] <= position[:, None])
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
        s = tl.dot(q, k, input_precision=PRECISION)
        s = tl.where(visible, s, -float("inf"))
        acc, total, highest = add_keys(acc, total, highest, s, v, scale, PRECISION)
    acc = normalised(acc, total)
    to = (row * GROUP + head) * T + token  # out [B, Hq, T, Dv], lse [B, Hq, T]
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + to, highest + tl.log2(total), mask=live)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, entries_ptr, items_ptr, blocks_ptr, part_ptr, part_lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    scale, T, S, n_blocks, item, first_chunk, n_chunks, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Attends with an item's rows to its KV block."""
    row, first, end, first_key, end_key = read_item(
        items_ptr, blocks_ptr, item, S, n_blocks, BLOCK_SIZE, PACKED
    )
    b, h = row // HEADS, row % HEADS
    shift = 0 if PACKED else S - T
    # log-sum-exps of the scratch are of base 2; the factor is above zero
    sign = tl.where(scale < 0, -1.0, 1.0)
    scale = tl.maximum(tl.abs(scale), 1e-30) * 1.4426950408889634
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    key = first_key + tl.arange(0, BLOCK_SIZE)  # [BLOCK_SIZE]
    keep = key < end_key
    at = key.to(tl.int64)
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + at[None, :] * stride_k_s
    k = tl.load(
        k_at + d[:, None] * stride_k_d, mask=(d[:, None] < D) & keep[None, :], other=0.0
    )  # [BLOCK_D, BLOCK_SIZE]
    k = (k * sign).to(k.dtype)
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + at[:, None] * stride_v_s
    v = tl.load(
        v_at + dv[None, :] * stride_v_d, mask=(dv[None, :] < DV) & keep[:, None], other=0.0
    )  # [BLOCK_SIZE, BLOCK_DV]
    q_base = q_ptr + b * stride_q_b + h * GROUP * stride_q_h
    before = ((row * n_chunks - first_chunk) * chunk_size * K).to(tl.int32)  # (token, slot)
    r = tl.arange(0, BLOCK_M)  # row of the item: entry, head of the group
    code = tl.load(entries_ptr + first + r // GROUP, mask=first + r // GROUP < end, other=0)
    for _ in range(0, (end - first) * GROUP, BLOCK_M):
        live = first + r // GROUP < end
        head, token = r % GROUP, code // K
        q_at = widened(head, WIDE) * stride_q_h + widened(token, WIDE) * stride_q_t
        q = tl.load(
            q_base + (q_at[:, None] + d[None, :] * stride_q_d),
            mask=live[:, None] & (d[None, :] < D), other=0.0,
        )  # [BLOCK_M, BLOCK_D]  # fmt: skip
        place = widened(before + code, WIDE) * GROUP + head
        r += BLOCK_M
        there = first + r // GROUP < end
        code = tl.load(entries_ptr + first + r // GROUP, mask=there, other=0)  # of the next tile
        s = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_SIZE]
        if not LOCAL:  # else the KV blocks are full, and before every token
            visible = keep[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= (token + shift)[:, None])
            s = tl.where(visible, s, -float("inf"))
        highest = tl.max(s, 1) * scale  # [BLOCK_M]
        highest = tl.where(highest == -float("inf"), 0.0, highest)  # of rows that are not alive
        p = tl.exp2(s * scale - highest[:, None])
        total = tl.sum(p, 1)
        total = tl.where(total == 0.0, 1.0, total)
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        tl.store(
            part_ptr + (place[:, None] * DV + dv[None, :]), out.to(part_ptr.dtype.element_ty),
            mask=live[:, None] & (dv[None, :] < DV),
        )  # fmt: skip
        tl.store(part_lse_ptr + place, highest + tl.log2(total), mask=live)


@triton.jit
def _merge(
    part_ptr, part_lse_ptr, indices_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, T, S, tile, row, chunk_start, chunk_size,
    scratch_base,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    STARTED: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Merges the slots of BLOCK_R rows (token, head of the group) of a KV head.

    If STARTED, what an earlier kernel wrote to the output is one slot more.
    """
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    in_chunk, head = r // GROUP, r % GROUP
    token = chunk_start + in_chunk
    live = (in_chunk < chunk_size) & (token < T)
    dv = tl.arange(0, BLOCK_DV)
    position, n_keys, _base, _first = read_position(rows_ptr, token, T, S, PACKED)
    to = (row * GROUP + head) * T + token  # out [B, Hq, T, Dv], lse [B, Hq, T]
    out_at = out_ptr + to[:, None] * DV + dv[None, :]
    in_out = live[:, None] & (dv[None, :] < DV)
    place = scratch_base + in_chunk * K * GROUP + head  # [BLOCK_R]
    highest = tl.full([BLOCK_R], -float("inf"), tl.float32)
    if STARTED:
        highest = tl.load(lse_ptr + to, mask=live, other=-float("inf"))
    before_lse = highest
    some: tl.constexpr = UNROLLED if K > UNROLLED else K
    for slots in range(0, K, some):
        for i in tl.static_range(some):
            slot = token * 0 + slots + i
            _block, listed = read_entry(
                indices_ptr, row, token, slot, live & (slot < K), position, n_keys,
                stride_i_b, stride_i_h, stride_i_t, stride_i_k,
                HEADS, BLOCK_SIZE, CAUSAL, PACKED, LOCAL,
            )  # fmt: skip
            at = part_lse_ptr + place + slot * GROUP
            highest = tl.maximum(highest, tl.load(at, mask=listed, other=-float("inf")))
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    if STARTED:
        total = tl.exp2(before_lse - reference)
        acc = tl.load(out_at, mask=in_out, other=0.0).to(tl.float32) * total[:, None]
    for slots in range(0, K, some):
        for i in tl.static_range(some):
            slot = token * 0 + slots + i
            _block, listed = read_entry(
                indices_ptr, row, token, slot, live & (slot < K), position, n_keys,
                stride_i_b, stride_i_h, stride_i_t, stride_i_k,
                HEADS, BLOCK_SIZE, CAUSAL, PACKED, LOCAL,
            )  # fmt: skip
            at = place + slot * GROUP
            part_lse = tl.load(part_lse_ptr + at, mask=listed, other=-float("inf"))
            part = tl.load(
                part_ptr + at[:, None] * DV + dv[None, :],
                mask=listed[:, None] & (dv[None, :] < DV), other=0.0,
            )  # [BLOCK_R, BLOCK_DV]  # fmt: skip
            weight = tl.exp2(part_lse - reference)
            total += weight
            acc += part.to(tl.float32) * weight[:, None]
    acc = normalised(acc, total)
    if STARTED:  # the threads that write a row are not all that read what was there
        tl.debug_barrier()
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=in_out)
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit(
    do_not_specialize=[
        "T", "S", "n_blocks", "first", "end", "merge_first", "n_merges", "chunk_size",
    ]
)  # fmt: skip
def _slots_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, rows_ptr, entries_ptr, items_ptr, first_item_ptr, blocks_ptr,
    part_ptr, part_lse_ptr, merge_part_ptr, merge_part_lse_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k,
    scale, T, S, n_blocks, first, end, merge_first, n_merges, chunk_size,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    STARTED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Attends in the chunks from `first` to `end`, and merges what the launch before attended with.

    The two kinds of programs alternate: one computes and writes while the other reads.
    """
    n_chunks = tl.cdiv(T, chunk_size)
    program = tl.program_id(0).to(tl.int64)
    merge = program * n_merges // tl.num_programs(0)  # programs before this one that merge
    if (program + 1) * n_merges // tl.num_programs(0) > merge:
        per_chunk = tl.cdiv(chunk_size * GROUP, BLOCK_R)
        in_launch = merge // per_chunk
        chunk = merge_first + in_launch
        _merge(
            merge_part_ptr, merge_part_lse_ptr, indices_ptr, rows_ptr, out_ptr, lse_ptr,
            stride_i_b, stride_i_h, stride_i_t, stride_i_k, T, S,
            (merge % per_chunk).to(tl.int32), chunk // n_chunks,
            (chunk % n_chunks).to(tl.int32) * chunk_size, chunk_size,
            in_launch * chunk_size * K * GROUP,
            HEADS, GROUP, K, DV, BLOCK_SIZE, CAUSAL, PACKED, LOCAL, STARTED, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    else:
        item = tl.load(first_item_ptr + first) + (program - merge).to(tl.int32)
        if item < tl.load(first_item_ptr + end):
            _attend(
                q_ptr, k_ptr, v_ptr, entries_ptr, items_ptr, blocks_ptr, part_ptr, part_lse_ptr,
                stride_q_b, stride_q_h, stride_q_t, stride_q_d,
                stride_k_b, stride_k_h, stride_k_s, stride_k_d,
                stride_v_b, stride_v_h, stride_v_s, stride_v_d,
                scale, T, S, n_blocks, item, first, n_chunks, chunk_size,
                HEADS, GROUP, K, D, DV, BLOCK_SIZE, CAUSAL, PACKED, LOCAL, PRECISION,
                WIDE, BLOCK_D, BLOCK_DV, BLOCK_M,
            )  # fmt: skip


SCRATCH_BYTES = 240 * 2**20  # of partial results, unless lists would become too short
LOCAL_TOKENS = 64  # of a program


KV_MAJOR = Tuned["Tiles"]("selected_kv_major")


class Tiles(NamedTuple):
    """What can be tuned."""

    block_m: int  # rows (token, head of the group) of a tile
    length: int  # entries of an item
    num_warps: int
    merged: int  # rows that a program merges
    registers: int | None  # of a thread: so few that more programs fit
    local_registers: int | None  # the same for what is read densely


def default_tiles(head_dim: int, value_dim: int, group: int, itemsize: int) -> Tiles:
    """Tiles that run everywhere; small ones, so that many programs fit."""
    if itemsize == 4:  # without matrix units all is in registers; larger tiles spill
        return Tiles(32, max(1, 256 // group), 8, 8, None, None)
    largest = max(head_dim, value_dim)
    registers = (128, 168) if largest <= 128 else (None, None)
    return Tiles(64, max(1, 512 // group), 4 if largest <= 192 else 8, 8, *registers)


def _tiles_for(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> Tiles:
    head_dim, value_dim, group = q.shape[3], v.shape[3], q.shape[1] // k.shape[1]
    default = default_tiles(head_dim, value_dim, group, q.element_size())
    return KV_MAJOR.choose(
        default, q, head_dim=head_dim, value_dim=value_dim, block_size=block_size, group=group,
        n_tokens=q.shape[2],
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, n_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, n_slots = query_heads // heads, block_indices.shape[3]
    out = q.new_empty((batch, query_heads, n_tokens, value_dim))
    lse = q.new_empty((batch, query_heads, n_tokens), dtype=torch.float32)
    local = causal and n_keys >= n_tokens
    if local:
        tiles = _tiles_for(q, k, v, block_size)
        some = LOCAL_TOKENS if q.element_size() == 2 else 16  # more would spill
        n_tiles = triton.cdiv(n_tokens + (place.shift % some), some)
        _local_kernel[(batch * query_heads * n_tiles,)](
            q, k, v, block_indices, place.rows, out, lse,
            *q.stride(), *k.stride(), *v.stride(), *block_indices.stride(),
            scale, n_tokens, n_keys,
            heads, group, n_slots, head_dim, value_dim, block_size, place.packed, precision(q.dtype),
            triton.next_power_of_2(n_slots), padded(head_dim), padded(value_dim),
            some, min(64, block_size),
            num_warps=tiles.num_warps, num_stages=1, maxnreg=tiles.local_registers,
        )  # fmt: skip
    attend(
        q, k, v, block_indices, place, out, lse,
        block_size=block_size, scale=scale, causal=causal, local=local, started=local,
    )  # fmt: skip
    return out, lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, place: Geometry,
    out: Tensor, lse: Tensor, *, block_size: int, scale: float, causal: bool,
    local: bool, started: bool,
) -> None:  # fmt: skip
    """Attend to what tokens selected, a KV block at a time; writes the output.

    Args:
        q: Queries [B, Hq, T, D].
        k: Keys [B, Hkv, S, D].
        v: Values [B, Hkv, S, Dv].
        block_indices: KV blocks of each token in any order, -1 anywhere, [B, Hkv, T, K] int32.
        place: Where tokens and KV blocks are.
        out: Where to write the output [B, Hq, T, Dv].
        lse: Where to write its natural log-sum-exp [B, Hq, T].
        block_size: Keys in a KV block.
        scale: Multiplies the scores.
        causal: Whether a query reads only keys up to its own position.
        local: Whether to leave out what `read_entry` calls local.
        started: Whether `out` and `lse` (of base 2) hold attention to other keys, to be merged.
    """
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, n_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group, n_slots, rows = query_heads // heads, block_indices.shape[3], batch * heads
    tiles = _tiles_for(q, k, v, block_size)
    bytes_ = value_dim * q.element_size() + 4
    chunks = cut(n_tokens, rows, group, n_slots, place.n_blocks, bytes_, SCRATCH_BYTES // 2)
    lists = build_lists(
        block_indices, place, n_keys, block_size=block_size, causal=causal, local=local,
        chunk=chunks.tokens, length=tiles.length, whole=max(1, tiles.block_m // group),
    )  # fmt: skip
    # one is written while the other is read
    n_rows = chunks.at_once * chunks.tokens * n_slots * group
    parts = [
        (q.new_empty((n_rows, value_dim)), q.new_empty(n_rows, dtype=torch.float32))
        for _ in range(2)
    ]
    per_chunk = triton.cdiv(chunks.tokens * group, tiles.merged)
    wide = max(span(q[0, :group]), n_rows * value_dim) >= 2**31
    launch = Repeated(
        _slots_kernel, num_warps=tiles.num_warps, num_stages=1, maxnreg=tiles.registers
    )
    tensors = (
        q, k, v, block_indices, place.rows, lists.entries, lists.items, lists.first_item,
        place.blocks,
    )  # fmt: skip
    sizes = (
        *q.stride(), *k.stride(), *v.stride(), *block_indices.stride(),
        scale, n_tokens, n_keys, place.n_blocks,
    )  # fmt: skip
    constants = (
        heads, group, n_slots, head_dim, value_dim, block_size, causal, place.packed,
        local, started, precision(q.dtype), wide, padded(head_dim), padded(value_dim),
        tiles.block_m, tiles.merged,
    )  # fmt: skip
    n_chunks, before = rows * lists.n_chunks, 0
    for start in range(0, n_chunks + chunks.at_once, chunks.at_once):
        first, end = min(start, n_chunks), min(start + chunks.at_once, n_chunks)
        n_merges = (first - before) * per_chunk
        written, read = parts
        launch(
            (end - first) * lists.max_items + n_merges,
            *tensors, *written, *read, out, lse, *sizes,
            first, end, before, n_merges, chunks.tokens, *constants,
        )  # fmt: skip
        parts.reverse()
        before = first
