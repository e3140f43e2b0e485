"""Which query tokens read each KV block: the inverse of a selection, built without a host sync.

The query tokens of a KV head are cut into chunks, so that what is computed per (token, KV block)
fits into a scratch of bounded size. Within a chunk every KV block gets a list of the tokens that
selected it, and every list is cut into work items of bounded length. Triton kernels do it all: a
histogram by atomics, a prefix sum, and a fill. The order within a list varies from run to run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 1024  # per program
LISTS = 128  # per program
MAX_PARTS = 16  # of a list, with counters of their own
COUNTERS = 2**22  # at most, unless there are more lists
UNROLLED = tl.constexpr(16)  # slots whose partial results are on their way at a time
ROWS_PER_LIST = 128  # fewer would leave the tiles of rows empty


class Geometry(NamedTuple):
    """Where the query tokens and the KV blocks are, dense or packed."""

    n_blocks: int  # KV blocks; for packed sequences no less than there are
    shift: int  # a query's position in the keys minus its number
    packed: bool
    rows: Tensor  # packed: first key, end of keys and first KV block of each token, int32 [3, T]
    blocks: Tensor  # packed: first key and end of keys of each KV block, int32 [2, n_blocks]


class Lists(NamedTuple):
    """The tokens of each KV block, chunk by chunk; `row` is that of the batch and the KV head."""

    entries: Tensor  # token * K + slot, int32 [B * Hkv * T * K]
    items: Tensor  # row, KV block, first entry, end: int32 [n, 4]
    first_item: Tensor  # of each chunk of each row, and the end: int32 [rows * n_chunks + 1]
    n_chunks: int  # of a row
    max_items: int  # of one chunk, whatever the selection


class Chunks(NamedTuple):
    """How the work is cut so that the scratch is bounded."""

    tokens: int  # query tokens of a chunk
    at_once: int  # chunks of a launch, which may be of several rows


def cut(
    n_tokens: int, n_rows: int, group: int, n_slots: int, n_blocks: int, bytes_: int, scratch: int,
    *, preferred: float = float("inf"),
) -> Chunks:  # fmt: skip
    """As much at a time as the scratch holds, but enough to fill the tiles.

    Args:
        n_tokens: T.
        n_rows: B * Hkv.
        group: Query heads of a KV head.
        n_slots: K.
        n_blocks: KV blocks.
        bytes_: Scratch of one (token, slot, head).
        scratch: Its bytes, unless lists would become too short.
        preferred: Rows (token, head of the group) that the mean list of a chunk needs no more of.
    """
    fits = scratch // (group * n_slots * bytes_)  # tokens
    fills = n_blocks / (group * n_slots)  # tokens for a list of one row
    most = math.ceil(max(min(fits, preferred * fills), ROWS_PER_LIST * fills))
    n_chunks = max(1, -(-n_tokens // most))
    tokens = -(-n_tokens // n_chunks)
    return Chunks(tokens, max(1, min(n_rows * n_chunks, fits // max(1, tokens))))


def span(x: Tensor) -> int:
    """Elements from the first of a tensor to its last."""
    return sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))


def geometry(
    n_queries: int, n_keys: int, block_size: int, cu_seqlens: Tensor | None, device: torch.device
) -> Geometry:
    """Positions of tokens and KV blocks.

    Args:
        n_queries: T.
        n_keys: S; T if the sequences are packed.
        block_size: Keys in a KV block.
        cu_seqlens: Starts of the packed sequences and the end of the last, int32 [n + 1].
        device: Where the kernels run.
    """
    if cu_seqlens is None:
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        n_blocks = -(-n_keys // block_size)
        return Geometry(n_blocks, n_keys - n_queries, False, nothing, nothing)
    bounds = cu_seqlens.long()
    n_sequences = bounds.numel() - 1
    n_of = (bounds.diff() + block_size - 1) // block_size  # KV blocks of each sequence
    ends = n_of.cumsum(0)
    token = torch.arange(n_queries, device=device)
    of = torch.searchsorted(bounds[1:], token, right=True).clamp(max=n_sequences - 1)
    rows = torch.stack([bounds[of], bounds[of + 1], (ends - n_of)[of]]).int()
    n_blocks = n_queries // block_size + n_sequences
    block = torch.arange(n_blocks, device=device)
    of = torch.searchsorted(ends, block, right=True).clamp(max=n_sequences - 1)
    first = bounds[of] + (block - (ends - n_of)[of]) * block_size
    blocks = torch.stack([first, torch.minimum(first + block_size, bounds[of + 1])]).int()
    return Geometry(n_blocks, 0, True, rows, blocks)


@triton.jit
def read_position(rows_ptr, token, T, S, PACKED: tl.constexpr):
    """Of tokens: position, number of keys and first KV block of their sequences; the first key."""
    if PACKED:
        inside = token < T
        first_key = tl.load(rows_ptr + token, mask=inside, other=0)
        end = tl.load(rows_ptr + T + token, mask=inside, other=0)
        base = tl.load(rows_ptr + 2 * T + token, mask=inside, other=0)
        position = token - first_key
        n_keys = end - first_key
    else:
        first_key = token * 0
        base = first_key
        position = token + (S - T)
        n_keys = first_key + S
    return position, n_keys, base, first_key


@triton.jit
def read_entry(
    indices_ptr, row, token, slot, live, position, n_keys,
    stride_b, stride_h, stride_t, stride_k,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    LOCAL: tl.constexpr,
):  # fmt: skip
    """The KV blocks that tokens selected in a slot, and whether the lists hold them.

    Left out are those with no key to read and, if LOCAL, those that `_merge_kernel` reads itself:
    a token's own, the one before and, unless packed, the first. `row` is batch * HEADS + KV head,
    int64; `token`, `slot`, `live`, `position` and `n_keys` broadcast.
    """
    at = (row // HEADS) * stride_b + (row % HEADS) * stride_h
    at += token.to(tl.int64) * stride_t + slot.to(tl.int64) * stride_k
    block = tl.load(indices_ptr + at, mask=live, other=-1).to(tl.int32)
    listed = live & (block >= 0) & (block < tl.cdiv(n_keys, BLOCK_SIZE))
    if LOCAL:
        listed = listed & (block < position // BLOCK_SIZE - 1)
        if not PACKED:
            listed = listed & (block > 0)
    elif CAUSAL:
        listed = listed & (block * BLOCK_SIZE <= position)
    return block, listed


@triton.jit
def read_item(
    items_ptr, blocks_ptr, item, S, n_blocks,
    BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """An item's (row, first entry, end of entries, first key, end of keys)."""
    at = items_ptr + item.to(tl.int64) * 4
    row = tl.load(at).to(tl.int64)
    block = tl.load(at + 1)
    first = tl.load(at + 2)
    end = tl.load(at + 3)
    if PACKED:
        first_key = tl.load(blocks_ptr + block)
        end_key = tl.load(blocks_ptr + n_blocks + block)
    else:
        first_key = block * BLOCK_SIZE
        end_key = tl.minimum(first_key + BLOCK_SIZE, S)
    return row, first, end, first_key, end_key


