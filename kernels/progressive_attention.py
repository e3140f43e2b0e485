"""Progressive Sparse Attention: decoding that reads pages until a share of the softmax is certain.

Every KV head of every sequence decides for itself how many pages it reads, by real weights:

1. *Score.* The INT4 sketch gives each page, for each query head, the log-sum-exp of about what its
   logits are; relative to the sum over all pages, its share.
2. *Order.* Heads of a group read the same pages. A page counts by the largest of its heads' shares
   (which read no more pages than their sum did, in each of seven kinds of data), rounded down to
   1/32 of an octave: its level. The first `sinks` and the last `local` pages come first, then pages
   by falling level, and those of one level as they lie in the sequence.
3. *Read and verify.* With `A` the real weight of the pages read so far and `R` the sketch's weight
   of all others, a head is done when `A >= p (A + R)`, and a group when all its heads are.

Pages are read in rounds, so that many programs share those of one KV head and nothing waits for the
host. Round 0 reads the pages that reach `p` if the sketch is right. A later round reads nothing
where all heads are done; else as many pages as the heads that are not done seem to need, when pages
to come are worth what those read were. The last round reads all that is left. So the promise
rests on `R` alone, never on how many rounds there are.

What `R` is corrected by. `A` tends to fall short of what the sketch said of the same pages,
`A_sketch`: those came first that it takes for too heavy. To scale `R` by `A / A_sketch` would make the
test empty, since `A / (A + R A / A_sketch)` is what the sketch alone says. A ratio far from 1 says
how noisy the sketch is, and then a heavy key may hide in `R`. So `R` only ever grows: by
`A / A_sketch` where that is above 1, which is to ask that `A_sketch >= p (A_sketch + R)`, and by
`sqrt(A_sketch / A)` where that is. Where the sketch is sane that costs nothing; at logits that it
misses by 0.9 nats, 5 % of rows fell short by more than a point without it and 0.2 % with it, for a
seventh more pages (`tests/progressive_cases.py`, "peaked" times 4).

Source: Zhou et al., "Progressive Sparse Attention" (2025, arXiv 2503.00392): a threshold verified by
real weights in place of a budget. Lin et al., "Twilight" (2025, arXiv 2502.02770): top-p from INT4
keys. Ours: both at once, the order by levels, the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile.kernels.paged_attention import masked_logits
from sparse_compile.kernels.paged_cache import paged_gather_ref

if TYPE_CHECKING:
    from sparse_compile.ir import ScoreProgram

OP = "sparse_compile::progressive_attention_v1"
LEVELS = 1024  # the highest for pages that always come first, 0 for shares below 2 ** -32
PER_OCTAVE = 32  # levels between a share and its double
ROUNDS = 3
SAFETY = 0.1  # how much more than what seems to be missing a round reads

# `p_rows` [B], where given, in place of `p`; a window or max_pages of 0 is none
torch.library.define(
    OP,
    "(Tensor q, Tensor pool, Tensor codes, Tensor scales, Tensor block_table, Tensor seq_lens, "
    "Tensor[] operands, str program, float p, Tensor? p_rows, int window, int sinks, int local, "
    "int min_pages, int max_pages) "
    "-> (Tensor out, Tensor lse, Tensor mass, Tensor n_pages, Tensor pages)",
)


def progressive_attention_ref(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor, operands: Sequence[Tensor],
    program: ScoreProgram, window: int, pages: Tensor, n_pages: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the operator must compute once it is known which pages are read, in plain PyTorch.

    Args:
        q: Queries, [B, Hq, 1, D].
        pool: Keys and values, [P, Hkv, 2, N, D].
        block_table: Pages of each sequence, [B, L] int32; -1 is none.
        seq_lens: Tokens of each sequence, that of the query among them, [B] int32.
        operands: What the program loads from.
        program: Of scores.
        window: How many keys a query reads at most; 0 for all.
        pages: Entries of the table that each KV head reads, each once, [B, Hkv, L] int32.
        n_pages: How many of them count, [B, Hkv] int32.
    Returns:
        The output [B, Hq, 1, D] and the natural log-sum-exp [B, Hq, 1] of the keys that are read; 0
        and -inf without any.
    """
    acc, page_size = torch.promote_types(q.dtype, torch.float32), pool.shape[3]
    n_entries = block_table.shape[1]
    k, v = paged_gather_ref(pool, block_table, seq_lens, n_entries * page_size)
    # logits of each page, and whether it is read
    logits, _ = masked_logits(
        q, k, seq_lens, seq_lens.long()[:, None] - 1, operands, program, False, window
    )
    counts = torch.arange(n_entries, device=q.device) < n_pages[..., None]  # [B, Hkv, L]
    is_read = torch.zeros(*counts.shape[:2], n_entries + 1, dtype=torch.bool, device=q.device)
    is_read.scatter_(2, pages.long().where(counts, n_entries), True)
    is_read = is_read[..., :-1].repeat_interleave(page_size, 2)  # [B, Hkv, S]
    grouped = logits.unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, 1, S]
    grouped = grouped.masked_fill(~is_read[:, :, None, None], -math.inf)
    lse = grouped.logsumexp(-1)
    weights = (grouped - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    v = v.to(acc).masked_fill(~is_read[..., None], 0.0)
    out = weights @ v[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def forward_cpu(*args):
    """The operator in plain PyTorch, on all pages at once."""
    from sparse_compile.kernels import progressive_cpu

    return progressive_cpu.forward(*args)


def launch(*args):
    """The operator by Triton kernels."""
    from sparse_compile.kernels import progressive_kernels  # Triton takes long to load

    return progressive_kernels.forward(*args)


torch.library.impl(OP, "cpu", forward_cpu)
torch.library.impl(OP, "cuda", launch)


@torch.library.register_fake(OP)
def _forward_fake(
    q, pool, codes, scales, block_table, seq_lens, operands, program, p, p_rows, window, sinks,
    local, min_pages, max_pages,
):  # fmt: skip
    batch, heads, n_tokens, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    counts = block_table.new_empty((batch, pool.shape[1]))
    return (
        q.new_empty(q.shape),
        q.new_empty((batch, heads, n_tokens), dtype=acc),
        q.new_empty((batch, heads), dtype=acc),
        counts,
        block_table.new_empty((*counts.shape, block_table.shape[1])),
    )
