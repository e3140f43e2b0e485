"""Sparse attention as functions: checked at the edge, differentiable, on any device.

They stand on the operators `torch.ops.sparse_compile.*`, which torch.compile keeps whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from sparse_compile.errors import OperatorError
from sparse_compile.kernels import block_sparse as _block_sparse  # noqa: F401 (registers it)
from sparse_compile.kernels import checks, key_ranges
from sparse_compile.kernels import range_attention as _range  # noqa: F401
from sparse_compile.kernels import select_top_k as _select  # noqa: F401
from sparse_compile.kernels import selected_attention as _selected
from sparse_compile.kernels.formulas import COMPUTABLE, encoded
from sparse_compile.kernels.program_attention import check_program
from sparse_compile.kernels.program_attention_cpu import parsed
from sparse_compile.ops_paged import Sketch, cow_copy, paged_append, paged_attention, paged_gather
from sparse_compile.ops_progressive import Progress, progressive_attention

if TYPE_CHECKING:
    import sympy

    from sparse_compile.ir import EmptyRows

LoopOrder = Literal["query_major", "kv_major", "tile_union"]

__all__ = [
    "LoopOrder",
    "Progress",
    "Sketch",
    "block_sparse_attention",
    "compressed_attention",
    "cow_copy",
    "list_blocks",
    "native_sparse_attention",
    "paged_append",
    "paged_attention",
    "paged_gather",
    "progressive_attention",
    "select_top_k",
    "selected_attention",
    "window_attention",
]


@overload
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int = ...,
    scale: float | None = ..., causal: bool = ..., cu_seqlens: Tensor | None = ...,
    loop_order: LoopOrder | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int = ...,
    scale: float | None = ..., causal: bool = ..., cu_seqlens: Tensor | None = ...,
    loop_order: LoopOrder | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block_size: int = 64,
    scale: float | None = None, causal: bool = True, cu_seqlens: Tensor | None = None,
    loop_order: LoopOrder | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in which every query token reads its own list of KV blocks.

    The forward gives the same bits every time; the gradients of `k` and `v` are sums in any order.

    Args:
        q: Queries, [B, Hq, T, D] float16, bfloat16 or float32 (on the CPU float64 too), D <= 256.
            Query `t` sits at key position `t + S - T`.
        k: Keys, [B, Hkv, S, D]; query head `h` reads head `h // (Hq // Hkv)`.
        v: Values, [B, Hkv, S, Dv].
        block_indices: The KV blocks of each query token and KV head, [B, Hkv, T, K] int32,
            ascending, -1 padded on the right, K <= 64. Packed sequences count from their own start.
        block_size: Keys in a KV block: 16, 32, 64 or 128.
        scale: Multiplies the scores; `D ** -0.5` if left out.
        causal: Whether a query reads only keys up to its own position.
        cu_seqlens: Starts of sequences packed into one row and the end of the last, [n + 1] int32;
            B is 1 then, and T is S.
        loop_order: `query_major` (a program owns a query token), `kv_major` (a program owns a KV
            block) or `tile_union` (a program owns neighbouring query tokens and reads what they
            share); if left out, what the cost model (`sparse_compile.costs`) finds fastest for the
            sizes of each call.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        The output, [B, Hq, T, Dv] in the dtype of `q`; with `return_lse` also the natural
        log-sum-exp of each row's scores, [B, Hq, T] float32. A row with no key to read gives 0 and
        -inf.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or value. The values of
            `block_indices` and `cu_seqlens` are looked at on the CPU; on CUDA only if
            SPARSE_COMPILE_CHECK_VALUES is 1, since that waits for the device.

    Source:
        Yuan et al., "Native Sparse Attention" (2025), equations 11 and 12; loop orders of NSA and
        of FSA (Yan et al., "Flash Sparse Attention", 2025).
    """
    checks.check_heads(q, k, v)
    checks.check_block_size(block_size)
    checks.check_selection(q, k, block_indices)
    if cu_seqlens is not None:
        checks.check_packing(q, k, cu_seqlens)
    if loop_order is not None and loop_order not in _selected.LOOP_ORDERS:
        raise OperatorError(
            f'loop_order is "{loop_order}". Expected {" or ".join(_selected.LOOP_ORDERS)}, or None.'
        )
    if checks.may_look(block_indices):
        checks.check_indices(block_indices, k.shape[2], block_size, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = torch.ops.sparse_compile.selected_attention(
        q, k, v, block_indices, block_size, scale, causal, cu_seqlens, loop_order
    )
    return (out, lse) if return_lse else out


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, block: int = 32, stride: int = 16,
    scale: float | None = None, n_keys: int | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention to compressed keys and values, each of which stands for a run of tokens.

    Compressed key `c` stands for the keys from `c * stride` to `c * stride + block - 1`; a query
    reads those that end at its own position or before. Differentiable.

    Args:
        q: Queries, [B, Hq, T, D].
        k_cmp: Compressed keys, [B, Hkv, C, D]; those of packed sequences behind each other.
        v_cmp: Compressed values, [B, Hkv, C, Dv].
        block: Tokens that a compressed key stands for, a multiple of `stride`.
        stride: Tokens from one to the next.
        scale: Multiplies the scores; `D ** -0.5` if left out.
        n_keys: S, how many keys were compressed; T if left out.
        cu_seqlens: Starts of packed sequences and the end of the last, [n + 1] int32.

    Returns:
        The output, [B, Hq, T, Dv] in the dtype of `q`, and the natural log-sum-exp of the scores,
        [B, Hq, T] float32; 0 and -inf for a query with nothing to read.

    Raises:
        OperatorError: An argument has a wrong shape, dtype or device.

    Source:
        Yuan et al., "Native Sparse Attention" (2025), equations 7 and 8.
    """
    checks.check_heads(q, k_cmp, v_cmp, ("q", "k_cmp", "v_cmp"))
    where = _compressed_tokens(q, k_cmp, block, stride, n_keys, cu_seqlens)
    return _in_ranges(q, k_cmp, v_cmp, key_ranges.compressed(where, block, stride), scale)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of every query to the `window` keys up to its own position; differentiable.

    Args:
        q: Queries, [B, Hq, T, D]. Query `t` sits at key position `t + S - T`.
        k: Keys, [B, Hkv, S, D].
        v: Values, [B, Hkv, S, Dv].
        window: How many keys a query reads, its own among them.
        scale: Multiplies the scores; `D ** -0.5` if left out.
        cu_seqlens: Starts of packed sequences and the end of the last, [n + 1] int32.

    Returns:
        The output, [B, Hq, T, Dv] in the dtype of `q`, and the natural log-sum-exp of the scores,
        [B, Hq, T] float32; 0 and -inf for a query with no key to read.

    Raises:
        OperatorError: An argument has a wrong shape, dtype or device, or `window` is below 1.
    """
    checks.check_heads(q, k, v)
    if cu_seqlens is not None:
        checks.check_packing(q, k, cu_seqlens)
    if window < 1:
        raise OperatorError(f"window is {window}. Expected at least 1.")
    where = key_ranges.tokens(q.shape[2], k.shape[2], cu_seqlens, q.device)
    return _in_ranges(q, k, v, key_ranges.window(where, window), scale)


def select_top_k(
    q: Tensor, k_cmp: Tensor, lse: Tensor, *, k: int = 16, block_size: int = 64, block: int = 32,
    stride: int = 16, sinks: int = 1, local: int = 2, scale: float | None = None,
    n_keys: int | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Choose the KV blocks that each query token reads, by its attention to compressed keys.

    The weights of all heads of a group are added; each compressed key counts for a KV block as
    often as the two share a run of `stride` tokens (1, 2, 2, 2, 1 times for 32, 16 and 64). No
    gradient goes through the choice.

    Args:
        q: Queries, [B, Hq, T, D].
        k_cmp: Compressed keys, [B, Hkv, C, D].
        lse: Log-sum-exps that `compressed_attention` gave for them, [B, Hq, T] float32.
        k: How many KV blocks to choose, at most 64.
        block_size: Keys in a KV block: 16, 32, 64 or 128, a multiple of `stride`.
        block: Tokens that a compressed key stands for.
        stride: Tokens from one compressed key to the next.
        sinks: How many KV blocks at the start are always among the chosen.
        local: How many KV blocks up to the token's own are always among the chosen.
        scale: As given to `compressed_attention`.
        n_keys: S; T if left out.
        cu_seqlens: Starts of packed sequences and the end of the last, [n + 1] int32.

    Returns:
        KV blocks, ascending, -1 padded on the right where a token has fewer: [B, Hkv, T, k] int32.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or value.

    Source:
        Yuan et al., "Native Sparse Attention" (2025), equations 9 to 12.
    """
    checks.check_heads(q, k_cmp, k_cmp, ("q", "k_cmp", "k_cmp"))
    checks.check_block_size(block_size)
    _compressed_tokens(q, k_cmp, block, stride, n_keys, cu_seqlens)
    if block_size % stride:
        raise OperatorError(
            f"block_size is {block_size}. Expected a multiple of the stride, {stride}."
        )
    if not 1 <= k <= checks.MAX_SLOTS:
        raise OperatorError(f"k is {k}. Expected 1 to {checks.MAX_SLOTS}.")
    if sinks < 0 or local < 0 or sinks + local > k:
        raise OperatorError(
            f"sinks is {sinks} and local {local}. Expected at most k together, which is {k}."
        )
    if tuple(lse.shape) != tuple(q.shape[:3]) or lse.device != q.device:
        raise OperatorError(
            f"lse has shape {tuple(lse.shape)} on {lse.device}. Expected {tuple(q.shape[:3])} on "
            f"{q.device}."
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    n_keys = q.shape[2] if n_keys is None else n_keys
    return torch.ops.sparse_compile.select_top_k(
        q.detach(), k_cmp.detach(), lse.detach(), k, block_size, block, stride, sinks, local, scale,
        n_keys, cu_seqlens,
    )  # fmt: skip


def native_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, *,
    n_selected: int = 16, window: int = 512, block_size: int = 64, block: int = 32,
    stride: int = 16, sinks: int = 1, local: int = 2, scale: float | None = None,
    cu_seqlens: Tensor | None = None, loop_order: LoopOrder | None = None,
) -> Tensor:  # fmt: skip
    """The core of Native Sparse Attention: three branches, each times its gate; differentiable.

    Args:
        q: Queries, [B, Hq, T, D].
        k: Keys, [B, Hkv, T, D].
        v: Values, [B, Hkv, T, Dv].
        k_cmp: Compressed keys, [B, Hkv, C, D].
        v_cmp: Compressed values, [B, Hkv, C, Dv].
        gates: Factors of compressed, selected and window attention, [B, Hq, T, 3].
        n_selected: KV blocks that a token selects.
        window: Keys of the window.
        block_size: Keys in a KV block.
        block: Tokens that a compressed key stands for.
        stride: Tokens from one compressed key to the next.
        sinks: KV blocks at the start that are always selected.
        local: KV blocks up to the token's own that are always selected.
        scale: Multiplies the scores; `D ** -0.5` if left out.
        cu_seqlens: Starts of packed sequences and the end of the last, [n + 1] int32.
        loop_order: Of the selected attention.

    Returns:
        The sum of the branches, [B, Hq, T, Dv] in the dtype of `q`.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or value.

    Source:
        Yuan et al., "Native Sparse Attention" (2025), equation 5.
    """
    if tuple(gates.shape) != (*q.shape[:3], 3):
        raise OperatorError(
            f"gates has shape {tuple(gates.shape)}. Expected {(*q.shape[:3], 3)}: one factor for "
            "each of compressed, selected and window attention."
        )
    compressed, lse = compressed_attention(
        q, k_cmp, v_cmp, block=block, stride=stride, scale=scale, cu_seqlens=cu_seqlens
    )
    chosen = select_top_k(
        q, k_cmp, lse, k=n_selected, block_size=block_size, block=block, stride=stride,
        sinks=sinks, local=local, scale=scale, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    selected = selected_attention(
        q, k, v, chosen, block_size=block_size, scale=scale, cu_seqlens=cu_seqlens,
        loop_order=loop_order,
    )  # fmt: skip
    near, _ = window_attention(q, k, v, window=window, scale=scale, cu_seqlens=cu_seqlens)
    branches = (compressed, selected, near)
    terms = [gate * out for gate, out in zip(gates.split(1, dim=-1), branches, strict=True)]
    return (terms[0] + terms[1] + terms[2]).to(q.dtype)


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor, *, tile: int,
    block_size: int, mask: sympy.Basic | None = ..., score: sympy.Expr | None = ...,
    operands: Sequence[Tensor] = ..., full_counts: Tensor | None = ..., sink: sympy.Expr | None = ...,
    empty_rows: EmptyRows = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor, *, tile: int,
    block_size: int, mask: sympy.Basic | None = ..., score: sympy.Expr | None = ...,
    operands: Sequence[Tensor] = ..., full_counts: Tensor | None = ..., sink: sympy.Expr | None = ...,
    empty_rows: EmptyRows = ..., scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor, *, tile: int,
    block_size: int, mask: sympy.Basic | None = None, score: sympy.Expr | None = None,
    operands: Sequence[Tensor] = (), full_counts: Tensor | None = None,
    sink: sympy.Expr | None = None, empty_rows: EmptyRows = "zero", scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in which every tile of queries reads its own list of KV blocks; differentiable.

    Formulas are written with the symbols of `sparse_compile.expressions`: `b` a sequence, `h` a
    query head, `t` and `s` the rows of `q` and `k`, `x` the score; `Load(i, ...)` reads an element
    of `operands[i]`. On CUDA they are printed into the kernels. Formulas for a function that
    torch.compile compiles are written outside of it. The forward, and the gradients of `q`, `k` and
    `v`, give the same bits every time.

    Args:
        q: Queries, [B, Hq, T, D] float16, bfloat16 or float32 (on the CPU float64 too), D <= 256.
        k: Keys, [B, Hkv, S, D]; query head `h` reads head `h // (Hq // Hkv)`.
        v: Values, [B, Hkv, S, Dv].
        block_indices: The KV blocks that each tile reads, [B, Hq or Hkv, ceil(T / tile), K] int32,
            in any order; B and heads may be 1 where all share. One listed twice counts twice.
        block_counts: How many entries of each list count, [B, Hq or Hkv, ceil(T / tile)] int32.
        tile: Query tokens that share a list: 16, 32, 64 or 128.
        block_size: Keys in a KV block: 16, 32, 64 or 128.
        mask: Which keys a query reads, a Boolean of `b`, `h`, `t` and `s`; all if left out.
        score: The logit, a formula of `x` and the indices; `x` if left out.
        operands: The tensors that formulas load from; floating ones may require grad.
        full_counts: How many of each list's entries, at its end, are KV blocks in which nothing is
            masked, of the shape of `block_counts`; `mask` is not computed there. None: 0.
        sink: One more logit in the softmax's denominator, a formula of `b`, `h` and `t`.
        empty_rows: What a row that reads no key gives: "zero", "uniform" (the mean of all values)
            or "nan"; with a sink always zero.
        scale: `x` is `q . k` times this; `D ** -0.5` if left out.
        return_lse: Whether to return the log-sum-exp too.

    Returns:
        The output, [B, Hq, T, Dv] in the dtype of `q`; with `return_lse` also the natural
        log-sum-exp of each row's logits, sink included, [B, Hq, T] float32; -inf for none.

    Raises:
        OperatorError: An argument has a wrong shape, dtype, device or value, or a formula holds
            what no kernel can compute. The values of lists are looked at on the CPU; on CUDA only
            if SPARSE_COMPILE_CHECK_VALUES is 1, since that waits for the device.
    """
    checks.check_heads(q, k, v)
    checks.check_tile(tile)
    checks.check_block_size(block_size)
    checks.check_lists(q, k, block_indices, block_counts, full_counts, tile, block_size)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    text = encoded(scale, mask, score, sink, empty_rows)
    if not torch.compiler.is_dynamo_compiling():  # which cannot trace the parser
        check_program(parsed(text), q, operands)
    try:
        out, lse = torch.ops.sparse_compile.block_sparse_attention_v1(
            q, k, v, block_indices, block_counts, full_counts, list(operands), text, tile,
            block_size,
        )  # fmt: skip
    except NotImplementedError as error:
        raise OperatorError(
            f"mask, score or sink cannot be computed: {error}. Expected {COMPUTABLE}."
        ) from error
    return (out, lse) if return_lse else out


def list_blocks(
    q: Tensor, k: Tensor, mask: sympy.Basic, *, tile: int, block_size: int,
    operands: Sequence[Tensor] = (), capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """List the KV blocks of which a mask keeps anything, for `block_sparse_attention`.

    The mask is bounded over whole blocks, by interval arithmetic on the device; nothing of size
    [T, S] is made. A list may hold a block that turns out to keep nothing.

    Args:
        q: Queries, [B, Hq, T, D]; only its shape and device matter.
        k: Keys, [B, Hkv, S, D], likewise.
        mask: Which keys a query reads, a Boolean of `b`, `h`, `t` and `s`.
        tile: Query tokens that share a list.
        block_size: Keys in a KV block.
        operands: The tensors that `mask` loads from.
        capacity: The length of the lists, where it is known that none is longer; all KV blocks if
            left out.

    Returns:
        `block_indices`, `block_counts` and `full_counts`; B and heads are 1 where the mask does not
        depend on them.

    Raises:
        OperatorError: An argument has a wrong shape, dtype or value, or `capacity` is too small
            (checked on the CPU; elsewhere the list is cut off).
    """
    checks.check_heads(q, k, k, ("q", "k", "k"))
    checks.check_tile(tile)
    checks.check_block_size(block_size)
    text = encoded(1.0, mask, None, None, "zero")
    if not torch.compiler.is_dynamo_compiling():
        check_program(parsed(text), q, operands)
    if capacity is not None and capacity < 1:
        raise OperatorError(f"capacity is {capacity}. Expected at least 1, or None.")
    found = torch.ops.sparse_compile.list_blocks_v1(
        q.detach(), k.detach(), [x.detach() for x in operands], text, tile, block_size, capacity
    )
    if (
        capacity is not None
        and found[1].numel()
        and checks.may_look(found[1])
        and int(found[1].max()) > capacity
    ):
        raise OperatorError(
            f"capacity is {capacity}. Expected at least {int(found[1].max())}, the longest list."
        )
    return found


def _compressed_tokens(
    q: Tensor, k_cmp: Tensor, block: int, stride: int, n_keys: int | None,
    cu_seqlens: Tensor | None,
) -> key_ranges.Tokens:  # fmt: skip
    n_keys = q.shape[2] if n_keys is None else n_keys
    if cu_seqlens is not None:
        checks.check_packing(q, q, cu_seqlens)
    checks.check_compression(k_cmp, q.shape[2], n_keys, block, stride, cu_seqlens)
    return key_ranges.tokens(q.shape[2], n_keys, cu_seqlens, q.device)


def _in_ranges(
    q: Tensor, k: Tensor, v: Tensor, ranges: tuple[Tensor, Tensor], scale: float | None
) -> tuple[Tensor, Tensor]:
    first, end = (x.int() for x in ranges)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return torch.ops.sparse_compile.range_attention(q, k, v, first, end, scale)
