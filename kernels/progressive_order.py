"""Triton kernels of `progressive_attention` that decide which pages are read, and in which round.

Logits and weights are in powers of two here. `of` is a KV head of a sequence, `g` a head of its group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_compile.kernels import progressive_attention
from sparse_compile.kernels.paged_kernels import find_pages

LEVELS = tl.constexpr(progressive_attention.LEVELS)
PER_OCTAVE = tl.constexpr(progressive_attention.PER_OCTAVE)
MARGIN = tl.constexpr(1.0 + progressive_attention.SAFETY)
UNIT = tl.constexpr(2**30)  # shares as integers, whose sum does not depend on their order
ALL = tl.constexpr(float("inf"))  # a share that no pages reach
LARGEST = tl.constexpr(
    64.0
)  # power of two up to which real weights and the sketch's are told apart


@triton.jit(do_not_specialize=["n_entries", "n_pages", "window", "stride_t_b"])
def _score_kernel(
    q_ptr, codes_ptr, scales_ptr, table_ptr, seq_lens_ptr, weight_ptr, tile_weight_ptr, pages_ptr,
    operands, places, stride_q_b, stride_q_h, stride_q_d,
    stride_t_b,  # table [B, L], last axis contiguous
    unit, n_entries, n_pages, window,
    LOGIT: tl.constexpr, KEEP: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program weighs BLOCK_P pages of a KV head by the sketch, for all heads of the group.

    Weights are [B, Hkv, G, L]; of whole tiles, [B, Hkv, G, tiles]. Lists of pages are emptied.
    """
    HALF: tl.constexpr = D // 2
    n_tiles = tl.cdiv(n_entries, BLOCK_P)
    tile = tl.program_id(0) % n_tiles
    of = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, kv_head = of // HEADS, of % HEADS
    entry = tile * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    tl.store(pages_ptr + of * n_entries + entry, -1, mask=entry < n_entries)
    n_keys = tl.load(seq_lens_ptr + b)
    if tile * BLOCK_P * PAGE_SIZE >= n_keys:
        return
    s = tile * BLOCK_P * PAGE_SIZE + tl.arange(0, BLOCK_P * PAGE_SIZE)  # [keys]
    first = entry * PAGE_SIZE
    page, there = find_pages(
        table_ptr + b * stride_t_b, first, first < n_keys, n_entries, n_pages, PAGE_SIZE
    )  # [BLOCK_P]
    shape: tl.constexpr = [BLOCK_P, PAGE_SIZE]
    page = tl.reshape(tl.broadcast_to(page[:, None], shape), [BLOCK_P * PAGE_SIZE])
    there = tl.reshape(tl.broadcast_to(there[:, None], shape), [BLOCK_P * PAGE_SIZE])
    there = there & (s < n_keys)
    d = tl.arange(0, BLOCK_H)  # [BLOCK_H] of each half of the channels
    g = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    h = (kv_head * GROUP).to(tl.int32) + g
    q_at = q_ptr + b * stride_q_b + h.to(tl.int64)[None, :] * stride_q_h
    wanted = (d < HALF)[:, None] & (g < GROUP)[None, :]
    q_low = tl.load(q_at + d[:, None] * stride_q_d, mask=wanted, other=0.0)  # [BLOCK_H, BLOCK_G]
    q_high = tl.load(q_at + (d + HALF)[:, None] * stride_q_d, mask=wanted, other=0.0)
    q_sum = tl.sum(q_low.to(tl.float32), 0) + tl.sum(q_high.to(tl.float32), 0)  # [BLOCK_G]
    row = (page * HEADS + kv_head) * PAGE_SIZE + s % PAGE_SIZE
    codes = tl.load(
        codes_ptr + row[:, None] * HALF + d[None, :],
        mask=there[:, None] & (d < HALF)[None, :], other=0,
    )  # [keys, BLOCK_H]  # fmt: skip
    step = tl.load(scales_ptr + row * 2, mask=there, other=0.0).to(tl.float32)
    lowest = tl.load(scales_ptr + row * 2 + 1, mask=there, other=0.0).to(tl.float32)
    number = q_low.dtype
    z = tl.dot((codes & 15).to(tl.float32).to(number), q_low, input_precision=PRECISION)
    z = tl.dot((codes >> 4).to(tl.float32).to(number), q_high, z, input_precision=PRECISION)
    z = lowest[:, None] * q_sum[None, :] + step[:, None] * z  # [keys, BLOCK_G]
    position = n_keys - 1
    if LOGIT is not None:
        z = LOGIT(z, b, h[None, :], position, s[:, None], operands, places)
    keep = there[:, None] & (g < GROUP)[None, :]
    if WINDOWED:
        keep = keep & (s > position - window)[:, None]
    if KEEP is not None:
        keep = keep & KEEP(b, h[None, :], position, s[:, None], operands, places)
    z = tl.where(keep, z * unit, -float("inf"))
    weight = _weight(tl.reshape(z, [BLOCK_P, PAGE_SIZE, BLOCK_G]), 1)  # [BLOCK_P, BLOCK_G]
    to = (of * GROUP + g)[None, :]
    tl.store(
        weight_ptr + to * n_entries + entry[:, None], weight,
        mask=(entry < n_entries)[:, None] & (g < GROUP)[None, :],
    )  # fmt: skip
    tl.store(
        tile_weight_ptr + (of * GROUP + g) * n_tiles + tile, _weight(weight, 0), mask=g < GROUP
    )


