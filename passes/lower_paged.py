"""Write attention to pages in place of attention to what was gathered from them.

Before:  k, v = paged_gather(pool, table, lens, S);  o = attention(q, k, v, mask)
After:   o = paged_attention(q, pool, table, lens, program), or by a sparse policy
         o = progressive_attention(q, pool, sketch, table, lens, program, p)
Skips:   nothing; `paged_sites` has proven the site.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import msgspec
import sympy
import torch

from sparse_compile import expressions as ex
from sparse_compile.expressions import Where
from sparse_compile.ir import ScoreProgram

if TYPE_CHECKING:
    from torch import fx

    from sparse_compile.passes.emit import Emitter
    from sparse_compile.passes.paged_sites import Paged

PAGED_KERNELS = ("paged_attention", "progressive_attention")
FILL = -1e30  # in place of a dropped score, where a row may have no other; no score comes near it


def emit_paged(
    emitter: Emitter, paged: Paged, q: fx.Node, program: ScoreProgram, operands: list[fx.Node],
    empty_rows: str,
) -> fx.Node:  # fmt: skip
    """The node of the output, [B, Hq, T, D].

    Args:
        emitter: Writes in front of the site.
        paged: What is proven.
        q: Queries, [B, Hq, T, D].
        program: `paged.program`, its sizes as operands.
        operands: What it loads from.
        empty_rows: What a query without a key gives in the model.
    """
    import sparse_compile.kernels.paged_attention  # noqa: F401  registers the operator

    pages = [emitter.value(node) for node in paged.reads]

    def attend(queries: fx.Node, *options: Any) -> tuple[fx.Node, fx.Node]:
        both = emitter.call(
            torch.ops.sparse_compile.paged_attention_v1.default, queries, *pages, None, *options
        )
        return emitter.call(operator.getitem, both, 0), emitter.call(operator.getitem, both, 1)

    plain = (operands, program.encode(), paged.causal, paged.window)
    if not paged.may_be_empty or program.sink is not None or empty_rows == "zero":
        return attend(q, *plain)[0]
    if empty_rows == "uniform" and q.meta["example_value"].shape[2] == 1:
        out, lse = attend(q, operands, _filled(paged, program).encode(), False, 0)
        return _mean_if_filled(emitter, paged, out, lse)
    out, lse = attend(q, *plain)
    is_empty = emitter.call(operator.eq, lse, float("-inf"))
    if empty_rows == "nan":
        return _where(emitter, is_empty, float("nan"), out)
    zeros = emitter.call(torch.zeros_like, emitter.call(operator.getitem, q, _FIRST_TOKEN))
    mean, _ = attend(zeros, [], ScoreProgram(scale=0.0).encode(), False, 0)
    return _where(emitter, is_empty, _of_all_keys(emitter, paged, mean), out)


def emit_progressive(
    emitter: Emitter, paged: Paged, q: fx.Node, program: ScoreProgram, operands: list[fx.Node],
    empty_rows: str, flags: dict[str, Any],
) -> fx.Node:  # fmt: skip
    """The node of the output, [B, Hq, 1, D], of a site that a sparse policy decodes.

    Args:
        emitter: Writes in front of the site.
        paged: What is proven.
        q: Queries, [B, Hq, 1, D].
        program: `paged.program`, its sizes as operands.
        operands: What it loads from.
        empty_rows: What a query without a key gives in the model.
        flags: `p`, `sinks`, `local` and `max_pages` of the operator.
    """
    import sparse_compile.kernels.progressive_attention  # noqa: F401  registers the operator

    where = [emitter.value(node) for node in paged.sketched]

    def attend(program: ScoreProgram, window: int) -> tuple[fx.Node, fx.Node]:
        found = emitter.call(
            torch.ops.sparse_compile.progressive_attention_v1.default, q, *where, operands,
            program.encode(), flags["p"], None, window, flags["sinks"], flags["local"], 0,
            flags["max_pages"],
        )  # fmt: skip
        return emitter.call(operator.getitem, found, 0), emitter.call(operator.getitem, found, 1)

    if not paged.may_be_empty or empty_rows == "zero":
        return attend(program, paged.window)[0]
    if empty_rows == "uniform":
        return _mean_if_filled(emitter, paged, *attend(_filled(paged, program), 0))
    out, lse = attend(program, paged.window)
    return _where(emitter, emitter.call(operator.eq, lse, float("-inf")), float("nan"), out)


def _filled(paged: Paged, program: ScoreProgram) -> ScoreProgram:
    """The program of one query that reads all keys, with the fill for a score that is dropped.

    One pass over the keys is enough then: where all scores are the fill, weights are equal.
    """
    keep = program.keep
    if paged.window:
        keep = keep & sympy.Lt(ex.t - ex.s, paged.window)
    score = Where(keep, program.score, sympy.Float(FILL))
    return msgspec.structs.replace(program, score=score, keep=sympy.true)


def _mean_if_filled(emitter: Emitter, paged: Paged, out: fx.Node, lse: fx.Node) -> fx.Node:
    is_empty = emitter.call(operator.lt, lse, FILL / 2)
    return _where(emitter, is_empty, _of_all_keys(emitter, paged, out), out)


_FIRST_TOKEN = (slice(None), slice(None), slice(0, 1))


def _of_all_keys(emitter: Emitter, paged: Paged, mean: fx.Node) -> fx.Node:
    """From the mean over a sequence's values to that over all that the model reads: zeros follow."""
    seq_lens = emitter.value(paged.seq_lens)
    share = emitter.call(operator.truediv, seq_lens, emitter.size(paged.n_keys))
    share = emitter.method("reshape", share, (-1, 1, 1, 1))
    share = emitter.method("to", share, mean.meta["example_value"].dtype)
    return emitter.call(operator.mul, mean, share)


def _where(emitter: Emitter, rows: fx.Node, value: fx.Node | float, other: fx.Node) -> fx.Node:
    return emitter.call(torch.where, emitter.method("unsqueeze", rows, -1), value, other)
