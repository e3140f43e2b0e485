"""The Triton kernels of `range_attention`: FlashAttention's, with a range of keys per query."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.delta import delta
from sparse_compile.kernels.launching import padded, precision
from sparse_compile.kernels.tuning import Tuned


class Tiles(NamedTuple):
    """What can be tuned."""

    block_m: int  # query tokens of a tile
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int


def forward_tiles(head_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """Tiles of the forward that run everywhere."""
    if itemsize == 4:  # without matrix units all is in registers; larger tiles spill
        return Tiles(32, 32, 8, 1)
    if max(head_dim, value_dim) <= 128:
        return Tiles(64, 64, 4, 3)
    return Tiles(64, 64, 4, 2)


def query_gradient_tiles(head_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """Tiles of the gradient of queries that run everywhere."""
    if itemsize == 4:  # without matrix units all is in registers; larger tiles spill
        return Tiles(32, 32, 8, 1)
    if max(head_dim, value_dim) <= 128:
        return Tiles(64, 64, 4, 2)
    return Tiles(64, 32, 4, 1)


def key_gradient_tiles(head_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """Tiles of the gradients of keys and values that run everywhere."""
    if itemsize == 4:  # without matrix units all is in registers; larger tiles spill
        return Tiles(32, 32, 8, 1)
    if max(head_dim, value_dim) <= 128:
        return Tiles(32, 64, 4, 2)
    return Tiles(32, 64, 8, 1)


FORWARD = Tuned[Tiles]("range_forward")
QUERY_GRADIENT = Tuned[Tiles]("range_query_gradient")
KEY_GRADIENT = Tuned[Tiles]("range_key_gradient")
PROGRAMS = 4096  # of the gradients of keys and values, if there are fewer tiles of keys
SHORTEST = 8  # tiles of queries that make a program worthwhile


@triton.jit
def _range_step(
    q, k_base, v_base, highest, total, acc, key, first, end, last, scale,
    stride_k_s, stride_k_d, stride_v_s, stride_v_d,
    MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the softmax; not MASKED: every query reads all of them."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    at = key.to(tl.int64)
    in_k = d[:, None] < D
    in_v = dv[None, :] < DV
    if MASKED:
        in_k = in_k & (key[None, :] < last)
        in_v = in_v & (key[:, None] < last)
    k = tl.load(
        k_base + at[None, :] * stride_k_s + d[:, None] * stride_k_d, mask=in_k, other=0.0
    )  # [BLOCK_D, BLOCK_N]
    v = tl.load(
        v_base + at[:, None] * stride_v_s + dv[None, :] * stride_v_d, mask=in_v, other=0.0
    )  # [BLOCK_N, BLOCK_DV]
    s = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        s = tl.where(visible, s, -float("inf"))
    new = tl.maximum(highest, tl.max(s, 1) * scale)
    reference = new
    if MASKED:
        reference = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(s * scale - reference[:, None])
    shrink = tl.exp2(highest - reference)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new, total, acc


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
    # a factor above zero, so that the largest score is the largest product
    q = (q * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    scale = tl.maximum(tl.abs(scale), 1e-30) * 1.4426950408889634
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    last = tl.max(end, 0)
    begin = tl.min(first, 0) // BLOCK_N * BLOCK_N
    # tiles of keys that every one of the tokens reads as a whole
    whole = tl.cdiv(tl.max(tl.where(live, first, 0), 0), BLOCK_N) * BLOCK_N
    whole_end = tl.min(tl.where(live, end, 2147483647), 0) // BLOCK_N * BLOCK_N
    whole = tl.maximum(whole, begin)
    whole_end = tl.maximum(whole_end, whole)
    n_before = (whole - begin) // BLOCK_N
    for i in range(n_before + tl.cdiv(tl.maximum(last - whole_end, 0), BLOCK_N)):
        start = tl.where(i < n_before, begin, whole_end - n_before * BLOCK_N) + i * BLOCK_N
        highest, total, acc = _range_step(
            q, k_base, v_base, highest, total, acc, start + n, first, end, last, scale,
            stride_k_s, stride_k_d, stride_v_s, stride_v_d,
            True, D, DV, PRECISION, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for start in range(whole, whole_end, BLOCK_N):
        highest, total, acc = _range_step(
            q, k_base, v_base, highest, total, acc, start + n, first, end, last, scale,
            stride_k_s, stride_k_d, stride_v_s, stride_v_d,
            False, D, DV, PRECISION, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    acc = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
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
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        p = tl.where(visible, tl.exp2((s * scale - lse[:, None]) * 1.4426950408889634), 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        acc = tl.dot(ds, k, acc, input_precision=PRECISION)
    to = (row * T + token)[:, None] * D + d[None, :]
    tl.store(dq_ptr + to, (acc * scale).to(dq_ptr.dtype.element_ty), mask=in_q)


@triton.jit
def _range_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr, readers_ptr,
    dk_ptr, dv_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d, scale, T, S, n_rows, n_splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program gives dK and dV of BLOCK_N keys and a KV head, from a share of their readers."""
    n_tiles = tl.cdiv(S, BLOCK_N)
    split = tl.program_id(0) % n_splits
    row = (tl.program_id(0) // n_splits % n_rows).to(tl.int64)  # of batch and KV head
    tile = tl.program_id(0) // n_splits // n_rows  # the first keys have most readers
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
    per_head = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    share = tl.cdiv(per_head * GROUP, n_splits)
    q_base = q_ptr + b * stride_q_b + h * GROUP * stride_q_h
    g_base = grad_ptr + b * stride_g_b + h * GROUP * stride_g_h
    to_base2 = 1.4426950408889634
    for i in range(split * share, tl.minimum((split + 1) * share, per_head * GROUP)):
        head = (i // per_head).to(tl.int64)
        token = begin + i % per_head * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        live = token < stop
        at_t = token.to(tl.int64)[:, None]
        q = tl.load(
            q_base + head * stride_q_h + at_t * stride_q_t + d[None, :] * stride_q_d,
            mask=live[:, None] & (d[None, :] < D), other=0.0,
        )  # [BLOCK_M, BLOCK_D]  # fmt: skip
        grad = tl.load(
            g_base + head * stride_g_h + at_t * stride_g_t + e[None, :] * stride_g_d,
            mask=live[:, None] & (e[None, :] < DV), other=0.0,
        )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
        rows = (row * GROUP + head) * T + token
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
        first = tl.load(first_ptr + token, mask=live, other=2147483647)
        end = tl.load(end_ptr + token, mask=live, other=0)
        # keys down and queries across: the weights go into the products as they lie in registers
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        visible = (key[:, None] >= first[None, :]) & (key[:, None] < end[None, :])
        p = tl.exp2((s * scale - lse[None, :]) * to_base2)
        p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk = dk * scale
    dk_at = dk_ptr + (row * S + at)[:, None] * D + d[None, :]
    dv_at = dv_ptr + (row * S + at)[:, None] * DV + e[None, :]
    if n_splits == 1:
        tl.store(dk_at, dk, mask=in_k)
        tl.store(dv_at, dv, mask=in_v)
    else:
        tl.atomic_add(dk_at, dk, mask=in_k, sem="relaxed")
        tl.atomic_add(dv_at, dv, mask=in_v, sem="relaxed")


def forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    (batch, heads, n_tokens, head_dim), value_dim = q.shape, v.shape[3]
    out = q.new_empty((batch, heads, n_tokens, value_dim))
    lse = q.new_empty((batch, heads, n_tokens), dtype=torch.float32)
    default = forward_tiles(head_dim, value_dim, q.element_size())
    facts = {"head_dim": head_dim, "value_dim": value_dim, "n_tokens": n_tokens}
    tiles = FORWARD.choose(default, q, **facts)
    _range_forward_kernel[(batch * heads * triton.cdiv(n_tokens, tiles.block_m),)](
        q, k, v, first, end, out, lse, *q.stride(), *k.stride(), *v.stride(),
        scale, n_tokens, *_problem(q, k, v, heads), tiles.block_m, tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, first: Tensor, end: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v; where readers of a key are split, their sums in any order."""
    batch, heads, n_tokens, head_dim = q.shape
    row_delta = delta(out, grad_out, grad_lse)
    sizes = (head_dim, v.shape[3], q.element_size())
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    dq = q.new_empty(q.shape)
    facts = {"head_dim": head_dim, "value_dim": v.shape[3], "n_tokens": n_tokens}
    tiles = QUERY_GRADIENT.choose(query_gradient_tiles(*sizes), q, **facts)
    _range_query_gradient_kernel[(batch * heads * triton.cdiv(n_tokens, tiles.block_m),)](
        q, k, v, grad_out, lse, row_delta, first, end, dq, *strides, scale, n_tokens,
        *_problem(q, k, v, heads), tiles.block_m, tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    tiles = KEY_GRADIENT.choose(key_gradient_tiles(*sizes), q, **facts)
    kv_heads, n_keys = k.shape[1], k.shape[2]
    # both ends of the ranges ascend, so the readers of a tile of keys are a range of tokens
    edges = torch.arange(0, n_keys, tiles.block_n, device=q.device, dtype=torch.int32)
    last = (edges + tiles.block_n).clamp(max=n_keys) - 1
    readers = torch.cat(
        [torch.searchsorted(end, edges, right=True), torch.searchsorted(first, last, right=True)]
    ).int()
    rows = batch * kv_heads
    most = n_tokens * (heads // kv_heads) // (tiles.block_m * SHORTEST)
    n_programs = rows * edges.numel()
    n_splits = max(1, min(PROGRAMS // max(1, n_programs), most))
    buffer = q.new_zeros if n_splits > 1 else q.new_empty
    dk, dv = (buffer(x.shape, dtype=torch.float32) for x in (k, v))
    _range_key_gradient_kernel[(n_programs * n_splits,)](
        q, k, v, grad_out, lse, row_delta, first, end, readers, dk, dv, *strides, scale, n_tokens,
        n_keys, rows, n_splits, *_problem(q, k, v, kv_heads), tiles.block_m, tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _problem(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[int | str, ...]:
    sizes = (q.shape[3], v.shape[3])
    return heads, q.shape[1] // k.shape[1], *sizes, precision(q.dtype), *map(padded, sizes)
