"""Selected attention in the loop order `query_major`: a program owns a query token.

It walks the KV blocks that the token selected, all heads of the group at once, with a running
softmax. Every program reads its own keys and values, so what bounds it is their traffic; it wins in
decoding and for large groups. Keys are the rows of its products and heads the columns, since matrix
units round rows up to 16 or 64 and columns only to 8. Where tokens are few, as in decoding, several
programs share the KV blocks of one, and a second kernel merges what they found as FlashDecoding
does.

Source: loop order of NSA (Yuan et al., "Native Sparse Attention", 2025, section 3.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.launching import n_multiprocessors, padded, precision
from sparse_compile.kernels.merge_splits import merge, n_splits
from sparse_compile.kernels.selected_lists import Geometry, read_entry, read_position
from sparse_compile.kernels.tuning import Tuned

QUERY_MAJOR = Tuned["Tiles"]("selected_query_major")


class Tiles(NamedTuple):
    """What can be tuned."""

    block_n: int  # keys of a step, at most a KV block
    block_g: int  # heads of the group that a program works on at once
    programs_per_sm: int  # below that many, programs share the KV blocks of a token
    num_warps: int
    num_stages: int


def default_tiles(
    head_dim: int, value_dim: int, group: int, block_size: int, itemsize: int
) -> Tiles:
    """Tiles that run everywhere: a step's keys and values take up to 32 KiB of shared memory."""
    row_bytes = (padded(head_dim) + padded(value_dim)) * itemsize
    fits = 1 << (2**15 // row_bytes).bit_length() - 1  # a power of two
    block_n = max(16, min(block_size, 64, fits))
    block_g = min(64 if itemsize == 2 else 16, triton.next_power_of_2(group))
    return Tiles(block_n, max(8, block_g), 4, 4, 3)


@triton.jit(do_not_specialize=["T", "S"])
def _query_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, scale, T, S,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program attends with one token and BLOCK_G heads of a group to a share of the KV blocks.

    The output is [B, Hq, T, SPLITS, Dv], the log-sum-exp [B, Hq, T, SPLITS].
    """
    n_parts: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    steps: tl.constexpr = BLOCK_SIZE // BLOCK_N
    split = tl.program_id(0) % SPLITS
    part = tl.program_id(0) // SPLITS % n_parts
    of = tl.program_id(0) // (SPLITS * n_parts)
    row = (of // T).to(tl.int64)
    token = of % T
    b, h = row // HEADS, row % HEADS
    g = part * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    q_at = q_ptr + b * stride_q_b + token.to(tl.int64) * stride_q_t
    q = tl.load(
        q_at + (h * GROUP + g)[None, :] * stride_q_h + d[:, None] * stride_q_d,
        mask=(g[None, :] < GROUP) & (d[:, None] < D), other=0.0,
    )  # [BLOCK_D, BLOCK_G]  # fmt: skip
    slot = tl.arange(0, BLOCK_K)
    position, n_keys, _, start = read_position(rows_ptr, token, T, S, PACKED)
    _block, listed = read_entry(
        indices_ptr, row, token, slot, slot < K, position, n_keys,
        stride_i_b, stride_i_h, stride_i_t, stride_i_k, HEADS, BLOCK_SIZE, CAUSAL, PACKED, False,
    )  # fmt: skip
    # lists ascend and are padded on the right, so the slots that hold something come first
    n_listed = tl.sum(listed.to(tl.int32), 0)
    share = tl.cdiv(n_listed, SPLITS)
    first = split * share
    n_steps = (tl.minimum(first + share, n_listed) - first) * steps
    end = start + n_keys
    if CAUSAL:
        end = tl.minimum(end, start + position + 1)
    i_at = indices_ptr + b * stride_i_b + h * stride_i_h + token.to(tl.int64) * stride_i_t
    i_at += first * stride_i_k
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + n.to(tl.int64)[:, None] * stride_k_s
    k_at += d[None, :] * stride_k_d  # [BLOCK_N, BLOCK_D]
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + n.to(tl.int64)[None, :] * stride_v_s
    v_at += dv[:, None] * stride_v_d  # [BLOCK_DV, BLOCK_N]
    highest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    # by keys of a step, summed at the end: a sum over warps costs more than these products
    total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_DV, BLOCK_G], tl.float32)
    for i in tl.range(0, n_steps, num_stages=STAGES):
        block = tl.load(i_at + i // steps * stride_i_k).to(tl.int32)
        begin = start + block * BLOCK_SIZE + i % steps * BLOCK_N
        keep = begin + n < end
        k = tl.load(
            k_at + begin.to(tl.int64) * stride_k_s,
            mask=keep[:, None] & (d[None, :] < D), other=0.0,
        )  # [BLOCK_N, BLOCK_D]  # fmt: skip
        v = tl.load(
            v_at + begin.to(tl.int64) * stride_v_s,
            mask=keep[None, :] & (dv[:, None] < DV), other=0.0,
        )  # [BLOCK_DV, BLOCK_N]  # fmt: skip
        s = tl.dot(k, q, input_precision=PRECISION) * scale  # [BLOCK_N, BLOCK_G]
        s = tl.where(keep[:, None], s, -float("inf"))
        new = tl.maximum(highest, tl.max(s, 0))
        # natural until here, so the log-sum-exp is rounded as the scores are
        p = tl.exp2((s - new[None, :]) * 1.4426950408889634)
        shrink = tl.exp2((highest - new) * 1.4426950408889634)
        total = total * shrink[None, :] + p
        acc = acc * shrink[None, :]
        acc = tl.dot(v, p.to(v.dtype), acc, input_precision=PRECISION)
        highest = new
    to = ((row * GROUP + g) * T + token) * SPLITS + split  # [BLOCK_G]
    total = tl.sum(total, 0)  # [BLOCK_G]
    acc = acc / tl.where(total == 0.0, 1.0, total)[None, :]
    tl.store(
        out_ptr + to[None, :] * DV + dv[:, None], acc.to(out_ptr.dtype.element_ty),
        mask=(g[None, :] < GROUP) & (dv[:, None] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + to, highest + tl.log(total), mask=g < GROUP)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, value_dim, n_slots = k.shape[1], v.shape[3], block_indices.shape[3]
    group = query_heads // heads
    if tiles is None:
        default = default_tiles(head_dim, value_dim, group, block_size, q.element_size())
        tiles = QUERY_MAJOR.choose(
            default, q, head_dim=head_dim, value_dim=value_dim, block_size=block_size, group=group
        )
    out = q.new_empty((batch, query_heads, n_tokens, value_dim))
    lse = q.new_empty((batch, query_heads, n_tokens), dtype=torch.float32)
    n_programs = batch * heads * n_tokens * triton.cdiv(group, tiles.block_g)
    splits = n_splits(n_programs, n_slots, tiles.programs_per_sm * n_multiprocessors(q.device))
    part, part_lse = out, lse
    if splits > 1:
        part = out.new_empty((*lse.shape, splits, value_dim), dtype=torch.float32)
        part_lse = lse.new_empty((*lse.shape, splits))
    _query_kernel[(n_programs * splits,)](
        q, k, v, block_indices, place.rows, part, part_lse,
        *q.stride(), *k.stride(), *v.stride(), *block_indices.stride(),
        scale, n_tokens, k.shape[2],
        heads, group, n_slots, head_dim, value_dim, block_size, causal, place.packed,
        precision(q.dtype), splits, triton.next_power_of_2(n_slots),
        padded(head_dim), padded(value_dim), tiles.block_n, tiles.block_g, tiles.num_stages,
        num_warps=tiles.num_warps,
    )  # fmt: skip
    if splits > 1:
        merge(part, part_lse, out, lse)
    return out, lse
