"""Progressive Sparse Attention as a function, checked at the edge; `sparse_compile.ops` has it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sparse_compile.errors import OperatorError
from sparse_compile.kernels import checks, paged_checks
from sparse_compile.kernels import progressive_attention as _progressive  # noqa: F401 (registers it)
from sparse_compile.kernels.formulas import COMPUTABLE, encoded
from sparse_compile.kernels.program_attention import check_program
from sparse_compile.kernels.program_attention_cpu import parsed
from sparse_compile.ops_paged import refuse_gradients

if TYPE_CHECKING:
    import sympy

    from sparse_compile.kernels.paged_cache import Sketch

__all__ = ["Progress", "progressive_attention"]


class Progress(NamedTuple):
    """What `progressive_attention` gives and what it read, all on the device."""

    out: Tensor  # [B, Hq, 1, D]
    lse: Tensor  # of the logits of the keys that were read, natural, [B, Hq, 1]
    mass: Tensor  # of the pages read, as estimated, [B, Hq]; below p only where a cap stopped it
    n_pages: Tensor  # read, [B, Hkv] int32
    pages: Tensor  # which, as entries of the table; the first n_pages count, [B, Hkv, L] int32
    capped: Tensor  # whether max_pages stopped it before p was reached, [B, Hkv] bool


@overload
def progressive_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor, sketch: Sketch,
    *, p: float | Tensor = ..., scale: float | None = ..., window: int | None = ...,
    mask: sympy.Basic | None = ..., score: sympy.Expr | None = ...,
    operands: Sequence[Tensor] = ..., sinks: int = ..., local: int = ..., min_pages: int = ...,
    max_pages: int | None = ..., telemetry: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def progressive_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor, sketch: Sketch,
    *, p: float | Tensor = ..., scale: float | None = ..., window: int | None = ...,
    mask: sympy.Basic | None = ..., score: sympy.Expr | None = ...,
    operands: Sequence[Tensor] = ..., sinks: int = ..., local: int = ..., min_pages: int = ...,
    max_pages: int | None = ..., telemetry: Literal[True],
) -> Progress: ...  # fmt: skip
def progressive_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor, sketch: Sketch,
    *, p: float | Tensor = 0.95, scale: float | None = None, window: int | None = None,
    mask: sympy.Basic | None = None, score: sympy.Expr | None = None,
    operands: Sequence[Tensor] = (), sinks: int = 1, local: int = 2, min_pages: int = 0,
    max_pages: int | None = None, telemetry: bool = False,
) -> Tensor | Progress:  # fmt: skip
    """Attention of the last token of sequences to as many of their pages as a share of the mass takes.

    The INT4 sketch of the keys orders the pages and says what those that are not read may weigh;
    the weight of those that are is real. Reading ends for a KV head when each of its query heads has
    `p` of its weight by that measure. The heads of a group read the same pages; a page counts by the
    largest share that it has in one of them. Nothing waits for the device, and no shape depends on
    lengths: a CUDA graph can hold it. But for rounding, the output depends neither on which pages hold a
    sequence nor on the others of the batch. The pages read grow with `p`, but for the last few.

    Reading the sketch takes an eighth of the bytes of float16 keys and values, and the launches ten
    times the host's time of one: sequences of a few thousand tokens are faster with `paged_attention`.

    Args:
        q: Queries, [B, Hq, 1, D], in the dtype of the pool; any strides.
        pool: Keys and values, [P, Hkv, 2, N, D] float16, bfloat16 or float32, contiguous; N is 16,
            32 or 64, D <= 256 and even. Query head `h` reads head `h // (Hq // Hkv)`.
        block_table: Pages of each sequence, [B, L] int32, -1 where there is none.
        seq_lens: Tokens of each sequence, that of the query among them, [B] int32; 0 for a row that
            stands for none.
        sketch: Of the pool's keys, as `paged_append` writes it.
        p: The share of the softmax's weight that is read, above 0; from 1 on, all pages are read. A
            number, or one for each sequence, [B] float32.
        scale: Multiplies the scores; `D ** -0.5` if left out.
        window: How many keys a query reads at most, its own the last.
        mask: Which of these keys it reads, a Boolean of `b`, `h`, `t` and `s`, as for
            `paged_attention`.
        score: The logit, a formula of `x` and the indices; `x` if left out.
        operands: The tensors that formulas load from.
        sinks: First pages that are always read.
        local: Last pages that are always read.
        min_pages: How many pages are read at least, where there are that many.
        max_pages: How many are read at most, whatever `p` says; at least `sinks + local`.
        telemetry: Whether to return what was read too.

    Returns:
        The output, [B, Hq, 1, D] in the dtype of `q`, of a softmax over the keys that were read; 0
        for a sequence of no tokens. With `telemetry` a `Progress`.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or layout, requires grad, or
            block_table lacks a page that is read; values are looked at as in `paged_append`.

    Source:
        Zhou et al., "Progressive Sparse Attention" (2025, arXiv 2503.00392), and Lin et al.,
        "Twilight" (2025, arXiv 2502.02770); `kernels/progressive_attention.py` says what is ours.
    """
    paged_checks.check_pool(pool)
    paged_checks.check_table(pool, block_table, seq_lens=seq_lens)
    paged_checks.check_queries(q, pool, block_table)
    paged_checks.check_sketch(pool, sketch)
    refuse_gradients(q=q, pool=pool)
    if q.shape[2] != 1:
        raise OperatorError(
            f"q has {q.shape[2]} tokens. Expected 1: progressive attention decodes; "
            "`paged_attention` takes chunks and prompts."
        )
    for name, number, least in (
        ("window", window, 1), ("sinks", sinks, 0), ("local", local, 0),
        ("min_pages", min_pages, 0), ("max_pages", max_pages, max(1, sinks + local, min_pages)),
    ):  # fmt: skip
        if number is not None and number < least:
            raise OperatorError(f"{name} is {number}. Expected {least} or more.")
    _check_share(p, q)
    paged_checks.check_places(pool, block_table, seq_lens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    text = encoded(scale, mask, score, None, "zero")
    if not torch.compiler.is_dynamo_compiling():  # which cannot trace the parser
        check_program(parsed(text), q, operands)
    share, rows = (1.0, p) if isinstance(p, Tensor) else (float(p), None)
    try:
        out, lse, mass, n_pages, pages = torch.ops.sparse_compile.progressive_attention_v1(
            q, pool, sketch.codes, sketch.scales, block_table, seq_lens, list(operands), text, share,
            rows, window or 0, sinks, local, min_pages, max_pages or 0,
        )  # fmt: skip
    except NotImplementedError as error:
        raise OperatorError(
            f"mask or score cannot be computed: {error}. Expected {COMPUTABLE}."
        ) from error
    if not telemetry:
        return out
    wanted = p[:, None] if isinstance(p, Tensor) else p
    short = (mass < wanted) & (mass < 1)
    capped = short.unflatten(1, (pool.shape[1], -1)).any(-1)
    return Progress(out, lse, mass, n_pages, pages, capped)


def _check_share(p: float | Tensor, q: Tensor) -> None:
    if not isinstance(p, Tensor):
        if not p > 0:
            raise OperatorError(f"p is {p}. Expected a share above 0, such as 0.95.")
        return
    if tuple(p.shape) != (q.shape[0],) or p.dtype != torch.float32 or p.device != q.device:
        raise OperatorError(
            f"p is {p.dtype} of shape {tuple(p.shape)} on {p.device}. Expected a number, or "
            f"torch.float32 of shape [{q.shape[0]}] on {q.device}: one for each sequence."
        )
    if checks.may_look(p) and not bool((p > 0).all()):
        raise OperatorError(f"p is {p.tolist()}. Expected shares above 0, such as 0.95.")
