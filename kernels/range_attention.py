"""Attention in which every query token reads a range of keys: windows, and compressed keys.

The two ends of the ranges ascend with the token, so that neighbours read nearly the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

OP = "sparse_compile::range_attention"
BACKWARD_OP = "sparse_compile::range_attention_backward"
TILE_NUMBERS = 2**24  # of scores at a time, on the CPU

torch.library.define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor first, Tensor end, float scale) "
    "-> (Tensor out, Tensor lse)",
)
torch.library.define(
    BACKWARD_OP,
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor first, Tensor end, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
)


def range_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What the operator must compute, in plain PyTorch, differentiable by autograd.

    Args:
        q: Queries, [B, Hq, T, D].
        k: Keys, [B, Hkv, S, D].
        v: Values, [B, Hkv, S, Dv].
        first: The first key that each query reads, int32 [T].
        end: The key behind the last, int32 [T].
        scale: Multiplies the scores.
    Returns:
        The output [B, Hq, T, Dv] and the natural log-sum-exp [B, Hq, T]; 0 and -inf where a query
        reads no key.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    group, key = q.shape[1] // k.shape[1], torch.arange(k.shape[2], device=q.device)
    keep = (key >= first[:, None]) & (key < end[:, None])
    k, v = (x.to(acc).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (scale * q.to(acc) @ k.mT).masked_fill(~keep, float("-inf"))
    empty = ~keep.any(-1, keepdim=True)
    # softmax of an empty row is replaced before it can make NaN gradients
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
    return (weights @ v).to(q.dtype), lse


def _tiles(q: Tensor, first: Tensor, end: Tensor) -> list[tuple[slice, slice, Tensor]]:
    """Some tokens at a time, the keys that they read, and which of them reads which."""
    tiles = []
    rows, n_tokens, at = q.shape[0] * q.shape[1], q.shape[2], 0
    while at < n_tokens:
        step = max(1, min(n_tokens - at, TILE_NUMBERS // max(1, rows * n_tokens)))
        some = slice(at, at + step)
        keys = slice(int(first[at]), max(int(first[at]), int(end[at + step - 1])))
        key = torch.arange(keys.start, keys.stop)
        tiles.append((some, keys, (key >= first[some, None]) & (key < end[some, None])))
        at += step
    return tiles


def _scores(q: Tensor, k: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (torch.einsum("bhgtd,bhsd->bhgts", q, k) * scale).masked_fill(~keep, float("-inf"))


def _forward_cpu(q, k, v, first, end, scale):
    acc, heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=acc)
    grouped, k, v = q.unflatten(1, (heads, -1)).to(acc), k.to(acc), v.to(acc)
    for some, keys, keep in _tiles(q, first, end):
        if keys.start == keys.stop:
            continue
        scores = _scores(grouped[:, :, :, some], k[:, :, keys], keep, scale)
        row_lse = scores.logsumexp(-1)
        weights = (scores - row_lse.masked_fill(row_lse == -torch.inf, 0.0)[..., None]).exp()
        part = torch.einsum("bhgts,bhsd->bhgtd", weights, v[:, :, keys])
        out[:, :, some] = part.flatten(1, 2).to(q.dtype)
        lse[:, :, some] = row_lse.flatten(1, 2)
    return out, lse


def _backward_cpu(grad_out, grad_lse, q, k, v, out, lse, first, end, scale):
    acc, heads = lse.dtype, k.shape[1]
    delta = (grad_out.to(acc) * out.to(acc)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grouped, grads, lse, delta = (
        x.unflatten(1, (heads, -1)).to(acc) for x in (q, grad_out, lse, delta)
    )
    k, v = k.to(acc), v.to(acc)
    dq, dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (grouped, k, v))
    for some, keys, keep in _tiles(q, first, end):
        part_q, grad, row_lse = (x[:, :, :, some] for x in (grouped, grads, lse))
        part_k, part_v = k[:, :, keys], v[:, :, keys]
        finite = row_lse.masked_fill(row_lse == -torch.inf, 0.0)
        weights = (_scores(part_q, part_k, keep, scale) - finite[..., None]).exp()
        above = torch.einsum("bhgtd,bhsd->bhgts", grad, part_v)
        inner = weights * (above - delta[:, :, :, some, None]) * scale
        dq[:, :, :, some] = torch.einsum("bhgts,bhsd->bhgtd", inner, part_k)
        dk[:, :, keys] += torch.einsum("bhgts,bhgtd->bhsd", inner, part_q)
        dv[:, :, keys] += torch.einsum("bhgts,bhgtd->bhsd", weights, grad)
    return dq.flatten(1, 2).to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def launch(q, k, v, first, end, scale):
    """The operator by Triton kernels."""
    from sparse_compile.kernels import range_kernels  # Triton takes long to load

    return range_kernels.forward(q, k, v, first, end, scale)


def launch_backward(grad_out, grad_lse, q, k, v, out, lse, first, end, scale):
    """The gradients by Triton kernels."""
    from sparse_compile.kernels import range_kernels

    return range_kernels.backward(grad_out, grad_lse, q, k, v, out, lse, first, end, scale)


for _op, _cpu, _cuda in (
    (OP, _forward_cpu, launch),
    (BACKWARD_OP, _backward_cpu, launch_backward),
):
    torch.library.impl(_op, "cpu", _cpu)
    torch.library.impl(_op, "cuda", _cuda)


@torch.library.register_fake(OP)
def _forward_fake(q, k, v, first, end, scale):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@torch.library.register_fake(BACKWARD_OP)
def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, first, end, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, first, end, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.sparse_compile.range_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, first, end, ctx.scale
    )
    return (*grads, None, None, None)


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)
