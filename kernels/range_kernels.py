"""The Triton kernels of `range_attention`: FlashAttention's, with a range of keys per query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_compile.kernels.delta import delta
from sparse_compile.kernels.launching import has_copy_engine, padded, precision
from sparse_compile.kernels.online_softmax import add_keys, normalised
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
    return Tiles(32, 32, 4, 1)


def key_gradient_tiles(head_dim: int, value_dim: int, itemsize: int) -> Tiles:
    """Tiles of the gradients of keys and values that run everywhere."""
    if itemsize == 4:  # without matrix units all is in registers; larger tiles spill
        return Tiles(32, 32, 8, 1)
    if max(head_dim, value_dim) <= 128:
        return Tiles(32, 64, 4, 3)
    return Tiles(32, 32, 4, 1)


FORWARD = Tuned[Tiles]("range_forward")
QUERY_GRADIENT = Tuned[Tiles]("range_query_gradient")
KEY_GRADIENT = Tuned[Tiles]("range_key_gradient")
PROGRAMS = 4096  # of the gradients of keys and values, if there are fewer tiles of keys
SHORTEST = 8  # tiles of queries that make a program worthwhile


@triton.jit
def _rows(
    of, b, h, start, last, stride_b, stride_h, stride_s, stride_d,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of a head, [BLOCK, BLOCK_D]; if MASKED, those from `last` on need not be read."""
    if DESCRIBED:
        return of.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(BLOCK, BLOCK_D)
    else:  # noqa: RET505
        at = start + tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        there = d[None, :] < D
        if MASKED:
            there = there & (at[:, None] < last)
        of_head = of + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        return tl.load(
            of_head + at.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d,
            mask=there, other=0.0,
        )  # fmt: skip


@triton.jit
def _whole_tiles(first, end, live, BLOCK_N: tl.constexpr):
    """Where the keys of a tile of tokens begin, how many tiles of keys come before those that every
    token reads as a whole, and where these begin and end."""
    begin = tl.min(first, 0) // BLOCK_N * BLOCK_N
    whole = tl.cdiv(tl.max(tl.where(live, first, 0), 0), BLOCK_N) * BLOCK_N
    whole_end = tl.min(tl.where(live, end, 2147483647), 0) // BLOCK_N * BLOCK_N
    whole = tl.maximum(whole, begin)
    return begin, (whole - begin) // BLOCK_N, whole, tl.maximum(whole_end, whole)


