"""Selected attention in the loop order `tile_union`: a program owns a tile of neighbouring tokens.

It walks the union of the KV blocks that its tokens share and reads each once for all of them and
for several heads of the group; one bit per (token, KV block) tells who reads it. What hardly any
neighbour shares would fill that union with work that is masked out, so KV blocks that fewer than
`shared` tokens of the tile selected are left to the second half of `kv_major`, which continues from
the tile's result. With `shared` 1 the tile reads all of them itself.

The unions are listed on the device, without a host sync. A program does so for one tile after the
other with a bit mask per KV block, of which there are as many as KV blocks and programs, not tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels import selected_kv_major
from sparse_compile.kernels.launching import n_multiprocessors, padded, precision
from sparse_compile.kernels.online_softmax import add_keys, normalised
from sparse_compile.kernels.selected_lists import Geometry, read_entry, read_position
from sparse_compile.kernels.tuning import Tuned

PROGRAMS_PER_SM = 8  # that list unions


TILE_UNION = Tuned["Tiles"]("selected_tile_union")


class Tiles(NamedTuple):
    """What can be tuned."""

    block_t: int  # neighbouring tokens of a tile, 1 to 64
    block_g: int  # heads of the group that a program works on at once; with all tokens 16 or more
    block_n: int  # keys of a step, at most a KV block
    shared: int  # the fewest tokens of a tile that share a KV block which the tile reads; 1: all
    num_warps: int
    num_stages: int
    registers: int  # of a thread at most


class Unions(NamedTuple):
    """KV blocks of every tile, and what the tiles leave out."""

    blocks: Tensor  # first key, end of keys, bits of tokens 0 to 31 and 32 to 63: int32 [n, 4]
    counts: Tensor  # KV blocks of each tile, int32 [B * Hkv * n_tiles]
    capacity: int  # of each tile
    rest: Tensor | None  # the selection without what the tiles read; None if nothing can be left


def default_tiles(
    head_dim: int, value_dim: int, group: int, block_size: int, itemsize: int
) -> Tiles:
    """Tiles that run everywhere.

    A KV block in a tile costs 64 tokens' work whoever reads it, in `kv_major` as much as about 16
    tokens', which write and read partial results: so 16 must share it.
    """
    if itemsize > 2:  # without matrix units, products live in registers
        return Tiles(16, 1, 16, 4, 4, 1, 255)
    if max(head_dim, value_dim) > 128:
        return Tiles(64, min(2, group), min(block_size, 32), 16, 8, 2, 255)
    if group == 1:
        return Tiles(64, 1, min(block_size, 64), 16, 4, 2, 255)
    # with 128 registers two programs of eight warps share a multiprocessor; products of more keys
    # would need more than that, and be done one by one
    block_n = 64 if max(head_dim, value_dim) <= 64 else 32
    return Tiles(64, 2, min(block_size, block_n), 16, 8, 2, 128)


def pad_before(shift: int, block_t: int) -> int:
    """Places of the first tile without a token, so that tiles begin where KV blocks may."""
    return shift % block_t


@triton.jit
def _count_bits(x):
    """How many bits of int64 numbers are set."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