@triton.jit
def widened(index, WIDE: tl.constexpr):
    """An index as it must be before it meets a stride: 64 bits where offsets need them."""
    return index.to(tl.int64) if WIDE else index


@triton.jit(do_not_specialize=["T", "S", "n_blocks"])
def _rank_kernel(
    indices_ptr, rows_ptr, counts_ptr, ranks_ptr,
    stride_b, stride_h, stride_t, stride_k, T, S, n_blocks,
    HEADS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Counts how often each KV block of a chunk is selected, and ranks the selections."""
    n_tiles = tl.cdiv(T * K, ENTRIES)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    entry = (tl.program_id(0) % n_tiles) * ENTRIES + tl.arange(0, ENTRIES)  # [ENTRIES]
    live = entry < T * K
    token = entry // K
    position, n_keys, base, _ = read_position(rows_ptr, token, T, S, PACKED)
    block, listed = read_entry(
        indices_ptr, row, token, entry % K, live, position, n_keys,
        stride_b, stride_h, stride_t, stride_k, HEADS, BLOCK_SIZE, CAUSAL, PACKED, LOCAL,
    )  # fmt: skip
    place = (row * tl.cdiv(T, CHUNK) + token // CHUNK) * n_blocks + base + block
    place = place * PARTS + (token % CHUNK) * PARTS // CHUNK
    rank = tl.atomic_add(counts_ptr + place, 1, mask=listed, sem="relaxed")
    tl.store(ranks_ptr + row * T * K + entry, tl.where(listed, rank, -1), mask=live)


@triton.jit(do_not_specialize=["T", "S", "n_blocks"])
def _fill_kernel(
    indices_ptr, rows_ptr, ends_ptr, counts_ptr, ranks_ptr, entries_ptr,
    stride_b, stride_h, stride_t, stride_k, T, S, n_blocks,
    HEADS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, LOCAL: tl.constexpr,
    PARTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Writes every selection to its place in the list of its KV block."""
    n_tiles = tl.cdiv(T * K, ENTRIES)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    entry = (tl.program_id(0) % n_tiles) * ENTRIES + tl.arange(0, ENTRIES)  # [ENTRIES]
    live = entry < T * K
    token = entry // K
    position, n_keys, base, _ = read_position(rows_ptr, token, T, S, PACKED)
    block, listed = read_entry(
        indices_ptr, row, token, entry % K, live, position, n_keys,
        stride_b, stride_h, stride_t, stride_k, HEADS, BLOCK_SIZE, CAUSAL, PACKED, LOCAL,
    )  # fmt: skip
    place = (row * tl.cdiv(T, CHUNK) + token // CHUNK) * n_blocks + base + block
    place = place * PARTS + (token % CHUNK) * PARTS // CHUNK
    start = tl.load(ends_ptr + place, mask=listed, other=0) - tl.load(
        counts_ptr + place, mask=listed, other=0
    )
    rank = tl.load(ranks_ptr + row * T * K + entry, mask=listed, other=0)
    tl.store(entries_ptr + start.to(tl.int64) + rank, entry, mask=listed)


@triton.jit(do_not_specialize=["n_lists", "n_blocks", "n_chunks"])
def _items_kernel(
    ends_ptr, item_ends_ptr, items_ptr, n_lists, n_blocks, n_chunks,
    LENGTH: tl.constexpr, WHOLE: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """Cuts every list into even items of at most LENGTH entries, of whole tiles of WHOLE."""
    at = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)  # [LISTS]
    live = at < n_lists
    end = tl.load(ends_ptr + at, mask=live, other=0)
    start = tl.load(ends_ptr + at - 1, mask=live & (at > 0), other=0)
    n_items = tl.cdiv(end - start, LENGTH)
    first = tl.load(item_ends_ptr + at, mask=live, other=0) - n_items
    row = at // n_blocks // n_chunks
    even = tl.cdiv(tl.cdiv(end - start, tl.maximum(n_items, 1)), WHOLE) * WHOLE
    even = tl.minimum(even, LENGTH)
    for i in range(tl.max(n_items, 0)):
        item = items_ptr + (first + i).to(tl.int64) * 4
        begin = tl.minimum(start + i * even, end)
        wanted = i < n_items
        tl.store(item, row.to(tl.int32), mask=wanted)
        tl.store(item + 1, (at % n_blocks).to(tl.int32), mask=wanted)
        tl.store(item + 2, begin, mask=wanted)
        tl.store(item + 3, tl.minimum(begin + even, end), mask=wanted)


def build_lists(
    block_indices: Tensor, place: Geometry, n_keys: int,
    *, block_size: int, causal: bool, local: bool, chunk: int, length: int, whole: int,
) -> Lists:  # fmt: skip
    """The lists of a selection.

    Args:
        block_indices: KV blocks of each token, int32 [B, Hkv, T, K]; -1 is none.
        place: Where tokens and KV blocks are.
        n_keys: S.
        block_size: Keys in a KV block.
        causal: Whether KV blocks behind the token are left out.
        local: Whether those that `read_entry` calls local are left out too.
        chunk: Query tokens of a chunk.
        length: Entries of an item at most.
        whole: Entries of a tile; items end where tiles do.
    """
    batch, heads, n_tokens, n_slots = block_indices.shape
    device = block_indices.device
    rows, entries = batch * heads, n_tokens * n_slots
    n_chunks = -(-n_tokens // chunk)
    n_lists = n_chunks * rows * place.n_blocks
    # a counter of its own for each part of a list, so that fewer programs wait for the same one
    parts = max(1, min(MAX_PARTS, triton.next_power_of_2(COUNTERS // max(1, n_lists) + 1) // 2))
    counts = torch.zeros(n_lists * parts, dtype=torch.int32, device=device)
    ranks = torch.empty(rows * entries, dtype=torch.int32, device=device)
    common = (
        *block_indices.stride(), n_tokens, n_keys, place.n_blocks,
        heads, n_slots, chunk, block_size, causal, place.packed, local, parts, ENTRIES,
    )  # fmt: skip
    grid = (rows * triton.cdiv(entries, ENTRIES),)
    _rank_kernel[grid](block_indices, place.rows, counts, ranks, *common)
    ends = counts.cumsum(0, dtype=torch.int32)
    found = torch.empty_like(ranks)
    _fill_kernel[grid](block_indices, place.rows, ends, counts, ranks, found, *common)
    list_ends = ends[parts - 1 :: parts].contiguous()
    lengths = list_ends.diff(prepend=list_ends.new_zeros(1))
    item_ends = ((lengths + (length - 1)) // length).cumsum(0, dtype=torch.int32)
    per_list = min(entries, chunk * n_slots)
    max_items = min(place.n_blocks, per_list) + per_list // length
    items = torch.empty((rows * n_chunks * max_items, 4), dtype=torch.int32, device=device)
    _items_kernel[(triton.cdiv(n_lists, LISTS),)](
        list_ends, item_ends, items, n_lists, place.n_blocks, n_chunks, length, whole, LISTS
    )
    last = item_ends[place.n_blocks - 1 :: place.n_blocks]
    first_item = torch.cat([last.new_zeros(1), last])
    return Lists(found, items, first_item, n_chunks, max_items)
