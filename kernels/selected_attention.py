"""Attention in which every query token reads its own list of KV blocks (NSA's selection branch).

Source: Yuan et al., "Native Sparse Attention" (2025), equations 11 and 12.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from sparse_compile import costs, rates
from sparse_compile.kernels import selected_cpu

OP = "sparse_compile::selected_attention"
BACKWARD_OP = "sparse_compile::selected_attention_backward"
LOOP_ORDERS = ("query_major", "kv_major", "tile_union")

torch.library.define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor block_indices, int block_size, float scale, "
    "bool causal, Tensor? cu_seqlens, str? loop_order) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    BACKWARD_OP,
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor block_indices, "
    "Tensor out, Tensor lse, int block_size, float scale, bool causal, Tensor? cu_seqlens) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
)


def selected_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int, scale: float,
    causal: bool, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the operator must compute, in plain PyTorch, differentiable by autograd."""
    acc = torch.promote_types(q.dtype, torch.float32)
    n_queries, n_keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    query = torch.arange(n_queries, device=q.device)[:, None] + (n_keys - n_queries)
    key = torch.arange(n_keys, device=q.device)[None, :]
    bounds = torch.tensor([0, n_keys], device=q.device) if cu_seqlens is None else cu_seqlens
    bounds = bounds.long()
    sequence = torch.searchsorted(bounds, key[0], right=True) - 1
    block = (key[0] - bounds[sequence]) // block_size  # of each key, in its sequence
    keep = (block_indices[..., None] == block).any(-2)  # [B, Hkv, T, S]
    if cu_seqlens is not None:
        keep = keep & (sequence[:, None] == sequence[None, :])
    if causal:
        keep = keep & (key <= query)
    k, v = (x.to(acc).repeat_interleave(group, dim=1) for x in (k, v))
    keep = keep.repeat_interleave(group, dim=1)
    scores = (scale * q.to(acc) @ k.mT).masked_fill(~keep, float("-inf"))
    empty = ~keep.any(-1, keepdim=True)
    # softmax of an empty row is replaced before it can make NaN gradients
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return (weights @ v).to(q.dtype), lse


def _forward_cpu(q, k, v, block_indices, block_size, scale, causal, cu_seqlens, loop_order):
    with torch.autocast("cpu", enabled=False):  # it would multiply in 16 bits
        return selected_cpu.forward(
            q, k, v, block_indices, cu_seqlens, block_size=block_size, scale=scale, causal=causal
        )


def _backward_cpu(
    grad_out, grad_lse, q, k, v, block_indices, out, lse, block_size, scale, causal, cu_seqlens
):
    return selected_cpu.backward(
        grad_out, grad_lse, q, k, v, block_indices, out, lse, cu_seqlens,
        block_size=block_size, scale=scale, causal=causal,
    )  # fmt: skip


def launch(q, k, v, block_indices, block_size, scale, causal, cu_seqlens, loop_order):
    """The operator by Triton kernels."""
    from sparse_compile.kernels.selected_lists import geometry

    if loop_order is None:
        loop_order = choose_loop_order(q, k, v, block_indices, block_size, causal)
    place = geometry(q.shape[2], k.shape[2], block_size, cu_seqlens, q.device)
    return _loop_order(loop_order).forward(
        q, k, v, block_indices, place, block_size=block_size, scale=scale, causal=causal
    )


def launch_backward(
    grad_out, grad_lse, q, k, v, block_indices, out, lse, block_size, scale, causal, cu_seqlens
):
    """The gradients by Triton kernels; every loop order has the same."""
    from sparse_compile.kernels import selected_backward
    from sparse_compile.kernels.selected_lists import geometry

    place = geometry(q.shape[2], k.shape[2], block_size, cu_seqlens, q.device)
    return selected_backward.backward(
        grad_out, grad_lse, q, k, v, block_indices, out, lse, place,
        block_size=block_size, scale=scale, causal=causal,
    )  # fmt: skip


def choose_loop_order(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int, causal: bool
) -> str:
    """The loop order that the cost model finds fastest for these sizes on this device.

    It is asked when the operator runs, so that a graph with symbolic sizes needs no guard. Tokens
    are rounded up to four binary digits: the steps of a decoding loop share an answer.
    """
    batch, query_heads, n_queries, head_dim = q.shape
    return _fastest(
        q.device, q.dtype, max(1, batch), _rounded(n_queries), _rounded(k.shape[2]), query_heads,
        k.shape[1], head_dim, v.shape[3], block_indices.shape[3], block_size, causal,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _fastest(
    device: torch.device, dtype: torch.dtype, batch: int, n_queries: int, n_keys: int,
    query_heads: int, kv_heads: int, head_dim: int, value_dim: int, n_slots: int, block_size: int,
    causal: bool,
) -> str:  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    problem = costs.Problem(
        batch=batch, n_queries=n_queries, n_keys=n_keys, query_heads=query_heads, kv_heads=kv_heads,
        head_dim=head_dim, value_dim=value_dim, n_slots=n_slots, block_size=block_size,
        dtype=str(dtype).removeprefix("torch."), causal=causal,
    )  # fmt: skip
    return costs.predict(problem, rates.lookup(name), LOOP_ORDERS).fastest


def _rounded(size: int) -> int:
    size = max(1, size)
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def _loop_order(name: str) -> ModuleType:
    # imported here: Triton takes long to load
    from sparse_compile.kernels import (
        selected_kv_major,
        selected_query_major,
        selected_tile_union,
    )

    modules = {
        "query_major": selected_query_major,
        "kv_major": selected_kv_major,
        "tile_union": selected_tile_union,
    }
    return modules[name]


torch.library.impl(OP, "cpu", _forward_cpu)
torch.library.impl(BACKWARD_OP, "cpu", _backward_cpu)
torch.library.impl(OP, "cuda", launch)
torch.library.impl(BACKWARD_OP, "cuda", launch_backward)


@torch.library.register_fake(OP)
def _forward_fake(q, k, v, block_indices, block_size, scale, causal, cu_seqlens, loop_order):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@torch.library.register_fake(BACKWARD_OP)
def _backward_fake(
    grad_out, grad_lse, q, k, v, block_indices, out, lse, block_size, scale, causal, cu_seqlens
):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, block_indices, ctx.block_size, ctx.scale, ctx.causal, cu_seqlens, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_seqlens = cu_seqlens is not None
    ctx.save_for_backward(
        q, k, v, block_indices, *output, *([cu_seqlens] if ctx.has_seqlens else [])
    )


def _backward(ctx, grad_out, grad_lse):
    q, k, v, block_indices, out, lse, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.sparse_compile.selected_attention_backward(
        grad_out, grad_lse, q, k, v, block_indices, out, lse, ctx.block_size, ctx.scale,
        ctx.causal, rest[0] if ctx.has_seqlens else None,
    )  # fmt: skip
    return (*grads, None, None, None, None, None, None)


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)
