"""Keys and values in pages as functions, checked at the edge; `sparse_compile.ops` has them all.

A pool holds the pages of one layer, [P, Hkv, 2, N, D]; a block table says which of them hold a
sequence, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from sparse_compile.errors import OperatorError
from sparse_compile.kernels import checks, paged_checks
from sparse_compile.kernels import paged_attention as _paged  # noqa: F401 (registers it)
from sparse_compile.kernels.formulas import COMPUTABLE, encoded
from sparse_compile.kernels.paged_cache import Sketch
from sparse_compile.kernels.program_attention import check_program
from sparse_compile.kernels.program_attention_cpu import parsed

if TYPE_CHECKING:
    import sympy

__all__ = ["Sketch", "cow_copy", "paged_append", "paged_attention", "paged_gather"]


@overload
def paged_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    *, n_new: Tensor | None = ..., scale: float | None = ..., causal: bool = ...,
    window: int | None = ..., mask: sympy.Basic | None = ..., score: sympy.Expr | None = ...,
    sink: sympy.Expr | None = ..., operands: Sequence[Tensor] = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def paged_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    *, n_new: Tensor | None = ..., scale: float | None = ..., causal: bool = ...,
    window: int | None = ..., mask: sympy.Basic | None = ..., score: sympy.Expr | None = ...,
    sink: sympy.Expr | None = ..., operands: Sequence[Tensor] = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def paged_attention(
    q: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    *, n_new: Tensor | None = None, scale: float | None = None, causal: bool = True,
    window: int | None = None, mask: sympy.Basic | None = None, score: sympy.Expr | None = None,
    sink: sympy.Expr | None = None, operands: Sequence[Tensor] = (), return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of the last tokens of sequences to all that is in their pages.

    Decoding (T = 1), prefill by chunks and whole prompts are one function. The queries are the last
    tokens of their sequence, whose keys and values `paged_append` has written. Nothing waits for the
    device, and no shape depends on lengths: a CUDA graph can hold it. But for rounding,
    the output depends neither on which pages hold a sequence nor on the others of the batch.

    Formulas are written with the symbols of `sparse_compile.expressions`: `b` a row of the table,
    `h` a query head, `t` and `s` positions in the sequence, `x` the score; `Load(i, ...)` reads an
    element of `operands[i]`. On CUDA they are printed into the kernel.

    Args:
        q: Queries, [B, Hq, T, D], in the dtype of the pool; any strides.
        pool: Keys and values, [P, Hkv, 2, N, D] float16, bfloat16 or float32, contiguous; N is 16,
            32 or 64, D <= 256. Query head `h` reads head `h // (Hq // Hkv)`.
        block_table: Pages of each sequence, [B, L] int32, -1 where there is none.
        seq_lens: Tokens of each sequence, those of the queries among them, [B] int32; 0 for a row
            that stands for none.
        n_new: How many of the T queries there are, counted from the first, [B] int32; T if left
            out.
        scale: Multiplies the scores; `D ** -0.5` if left out.
        causal: Whether a query reads only keys up to its own position.
        window: How many keys a query reads at most, its own the last; pages before are not read.
        mask: Which of these keys it reads, a Boolean of `b`, `h`, `t` and `s`; all if left out.
        score: The logit, a formula of `x` and the indices; `x` if left out.
        sink: One more logit in the softmax's denominator, a formula of `b`, `h` and `t`.
        operands: The tensors that formulas load from.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        The output, [B, Hq, T, D] in the dtype of `q`; with `return_lse` also the natural
        log-sum-exp of each row's logits, sink included, [B, Hq, T] float32. A row with no key to
        read, or past `n_new`, gives 0 and, without a sink, -inf.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or layout, requires grad, or
            block_table lacks a page that is read; values are looked at as in `paged_append`.

    Source:
        Kwon et al., "Efficient Memory Management for Large Language Model Serving with
        PagedAttention" (2023), section 4.1; shares of the keys merged as in FlashDecoding.
    """
    paged_checks.check_pool(pool)
    paged_checks.check_table(pool, block_table, seq_lens=seq_lens, n_new=n_new)
    paged_checks.check_queries(q, pool, block_table)
    refuse_gradients(q=q, pool=pool)
    if window is not None and window < 1:
        raise OperatorError(f"window is {window}. Expected 1 or more, or None.")
    count = q.shape[2] if n_new is None else n_new
    paged_checks.check_counts(n_new, q.shape[2])
    paged_checks.check_places(pool, block_table, seq_lens, minimum=count)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    text = encoded(scale, mask, score, sink, "zero")
    if not torch.compiler.is_dynamo_compiling():  # which cannot trace the parser
        check_program(parsed(text), q, operands)
    try:
        out, lse = torch.ops.sparse_compile.paged_attention_v1(
            q, pool, block_table, seq_lens, n_new, list(operands), text, causal, window or 0
        )
    except NotImplementedError as error:
        raise OperatorError(
            f"mask, score or sink cannot be computed: {error}. Expected {COMPUTABLE}."
        ) from error
    return (out, lse) if return_lse else out


