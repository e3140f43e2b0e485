"""The gradients of block-sparse attention: dQ by tiles of queries, dK and dV by KV blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import triton_functions as printed
from sparse_compile.kernels.block_sparse_forward import (
    Tiles,
    describe,
    list_strides,
    load_tile,
)
from sparse_compile.kernels.block_sparse_lists import readers
from sparse_compile.kernels.delta import delta
from sparse_compile.kernels.launching import are_compiled
from sparse_compile.kernels.tuning import Tuned


@triton.jit
def _query_gradient(
    acc, q, grad, lse, delta, k_at, v_at, list_at, first, end, b, h, token, n, d, dv, live,
    operands, places, grads, grad_places, stride_k_s, stride_v_s, stride_i_n, unit, S,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, SCATTER: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to dQ of a tile what a part of its list gives."""
    block = tl.load(list_at + first * stride_i_n, mask=first < end, other=0)
    for i in range(first * STEPS, end * STEPS):
        start = block * (STEPS * BLOCK_N) + i % STEPS * BLOCK_N
        # one ahead, so that no load of this round waits for it
        block = tl.load(list_at + tl.minimum(i + 1, end * STEPS - 1) // STEPS * stride_i_n)
        key = start + n  # [BLOCK_N]
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]
        k = load_tile(k_at + start.to(tl.int64) * stride_k_s, key < S, d < D, EVEN, BLOCK_D == D)
        v = load_tile(
            v_at + start.to(tl.int64) * stride_v_s, key < S, dv < DV, EVEN, BLOCK_DV == DV
        )
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z = raw
        if LOGIT is not None:
            z, slope = LOGIT(raw, b, h, token[:, None], key[None, :], operands, places)
        keep = live[:, None] & (key < S)[None, :]
        if KEEP is not None:
            keep = keep & KEEP(b, h, token[:, None], key[None, :], operands, places)
        if KEEP is not None or not EVEN:
            z = tl.where(keep, z, -float("inf"))
        p = tl.exp2(z * unit - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SCATTER is not None:
            SCATTER(
                ds, keep, raw, b, h, token[:, None], key[None, :], operands, places, grads,
                grad_places,
            )  # fmt: skip
        if LOGIT is not None:
            ds = ds * slope
            if KEEP is not None or not EVEN:
                ds = tl.where(keep, ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T"])
def _block_sparse_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, indices_ptr, counts_ptr, full_ptr, dq_ptr,
    operands, places, grads, grad_places,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_i_b, stride_i_h, stride_i_t, stride_i_n,
    stride_c_b, stride_c_h, stride_c_t, stride_f_b, stride_f_h, stride_f_t,
    unit, factor, T, S,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, SCATTER: tl.constexpr, QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    at_t = token.to(tl.int64)[:, None]
    in_q = live[:, None] & (d < D)[None, :]
    q_at = q_ptr + b * stride_q_b + h * stride_q_h + at_t * stride_q_t
    q = tl.load(q_at + d[None, :] * stride_q_d, mask=in_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    g_at = grad_ptr + b * stride_g_b + h * stride_g_h + at_t * stride_g_t
    in_g = live[:, None] & (dv < DV)[None, :]
    grad = tl.load(g_at + dv[None, :] * stride_g_d, mask=in_g, other=0.0)  # [BLOCK_M, BLOCK_DV]
    lse = _exponent(lse_ptr + row * T + token, live)
    delta = tl.load(delta_ptr + row * T + token, mask=live, other=0.0)
    n_at, g = n.to(tl.int64), h // GROUP
    k_at = k_ptr + b * stride_k_b + g * stride_k_h + n_at[:, None] * stride_k_s
    k_at = k_at + d[None, :] * stride_k_d  # [BLOCK_N, BLOCK_D]
    v_at = v_ptr + b * stride_v_b + g * stride_v_h + n_at[:, None] * stride_v_s
    v_at = v_at + dv[None, :] * stride_v_d  # [BLOCK_N, BLOCK_DV]
    list_h, list_t = h // LIST_GROUP, (tile * BLOCK_M // TILE).to(tl.int64)
    list_at = indices_ptr + b * stride_i_b + list_h * stride_i_h + list_t * stride_i_t
    count = tl.load(counts_ptr + b * stride_c_b + list_h * stride_c_h + list_t * stride_c_t)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n_partial = 0
    if KEEP is not None:
        full = tl.load(full_ptr + b * stride_f_b + list_h * stride_f_h + list_t * stride_f_t)
        n_partial = count - full
        acc = _query_gradient(
            acc, q, grad, lse, delta, k_at, v_at, list_at, 0, n_partial, b, h, token, n, d, dv,
            live, operands, places, grads, grad_places, stride_k_s, stride_v_s, stride_i_n, unit, S,
            LOGIT, KEEP, SCATTER, D, DV, PRECISION, EVEN, BLOCK // BLOCK_N, BLOCK_D, BLOCK_DV,
            BLOCK_N,
        )  # fmt: skip
    acc = _query_gradient(
        acc, q, grad, lse, delta, k_at, v_at, list_at, n_partial, count, b, h, token, n, d, dv,
        live, operands, places, grads, grad_places, stride_k_s, stride_v_s, stride_i_n, unit, S,
        LOGIT, None, SCATTER, D, DV, PRECISION, EVEN, BLOCK // BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    to = (row * T + token)[:, None] * D + d[None, :]
    tl.store(dq_ptr + to, (acc * factor).to(dq_ptr.dtype.element_ty), mask=in_q)


@triton.jit
def _exponent(at, live):
    """Log-sum-exps for powers of two; rows without keys, and past the end, have no weight."""
    lse = tl.load(at, mask=live, other=-float("inf")) * 1.4426950408889634
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def _key_gradient(
    dk, dv, k, v, q_at, g_at, lse_at, delta_at, list_at, first, end, b, h, key, in_s, m, d, e,
    operands, places, stride_q_t, stride_g_t, unit, T,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds to dK and dV of some keys what a part of their readers gives."""
    tile = tl.load(list_at + first, mask=first < end, other=0)
    for i in range(first * STEPS, end * STEPS):
        start = tile * (STEPS * BLOCK_M) + i % STEPS * BLOCK_M
        # one ahead, so that no load of this round waits for it
        tile = tl.load(list_at + tl.minimum(i + 1, end * STEPS - 1) // STEPS)
        token = start + m  # [BLOCK_M]
        live = token < T
        # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]
        q = load_tile(q_at + start.to(tl.int64) * stride_q_t, live, d < D, False, BLOCK_D == D)
        grad = load_tile(
            g_at + start.to(tl.int64) * stride_g_t, live, e < DV, False, BLOCK_DV == DV
        )
        lse = _exponent(lse_at + token, live)
        delta = tl.load(delta_at + token, mask=live, other=0.0)
        raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        z = raw
        if LOGIT is not None:
            z, slope = LOGIT(raw, b, h, token[None, :], key[:, None], operands, places)
        keep = in_s[:, None] & live[None, :]
        if KEEP is not None:
            keep = keep & KEEP(b, h, token[None, :], key[:, None], operands, places)
        if KEEP is not None or not EVEN:
            z = tl.where(keep, z, -float("inf"))
        p = tl.exp2(z * unit - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if LOGIT is not None:
            ds = ds * slope
            if KEEP is not None or not EVEN:
                ds = tl.where(keep, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def _block_sparse_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, readers_ptr, starts_ptr, dk_ptr, dv_ptr,
    operands, places,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d,
    stride_r_b, stride_r_h,                                        # readers [B, H, n]
    stride_s_b, stride_s_h, stride_s_n,                            # starts [B, H, 2 blocks + 1]
    unit, factor, T, S,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program gives dK and dV of BLOCK_N keys and a KV head."""
    HEADS: tl.constexpr = QUERY_HEADS // GROUP
    n_tiles = tl.cdiv(S, BLOCK_N)
    tile = tl.program_id(0) % n_tiles
    row = (tl.program_id(0) // n_tiles).to(tl.int64)  # of batch and KV head
    b, head = row // HEADS, row % HEADS
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_s = key < S
    at = key.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    m = tl.arange(0, BLOCK_M)
    in_k = in_s[:, None] & (d < D)[None, :]
    in_v = in_s[:, None] & (e < DV)[None, :]
    k_at = k_ptr + b * stride_k_b + head * stride_k_h + at[:, None] * stride_k_s
    k = tl.load(k_at + d[None, :] * stride_k_d, mask=in_k, other=0.0)  # [BLOCK_N, BLOCK_D]
    v_at = v_ptr + b * stride_v_b + head * stride_v_h + at[:, None] * stride_v_s
    v = tl.load(v_at + e[None, :] * stride_v_d, mask=in_v, other=0.0)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    block, m_at = tile * BLOCK_N // BLOCK, m.to(tl.int64)
    for g in range(GROUP):
        h = head * GROUP + g
        list_h = h // LIST_GROUP
        starts_at = starts_ptr + b * stride_s_b + list_h * stride_s_h + 2 * block * stride_s_n
        first = tl.load(starts_at)
        middle = tl.load(starts_at + stride_s_n)
        end = tl.load(starts_at + 2 * stride_s_n)
        list_at = readers_ptr + b * stride_r_b + list_h * stride_r_h
        q_at = q_ptr + b * stride_q_b + h * stride_q_h + m_at[:, None] * stride_q_t
        q_at = q_at + d[None, :] * stride_q_d
        g_at = grad_ptr + b * stride_g_b + h * stride_g_h + m_at[:, None] * stride_g_t
        g_at = g_at + e[None, :] * stride_g_d
        rows = (b * QUERY_HEADS + h) * T
        if KEEP is not None:
            dk, dv = _key_gradient(
                dk, dv, k, v, q_at, g_at, lse_ptr + rows, delta_ptr + rows, list_at, first, middle,
                b, h, key, in_s, m, d, e, operands, places, stride_q_t, stride_g_t, unit, T,
                LOGIT, KEEP, D, DV, PRECISION, EVEN, TILE // BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_M,
            )  # fmt: skip
            first = middle
        dk, dv = _key_gradient(
            dk, dv, k, v, q_at, g_at, lse_ptr + rows, delta_ptr + rows, list_at, first, end,
            b, h, key, in_s, m, d, e, operands, places, stride_q_t, stride_g_t, unit, T,
            LOGIT, None, D, DV, PRECISION, EVEN, TILE // BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_M,
        )  # fmt: skip
    to = (row * S + at)[:, None]
    tl.store(dk_ptr + to * D + d[None, :], (dk * factor).to(dk_ptr.dtype.element_ty), mask=in_k)
    tl.store(dv_ptr + to * DV + e[None, :], dv.to(dv_ptr.dtype.element_ty), mask=in_v)


QUERY_GRADIENT = Tuned[Tiles]("block_sparse_query_gradient")
KEY_GRADIENT = Tuned[Tiles]("block_sparse_key_gradient")


def query_gradient_tiles(row_size: int, itemsize: int, tile: int, block_size: int) -> Tiles:
    """Tiles of dQ that run everywhere; the arguments are those of the forward's `default_tiles`."""
    found = Tiles(128, 64, 8, 3) if row_size <= 128 else Tiles(64, 32, 8, 3)
    return (Tiles(32, 32, 8, 1) if itemsize == 4 else found).within(tile, block_size)


def key_gradient_tiles(row_size: int, itemsize: int, tile: int, block_size: int) -> Tiles:
    """Tiles of dK and dV that run everywhere."""
    if itemsize == 4:
        found = Tiles(32 if row_size <= 128 else 16, 32, 8, 1)
    elif row_size <= 128:
        found = Tiles(64 if row_size <= 64 else 32, 128, 8, 3)
    else:
        found = Tiles(16, 64, 8, 3)
    return found.within(tile, block_size)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, block_counts: Tensor, full_counts: Tensor | None,
    operands: Sequence[Tensor], out: Tensor, lse: Tensor, program: str, tile: int, block_size: int,
    wanted: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    """The gradients of q, k and v; of the wanted operands, by the score, in float32; and deltas.

    The deltas, [B, Hq, T] float32, are the sums of dO * O over each row, less the gradients of its
    log-sum-exp.
    """
    batch, heads, n_tokens, _ = q.shape
    n_keys = k.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    grads = [torch.zeros(operands[i].shape, device=q.device) for i in wanted]
    if lse.numel() == 0 or n_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), grads, torch.zeros_like(lse)
    ask = printed.request(
        program, operands, q, n_keys, wanted=tuple(wanted), approximate=are_compiled()
    )  # fmt: skip
    made = printed.functions(ask)
    problem = describe(q, k, v, block_indices, tile, block_size)
    row_delta = delta(out, grad_out, grad_lse)
    full = torch.zeros_like(block_counts) if full_counts is None else full_counts
    sizes = (problem.row_size, q.element_size(), tile, block_size)
    of_queries = problem.choose(QUERY_GRADIENT, query_gradient_tiles(*sizes), q, program)
    of_keys = problem.choose(KEY_GRADIENT, key_gradient_tiles(*sizes), q, program)
    pointers, places = printed.arguments(operands)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    # the slope of any other score holds the scale
    factor = printed.parsed(program).scale if made.logit is None else 1.0
    unit = problem.unit(program)
    grad_places = printed.arguments([torch.empty(x.shape, device="meta") for x in operands])[1]
    _block_sparse_query_gradient_kernel[(batch * heads * triton.cdiv(n_tokens, of_queries.block_m),)](
        q, k, v, grad_out, lse, row_delta, block_indices, block_counts, full, dq,
        pointers, places, tuple(grads), grad_places if grads else (),
        *strides, *list_strides(block_indices), *list_strides(block_counts), *list_strides(full),
        unit, factor, n_tokens, n_keys,
        made.logit_and_slope, made.keep, made.scatter, *problem.constants,
        of_queries.block_m, of_queries.block_n,
        num_warps=of_queries.num_warps, num_stages=of_queries.num_stages,
    )  # fmt: skip
    n_blocks = -(-n_keys // block_size)
    tiles_of, starts = readers(block_indices, block_counts, full, n_blocks)
    n_programs = batch * k.shape[1] * triton.cdiv(n_keys, of_keys.block_n)
    _block_sparse_key_gradient_kernel[(n_programs,)](
        q, k, v, grad_out, lse, row_delta, tiles_of, starts, dk, dv, pointers, places,
        *strides, *list_strides(tiles_of)[:2], *list_strides(starts),
        unit, factor, n_tokens, n_keys,
        made.logit_and_slope, made.keep, *problem.constants, of_keys.block_m, of_keys.block_n,
        num_warps=of_keys.num_warps, num_stages=of_keys.num_stages,
    )  # fmt: skip
    return dq, dk, dv, grads, row_delta
