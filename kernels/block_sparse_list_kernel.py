"""Lists of KV blocks from a predicate, by a Triton kernel into which its bounds are printed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparse_compile.kernels import triton_functions as printed
from sparse_compile.kernels.block_sparse_lists import counts_of, extrema_of, sizes

CHUNK = 256  # KV blocks at a time


@triton.jit
def _list_blocks_kernel(
    indices_ptr, counts_ptr, full_ptr, lows, highs, strides, T, S, n_blocks, capacity,
    POSSIBLE: tl.constexpr, HEADS: tl.constexpr, N_ENDS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program lists the KV blocks of a tile: first those partly kept, then those fully."""
    n_tiles = tl.cdiv(T, TILE)
    row = tl.program_id(0).to(tl.int64)
    tile = row % n_tiles
    b, h = row // n_tiles // HEADS, row // n_tiles % HEADS
    t_low = tile * TILE
    t_high = tl.minimum(t_low + TILE, T) - 1
    n_listed = 0
    n_full = 0
    for wants_full in tl.static_range(2):
        n_found = 0
        for first in range(0, n_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)  # [CHUNK]
            there = block < n_blocks
            s_low = block * BLOCK
            s_high = tl.minimum(s_low + BLOCK, S) - 1
            ends = ()
            tops = ()
            for i in tl.static_range(N_ENDS):
                at = b * strides[4 * i] + h * strides[4 * i + 1] + tile * strides[4 * i + 2]
                at = at + block * strides[4 * i + 3]
                ends = ends + (tl.load(lows[i] + at, mask=there, other=0.0),)  # noqa: RUF005
                tops = tops + (tl.load(highs[i] + at, mask=there, other=0.0),)  # noqa: RUF005
            some, every = POSSIBLE(b, h, t_low, t_high, s_low, s_high, ends, tops)
            found = there & every if wants_full else there & some & ~every
            order = tl.cumsum(found.to(tl.int32), 0) - 1 + n_listed + n_found
            to = row * capacity + order
            tl.store(indices_ptr + to, block, mask=found & (order < capacity))
            n_found += tl.sum(found.to(tl.int32), 0)
        n_listed += n_found
        n_full = n_found
    n_cut = tl.maximum(n_listed - capacity, 0)
    tl.store(counts_ptr + row, n_listed - n_cut)
    tl.store(full_ptr + row, tl.maximum(n_full - n_cut, 0))


def launch(q, k, operands, program, tile, block_size, capacity):
    """The operator by a Triton kernel."""
    batch, heads = sizes(q, k, program)
    n_tiles, n_blocks = counts_of(q, k, tile, block_size)
    capacity = n_blocks if capacity is None else capacity
    indices = torch.zeros((batch, heads, n_tiles, capacity), dtype=torch.int32, device=q.device)
    counts, full = (
        torch.empty((batch, heads, n_tiles), dtype=torch.int32, device=q.device) for _ in range(2)
    )
    if counts.numel() == 0:
        return indices, counts, full
    found = extrema_of(q, k, operands, program, tile, block_size)
    ends = printed.Ends(tuple(found), tuple(one.is_whole for one in found.values()))
    lows, highs = (tuple(one[side] for one in found.values()) for side in (0, 1))
    strides = tuple(
        0 if size == 1 else stride
        for low in lows for size, stride in zip(low.shape, low.stride(), strict=True)
    )  # fmt: skip
    _list_blocks_kernel[(counts.numel(),)](
        indices, counts, full, lows, highs, strides, q.shape[2], k.shape[2], n_blocks, capacity,
        printed.possible(program, ends), heads, len(lows), tile, block_size,
        min(CHUNK, triton.next_power_of_2(max(n_blocks, 1))),
    )  # fmt: skip
    return indices, counts, full