@triton.jit(do_not_specialize=["T", "S", "n_blocks", "n_tiles", "n_all", "before", "capacity"])
def _union_kernel(
    indices_ptr, rows_ptr, seen_ptr, blocks_ptr, counts_ptr, rest_ptr,
    stride_i_b, stride_i_h, stride_i_t, stride_i_k,
    T, S, n_blocks, n_tiles, n_all, before, capacity,
    HEADS: tl.constexpr, K: tl.constexpr, BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, SHARED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program lists the KV blocks of one tile after the other, in the order of its tokens."""
    entry = tl.arange(0, BLOCK_T * BLOCK_K)  # [BLOCK_T * BLOCK_K]
    in_tile, slot = entry // BLOCK_K, entry % BLOCK_K
    bit = tl.full([1], 1, tl.int64) << in_tile.to(tl.int64)
    seen_ptr += tl.program_id(0).to(tl.int64) * n_blocks
    tile = tl.program_id(0)
    while tile < n_all:
        row = (tile // n_tiles).to(tl.int64)
        token = tile % n_tiles * BLOCK_T - before + in_tile
        live = (token >= 0) & (token < T) & (slot < K)
        token = tl.where(live, token, 0)
        position, n_keys, base, first_key = read_position(rows_ptr, token, T, S, PACKED)
        block, listed = read_entry(
            indices_ptr, row, token, slot, live, position, n_keys,
            stride_i_b, stride_i_h, stride_i_t, stride_i_k,
            HEADS, BLOCK_SIZE, CAUSAL, PACKED, False,
        )  # fmt: skip
        at = seen_ptr + base + block
        tl.atomic_or(at, bit, mask=listed, sem="relaxed")
        tl.debug_barrier()
        # past the L1 cache, which atomics do not reach
        members = tl.load(at, mask=listed, other=0, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(at, tl.zeros_like(members), mask=listed)
        tl.debug_barrier()  # before the next tile
        shared = listed & (_count_bits(members) >= SHARED)
        leads = shared & ((members & -members) == bit)  # the first token writes the KV block
        place = tl.cumsum(leads.to(tl.int32), 0) - 1
        begin = first_key + block * BLOCK_SIZE
        to = blocks_ptr + (tile.to(tl.int64) * capacity + place) * 4
        tl.store(to, begin, mask=leads)
        tl.store(to + 1, tl.minimum(begin + BLOCK_SIZE, first_key + n_keys), mask=leads)
        tl.store(to + 2, members.to(tl.int32), mask=leads)
        tl.store(to + 3, (members >> 32).to(tl.int32), mask=leads)
        tl.store(counts_ptr + tile, tl.sum(leads.to(tl.int32), 0))
        if SHARED > 1:
            left = tl.where(listed & ~shared, block, -1)
            tl.store(rest_ptr + (row * T + token) * K + slot, left, mask=live)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["T", "S", "n_tiles", "before", "capacity"])
def _tile_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, blocks_ptr, counts_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_h, stride_q_t, stride_q_d,
    stride_k_b, stride_k_h, stride_k_s, stride_k_d,
    stride_v_b, stride_v_h, stride_v_s, stride_v_d,
    scale, T, S, n_tiles, before, capacity,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, NATURAL: tl.constexpr,
    POSITIVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program attends with a tile of tokens and BLOCK_G heads; rows are (head, token).

    The log-sum-exp that it writes is natural or, for another step to continue from, of base 2.
    """
    n_parts: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    steps: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tile = tl.program_id(0) // n_parts
    row = (tile // n_tiles).to(tl.int64)
    b, h = row // HEADS, row % HEADS
    r = tl.arange(0, BLOCK_G * BLOCK_T)  # [BLOCK_G * BLOCK_T]
    in_tile = r % BLOCK_T
    head = tl.program_id(0) % n_parts * BLOCK_G + r // BLOCK_T
    token = tile % n_tiles * BLOCK_T - before + in_tile
    live = (token >= 0) & (token < T) & (head < GROUP)
    token = tl.where(live, token, 0)
    head = tl.where(live, head, 0).to(tl.int64)
    position, _, _, first_key = read_position(rows_ptr, token, T, S, PACKED)
    own = first_key + position
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dv = tl.arange(0, BLOCK_DV)  # [BLOCK_DV]
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    q_at = q_ptr + b * stride_q_b + (h * GROUP + head) * stride_q_h
    q_at += token.to(tl.int64) * stride_q_t
    q = tl.load(
        q_at[:, None] + d[None, :] * stride_q_d, mask=live[:, None] & (d[None, :] < D), other=0.0
    )  # [BLOCK_G * BLOCK_T, BLOCK_D]
    k_at = k_ptr + b * stride_k_b + h * stride_k_h + n.to(tl.int64)[None, :] * stride_k_s
    k_at += d[:, None] * stride_k_d  # [BLOCK_D, BLOCK_N]
    v_at = v_ptr + b * stride_v_b + h * stride_v_h + n.to(tl.int64)[:, None] * stride_v_s
    v_at += dv[None, :] * stride_v_d  # [BLOCK_N, BLOCK_DV]
    scale = scale * 1.4426950408889634
    # a positive factor may follow the mask and the maximum, where it costs nothing
    size = scale if POSITIVE else 1.0
    highest = tl.full([BLOCK_G * BLOCK_T], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G * BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_G * BLOCK_T, BLOCK_DV], tl.float32)
    blocks_ptr += tile.to(tl.int64) * capacity * 4
    for i in tl.range(0, tl.load(counts_ptr + tile) * steps, num_stages=STAGES):
        block_at = blocks_ptr + i // steps * 4
        begin = tl.load(block_at) + i % steps * BLOCK_N
        end = tl.load(block_at + 1)
        key = begin + n
        k = tl.load(
            k_at + begin.to(tl.int64) * stride_k_s,
            mask=(key < end)[None, :] & (d[:, None] < D), other=0.0,
        )  # [BLOCK_D, BLOCK_N]  # fmt: skip
        v = tl.load(
            v_at + begin.to(tl.int64) * stride_v_s,
            mask=(key < end)[:, None] & (dv[None, :] < DV), other=0.0,
        )  # [BLOCK_N, BLOCK_DV]  # fmt: skip
        members = tl.where(in_tile < 32, tl.load(block_at + 2), tl.load(block_at + 3))
        last = own if CAUSAL else tl.zeros_like(own) + (end - 1)
        last = tl.where((members >> (in_tile % 32)) & 1 != 0, last, -1)  # key that a row reads
        s = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_G * BLOCK_T, BLOCK_N]
        if not POSITIVE:
            s = s * scale
        s = tl.where(key[None, :] <= last[:, None], s, -float("inf"))
        acc, total, highest = add_keys(acc, total, highest, s, v, size, PRECISION)
    acc = normalised(acc, total)
    to = (row * GROUP + head) * T + token  # out [B, Hq, T, Dv], lse [B, Hq, T]
    tl.store(
        out_ptr + to[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (dv[None, :] < DV),
    )  # fmt: skip
    lse = highest + tl.log2(total)
    tl.store(lse_ptr + to, lse * 0.6931471805599453 if NATURAL else lse, mask=live)


def build_unions(
    block_indices: Tensor, place: Geometry, n_keys: int,
    *, block_size: int, causal: bool, block_t: int, shared: int,
) -> Unions:  # fmt: skip
    """The KV blocks that the tokens of each tile share.

    Args:
        block_indices: KV blocks of each token, int32 [B, Hkv, T, K]; -1 is none.
        place: Where tokens and KV blocks are.
        n_keys: S.
        block_size: Keys in a KV block.
        causal: Whether KV blocks behind the token are left out.
        block_t: Tokens of a tile.
        shared: The fewest tokens that share a KV block; all others are in `rest`.
    """
    batch, heads, n_tokens, n_slots = block_indices.shape
    device, before = block_indices.device, pad_before(place.shift, block_t)
    n_tiles = triton.cdiv(n_tokens + before, block_t)
    n_all = batch * heads * n_tiles
    capacity = max(1, min(block_t * n_slots // shared, place.n_blocks))
    blocks = torch.empty((n_all * capacity, 4), dtype=torch.int32, device=device)
    counts = torch.empty(n_all, dtype=torch.int32, device=device)
    rest = None
    if shared > 1:
        rest = torch.empty_like(block_indices, memory_format=torch.contiguous_format)
    n_programs = min(n_all, PROGRAMS_PER_SM * n_multiprocessors(device))
    seen = torch.zeros(n_programs * place.n_blocks, dtype=torch.int64, device=device)
    block_k = triton.next_power_of_2(n_slots)
    _union_kernel[(n_programs,)](
        block_indices, place.rows, seen, blocks, counts, rest, *block_indices.stride(),
        n_tokens, n_keys, place.n_blocks, n_tiles, n_all, before, capacity,
        heads, n_slots, block_size, causal, place.packed, shared, block_k, block_t,
        num_warps=8 if block_t * block_k > 1024 else 4,
    )  # fmt: skip
    return Unions(blocks, counts, capacity, rest)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, place: Geometry,
    *, block_size: int, scale: float, causal: bool, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and its natural log-sum-exp [B, Hq, T] in float32."""
    batch, query_heads, n_tokens, head_dim = q.shape
    heads, n_keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group = query_heads // heads
    if tiles is None:
        default = default_tiles(head_dim, value_dim, group, block_size, q.element_size())
        tiles = TILE_UNION.choose(
            default, q, head_dim=head_dim, value_dim=value_dim, block_size=block_size, group=group
        )
    unions = build_unions(
        block_indices, place, n_keys, block_size=block_size, causal=causal,
        block_t=tiles.block_t, shared=tiles.shared,
    )  # fmt: skip
    out = q.new_empty((batch, query_heads, n_tokens, value_dim))
    lse = q.new_empty((batch, query_heads, n_tokens), dtype=torch.float32)
    n_all = unions.counts.shape[0]
    _tile_kernel[(n_all * triton.cdiv(group, tiles.block_g),)](
        q, k, v, place.rows, unions.blocks, unions.counts, out, lse,
        *q.stride(), *k.stride(), *v.stride(),
        scale, n_tokens, n_keys, n_all // (batch * heads), pad_before(place.shift, tiles.block_t),
        unions.capacity,
        heads, group, head_dim, value_dim, block_size, causal, place.packed, unions.rest is None, scale > 0,
        precision(q.dtype),
        padded(head_dim), padded(value_dim),
        tiles.block_t, tiles.block_g, tiles.block_n, tiles.num_stages,
        num_warps=tiles.num_warps, maxnreg=tiles.registers,
    )  # fmt: skip
    if unions.rest is not None:
        selected_kv_major.attend(
            q, k, v, unions.rest, place, out, lse, block_size=block_size, scale=scale,
            causal=causal, local=False, started=True,
        )  # fmt: skip
    return out, lse


def count(
    block_indices: Tensor, place: Geometry, n_keys: int,
    *, block_size: int, causal: bool, block_t: int, shared: int,
) -> Tensor:  # fmt: skip
    """How many KV blocks the tiles would read and how many selections they would leave, int64 [2].

    It stays on the device: what a cost model needs to compare this loop order with others. The
    arguments are those of `build_unions`.
    """
    unions = build_unions(
        block_indices, place, n_keys, block_size=block_size, causal=causal, block_t=block_t,
        shared=shared,
    )  # fmt: skip
    read = unions.counts.sum()
    left = torch.zeros_like(read) if unions.rest is None else (unions.rest >= 0).sum()
    return torch.stack([read, left])
