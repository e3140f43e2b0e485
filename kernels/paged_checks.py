"""Checks of pools, block tables and lengths: each error names the argument and what it should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile.errors import OperatorError
from sparse_compile.kernels.checks import DTYPES, MAX_HEAD_DIM, may_look

if TYPE_CHECKING:
    from sparse_compile.kernels.paged_cache import Sketch

PAGE_SIZES = (16, 32, 64)


def check_pool(pool: Tensor) -> None:
    """Refuse what is no pool of pages."""
    if pool.dim() != 5 or pool.shape[2] != 2:
        raise OperatorError(
            f"pool has shape {tuple(pool.shape)}. Expected [P, Hkv, 2, N, D]: pages, KV heads, keys "
            "and values, tokens of a page, head size."
        )
    if pool.shape[3] not in PAGE_SIZES:
        listed = ", ".join(map(str, PAGE_SIZES))
        raise OperatorError(f"pool has pages of {pool.shape[3]} tokens. Expected one of {listed}.")
    if not 1 <= pool.shape[4] <= MAX_HEAD_DIM:
        raise OperatorError(f"pool has head size {pool.shape[4]}. Expected 1 to {MAX_HEAD_DIM}.")
    allowed = (*DTYPES, torch.float64) if pool.device.type == "cpu" else DTYPES
    if pool.dtype not in allowed:
        raise OperatorError(
            f"pool is {pool.dtype}. Expected float16, bfloat16 or float32 (float64 on the CPU)."
        )
    if not pool.is_contiguous():
        raise OperatorError(
            f"pool has strides {pool.stride()}. Expected a contiguous tensor, as `pools[layer]` of "
            "[layers, P, Hkv, 2, N, D] is."
        )


def check_table(pool: Tensor, block_table: Tensor, **lengths: Tensor | None) -> None:
    """Refuse a block table or lengths of a wrong shape or dtype; values are for `check_places`."""
    if block_table.dim() != 2:
        raise OperatorError(
            f"block_table has shape {tuple(block_table.shape)}. Expected [B, L]: sequences, their "
            "pages."
        )
    given = {"block_table": block_table, **lengths}
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise OperatorError(
                f"{name} is {tensor.dtype}. Expected torch.int32; convert it with .int()."
            )
        if tensor.device != pool.device:
            raise OperatorError(f"{name} is on {tensor.device}. Expected {pool.device}, as pool.")
        if name != "block_table" and tuple(tensor.shape) != (block_table.shape[0],):
            raise OperatorError(
                f"{name} has shape {tuple(tensor.shape)}. Expected [{block_table.shape[0]}], one for "
                "each row of block_table."
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise OperatorError(
                f"{name} has strides {tensor.stride()}. Expected 1 on the last axis."
            )


def check_new(
    k: Tensor, v: Tensor, pool: Tensor, block_table: Tensor, sketch: Sketch | None
) -> None:
    """Refuse new keys and values that do not fit the pool, and a sketch of another one."""
    heads, head_dim = pool.shape[1], pool.shape[4]
    batch = block_table.shape[0]
    for name, tensor in (("k", k), ("v", v)):
        fits = tensor.dim() == 4 and (*tensor.shape[:2], tensor.shape[3]) == (
            batch, heads, head_dim,
        )  # fmt: skip
        if not fits or tensor.shape != k.shape:
            raise OperatorError(
                f"{name} has shape {tuple(tensor.shape)}. Expected [{batch}, {heads}, T, {head_dim}], "
                f"to fit block_table and pool of shape {tuple(pool.shape)}; the same T for k and v."
            )
        if tensor.dtype != pool.dtype or tensor.device != pool.device:
            raise OperatorError(
                f"{name} is {tensor.dtype} on {tensor.device}. Expected {pool.dtype} on "
                f"{pool.device}, as pool."
            )
    if sketch is not None:
        check_sketch(pool, sketch)


def check_sketch(pool: Tensor, sketch: Sketch) -> None:
    """Refuse a sketch of another pool."""
    n_pages, heads, _, page_size, head_dim = pool.shape
    if head_dim % 2:
        raise OperatorError(f"pool has head size {head_dim}. Expected an even one for a sketch.")
    shape = (n_pages, heads, page_size)
    for name, tensor, width, dtype in (
        ("codes", sketch.codes, head_dim // 2, torch.uint8),
        ("scales", sketch.scales, 2, torch.float16),
    ):
        if tuple(tensor.shape) != (*shape, width) or tensor.dtype != dtype:
            raise OperatorError(
                f"sketch.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}. Expected {dtype} of "
                f"shape {(*shape, width)}; `Sketch.empty(pool)` makes one."
            )
        if tensor.device != pool.device or not tensor.is_contiguous():
            raise OperatorError(
                f"sketch.{name} is on {tensor.device} with strides {tensor.stride()}. Expected a "
                f"contiguous tensor on {pool.device}, as pool."
            )


def check_queries(q: Tensor, pool: Tensor, block_table: Tensor) -> None:
    """Refuse queries that do not fit the pool."""
    heads, head_dim, batch = pool.shape[1], pool.shape[4], block_table.shape[0]
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim):
        raise OperatorError(
            f"q has shape {tuple(q.shape)}. Expected [{batch}, Hq, T, {head_dim}], to fit block_table "
            f"and pool of shape {tuple(pool.shape)}."
        )
    if q.shape[1] == 0 or heads == 0 or q.shape[1] % heads:
        raise OperatorError(
            f"q has {q.shape[1]} heads. Expected a multiple of the {heads} KV heads of pool."
        )
    if q.dtype != pool.dtype or q.device != pool.device:
        raise OperatorError(
            f"q is {q.dtype} on {q.device}. Expected {pool.dtype} on {pool.device}, as pool."
        )


def check_places(
    pool: Tensor, block_table: Tensor, seq_lens: Tensor,
    *, first: Tensor | None = None, minimum: Tensor | int = 0,
) -> None:  # fmt: skip
    """Refuse tables that lack a page of what is read or written; looks at values where it may.

    Args:
        pool: The pages.
        block_table: Pages of each sequence.
        seq_lens: Where what is read or written ends, in tokens.
        first: Where it begins; 0 if left out.
        minimum: What a sequence has at least, unless it has no tokens at all.
    """
    if not all(may_look(tensor) for tensor in (block_table, seq_lens)):
        return
    page_size, end = pool.shape[3], seq_lens.long()
    begin = torch.zeros_like(end) if first is None else first.long().clamp(min=0)
    least = torch.as_tensor(minimum, device=end.device).expand_as(end)
    short = (end < 0) | ((end > 0) & (end < least))
    if bool(short.any()):
        row = int(short.nonzero()[0])
        raise OperatorError(
            f"seq_lens[{row}] is {int(end[row])}. Expected 0, or at least the {int(least[row])} "
            "tokens of this call."
        )
    room = block_table.shape[1] * page_size
    if bool((end > room).any()):
        row = int((end > room).nonzero()[0])
        raise OperatorError(
            f"seq_lens[{row}] is {int(end[row])}. Expected at most {room}, the room of "
            f"{block_table.shape[1]} pages of {page_size} tokens; give block_table more columns."
        )
    entry = torch.arange(block_table.shape[1], device=block_table.device)
    needed = (entry >= (begin // page_size)[:, None]) & (entry * page_size < end[:, None])
    bad = needed & ((block_table < 0) | (block_table >= pool.shape[0]))
    if bool(bad.any()):
        row, at = bad.nonzero()[0].tolist()
        raise OperatorError(
            f"block_table[{row}, {at}] is {int(block_table[row, at])}. Expected a page from 0 to "
            f"{pool.shape[0] - 1}, since the sequence has {int(end[row])} tokens."
        )


def check_counts(n_new: Tensor | None, n_tokens: int) -> None:
    """Refuse more new tokens than a call brings; looks at values where it may."""
    if n_new is None or not may_look(n_new):
        return
    bad = (n_new < 0) | (n_new > n_tokens)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise OperatorError(
            f"n_new[{row}] is {int(n_new[row])}. Expected 0 to {n_tokens}, the tokens of this call."
        )
