"""Dense attention to keys and values in pages: decoding, and prefill by chunks.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention" (2023), section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile import expressions as ex
from sparse_compile.evaluation import evaluate
from sparse_compile.kernels.paged_cache import paged_gather_ref
from sparse_compile.kernels.program_attention_cpu import parsed

if TYPE_CHECKING:
    import sympy

    from sparse_compile.ir import ScoreProgram

OP = "sparse_compile::paged_attention_v1"
TILE_NUMBERS = 2**24  # of scores at a time, on the CPU

# a window of 0 is none
torch.library.define(
    OP,
    "(Tensor q, Tensor pool, Tensor block_table, Tensor seq_lens, Tensor? n_new, "
    "Tensor[] operands, str program, bool causal, int window) -> (Tensor out, Tensor lse)",
)


def paged_attention_ref(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor, n_new: Tensor | None,
    operands: Sequence[Tensor], program: ScoreProgram, causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the operator must compute, in plain PyTorch.

    Args:
        q: Queries, [B, Hq, T, D].
        pool: Keys and values, [P, Hkv, 2, N, D].
        block_table: Pages of each sequence, [B, L] int32; -1 is none.
        seq_lens: Tokens of each sequence, those of the queries among them, [B] int32.
        n_new: How many of the T queries there are, counted from the first, [B] int32; all if left
            out. They are the last tokens of the sequence.
        operands: What the program loads from.
        program: Of scores; `t` and `s` are positions in the sequence.
        causal: Whether a query reads only keys up to its own position.
        window: How many keys a query reads at most, its own the last; 0 for all.
    Returns:
        The output [B, Hq, T, D] and the natural log-sum-exp [B, Hq, T]; 0 and -inf for a query that
        reads no key, or that there is not.
    """
    k, v = paged_gather_ref(pool, block_table, seq_lens, block_table.shape[1] * pool.shape[3])
    position = _positions(q.shape[2], seq_lens, n_new)
    return _attend(q, k, v, seq_lens, position, operands, program, causal, window)


def _positions(n_tokens: int, seq_lens: Tensor, n_new: Tensor | None) -> Tensor:
    """Of the queries in their sequences, [B, T]; negative where there is none."""
    t = torch.arange(n_tokens, device=seq_lens.device)
    count = n_tokens if n_new is None else n_new.long()[:, None]
    return (seq_lens.long()[:, None] - count + t).masked_fill(t >= count, -1)


def masked_logits(
    q: Tensor, k: Tensor, seq_lens: Tensor, position: Tensor,
    operands: Sequence[Tensor], program: ScoreProgram, causal: bool, window: int,
) -> tuple[Tensor, dict[sympy.Symbol, Tensor]]:  # fmt: skip
    """Logits [B, Hq, T, S], -inf where a key is not read, and what the program's symbols stand for."""
    acc = torch.promote_types(q.dtype, torch.float32)
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    position = position[:, None, :, None]
    there = position >= 0
    s = torch.arange(k.shape[2], device=q.device)
    grouped = q.to(acc).unflatten(1, (kv_heads, -1))
    scores = (grouped @ k.to(acc).mT[:, :, None]).flatten(1, 2) * program.scale
    keep = there & (s < seq_lens.long()[:, None, None, None])
    if causal:
        keep = keep & (s <= position)
    if window:
        keep = keep & (s > position - window)
    env = {
        ex.x: scores, ex.t: position.clamp(min=0), ex.s: s.view(1, 1, 1, -1),
        ex.b: torch.arange(batch, device=q.device).view(-1, 1, 1, 1),
        ex.h: torch.arange(heads, device=q.device).view(1, -1, 1, 1),
    }  # fmt: skip
    keep = keep & torch.as_tensor(evaluate(program.keep, env, operands, dtype=acc), device=q.device)
    logits = torch.where(keep, evaluate(program.score, env, operands, dtype=acc), -math.inf)
    return logits, env


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, position: Tensor,
    operands: Sequence[Tensor], program: ScoreProgram, causal: bool, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries at `position` [B, T], negative where there is none, to gathered K and V."""
    acc = torch.promote_types(q.dtype, torch.float32)
    logits, env = masked_logits(q, k, seq_lens, position, operands, program, causal, window)
    sink = -math.inf
    if program.sink is not None:
        sink = evaluate(program.sink, env, operands, dtype=acc)
    sink = torch.as_tensor(sink, dtype=acc, device=q.device).expand(*logits.shape[:3], 1)
    sink = sink.masked_fill((position < 0)[:, None, :, None], -math.inf)
    all_logits = torch.cat([logits, sink], -1)
    lse = all_logits.logsumexp(-1)
    # a row without keys has a log-sum-exp of -inf, and weights of 0
    weights = (logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    out = weights.unflatten(1, (k.shape[1], -1)) @ v.to(acc)[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse


def forward_cpu(q, pool, block_table, seq_lens, n_new, operands, program, causal, window):
    """The operator in tiles of queries, so that no more scores are held than fit a cache."""
    batch, heads, n_tokens, _ = q.shape
    k, v = paged_gather_ref(pool, block_table, seq_lens, block_table.shape[1] * pool.shape[3])
    position = _positions(n_tokens, seq_lens, n_new)
    step = max(1, TILE_NUMBERS // max(1, batch * heads * k.shape[2]))
    out, lse = _forward_fake(
        q, pool, block_table, seq_lens, n_new, operands, program, causal, window
    )
    for start in range(0, n_tokens, step):
        some = slice(start, start + step)
        out[:, :, some], lse[:, :, some] = _attend(
            q[:, :, some], k, v, seq_lens, position[:, some], operands, parsed(program), causal,
            window,
        )  # fmt: skip
    return out, lse


def launch(q, pool, block_table, seq_lens, n_new, operands, program, causal, window):
    """The operator by Triton kernels."""
    from sparse_compile.kernels import paged_attention_kernel  # Triton takes long to load

    return paged_attention_kernel.forward(
        q, pool, block_table, seq_lens, n_new, operands, program, causal, window
    )


torch.library.impl(OP, "cpu", forward_cpu)
torch.library.impl(OP, "cuda", launch)


@torch.library.register_fake(OP)
def _forward_fake(q, pool, block_table, seq_lens, n_new, operands, program, causal, window):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse
