"""Sparse attention as functions: checked at the edge, differentiable, on any device.

They stand on the operators `torch.ops.sparse_compile.*`, which torch.compile keeps whole.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from sparse_compile import settings
from sparse_compile.errors import OperatorError
from sparse_compile.kernels import selected_attention as _selected

LoopOrder = Literal["query_major", "kv_major"]
BLOCK_SIZES = (16, 32, 64, 128)
MAX_SLOTS = 64
MAX_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = ["LoopOrder", "selected_attention"]


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
        loop_order: `query_major` (a program owns a query token) or `kv_major` (a program owns a KV
            block); chosen by the sizes if left out.
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
    _check_heads(q, k, v)
    _check_block_size(block_size)
    _check_selection(q, k, block_indices)
    if cu_seqlens is not None:
        _check_packing(q, k, cu_seqlens)
    if loop_order is None:
        loop_order = _choose_loop_order(q, k, v, block_indices, block_size)
    elif loop_order not in _selected.LOOP_ORDERS:
        raise OperatorError(
            f'loop_order is "{loop_order}". Expected {" or ".join(_selected.LOOP_ORDERS)}, or None.'
        )
    if _may_look(block_indices):
        _check_indices(block_indices, k.shape[2], block_size, cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    out, lse = torch.ops.sparse_compile.selected_attention(
        q, k, v, block_indices, block_size, scale, causal, cu_seqlens, loop_order
    )
    return (out, lse) if return_lse else out


def _choose_loop_order(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int
) -> LoopOrder:
    """The loop order that moves fewer bytes, each from where it comes.

    `query_major` reads every selected key and value from the L2 cache; `kv_major` writes and reads
    a partial output for every selection, through memory, and reads every query as often.
    """
    heads, group, n_slots = k.shape[1], q.shape[1] // k.shape[1], block_indices.shape[3]
    keys = heads * n_slots * block_size * (q.shape[3] + v.shape[3]) / 2.5  # L2 is that much faster
    partials = heads * group * n_slots * (q.shape[3] / 2.5 + 2 * v.shape[3])
    n_full = q.shape[2] * n_slots * group >= 16 * -(-k.shape[2] // block_size)
    return "kv_major" if n_full and partials < keys else "query_major"


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise OperatorError(
                f"{name} has shape {tuple(tensor.shape)}. Expected four axes: batch, heads, tokens, "
                "head size."
            )
        allowed = (*_DTYPES, torch.float64) if tensor.device.type == "cpu" else _DTYPES
        if tensor.dtype not in allowed or tensor.dtype != q.dtype:
            raise OperatorError(
                f"{name} is {tensor.dtype}. Expected float16, bfloat16 or float32 (float64 on the "
                f"CPU), the same for q, k and v (q is {q.dtype})."
            )
        if tensor.device != q.device:
            raise OperatorError(f"{name} is on {tensor.device}. Expected {q.device}, as q.")
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise OperatorError(
                f"{name} has head size {tensor.shape[3]}. Expected 1 to {MAX_HEAD_DIM}."
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0:
        raise OperatorError(
            f"k has shape {tuple(k.shape)}. Expected [{q.shape[0]}, Hkv, S, {q.shape[3]}], to fit "
            f"q of shape {tuple(q.shape)}."
        )
    if q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise OperatorError(
            f"k has {k.shape[1]} heads. Expected a number that divides the {q.shape[1]} heads of q."
        )
    if v.shape[:3] != k.shape[:3]:
        raise OperatorError(
            f"v has shape {tuple(v.shape)}. Expected [{', '.join(map(str, k.shape[:3]))}, Dv], to "
            f"fit k of shape {tuple(k.shape)}."
        )


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise OperatorError(
            f"block_size is {block_size}. Expected one of {', '.join(map(str, BLOCK_SIZES))}."
        )


def _check_selection(q: Tensor, k: Tensor, block_indices: Tensor) -> None:
    if block_indices.dtype != torch.int32:
        raise OperatorError(
            f"block_indices is {block_indices.dtype}. Expected torch.int32; convert it with .int()."
        )
    if block_indices.device != q.device:
        raise OperatorError(
            f"block_indices is on {block_indices.device}. Expected {q.device}, as q."
        )
    expected = (q.shape[0], k.shape[1], q.shape[2])
    if block_indices.dim() != 4 or tuple(block_indices.shape[:3]) != expected:
        raise OperatorError(
            f"block_indices has shape {tuple(block_indices.shape)}. Expected [{', '.join(map(str, expected))}, K]: "
            "batch, KV heads, query tokens, selected KV blocks."
        )
    if not 1 <= block_indices.shape[3] <= MAX_SLOTS:
        raise OperatorError(
            f"block_indices selects {block_indices.shape[3]} KV blocks a token. Expected 1 to {MAX_SLOTS}."
        )
    if block_indices.numel() >= 2**31:
        raise OperatorError(
            f"block_indices has {block_indices.numel()} entries. Expected fewer than 2 ** 31; split the batch."
        )


def _check_packing(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise OperatorError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}. Expected int32 "
            "of shape [n + 1]: the starts of n sequences and the end of the last."
        )
    if cu_seqlens.device != q.device:
        raise OperatorError(f"cu_seqlens is on {cu_seqlens.device}. Expected {q.device}, as q.")
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise OperatorError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}. With cu_seqlens, expected a "
            "batch of 1 and as many queries as keys."
        )
    if _may_look(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[2] or bounds != sorted(bounds):
            raise OperatorError(
                f"cu_seqlens is {bounds[:4]} to {bounds[-1]}. Expected numbers that ascend from 0 "
                f"to the {q.shape[2]} tokens of q."
            )


def _may_look(tensor: Tensor) -> bool:
    """Whether values may be read: never while tracing, on CUDA only if that was asked for."""
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return tensor.device.type == "cpu" or settings.read().check_values


def _check_indices(
    block_indices: Tensor, n_keys: int, block_size: int, cu_seqlens: Tensor | None
) -> None:
    n_blocks = -(-n_keys // block_size)
    if cu_seqlens is not None:
        longest = int(cu_seqlens.diff().max())
        n_blocks = -(-longest // block_size)
    before, after = block_indices[..., :-1], block_indices[..., 1:]
    ascends = (after > before) & (before >= 0) | (after == -1)
    inside = (block_indices >= -1) & (block_indices < n_blocks)
    for good, what in ((inside, f"-1 or a KV block from 0 to {n_blocks - 1}"), (
        ascends, "lists that ascend, -1 padded on the right"
    )):  # fmt: skip
        if not bool(good.all()):
            b, h, t = (~good).any(-1).nonzero()[0].tolist()
            raise OperatorError(
                f"block_indices[{b}, {h}, {t}] is {block_indices[b, h, t].tolist()}. Expected {what}."
            )