@triton.jit
def _range_step(
    acc, total, highest, q, k_ptr, v_ptr, b, h, start, first, end, last, scale,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the softmax; not MASKED: every query reads all of them."""
    k = _rows(
        k_ptr, b, h, start, last, stride_k_b, stride_k_h, stride_k_s, stride_k_d,
        MASKED, DESCRIBED, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    v = _rows(
        v_ptr, b, h, start, last, stride_v_b, stride_v_h, stride_v_s, stride_v_d,
        MASKED, DESCRIBED, DV, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        s = tl.where(visible, s, -float("inf"))
    return add_keys(acc, total, highest, s, v, scale, PRECISION)


@triton.jit
def _range_forward_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, end_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d, scale, T,
    QUERY_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    first = tl.load(first_ptr + token, mask=live, other=2147483647)
    end = tl.load(end_ptr + token, mask=live, other=0)
    q_at = q_ptr + b * stride_q_b + h * stride_q_h + token.to(tl.int64)[:, None] * stride_q_t
    in_q = live[:, None] & (d[None, :] < D)
    q = tl.load(q_at + d[None, :] * stride_q_d, mask=in_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    # a factor above zero, so that the largest score is the largest product
    q = (q * tl.where(scale < 0, -1.0, 1.0)).to(q.dtype)
    scale = tl.maximum(tl.abs(scale), 1e-30) * 1.4426950408889634
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    last = tl.max(end, 0)
    begin, n_before, whole, whole_end = _whole_tiles(first, end, live, BLOCK_N)
    for i in range(n_before + tl.cdiv(tl.maximum(last - whole_end, 0), BLOCK_N)):
        start = tl.where(i < n_before, begin, whole_end - n_before * BLOCK_N) + i * BLOCK_N
        acc, total, highest = _range_step(
            acc, total, highest, q, k_ptr, v_ptr, b, h // GROUP, start, first, end, last, scale,
            stride_k_b, stride_k_h, stride_k_s, stride_k_d,
            stride_v_b, stride_v_h, stride_v_s, stride_v_d,
            True, DESCRIBED, D, DV, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
    for start in range(whole, whole_end, BLOCK_N):
        acc, total, highest = _range_step(
            acc, total, highest, q, k_ptr, v_ptr, b, h // GROUP, start, first, end, last, scale,
            stride_k_b, stride_k_h, stride_k_s, stride_k_d,
            stride_v_b, stride_v_h, stride_v_s, stride_v_d,
            False, DESCRIBED, D, DV, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
    acc = normalised(acc, total)
    to = row * T + token
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit
def _query_gradient_step(
    acc, q, grad, lse, delta, k_ptr, v_ptr, b, h, start, first, end, last, scale,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to dQ what a tile of keys gives; `lse` is of base 2."""
    k = _rows(
        k_ptr, b, h, start, last, stride_k_b, stride_k_h, stride_k_s, stride_k_d,
        MASKED, DESCRIBED, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    v = _rows(
        v_ptr, b, h, start, last, stride_v_b, stride_v_h, stride_v_s, stride_v_d,
        MASKED, DESCRIBED, DV, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s * (scale * 1.4426950408889634) - lse[:, None])
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, acc, input_precision=PRECISION)


@triton.jit
def _range_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr, dq_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d, scale, T,
    QUERY_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    lse = lse * 1.4426950408889634
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.max(end, 0)
    begin, n_before, whole, whole_end = _whole_tiles(first, end, live, BLOCK_N)
    for i in range(n_before + tl.cdiv(tl.maximum(last - whole_end, 0), BLOCK_N)):
        start = tl.where(i < n_before, begin, whole_end - n_before * BLOCK_N) + i * BLOCK_N
        acc = _query_gradient_step(
            acc, q, grad, lse, delta, k_ptr, v_ptr, b, h // GROUP, start, first, end, last, scale,
            stride_k_b, stride_k_h, stride_k_s, stride_k_d,
            stride_v_b, stride_v_h, stride_v_s, stride_v_d,
            True, DESCRIBED, D, DV, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
    for start in range(whole, whole_end, BLOCK_N):
        acc = _query_gradient_step(
            acc, q, grad, lse, delta, k_ptr, v_ptr, b, h // GROUP, start, first, end, last, scale,
            stride_k_b, stride_k_h, stride_k_s, stride_k_d,
            stride_v_b, stride_v_h, stride_v_s, stride_v_d,
            False, DESCRIBED, D, DV, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
    to = (row * T + token)[:, None] * D + d[None, :]
    tl.store(dq_ptr + to, (acc * scale).to(dq_ptr.dtype.element_ty), mask=in_q)


@triton.jit
def _key_gradient_step(
    dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr,
    b, h, begin, stop, key, scale, T,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    MASKED: tl.constexpr, DESCRIBED: tl.constexpr, QUERY_HEADS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds to dK and dV what a tile of tokens gives; not MASKED: they read all of the keys."""
    q = _rows(
        q_ptr, b, h, begin, stop, stride_q_b, stride_q_h, stride_q_t, stride_q_d,
        MASKED, DESCRIBED, D, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    grad = _rows(
        grad_ptr, b, h, begin, stop, stride_g_b, stride_g_h, stride_g_t, stride_g_d,
        MASKED, DESCRIBED, DV, BLOCK_DV, BLOCK_M,
    )  # fmt: skip
    token = begin + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = token < stop
    rows = (b * QUERY_HEADS + h) * T + token
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
    # keys down and queries across: the weights go into the products as they lie in registers
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(s * (scale * 1.4426950408889634) - lse[None, :])
    if MASKED:
        first = tl.load(first_ptr + token, mask=live, other=2147483647)
        end = tl.load(end_ptr + token, mask=live, other=0)
        p = tl.where((key[:, None] >= first[None, :]) & (key[:, None] < end[None, :]), p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


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
    DESCRIBED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program gives dK and dV of BLOCK_N keys and a KV head, from a share of their readers.

    For each tile of keys, readers [4, tiles] holds the first token that reads any of them, the first
    that reads the last one too, the first that no longer reads the first one, and the first behind
    all that read any.
    """
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
    stop = tl.load(readers_ptr + 3 * n_tiles + tile)
    per_head = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    # tiles of tokens that read all of the keys
    whole = tl.cdiv(tl.load(readers_ptr + n_tiles + tile) - begin, BLOCK_M)
    n_whole = (tl.load(readers_ptr + 2 * n_tiles + tile) - begin) // BLOCK_M - whole
    n_whole = tl.maximum(n_whole, 0)
    n_partial = per_head - n_whole
    share = tl.cdiv(n_partial * GROUP, n_splits)
    for i in range(split * share, tl.minimum((split + 1) * share, n_partial * GROUP)):
        of_head = i % n_partial
        of_head += tl.where(of_head >= whole, n_whole, 0)
        dk, dv = _key_gradient_step(
            dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr,
            b, h * GROUP + i // n_partial, begin + of_head * BLOCK_M, stop, key, scale, T,
            stride_q_b, stride_q_h, stride_q_t, stride_q_d,
            stride_g_b, stride_g_h, stride_g_t, stride_g_d,
            True, DESCRIBED, HEADS * GROUP, D, DV, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_M,
        )  # fmt: skip
    share = tl.cdiv(n_whole * GROUP, n_splits)
    for i in range(split * share, tl.minimum((split + 1) * share, n_whole * GROUP)):
        dk, dv = _key_gradient_step(
            dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, end_ptr,
            b, h * GROUP + i // n_whole, begin + (whole + i % n_whole) * BLOCK_M, stop, key, scale, T,
            stride_q_b, stride_q_h, stride_q_t, stride_q_d,
            stride_g_b, stride_g_h, stride_g_t, stride_g_d,
            False, DESCRIBED, HEADS * GROUP, D, DV, PRECISION, BLOCK_D, BLOCK_DV, BLOCK_M,
        )  # fmt: skip
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
    tensors, described = _described(q, (k, v), tiles.block_n)
    _range_forward_kernel[(batch * heads * triton.cdiv(n_tokens, tiles.block_m),)](
        q, *tensors, first, end, out, lse, *q.stride(), *k.stride(), *v.stride(),
        scale, n_tokens, *_problem(q, k, v, heads), described, tiles.block_m, tiles.block_n,
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
    tensors, described = _described(q, (k, v), tiles.block_n)
    _range_query_gradient_kernel[(batch * heads * triton.cdiv(n_tokens, tiles.block_m),)](
        q, *tensors, grad_out, lse, row_delta, first, end, dq, *strides, scale, n_tokens,
        *_problem(q, k, v, heads), described, tiles.block_m, tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    tiles = KEY_GRADIENT.choose(key_gradient_tiles(*sizes), q, **facts)
    kv_heads, n_keys = k.shape[1], k.shape[2]
    # both ends of the ranges ascend, so the readers of a tile of keys are a range of tokens
    edges = torch.arange(0, n_keys, tiles.block_n, device=q.device, dtype=torch.int32)
    last = (edges + tiles.block_n).clamp(max=n_keys) - 1
    readers = torch.searchsorted(
        torch.stack([end, first]), torch.cat([edges, last]).expand(2, -1).contiguous(),
        right=True, out_int32=True,
    )  # fmt: skip
    rows = batch * kv_heads
    most = n_tokens * (heads // kv_heads) // (tiles.block_m * SHORTEST)
    n_programs = rows * edges.numel()
    n_splits = max(1, min(PROGRAMS // max(1, n_programs), most))
    buffer = q.new_zeros if n_splits > 1 else q.new_empty
    dk, dv = (buffer(x.shape, dtype=torch.float32) for x in (k, v))
    (queries, grads), described = _described(q, (q, grad_out), tiles.block_m)
    _range_key_gradient_kernel[(n_programs * n_splits,)](
        queries, k, v, grads, lse, row_delta, first, end, readers, dk, dv, *strides, scale,
        n_tokens, n_keys, rows, n_splits, *_problem(q, k, v, kv_heads), described, tiles.block_m, tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _described(
    q: Tensor, tensors: tuple[Tensor, Tensor], rows: int
) -> tuple[Sequence[Tensor | TensorDescriptor], bool]:
    """The tensors [B, H, S, D] as tiles of `rows` for the copy engine, where it can read all."""
    if q.element_size() != 2 or not has_copy_engine(q.device) or not all(map(_is_regular, tensors)):
        return tensors, False
    tiles = ([1, 1, rows, padded(tensor.shape[3])] for tensor in tensors)
    return [TensorDescriptor.from_tensor(*pair) for pair in zip(tensors, tiles, strict=True)], True


def _is_regular(tensor: Tensor) -> bool:
    step = 16 // tensor.element_size()
    starts_right = tensor.data_ptr() % 16 == 0 and all(
        x > 0 and x % step == 0 for x in tensor.stride()[:3]
    )
    return starts_right and tensor.stride(3) == 1 and tensor.numel() > 0


def _problem(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[int | str, ...]:
    sizes = (q.shape[3], v.shape[3])
    return heads, q.shape[1] // k.shape[1], *sizes, precision(q.dtype), *map(padded, sizes)
