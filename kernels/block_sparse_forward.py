"""The forward of block-sparse attention: a program owns a tile of queries and walks its KV blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import triton_functions as printed
from sparse_compile.kernels.launching import are_compiled, padded, precision
from sparse_compile.kernels.online_softmax import add_keys, add_sink, normalised
from sparse_compile.kernels.tuning import Tuned


@triton.jit
def load_tile(at, rows, columns, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """A tile of a tensor, 0 outside of it; checked only where it may end."""
    if ALL_ROWS and ALL_COLUMNS:
        return tl.load(at)
    elif ALL_ROWS:  # noqa: RET505
        return tl.load(at, mask=columns[None, :], other=0.0)
    elif ALL_COLUMNS:
        return tl.load(at, mask=rows[:, None], other=0.0)
    else:
        return tl.load(at, mask=rows[:, None] & columns[None, :], other=0.0)


@triton.jit
def _attend(
    acc, total, highest, q, k_at, v_at, list_at, first, end, b, h, token, n, d, dv, operands,
    places, stride_k_s, stride_v_s, stride_i_n, unit, S,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend with a tile to a part of its list, `BLOCK_N` keys at a time."""
    block = tl.load(list_at + first * stride_i_n, mask=first < end, other=0)
    for i in range(first * STEPS, end * STEPS):
        start = block * (STEPS * BLOCK_N) + i % STEPS * BLOCK_N
        # one ahead, so that no load of this round waits for it
        block = tl.load(list_at + tl.minimum(i + 1, end * STEPS - 1) // STEPS * stride_i_n)
        key = start + n  # [BLOCK_N]
        # [BLOCK_D, BLOCK_N], [BLOCK_N, BLOCK_DV]
        k = load_tile(k_at + start.to(tl.int64) * stride_k_s, d < D, key < S, BLOCK_D == D, EVEN)
        v = load_tile(
            v_at + start.to(tl.int64) * stride_v_s, key < S, dv < DV, EVEN, BLOCK_DV == DV
        )
        z = tl.dot(q, k, input_precision=PRECISION)
        if LOGIT is not None:
            z = LOGIT(z, b, h, token[:, None], key[None, :], operands, places)
        if KEEP is not None:
            z = tl.where(
                KEEP(b, h, token[:, None], key[None, :], operands, places), z, -float("inf")
            )
        if not EVEN:
            z = tl.where((key < S)[None, :], z, -float("inf"))
        acc, total, highest = add_keys(acc, total, highest, z, v, unit, PRECISION)
    return acc, total, highest


@triton.jit(do_not_specialize=["T"])
def _block_sparse_forward_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, full_ptr, out_ptr, lse_ptr, operands, places,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    stride_i_b, stride_i_h, stride_i_t, stride_i_n,                # indices [B, H, tiles, K]
    stride_c_b, stride_c_h, stride_c_t,                            # counts [B, H, tiles]
    stride_f_b, stride_f_h, stride_f_t,                            # full [B, H, tiles]
    unit, T, S,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, SINK: tl.constexpr, QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr, LIST_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_M tokens and a head.

    `unit` makes powers of two of logits; `LIST_GROUP` query heads share a list.
    """
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
    q_at = q_ptr + b * stride_q_b + h * stride_q_h + token.to(tl.int64)[:, None] * stride_q_t
    in_q = live[:, None] & (d < D)[None, :]
    q = tl.load(q_at + d[None, :] * stride_q_d, mask=in_q, other=0.0)  # [BLOCK_M, BLOCK_D]
    n_at, g = n.to(tl.int64), h // GROUP
    k_at = k_ptr + b * stride_k_b + g * stride_k_h + n_at[None, :] * stride_k_s
    k_at = k_at + d[:, None] * stride_k_d  # [BLOCK_D, BLOCK_N]
    v_at = v_ptr + b * stride_v_b + g * stride_v_h + n_at[:, None] * stride_v_s
    v_at = v_at + dv[None, :] * stride_v_d  # [BLOCK_N, BLOCK_DV]
    list_h, list_t = h // LIST_GROUP, (tile * BLOCK_M // TILE).to(tl.int64)
    list_at = indices_ptr + b * stride_i_b + list_h * stride_i_h + list_t * stride_i_t
    count = tl.load(counts_ptr + b * stride_c_b + list_h * stride_c_h + list_t * stride_c_t)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    n_partial = 0
    if KEEP is not None:
        full = tl.load(full_ptr + b * stride_f_b + list_h * stride_f_h + list_t * stride_f_t)
        n_partial = count - full
        acc, total, highest = _attend(
            acc, total, highest, q, k_at, v_at, list_at, 0, n_partial, b, h, token, n, d, dv,
            operands, places, stride_k_s, stride_v_s, stride_i_n, unit, S,
            LOGIT, KEEP, D, DV, PRECISION, EVEN, BLOCK // BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q, k_at, v_at, list_at, n_partial, count, b, h, token, n, d, dv,
        operands, places, stride_k_s, stride_v_s, stride_i_n, unit, S,
        LOGIT, None, D, DV, PRECISION, EVEN, BLOCK // BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_N,
    )  # fmt: skip
    if SINK is not None:
        sink = SINK(b, h, token, operands, places)
        acc, total, highest = add_sink(acc, total, highest, sink)
    acc = normalised(acc, total)
    to = row * T + token
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv < DV)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + to, (highest + tl.log2(total)) * 0.6931471805599453, mask=live)


FORWARD = Tuned["Tiles"]("block_sparse_forward")


class Tiles(NamedTuple):
    """What can be tuned."""

    block_m: int  # query tokens of a program, at most a list's tile
    block_n: int  # keys at a time, at most a KV block
    num_warps: int
    num_stages: int

    def within(self, tile: int, block_size: int) -> Tiles:
        """The same, no larger than a list's tile and a KV block."""
        block_m, block_n = min(self.block_m, tile), min(self.block_n, block_size)
        warps = min(self.num_warps, max(4, self.num_warps * block_m * block_n // (
            self.block_m * self.block_n
        )))  # fmt: skip
        return self._replace(block_m=block_m, block_n=block_n, num_warps=warps)


