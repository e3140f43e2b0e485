"""Checks of what is given to operators: each error names the argument and what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile import _compat, settings
from sparse_compile.errors import OperatorError
from sparse_compile.option_checks import MAX_K

BLOCK_SIZES = (16, 32, 64, 128)
TILES = (16, 32, 64, 128)
MAX_SLOTS = MAX_K
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    """Refuse queries, keys and values that do not fit each other."""
    listed = f"{names[0]}, {names[1]} and {names[2]}"
    for name, tensor in zip(names, (q, k, v), strict=True):
        if tensor.dim() != 4:
            raise OperatorError(
                f"{name} has shape {tuple(tensor.shape)}. Expected four axes: batch, heads, tokens, "
                "head size."
            )
        allowed = (*DTYPES, torch.float64) if tensor.device.type == "cpu" else DTYPES
        if tensor.dtype not in allowed or tensor.dtype != q.dtype:
            raise OperatorError(
                f"{name} is {tensor.dtype}. Expected float16, bfloat16 or float32 (float64 on the "
                f"CPU), the same for {listed} (q is {q.dtype})."
            )
        if tensor.device != q.device:
            raise OperatorError(f"{name} is on {tensor.device}. Expected {q.device}, as q.")
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise OperatorError(
                f"{name} has head size {tensor.shape[3]}. Expected 1 to {MAX_HEAD_DIM}."
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0:
        raise OperatorError(
            f"{names[1]} has shape {tuple(k.shape)}. Expected [{q.shape[0]}, Hkv, S, {q.shape[3]}], to fit "
            f"q of shape {tuple(q.shape)}."
        )
    if q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise OperatorError(
            f"{names[1]} has {k.shape[1]} heads. Expected a number that divides the {q.shape[1]} heads of q."
        )
    if v.shape[:3] != k.shape[:3]:
        raise OperatorError(
            f"{names[2]} has shape {tuple(v.shape)}. Expected [{', '.join(map(str, k.shape[:3]))}, Dv], to "
            f"fit {names[1]} of shape {tuple(k.shape)}."
        )


def check_block_size(block_size: int) -> None:
    """Refuse a size of KV blocks that no kernel has."""
    if block_size not in BLOCK_SIZES:
        raise OperatorError(
            f"block_size is {block_size}. Expected one of {', '.join(map(str, BLOCK_SIZES))}."
        )


def check_selection(q: Tensor, k: Tensor, block_indices: Tensor) -> None:
    """Refuse a selection of a wrong shape or dtype; its values are for `check_indices`."""
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


def check_packing(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse bounds of packed sequences that do not fit."""
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
    if may_look(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[2] or bounds != sorted(bounds):
            raise OperatorError(
                f"cu_seqlens is {bounds[:4]} to {bounds[-1]}. Expected numbers that ascend from 0 "
                f"to the {q.shape[2]} tokens of q."
            )


def may_look(tensor: Tensor) -> bool:
    """Whether values may be read: never while tracing, on CUDA only if that was asked for."""
    if torch.compiler.is_compiling() or isinstance(tensor, _compat.FakeTensor):
        return False
    return tensor.device.type == "cpu" or settings.read().check_values


def check_indices(
    block_indices: Tensor, n_keys: int, block_size: int, cu_seqlens: Tensor | None
) -> None:
    """Refuse lists that do not ascend, or name KV blocks that there are not."""
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


def check_compression(
    k_cmp: Tensor, n_queries: int, n_keys: int, block: int, stride: int, cu_seqlens: Tensor | None
) -> None:
    """Refuse runs of tokens that do not fit each other, and a wrong number of compressed keys."""
    if stride < 1 or block < stride or block % stride:
        raise OperatorError(
            f"block is {block} and stride {stride}. Expected a block that is a multiple of stride."
        )
    if cu_seqlens is None:
        if n_keys < n_queries:
            raise OperatorError(
                f"n_keys is {n_keys}. Expected at least the {n_queries} tokens of q."
            )
        expected = max(0, (n_keys - block) // stride + 1)
    elif may_look(cu_seqlens):
        lengths = cu_seqlens.diff().tolist()
        expected = sum(max(0, (length - block) // stride + 1) for length in lengths)
    else:
        return
    if k_cmp.shape[2] != expected:
        raise OperatorError(
            f"k_cmp has {k_cmp.shape[2]} compressed keys. Expected {expected}: those of {n_keys} keys "
            f"with block {block} and stride {stride}."
        )


def check_tile(tile: int) -> None:
    """Refuse a size of query tiles that no kernel has."""
    if tile not in TILES:
        raise OperatorError(f"tile is {tile}. Expected one of {', '.join(map(str, TILES))}.")


def check_lists(
    q: Tensor, k: Tensor, block_indices: Tensor, block_counts: Tensor, full_counts: Tensor | None,
    tile: int, block_size: int,
) -> None:  # fmt: skip
    """Refuse lists of KV blocks of a wrong shape, dtype or device, and values where they may be read."""
    lists = {"block_indices": block_indices, "block_counts": block_counts}
    if full_counts is not None:
        lists["full_counts"] = full_counts
    for name, tensor in lists.items():
        if tensor.dtype != torch.int32:
            raise OperatorError(
                f"{name} is {tensor.dtype}. Expected torch.int32; convert it with .int()."
            )
        if tensor.device != q.device:
            raise OperatorError(f"{name} is on {tensor.device}. Expected {q.device}, as q.")
    batch, heads, n_tiles = q.shape[0], q.shape[1], -(-q.shape[2] // tile)
    shape = tuple(block_indices.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, k.shape[1], heads)
    if not fits or shape[2] != n_tiles or shape[3] < 1:
        raise OperatorError(
            f"block_indices has shape {shape}. Expected [{batch}, {heads} or {k.shape[1]}, "
            f"{n_tiles}, K], or 1 instead of the first two where all share: batch, heads, tiles of "
            f"{tile} queries, KV blocks."
        )
    for name, tensor in list(lists.items())[1:]:
        if tuple(tensor.shape) != shape[:3]:
            raise OperatorError(
                f"{name} has shape {tuple(tensor.shape)}. Expected {shape[:3]}, as block_indices."
            )
    if not may_look(block_indices):
        return
    full = torch.zeros_like(block_counts) if full_counts is None else full_counts
    for name, tensor, most in (
        ("block_counts", block_counts, torch.full_like(full, shape[3])),
        ("full_counts", full, block_counts),
    ):
        wrong = (tensor < 0) | (tensor > most)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise OperatorError(
                f"{name}{at} is {int(tensor[tuple(at)])}. Expected 0 to {int(most[tuple(at)])}."
            )
    n_blocks = -(-k.shape[2] // block_size)
    listed = torch.arange(shape[3], device=q.device) < block_counts[..., None]
    wrong = listed & ((block_indices < 0) | (block_indices >= n_blocks))
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise OperatorError(
            f"block_indices{at} is {int(block_indices[tuple(at)])}. Expected a KV block from 0 to "
            f"{n_blocks - 1}."
        )
