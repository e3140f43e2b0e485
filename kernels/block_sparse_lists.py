"""Lists of KV blocks: from a predicate, without a [T, S] mask, and the lists' inverse."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from sparse_compile.expressions import INDICES, Load, b, h, s, t
from sparse_compile.intervals import Interval, bounds, load_extrema
from sparse_compile.kernels.program_attention_cpu import parsed


def sizes(q: Tensor, k: Tensor, program: str) -> tuple[int, int]:
    """Batch and heads of the lists: 1 where the predicate does not depend on them."""
    symbols = parsed(program).keep.free_symbols
    return (q.shape[0] if b in symbols else 1), (q.shape[1] if h in symbols else 1)


def counts_of(q: Tensor, k: Tensor, tile: int, block_size: int) -> tuple[int, int]:
    """How many tiles of queries and KV blocks there are."""
    return -(-q.shape[2] // tile), -(-k.shape[2] // block_size)


def extrema_of(
    q: Tensor, k: Tensor, operands: list[Tensor], program: str, tile: int, block_size: int
) -> dict[Load, Interval]:
    """What is known of each load of the predicate, over blocks."""
    lengths = dict(zip(INDICES, (*q.shape[:3], k.shape[2]), strict=True))
    steps = {b: 1, h: 1, t: tile, s: block_size}
    blocks = {one: (n, steps[one], -(-n // steps[one])) for one, n in lengths.items()}
    found = {}
    for load in sorted(parsed(program).keep.atoms(Load), key=sympy.default_sort_key):
        extrema = load_extrema(
            operands[int(load.args[0])], load, blocks, lengths,
            lambda count: torch.arange(count, device=q.device),
        )  # fmt: skip
        if extrema is not None:
            found[load] = extrema._replace(
                low=extrema.low.contiguous(), high=extrema.high.contiguous()
            )
    return found


def list_blocks_cpu(q, k, operands, program, tile, block_size, capacity):
    """The operator in PyTorch."""
    batch, heads = sizes(q, k, program)
    n_tiles, n_blocks = counts_of(q, k, tile, block_size)
    intervals: dict[sympy.Basic, tuple[Tensor, Tensor]] = {
        symbol: (torch.arange(size).view([-1 if axis == i else 1 for i in range(4)]),) * 2
        for axis, (symbol, size) in enumerate(((b, batch), (h, heads)))
    }
    for symbol, axis, size, n in ((t, 2, tile, q.shape[2]), (s, 3, block_size, k.shape[2])):
        low = torch.arange(0, n, size).view([-1 if axis == i else 1 for i in range(4)])
        intervals[symbol] = (low, (low + size - 1).clamp(max=n - 1))
    intervals.update(extrema_of(q, k, operands, program, tile, block_size))
    found = bounds(parsed(program).keep, intervals)
    shape = (batch, heads, n_tiles, n_blocks)
    some, every = (torch.as_tensor(value).expand(shape) for value in found)
    rank = torch.where(every, 1, torch.where(some, 0, 2))  # partial ones before full ones
    indices = rank.sort(dim=-1, stable=True).indices.int()
    counts, full = (rank < 2).sum(-1).int(), every.sum(-1).int()
    listed = torch.arange(n_blocks) < counts[..., None]
    indices = indices.masked_fill(~listed, 0)
    if capacity is not None:
        padded = torch.nn.functional.pad(indices, (0, max(0, capacity - n_blocks)))
        indices = padded[..., :capacity].contiguous()
    return indices, counts, full


def readers(
    block_indices: Tensor, block_counts: Tensor, full_counts: Tensor, n_blocks: int
) -> tuple[Tensor, Tensor]:
    """Which tiles list each KV block.

    Returns:
        The numbers of tiles, [B, H, n] int32, those of a KV block together, first those that keep
        it partly; and where they begin, [B, H, 2 n_blocks + 1] int32: partial and full ones of each
        KV block in turn, and the end of the last.
    """
    n_slots = block_indices.shape[3]
    slot = torch.arange(n_slots, device=block_indices.device, dtype=torch.int32)
    is_full = slot >= (block_counts - full_counts)[..., None]
    place = block_indices * 2 + is_full
    place = place.masked_fill(slot >= block_counts[..., None], 2 * n_blocks).flatten(2)
    ordered, entry = place.sort(dim=-1, stable=True)
    edges = torch.arange(2 * n_blocks + 1, device=place.device, dtype=torch.int32)
    edges = edges.expand(*place.shape[:2], -1).contiguous()
    starts = torch.searchsorted(ordered, edges, out_int32=True)
    return (entry // max(1, n_slots)).int(), starts