def default_tiles(row_size: int, itemsize: int, tile: int, block_size: int) -> Tiles:
    """Tiles that run everywhere.

    Args:
        row_size: The size of a key or a value, whichever is larger, padded.
        itemsize: Bytes of a number.
        tile: Query tokens of a list.
        block_size: Keys of a KV block.
    """
    if itemsize == 4:
        found = Tiles(64, 64, 8, 1) if row_size <= 64 else Tiles(32, 32, 8, 1)
    else:
        found = Tiles(128, 64, 8, 3) if row_size <= 128 else Tiles(128, 32, 8, 2)
    return found.within(tile, block_size)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor,
    full_counts: Tensor | None, operands: Sequence[Tensor], program: str, tile: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T]; 0 for rows without keys."""
    (batch, heads, n_tokens, _), value_dim = q.shape, v.shape[3]
    out = q.new_empty((batch, heads, n_tokens, value_dim))
    lse = q.new_empty((batch, heads, n_tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    made = printed.functions(
        printed.request(program, operands, q, k.shape[2], approximate=are_compiled())
    )
    problem = describe(q, k, v, block_indices, tile, block_size)
    tiles = problem.choose(
        FORWARD, default_tiles(problem.row_size, q.element_size(), tile, block_size), q, program
    )
    full = torch.zeros_like(block_counts) if full_counts is None else full_counts
    _block_sparse_forward_kernel[(batch * heads * triton.cdiv(n_tokens, tiles.block_m),)](
        q, k, v, block_indices, block_counts, full, out, lse, *printed.arguments(operands),
        *q.stride(), *k.stride(), *v.stride(), *list_strides(block_indices), *list_strides(block_counts),
        *list_strides(full), problem.unit(program), n_tokens, k.shape[2],
        made.logit, made.keep, made.sink, *problem.constants, tiles.block_m, tiles.block_n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


class Problem(NamedTuple):
    """What a kernel is compiled for, besides its functions and tiles."""

    constants: tuple[int | bool | str, ...]
    facts: dict[str, int]  # what tuned tiles depend on, besides the program
    row_size: int  # of a key or a value, whichever is larger, padded

    def unit(self, program: str) -> float:
        """What makes powers of two of the logits that the kernel computes."""
        parsed = printed.parsed(program)
        return parsed.scale * printed.LOG2_E if printed.is_plain(parsed) else 1.0

    def choose(self, tuned: Tuned[Tiles], default: Tiles, q: Tensor, program: str) -> Tiles:
        """The tiles for this problem, within what is listed; functions of scores need registers."""
        scored = int(not printed.is_plain(printed.parsed(program)))
        tiles = tuned.choose(default, q, **self.facts, scored=scored)
        return tiles.within(self.facts["tile"], self.facts["block_size"])


def describe(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, tile: int, block_size: int
) -> Problem:
    """The problem of these arguments."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    sizes = (q.shape[3], v.shape[3])
    widths = [padded(size) for size in sizes]
    even = k.shape[2] % block_size == 0
    list_group = heads // block_indices.shape[1]
    constants = (
        heads, group, list_group, *sizes, precision(q.dtype), even, tile, block_size, *widths,
    )  # fmt: skip
    facts = {
        "head_dim": q.shape[3], "value_dim": v.shape[3], "tile": tile, "block_size": block_size
    }  # fmt: skip
    return Problem(constants, facts, max(widths))


def list_strides(tensor: Tensor) -> list[int]:
    """Strides, 0 for a batch or a head that all share."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [0 if size == 1 and axis < 2 else stride for axis, (size, stride) in enumerate(pairs)]