def refuse_gradients(**tensors: Tensor) -> None:
    """Refuse what has no gradient here instead of losing it."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise OperatorError(
                f"{name} requires grad. Expected none: pages are for inference; call it under "
                "torch.no_grad()."
            )


def paged_append(
    k: Tensor, v: Tensor, pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    *, n_new: Tensor | None = None, sketch: Sketch | None = None,
) -> None:  # fmt: skip
    """Write the last tokens of sequences into their pages, and the sketch of their keys.

    Nothing waits for the device, and no shape depends on lengths: a CUDA graph can hold it. Pages
    that others hold too must be copied before (`BlockTable.append` says which, `cow_copy` does it).

    Args:
        k: New keys, [B, Hkv, T, D], in the dtype of the pool; any strides.
        v: New values, [B, Hkv, T, D].
        pool: Where they are written, [P, Hkv, 2, N, D] float16, bfloat16 or float32, contiguous;
            N is 16, 32 or 64, D <= 256.
        block_table: Pages of each sequence, [B, L] int32, -1 where there is none.
        seq_lens: Tokens of each sequence, the new ones among them, [B] int32.
        n_new: How many of the T tokens are new, counted from the first, [B] int32; T if left out.
            A sequence with 0 is left as it is.
        sketch: The sketch of the pool, written too.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or layout, or block_table lacks
            a page that is written. Values are looked at on the CPU; on CUDA only if
            SPARSE_COMPILE_CHECK_VALUES is 1, and what has no page is not written.

    Source:
        Kwon et al., "Efficient Memory Management for Large Language Model Serving with
        PagedAttention" (2023), section 4.3.
    """
    paged_checks.check_pool(pool)
    paged_checks.check_table(pool, block_table, seq_lens=seq_lens, n_new=n_new)
    paged_checks.check_new(k, v, pool, block_table, sketch)
    refuse_gradients(k=k, v=v, pool=pool)
    count = k.shape[2] if n_new is None else n_new
    paged_checks.check_counts(n_new, k.shape[2])
    paged_checks.check_places(pool, block_table, seq_lens, first=seq_lens - count, minimum=count)
    codes, scales = (None, None) if sketch is None else sketch
    torch.ops.sparse_compile.paged_append(k, v, pool, block_table, seq_lens, n_new, codes, scales)


def paged_gather(
    pool: Tensor, block_table: Tensor, seq_lens: Tensor, *, n_keys: int,
    sketch: Sketch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read sequences back from their pages.

    In a model that our backend compiles, attention to what is gathered reads the pages in its place.

    Args:
        pool: Keys and values, [P, Hkv, 2, N, D].
        block_table: Pages of each sequence, [B, L] int32, -1 where there is none.
        seq_lens: Tokens of each sequence, [B] int32.
        n_keys: How many positions to read of each.
        sketch: Of the pool's keys. Nothing is read of it here; a compiled model needs it where its
            policy is `top_p` or `top_k`.

    Returns:
        Keys and values, [B, Hkv, n_keys, D] each, 0 behind the end of a sequence.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or value, or pool requires grad;
            values are looked at as in `paged_append`, and what has no page is 0.
    """
    paged_checks.check_pool(pool)
    paged_checks.check_table(pool, block_table, seq_lens=seq_lens)
    refuse_gradients(pool=pool)
    if n_keys < 0:
        raise OperatorError(f"n_keys is {n_keys}. Expected 0 or more.")
    paged_checks.check_places(pool, block_table, seq_lens.clamp(max=n_keys))
    if sketch is not None:
        paged_checks.check_sketch(pool, sketch)
    return torch.ops.sparse_compile.paged_gather(
        pool, block_table, seq_lens, n_keys, *(sketch or ())
    )


def cow_copy(tensors: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy pages of pools and sketches, before one of the sharers writes (copy on write).

    All sources are read before a target is written.

    Args:
        tensors: Pools and what else has pages on its first axis.
        sources: Pages, [n] int32 or int64.
        targets: The pages that get their content, [n]; none twice.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or value; values are looked at
            as in `paged_append`.
    """
    for name, pages in (("sources", sources), ("targets", targets)):
        if pages.dtype not in (torch.int32, torch.int64) or pages.dim() != 1:
            raise OperatorError(
                f"{name} is {pages.dtype} of shape {tuple(pages.shape)}. Expected int32 or int64 of "
                "shape [n]."
            )
    if sources.shape != targets.shape:
        raise OperatorError(
            f"targets has {targets.shape[0]} pages. Expected {sources.shape[0]}, as sources."
        )
    for number, tensor in enumerate(tensors):
        if tensor.device != sources.device or tensor.device != targets.device:
            raise OperatorError(
                f"tensors[{number}] is on {tensor.device}, sources on {sources.device}, targets on "
                f"{targets.device}. Expected one device."
            )
    if tensors and checks.may_look(sources) and checks.may_look(targets):
        n_pages = min(tensor.shape[0] for tensor in tensors)
        for name, pages in (("sources", sources), ("targets", targets)):
            if bool(((pages < 0) | (pages >= n_pages)).any()):
                raise OperatorError(
                    f"{name} is {pages.tolist()}. Expected pages from 0 to {n_pages - 1}."
                )
        if targets.unique().numel() != targets.numel():
            raise OperatorError(f"targets is {targets.tolist()}. Expected every page once.")
    torch.ops.sparse_compile.cow_copy(list(tensors), sources, targets)
