"""`progressive_attention` in plain PyTorch: what is read is decided as the kernels decide it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels.paged_attention import masked_logits
from sparse_compile.kernels.paged_cache import Sketch, paged_gather_ref
from sparse_compile.kernels.program_attention_cpu import parsed
from sparse_compile.kernels.progressive_attention import (
    LEVELS,
    PER_OCTAVE,
    ROUNDS,
    SAFETY,
    progressive_attention_ref,
)

LARGEST = 2.0**64  # how much heavier than all of the sketch the pages read may be, to be told apart


class Order(NamedTuple):
    """In which order the pages of each KV head are read."""

    total: Tensor  # log-sum-exp of the sketch's logits, [B, Hkv, G, 1]
    share: Tensor  # of each page in the total, [B, Hkv, G, L]
    level: Tensor  # [B, Hkv, L] int64; -1 for a page with no key to read


class Limits(NamedTuple):
    """How much is read."""

    p: Tensor  # [B, 1, 1], or of no dimensions
    min_pages: int
    max_pages: int


def ordered(weight: Tensor, seq_lens: Tensor, page_size: int, sinks: int, local: int) -> Order:
    """The order of pages.

    Args:
        weight: Log-sum-exp of the sketch's logits in each page, [B, Hkv, G, L]; -inf without keys.
        seq_lens: Tokens of each sequence, [B] int32.
        page_size: N.
        sinks: First pages that come first.
        local: Last pages that do.
    """
    total = weight.logsumexp(-1, keepdim=True)
    share = (weight - total.masked_fill(total == -math.inf, 0.0)).exp()
    largest = share.amax(2)  # of the group; NaN if one is
    level = (LEVELS - 2 + PER_OCTAVE * largest.log2()).floor().clamp(0, LEVELS - 2)
    entry = torch.arange(weight.shape[-1], device=weight.device)
    n_live = -(-seq_lens.long() // page_size)[:, None]
    first = (entry < sinks) | (entry >= n_live - local)  # [B, L]
    level = level.masked_fill(first[:, None] | largest.isnan(), LEVELS - 1)
    dead = (weight == -math.inf).all(2)
    return Order(total, share, level.masked_fill(dead, -1).long())


def _prefix(order: Order, need: Tensor, limits: Limits) -> Tensor:
    """Which pages are read to reach a share of each head, [B, Hkv, L]: a prefix of the order.

    Args:
        order: Of the pages.
        need: The share, [B, Hkv, G]; more than 1 for all pages.
        limits: How many pages at least and at most.
    """
    at = order.level.argsort(dim=-1, descending=True, stable=True)
    share = order.share.nan_to_num(0.0).gather(-1, at[:, :, None].expand_as(order.share))
    before = share.cumsum(-1) - share
    rank = torch.arange(at.shape[-1], device=at.device)
    first = order.level == LEVELS - 1
    wanted = (before < need[..., None]).any(2) | (rank < limits.min_pages)
    wanted = (wanted | first.gather(-1, at)) & (rank < limits.max_pages)
    return torch.zeros_like(wanted).scatter(-1, at, wanted) & (order.level >= 0)


def choose(order: Order, weight: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Which pages are read, and in which round.

    Args:
        order: Of the pages.
        weight: Log-sum-exp of the real logits in each page, [B, Hkv, G, L].
        limits: How much is read.
    Returns:
        The round in which a page is read, ROUNDS for never, [B, Hkv, L], and the mass of the pages
        read, [B, Hkv, G], as estimated.
    """
    p = limits.p
    when = torch.full_like(order.level, ROUNDS)
    need = p.where(p < 1, math.inf).expand(order.share.shape[:3])
    need = torch.where(order.total[..., 0].isnan(), math.inf, need)
    for number in range(ROUNDS):
        is_read = when < ROUNDS
        if number > 0:
            real, rest = _found(order, weight, is_read)
            got = 1.0 - rest
            doubt = (got / real).clamp(min=1.0).sqrt()
            done = (real >= p * (real + doubt * rest)) & (got >= p)
            worth = (real / got).clamp(max=1.0)  # of pages to come, as of those read
            missing = p * doubt * rest - (1.0 - p) * real
            missing = missing / ((1.0 - p) * worth + p * doubt)
            need = torch.maximum(got + (1.0 + SAFETY) * missing, p.expand_as(got))
            need = torch.where(done, 0.0, need)
            if number == ROUNDS - 1:
                need = torch.where(done, 0.0, math.inf)
            need = need.nan_to_num(math.inf, math.inf)
        new = _prefix(order, need, limits) & ~is_read
        when = when.masked_fill(new, number)
    real, rest = _found(order, weight, when < ROUNDS)
    doubt = ((1.0 - rest) / real).clamp(min=1.0).sqrt()
    mass = torch.minimum(real / (real + doubt * rest), 1.0 - rest)
    return when, mass.where(rest != 0, 1.0)


def _found(order: Order, weight: Tensor, is_read: Tensor) -> tuple[Tensor, Tensor]:
    """Real weight of the pages read, and the sketch's of all others, relative to the sketch's total."""
    is_read = is_read[:, :, None]
    real = weight.masked_fill(~is_read, -math.inf).logsumexp(-1) - order.total[..., 0]
    rest = order.share.masked_fill(is_read | (order.level < 0)[:, :, None], 0.0).sum(-1)
    real = real.masked_fill(order.total[..., 0] == -math.inf, 0.0)
    return real.exp().clamp(max=LARGEST), rest


def forward(
    q: Tensor, pool: Tensor, codes: Tensor, scales: Tensor, block_table: Tensor, seq_lens: Tensor,
    operands: Sequence[Tensor], program: str, p: float, p_rows: Tensor | None, window: int,
    sinks: int, local: int, min_pages: int, max_pages: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, log-sum-exp, estimated mass, how many pages were read, and which."""
    n_entries, page_size, heads = block_table.shape[1], pool.shape[3], pool.shape[1]
    acc = torch.promote_types(q.dtype, torch.float32)
    formula, position = parsed(program), seq_lens.long()[:, None] - 1
    k, _ = paged_gather_ref(pool, block_table, seq_lens, n_entries * page_size)
    pages = block_table.long().clamp(0, max(0, pool.shape[0] - 1))
    sketch = Sketch(codes[pages], scales[pages]).keys()  # [B, L, Hkv, N, D]
    sketch = sketch.transpose(1, 2).flatten(2, 3)

    def page_weights(keys: Tensor) -> Tensor:
        logits, _ = masked_logits(q, keys, seq_lens, position, operands, formula, False, window)
        in_pages = logits[:, :, 0].unflatten(-1, (n_entries, page_size))  # [B, Hq, L, N]
        return in_pages.logsumexp(-1).unflatten(1, (heads, -1))

    order = ordered(page_weights(sketch), seq_lens, page_size, sinks, local)
    share = torch.tensor(p, dtype=acc, device=q.device) if p_rows is None else p_rows.to(acc)
    limits = Limits(share.reshape(-1, 1, 1), min_pages, max_pages or n_entries)
    when, mass = choose(order, page_weights(k), limits)
    is_read = when < ROUNDS
    n_pages = is_read.sum(-1).int()
    listed = when.argsort(dim=-1, stable=True)
    listed = listed.masked_fill(~is_read.gather(-1, listed), -1).int()
    out, lse = progressive_attention_ref(
        q, pool, block_table, seq_lens, operands, formula, window, listed, n_pages
    )
    return out, lse, mass.flatten(1), n_pages, listed
