"""Selected attention in the loop order `query_major`: a program owns a query token.

It walks the KV blocks that the token selected, all heads of the group at once, with a running
softmax. Every program reads its own keys and values, so what bounds it is their traffic; it wins in
decoding and for large groups.

Source: loop order of NSA (Yuan et al., "Native Sparse Attention", 2025, section 3.4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.selected_lists import Geometry, read_entry, read_position


@triton.jit(do_not_specialize=["T", "S"])
def _query_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k, scale, T, S,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program attends with one token and the heads of one group."""
    row = (tl.program_id(0) // T).to(tl.int64)
    token = tl.program_id(0) % T
    b, h = row // HEADS, row % HEADS
    scale = scale * 1.4426950408889634
    g = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    n = tl.arange(0, BLOCK_SIZE)  # [BLOCK_SIZE]
    q_at = q_ptr + b * stride_q_b + token.to(tl.int64) * stride_q_t
    q = tl.load(
        q_at + (h * GROUP + g)[:, None] * stride_q_h + d[None, :] * stride_q_d,
        mask=(g[:, None] < GROUP) & (d[None, :] < D), other=0.0,
    )  # [BLOCK_G, BLOCK_D]  # fmt: skip
    slot = tl.arange(0, BLOCK_K)
    position, n_keys, _, start = read_position(rows_ptr, token, T, S, PACKED)
    _block, listed = read_entry(
        indices_ptr, row, token, slot, slot < K, position, n_keys,
        stride_i_b, stride_i_h, stride_i_t, stride_i_k, HEADS, BLOCK_SIZE, CAUSAL, PACKED, False,
    )  # fmt: skip
    # lists ascend and are padded on the right, so the slots that hold something come first
    n_listed = tl.sum(listed.to(tl.int32), 0)
    end = start + n_keys
    if CAUSAL:
        end = tl.minimum(end, start + position + 1)
    i_at = indices_ptr + b * stride_i_b + h * stride_i_h + token.to(tl.int64) * stride_i_t
    k_base = k_ptr + b * stride_k_b + h * stride_k_h
    v_base = v_ptr + b * stride_v_b + h * stride_v_h
    highest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for i in tl.range(0, n_listed, num_stages=STAGES):
        key = start + tl.load(i_at + i * stride_i_k).to(tl.int32) * BLOCK_SIZE + n
        keep = key < end
        at = key.to(tl.int64)
        k = tl.load(
            k_base + at[None, :] * stride_k_s + d[:, None] * stride_k_d,
            mask=keep[None, :] & (d[:, None] < D), other=0.0,
        )  # [BLOCK_D, BLOCK_SIZE]  # fmt: skip
        v = tl.load(
            v_base + at[:, None] * stride_v_s + dv[None, :] * stride_v_d,
            mask=keep[:, None] & (dv[None, :] < DV), other=0.0,
        )  # [BLOCK_SIZE, BLOCK_DV]  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale  # [BLOCK_G, BLOCK_SIZE]
        s = tl.where(keep[None, :], s, -float("inf"))
        new = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        highest = new
    to = (row * GROUP + g) * T + token  # out [B, Hq, T, Dv], lse [B, Hq, T]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=(g[:, None] < GROUP) & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=g < GROUP)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, value_dim, n_slots = k.shape[1], v.shape[3], block_indices.shape[3]
    group = query_heads // heads
    out = q.new_empty((batch, query_heads, n_tokens, value_dim))
    lse = q.new_empty((batch, query_heads, n_tokens), dtype=torch.float32)
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    block_bytes = block_size * (block_d + block_dv) * q.element_size()
    _query_kernel[(batch * heads * n_tokens,)](
        q, k, v, block_indices, place.rows, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *block_indices.stride(),
        scale, n_tokens, k.shape[2],
        heads, group, n_slots, head_dim, value_dim, block_size, causal, place.packed,
        "ieee" if q.dtype == torch.float32 else "tf32",
        triton.next_power_of_2(n_slots), block_d, block_dv, max(16, triton.next_power_of_2(group)),
        max(1, min(3, 2**17 // block_bytes)), num_warps=4,
    )  # fmt: skip
    return out, lse
