"""The Triton kernels of `range_attention`: FlashAttention's, with a range of keys per query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64  # keys of a tile


@triton.jit
def _range_forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, end_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d, scale, T,
    QUERY_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_M tokens and a head."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    # the last tokens read most, so they begin
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    row = (tl.program_id(0) // n_tiles).to(tl.int64)  # of batch and query head
    b, h = row // QUERY_HEADS, row % QUERY_HEADS
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = token < T
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    first = tl.load(first_ptr + token, mask=live, other=2147483647)
    end = tl.load(end_ptr + token, mask=live, other=0)
    q_at = q_ptr + b * stride_q_b + h * stride_q_h + token.to(tl.int64)[:, None] * stride_q_t
    in_q = live[:, None] & (d[None, :] < D)
    q = tl.load(q_at + d[None, :] * stride_q_d, mask=in_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_base = k_ptr + b * stride_k_b + h // GROUP * stride_k_h
    v_base = v_ptr + b * stride_v_b + h // GROUP * stride_v_h
    scale = scale * 1.4426950408889634
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    last = tl.max(end, 0)
    for start in range(tl.min(first, 0) // BLOCK_N * BLOCK_N, last, BLOCK_N):
        key = start + n
        there = key < last
        at = key.to(tl.int64)
        k = tl.load(
            k_base + at[None, :] * stride_k_s + d[:, None] * stride_k_d,
            mask=there[None, :] & (d[:, None] < D), other=0.0,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        v = tl.load(
            v_base + at[:, None] * stride_v_s + dv[None, :] * stride_v_d,
            mask=there[:, None] & (dv[None, :] < DV), other=0.0,
        )  # [BLOCK_N, BLOCK_DV]  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        s = tl.where(
            (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), s, -float("inf")
        )
        new = tl.maximum(highest, tl.max(s, 1))
        reference = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        highest = new
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    to = row * T + token
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit
def _range_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr, dq_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d, scale, T,
    QUERY_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program gives dQ of BLOCK_M tokens and a head."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = row // QUERY_HEADS, row % QUERY_HEADS
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = token < T
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, BLOCK_N)
    first = tl.load(first_ptr + token, mask=live, other=2147483647)
    end = tl.load(end_ptr + token, mask=live, other=0)
    at_t = token.to(tl.int64)[:, None]
    in_q = live[:, None] & (d[None, :] < D)
    q_at = q_ptr + b * stride_q_b + h * stride_q_h + at_t * stride_q_t
    q = tl.load(q_at + d[None, :] * stride_q_d, mask=in_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    g_at = grad_ptr + b * stride_g_b + h * stride_g_h + at_t * stride_g_t
    in_g = live[:, None] & (dv[None, :] < DV)
    grad = tl.load(g_at + dv[None, :] * stride_g_d, mask=in_g, other=0.0)  # [BLOCK_M, BLOCK_DV]
    lse = tl.load(lse_ptr + row * T + token, mask=live, other=0.0)
    delta = tl.load(delta_ptr + row * T + token, mask=live, other=0.0)
    k_base = k_ptr + b * stride_k_b + h // GROUP * stride_k_h
    v_base = v_ptr + b * stride_v_b + h // GROUP * stride_v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.max(end, 0)
    for start in range(tl.min(first, 0) // BLOCK_N * BLOCK_N, last, BLOCK_N):
        key = start + n
        there = key < last
        at = key.to(tl.int64)
        k = tl.load(
            k_base + at[:, None] * stride_k_s + d[None, :] * stride_k_d,
            mask=there[:, None] & (d[None, :] < D), other=0.0,
        )  # [BLOCK_N, BLOCK_D]  # fmt: skip
        v = tl.load(
            v_base + at[:, None] * stride_v_s + dv[None, :] * stride_v_d,
            mask=there[:, None] & (dv[None, :] < DV), other=0.0,
        )  # [BLOCK_N, BLOCK_DV]  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        p = tl.where(visible, tl.exp2((s - lse[:, None]) * 1.4426950408889634), 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None]) * scale).to(k.dtype)
        acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    to = (row * T + token)[:, None] * D + d[None, :]
    tl.store(dq_ptr + to, acc.to(dq_ptr.dtype.element_ty), mask=in_q)


@triton.jit
def _range_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr, readers_ptr,
    dk_ptr, dv_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d, scale, T, S,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program gives dK and dV of BLOCK_N keys and a KV head."""
    n_tiles = tl.cdiv(S, BLOCK_N)
    tile = tl.program_id(0) % n_tiles
    row = (tl.program_id(0) // n_tiles).to(tl.int64)  # of batch and KV head
    b, h = row // HEADS, row % HEADS
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    there = key < S
    at = key.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    in_k = there[:, None] & (d[None, :] < D)
    in_v = there[:, None] & (e[None, :] < DV)
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + at[:, None] * stride_k_s
    k = tl.load(k_at + d[None, :] * stride_k_d, mask=in_k, other=0.0)  # [BLOCK_N, BLOCK_D]
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + at[:, None] * stride_v_s
    v = tl.load(v_at + e[None, :] * stride_v_d, mask=in_v, other=0.0)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin = tl.load(readers_ptr + tile)
    stop = tl.load(readers_ptr + n_tiles + tile)
    for g in range(GROUP):
        head = h * GROUP + g
        rows = (b * HEADS * GROUP + head) * T
        for start in range(begin, stop, BLOCK_M):
            token = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            live = token < stop
            at_t = token.to(tl.int64)[:, None]
            q_at = q_ptr + b * stride_q_b + head * stride_q_h + at_t * stride_q_t
            q = tl.load(
                q_at + d[None, :] * stride_q_d, mask=live[:, None] & (d[None, :] < D), other=0.0
            )  # [BLOCK_M, BLOCK_D]
            g_at = grad_ptr + b * stride_g_b + head * stride_g_h + at_t * stride_g_t
            grad = tl.load(
                g_at + e[None, :] * stride_g_d, mask=live[:, None] & (e[None, :] < DV), other=0.0
            )  # [BLOCK_M, BLOCK_DV]
            lse = tl.load(lse_ptr + rows + token, mask=live, other=0.0)
            delta = tl.load(delta_ptr + rows + token, mask=live, other=0.0)
            first = tl.load(first_ptr + token, mask=live, other=2147483647)
            end = tl.load(end_ptr + token, mask=live, other=0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
            p = tl.where(visible, tl.exp2((s - lse[:, None]) * 1.4426950408889634), 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None]) * scale
            dv = tl.dot(tl.trans(p.to(grad.dtype)), grad, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    to = (row * S + at)[:, None]
    tl.store(dk_ptr + to * D + d[None, :], dk.to(dk_ptr.dtype.element_ty), mask=in_k)
    tl.store(dv_ptr + to * DV + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=in_v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    (batch, heads, n_tokens, _), value_dim = q.shape, v.shape[3]
    out = q.new_empty((batch, heads, n_tokens, value_dim))
    lse = q.new_empty((batch, heads, n_tokens), dtype=torch.float32)
    block_m, warps = _tile(q, v)
    _range_forward_kernel[(batch * heads * triton.cdiv(n_tokens, block_m),)](
        q, k, v, first, end, out, lse, *q.stride(), *k.stride(), *v.stride(),
        scale, n_tokens, *_problem(q, k, v, heads), block_m, BLOCK_N, num_warps=warps,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, first: Tensor, end: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    batch, heads, n_tokens, _ = q.shape
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    block_m, warps = _tile(q, v)
    block_m = min(block_m, 64)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    _range_query_gradient_kernel[(batch * heads * triton.cdiv(n_tokens, block_m),)](
        q, k, v, grad_out, lse, delta, first, end, dq, *strides, scale, n_tokens,
        *_problem(q, k, v, heads), block_m, BLOCK_N, num_warps=warps, num_stages=2,
    )  # fmt: skip
    # both ends of the ranges ascend, so the readers of a tile of keys are a range of tokens
    edges = torch.arange(0, k.shape[2], BLOCK_N, device=q.device, dtype=torch.int32)
    last = (edges + BLOCK_N).clamp(max=k.shape[2]) - 1
    readers = torch.cat(
        [torch.searchsorted(end, edges, right=True), torch.searchsorted(first, last, right=True)]
    ).int()
    _range_key_gradient_kernel[(batch * k.shape[1] * edges.numel(),)](
        q, k, v, grad_out, lse, delta, first, end, readers, dk, dv, *strides, scale, n_tokens,
        k.shape[2], *_problem(q, k, v, k.shape[1]), block_m, BLOCK_N, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return dq, dk, dv


def _tile(q: Tensor, v: Tensor) -> tuple[int, int]:
    """Tokens of a tile, and warps."""
    row_bytes = triton.next_power_of_2(max(q.shape[3], v.shape[3])) * q.element_size()
    return (128, 8) if row_bytes <= 256 else (64, 4) if row_bytes <= 512 else (32, 4)


def _problem(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[int | str, ...]:
    sizes = (q.shape[3], v.shape[3])
    padded = (max(16, triton.next_power_of_2(size)) for size in sizes)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return heads, q.shape[1] // k.shape[1], *sizes, precision, *padded