@triton.jit
def _weight(z, AXIS: tl.constexpr):
    """The log-sum-exp along an axis: NaN if one is, -inf of nothing."""
    highest = tl.max(z, AXIS)
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    return reference + tl.log2(tl.sum(tl.exp2(z - tl.expand_dims(reference, AXIS)), AXIS))


@triton.jit
def _shares(weight, total):
    """Shares [BLOCK_G, BLOCK_L] of weights in totals [BLOCK_G]."""
    return tl.exp2(weight - tl.where(total == -float("inf"), 0.0, total)[:, None])


@triton.jit(do_not_specialize=["n_entries", "n_score_tiles", "sinks", "local"])
def _rank_kernel(
    weight_ptr, tile_weight_ptr, seq_lens_ptr, total_ptr, level_ptr, sums_ptr,
    n_entries, n_score_tiles, sinks, local,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, SCORED: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program gives BLOCK_L pages of a KV head their levels, and adds up shares by level.

    Sums are [B, Hkv, G + 1, LEVELS] int32, of pages last; `SCORED` pages were a tile of the scores.
    """
    n_tiles = tl.cdiv(n_entries, BLOCK_L)
    tile = tl.program_id(0) % n_tiles
    of = (tl.program_id(0) // n_tiles).to(tl.int64)
    n_live = tl.minimum(tl.cdiv(tl.load(seq_lens_ptr + of // HEADS), PAGE_SIZE), n_entries)
    g = tl.arange(0, BLOCK_G)
    own = (g < GROUP)[:, None]
    highest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    amount = tl.zeros([BLOCK_G], tl.float32)
    scored = tl.cdiv(n_live, SCORED)  # others were left out
    for start in range(0, scored, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        some = tl.load(
            tile_weight_ptr + (of * GROUP + g)[:, None] * n_score_tiles + t[None, :],
            mask=own & (t < scored)[None, :], other=-float("inf"),
        )  # [BLOCK_G, BLOCK_T]  # fmt: skip
        new = tl.maximum(highest, tl.max(some, 1))
        reference = tl.where(new == -float("inf"), 0.0, new)
        amount = amount * tl.exp2(highest - reference)
        amount += tl.sum(tl.exp2(some - reference[:, None]), 1)
        highest = new
    total = tl.where(highest == -float("inf"), 0.0, highest) + tl.log2(amount)  # [BLOCK_G]
    if tile == 0:
        tl.store(total_ptr + of * GROUP + g, total, mask=g < GROUP)
    entry = tile * BLOCK_L + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    live = entry < n_live
    weight = tl.load(
        weight_ptr + (of * GROUP + g)[:, None] * n_entries + entry[None, :],
        mask=own & live[None, :], other=-float("inf"),
    )  # [BLOCK_G, BLOCK_L]  # fmt: skip
    share = _shares(weight, total)
    is_number = share == share
    share = tl.where(is_number & own, share, 0.0)
    level = LEVELS - 2 + PER_OCTAVE * tl.log2(tl.max(share, 0))
    level = tl.minimum(tl.maximum(tl.floor(level), 0.0), LEVELS - 2).to(tl.int32)
    first = (entry < sinks) | (entry >= n_live - local)
    first = first | (tl.max(tl.where(is_number | (own == 0), 0, 1), 0) > 0)
    level = tl.where(first, LEVELS - 1, level)
    live = live & (tl.max(tl.where(weight == -float("inf"), 0, 1), 0) > 0)
    level = tl.where(live, level, -1)
    tl.store(level_ptr + of * n_entries + entry, level.to(tl.int16), mask=entry < n_entries)
    amount = (share * UNIT + 0.5).to(tl.int32)
    to = sums_ptr + of * (GROUP + 1) * LEVELS + level
    tl.atomic_add(
        to[None, :] + g[:, None] * LEVELS, amount, mask=live[None, :] & (amount > 0), sem="relaxed"
    )
    tl.atomic_add(to + GROUP * LEVELS, 1, mask=live, sem="relaxed")


@triton.jit
def _missing(real, rest, p):
    """What share of a head must be read next, given the real weight and the sketch's rest; 0 for none.

    A later round of `progressive_cpu.choose`.
    """
    got = 1.0 - rest
    doubt = tl.sqrt(tl.maximum(got / real, 1.0))
    done = (real >= p * (real + doubt * rest)) & (got >= p)
    worth = tl.minimum(real / got, 1.0)
    missing = (p * doubt * rest - (1.0 - p) * real) / ((1.0 - p) * worth + p * doubt)
    need = got + MARGIN * missing
    need = tl.where(need == need, tl.maximum(need, p), ALL)
    return tl.where(done, 0.0, need)


@triton.jit
def real_weight(lse, total):
    """The weight of keys that were read, relative to the sketch's total; 1 where there is nothing."""
    return tl.where(total == -float("inf"), 1.0, tl.exp2(tl.minimum(lse - total, LARGEST)))


@triton.jit(do_not_specialize=["n_entries", "min_pages", "max_pages", "splits"])
def _plan_kernel(
    weight_ptr, level_ptr, sums_ptr, total_ptr, seq_lens_ptr, part_lse_ptr, p_ptr, pages_ptr,
    count_before_ptr, edge_before_ptr, rest_before_ptr, count_ptr, edge_ptr, rest_ptr,
    p, n_entries, min_pages, max_pages, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, P_OF_ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One program lists what a round reads of a KV head.

    What has been read is a prefix of the order: all pages of levels above an edge's, and of its level
    those up to a page. Edges are [B, Hkv, 2], counts [B, Hkv], rests [B, Hkv, G].
    """
    of = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    own = g < GROUP
    if P_OF_ROWS:
        p = tl.load(p_ptr + of // HEADS)
    p = tl.zeros([BLOCK_G], tl.float32) + p  # [BLOCK_G]
    total = tl.load(total_ptr + of * GROUP + g, mask=own, other=-float("inf"))  # [BLOCK_G]
    count, top, until = 0, LEVELS, -1
    if FIRST:
        need = tl.where((total == total) & (p < 1.0), p, ALL)  # [BLOCK_G]
    else:
        count = tl.load(count_before_ptr + of)
        top, until = tl.load(edge_before_ptr + of * 2), tl.load(edge_before_ptr + of * 2 + 1)
        rest = tl.load(rest_before_ptr + of * GROUP + g, mask=own, other=0.0)
        split = tl.arange(0, BLOCK_S)
        lse = tl.load(
            part_lse_ptr + (of * GROUP + g)[:, None] * splits + split[None, :],
            mask=own[:, None] & (split < splits)[None, :], other=-float("inf"),
        )  # [BLOCK_G, BLOCK_S]  # fmt: skip
        need = _missing(real_weight(_weight(lse, 1), total), rest, p)
        if LAST:
            need = tl.where(need > 0.0, ALL, 0.0)
        need = tl.where(own, need, 0.0)
        if tl.max(need, 0) == 0.0:  # verified
            tl.store(count_ptr + of, count)
            tl.store(edge_ptr + of * 2, top)
            tl.store(edge_ptr + of * 2 + 1, until)
            tl.store(rest_ptr + of * GROUP + g, rest, mask=own)
            return
    need = tl.where(own, need, 0.0)
    level = tl.arange(0, LEVELS)
    sums_at = sums_ptr + of * (GROUP + 1) * LEVELS + level
    sums = tl.load(sums_at[None, :] + g[:, None] * LEVELS, mask=own[:, None], other=0)
    n_of_level = tl.load(sums_at + GROUP * LEVELS)  # [LEVELS]
    got = tl.cumsum(sums, 1, reverse=True).to(tl.float32) * (1.0 / UNIT)  # [BLOCK_G, LEVELS]
    n_got = tl.cumsum(n_of_level, 0, reverse=True)
    floor = tl.maximum(min_pages, tl.sum(tl.where(level == LEVELS - 1, n_of_level, 0)))
    enough = tl.min(tl.where(got >= need[:, None], 1, 0), 0) > 0
    enough = (enough & (n_got >= floor)) | (n_got >= max_pages)
    new_top = tl.max(tl.where(enough, level, 0), 0)
    above = level > new_top
    got = tl.sum(tl.where(above[None, :], sums, 0), 1).to(tl.float32) * (1.0 / UNIT)  # [BLOCK_G]
    n_got = tl.sum(tl.where(above, n_of_level, 0), 0)
    # pages of the edge's level are read in their order while a head needs them
    new_until = -1
    rest = tl.zeros([BLOCK_G], tl.float32)
    n_live = tl.minimum(tl.cdiv(tl.load(seq_lens_ptr + of // HEADS), PAGE_SIZE), n_entries)
    for start in range(0, n_live, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)  # [BLOCK_L]
        at_level = tl.load(level_ptr + of * n_entries + entry, mask=entry < n_live, other=-1)
        at_level = at_level.to(tl.int32)
        weight = tl.load(
            weight_ptr + (of * GROUP + g)[:, None] * n_entries + entry[None, :],
            mask=own[:, None] & (at_level >= 0)[None, :], other=-float("inf"),
        )  # [BLOCK_G, BLOCK_L]  # fmt: skip
        share = _shares(weight, total)
        on_edge = at_level == new_top
        some = tl.where(on_edge[None, :] & (share == share), share, 0.0)
        before = got[:, None] + tl.cumsum(some, 1) - some
        one = on_edge.to(tl.int32)
        rank = n_got + tl.cumsum(one, 0) - one
        needed = tl.max(tl.where(before < need[:, None], 1, 0), 0) > 0
        on_edge = on_edge & (needed | (rank < floor)) & (rank < max_pages)
        is_read = (at_level > top) | ((at_level == top) & (entry <= until))
        new = ((at_level > new_top) | on_edge) & (is_read == 0)
        one = new.to(tl.int32)
        at = count + tl.cumsum(one, 0) - one
        tl.store(pages_ptr + of * n_entries + at, entry, mask=new)
        rest += tl.sum(tl.where((is_read | new | (at_level < 0))[None, :], 0.0, share), 1)
        new_until = tl.maximum(new_until, tl.max(tl.where(on_edge, entry, -1), 0))
        count += tl.sum(one, 0)
        got += tl.sum(some, 1)
        n_got += tl.sum((at_level == new_top).to(tl.int32), 0)
    longer = (new_top < top) | ((new_top == top) & (new_until > until))
    tl.store(count_ptr + of, count)
    tl.store(edge_ptr + of * 2, tl.where(longer, new_top, top))
    tl.store(edge_ptr + of * 2 + 1, tl.where(longer, new_until, until))
    tl.store(rest_ptr + of * GROUP + g, rest, mask=own)
