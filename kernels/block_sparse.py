"""Attention in which every tile of queries reads its own list of KV blocks, with a score program.

The mask of a program is looked at only in blocks that it keeps partly; a list names those first. The
program travels as a string, so that the operator's arguments are plain and its graph can be cached.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import sympy
import torch
from sympy import And, Ne, Or, floor
from torch import Tensor

from sparse_compile import expressions
from sparse_compile.evaluation import evaluate, read_positions
from sparse_compile.expressions import INDICES, Load, Truth, b, h, s, t
from sparse_compile.kernels import block_sparse_lists, checks
from sparse_compile.kernels import program_attention_cpu as tiled
from sparse_compile.kernels.triton_text import unprintable

if TYPE_CHECKING:
    from sparse_compile.ir import ScoreProgram

OP = "sparse_compile::block_sparse_attention_v1"
BACKWARD_OP = "sparse_compile::block_sparse_attention_backward_v1"
LIST_OP = "sparse_compile::list_blocks_v1"

torch.library.define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor block_counts, "
    "Tensor? full_counts, Tensor[] operands, str program, int tile, int block_size) "
    "-> (Tensor out, Tensor lse)",
)
# the gradients of q, k, v and then of the wanted operands
torch.library.define(
    BACKWARD_OP,
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor block_indices, "
    "Tensor block_counts, Tensor? full_counts, Tensor[] operands, Tensor out, Tensor lse, "
    "str program, int tile, int block_size, bool[] wanted) -> Tensor[]",
)
torch.library.define(
    LIST_OP,
    "(Tensor q, Tensor k, Tensor[] operands, str program, int tile, int block_size, int? capacity) "
    "-> (Tensor block_indices, Tensor block_counts, Tensor full_counts)",
)


def refusal(
    program: ScoreProgram, device_type: str, head_dim: int, value_dim: int, dtype: torch.dtype
) -> str | None:
    """Why the Triton kernels cannot compute such an attention; None if they can."""
    if device_type != "cuda":
        return f"block_sparse_attention has no kernel on {device_type}"
    if dtype not in checks.DTYPES:
        return f"block_sparse_attention has no kernel for {dtype}"
    if not 1 <= min(head_dim, value_dim) <= max(head_dim, value_dim) <= checks.MAX_HEAD_DIM:
        return f"block_sparse_attention needs head sizes of 1 to {checks.MAX_HEAD_DIM}"
    if program.weight is not None:
        return "block_sparse_attention has no place for factors after the softmax"
    for formula in (program.score, program.keep, program.sink):
        unknown = None if formula is None else unprintable(formula)
        if unknown is not None:
            return f"block_sparse_attention has no text for {unknown}"
    return None


def block_sparse_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor,
    full_counts: Tensor | None, operands: Sequence[Tensor], program: ScoreProgram, tile: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the operator must compute, in plain PyTorch, differentiable by autograd."""
    acc = torch.promote_types(q.dtype, torch.float32)
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    k, v = (x.to(acc).repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    scores = program.scale * q.to(acc) @ k.mT
    env: dict[Any, Any] = {expressions.x: scores}
    for axis, (symbol, size) in enumerate(zip(INDICES, (batch, heads, rows, keys), strict=True)):
        env[symbol] = torch.arange(size, device=q.device).view(
            [-1 if axis == i else 1 for i in range(4)]
        )
    value = functools.partial(evaluate, env=env, operands=operands, dtype=acc)
    # how often each key is listed, in partial and in full blocks
    listed = _times_listed(block_indices, block_counts, full_counts, -(-keys // block_size))
    groups = heads // block_indices.shape[1]
    partial, full = (
        times.repeat_interleave(tile, 2)[:, :, :rows].repeat_interleave(block_size, 3)[..., :keys]
        .repeat_interleave(groups, 1) for times in listed
    )  # fmt: skip
    times = full + partial * torch.as_tensor(value(program.keep), device=q.device)
    empty = ~(times > 0).any(-1, keepdim=True)
    logits = torch.where(times > 0, value(program.score) + times.to(acc).log(), -math.inf)
    sink = -math.inf if program.sink is None else value(program.sink)
    sink = torch.as_tensor(sink, dtype=acc, device=q.device).expand(batch, heads, rows, 1)
    # softmax of an empty row is replaced before it can make NaN gradients
    safe = torch.where(empty & (sink == -math.inf), 0.0, torch.cat([logits, sink], -1))
    weights, lse = safe.softmax(-1)[..., :-1], safe.logsumexp(-1)
    if program.sink is None:
        filled = {"zero": 0.0, "uniform": 1 / max(keys, 1), "nan": math.nan}[program.empty_rows]
        weights = torch.where(empty, filled, weights)
        lse = lse.masked_fill(empty[..., 0], -math.inf)
    return (weights @ v).to(q.dtype), lse


def _times_listed(
    block_indices: Tensor, block_counts: Tensor, full_counts: Tensor | None, n_blocks: int
) -> tuple[Tensor, Tensor]:
    """How often each tile lists each KV block as partial and as full, [B, H, tiles, n_blocks]."""
    slot = torch.arange(block_indices.shape[3], device=block_indices.device)
    full = torch.zeros_like(block_counts) if full_counts is None else full_counts
    is_listed = slot < block_counts[..., None]
    is_full = is_listed & (slot >= (block_counts - full)[..., None])
    place = block_indices.long().masked_fill(~is_listed, 0)
    empty = torch.zeros((*block_indices.shape[:3], max(1, n_blocks)), dtype=torch.int64,
                        device=block_indices.device)  # fmt: skip
    partial, whole = (
        empty.scatter_add(3, place, chosen.long())[..., :n_blocks]
        for chosen in (is_listed & ~is_full, is_full)
    )
    return partial, whole


def _listed_program(
    q: Tensor, block_indices: Tensor, block_counts: Tensor, full_counts: Tensor | None,
    operands: Sequence[Tensor], program: str, tile: int, block_size: int, n_blocks: int,
) -> tuple[list[Tensor], str]:  # fmt: skip
    """A program that reads the lists as two tables, and so needs none; and its operands."""
    partial, full = _times_listed(block_indices, block_counts, full_counts, n_blocks)
    parsed = tiled.parsed(program)
    batch, heads = block_indices.shape[:2]
    place = (
        b if batch > 1 else sympy.Integer(0),
        floor(h / (q.shape[1] // heads)) if heads > 1 else sympy.Integer(0),
        floor(t / tile),
        floor(s / block_size),
    )
    some, every = (Load(len(operands) + i, *place) for i in range(2))
    keep = Or(Ne(every, 0), And(Ne(some, 0), parsed.keep))
    score = parsed.score
    if max(int((partial + full).max()) if partial.numel() else 0, 0) > 1:
        score = score + sympy.log(every + some * Truth(parsed.keep))
    changed = msgspec.structs.replace(parsed, keep=keep, score=score)
    return [*operands, partial, full], changed.encode()


def _forward_cpu(
    q, k, v, block_indices, block_counts, full_counts, operands, program, tile, block_size
):
    n_blocks = -(-k.shape[2] // block_size)
    operands, program = _listed_program(
        q, block_indices, block_counts, full_counts, operands, program, tile, block_size, n_blocks
    )
    return tiled.forward(q, k, v, operands, program, 0.0, None)


def _backward_cpu(
    grad_out, grad_lse, q, k, v, block_indices, block_counts, full_counts, operands, out, lse,
    program, tile, block_size, wanted,
):  # fmt: skip
    n_blocks = -(-k.shape[2] // block_size)
    operands, program = _listed_program(
        q, block_indices, block_counts, full_counts, operands, program, tile, block_size, n_blocks
    )
    wanted = [*wanted, False, False]
    return tiled.backward(
        grad_out, q, k, v, operands, lse, program, 0.0, None, wanted, grad_lse
    )  # fmt: skip


def _empty_weight(program: str, n_keys: int) -> float:
    """The weight of every key in a row that keeps none."""
    parsed = tiled.parsed(program)
    kind = "zero" if parsed.sink is not None else parsed.empty_rows
    return {"zero": 0.0, "uniform": 1 / max(1, n_keys), "nan": math.nan}[kind]


def launch(q, k, v, block_indices, block_counts, full_counts, operands, program, tile, block_size):
    """The operator by Triton kernels."""
    from sparse_compile.kernels import block_sparse_forward  # Triton takes long to load

    out, lse = block_sparse_forward.forward(
        q, k, v, block_indices, block_counts, full_counts, operands, program, tile, block_size
    )
    weight = _empty_weight(program, k.shape[2])
    if weight != 0:
        filled = v.sum(2, keepdim=True, dtype=torch.float32) * weight
        filled = filled.to(q.dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        out = torch.where((lse == -math.inf)[..., None], filled, out)
    return out, lse


def launch_backward(
    grad_out, grad_lse, q, k, v, block_indices, block_counts, full_counts, operands, out, lse,
    program, tile, block_size, wanted,
):  # fmt: skip
    """The gradients by Triton kernels."""
    from sparse_compile.kernels import block_sparse_backward

    weight, inner = _empty_weight(program, k.shape[2]), grad_out
    if weight != 0:
        is_empty = (lse == -math.inf)[..., None]
        inner = grad_out.masked_fill(is_empty, 0.0)
        out = out.masked_fill(is_empty, 0.0)
    chosen = [number for number, want in enumerate(wanted) if want]
    dq, dk, dv, grads, delta = block_sparse_backward.backward(
        inner, grad_lse, q, k, v, block_indices, block_counts, full_counts, operands, out, lse,
        program, tile, block_size, chosen,
    )  # fmt: skip
    if weight != 0:
        rest = torch.where(is_empty, grad_out.float() * weight, 0.0).sum(2, keepdim=True)
        rest = rest.unflatten(1, (k.shape[1], -1)).sum(2)
        dv = (dv + rest).to(v.dtype)
    for number, grad in zip(chosen, grads, strict=True):
        _add_sink_gradient(grad, number, lse, delta, operands, program)
    grads = [grad.to(operands[i].dtype) for i, grad in zip(chosen, grads, strict=True)]
    return [dq, dk, dv, *grads]


def _add_sink_gradient(
    grad: Tensor, number: int, lse: Tensor, delta: Tensor, operands: Sequence[Tensor], program: str
) -> None:
    """Adds what the sink says of an operand: its logit's gradient is `-exp(sink - lse) * delta`."""
    env: dict[sympy.Basic, Any] = {}
    for axis, (symbol, size) in enumerate(zip(INDICES, lse.shape, strict=False)):
        shape = [-1 if i == axis else 1 for i in range(3)]
        env[symbol] = torch.arange(size, device=lse.device).view(shape)
    sink = tiled.parsed(program).sink
    for part in tiled.slopes_of(program, number):
        if part.name != "sink":
            continue
        share = -torch.exp(evaluate(sink, env, operands) - lse) * delta
        share = share * evaluate(part.slope, env, operands)
        places = read_positions(part.load, env, operands)
        places = [torch.as_tensor(place, device=lse.device) for place in places]
        if not places:
            grad += share.sum()
            continue
        shape = torch.broadcast_shapes(*(place.shape for place in places))
        shape = [1] * (share.dim() - len(shape)) + list(shape)
        grad.index_put_(tuple(places), share.sum_to_size(shape), accumulate=True)


def _list_cuda(q, k, operands, program, tile, block_size, capacity):
    from sparse_compile.kernels import block_sparse_list_kernel

    return block_sparse_list_kernel.launch(q, k, operands, program, tile, block_size, capacity)


for _op, _cpu, _cuda in (
    (OP, _forward_cpu, launch),
    (BACKWARD_OP, _backward_cpu, launch_backward),
    (LIST_OP, block_sparse_lists.list_blocks_cpu, _list_cuda),
):
    torch.library.impl(_op, "cpu", _cpu)
    torch.library.impl(_op, "cuda", _cuda)


@torch.library.register_fake(OP)
def _forward_fake(
    q, k, v, block_indices, block_counts, full_counts, operands, program, tile, block_size
):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@torch.library.register_fake(BACKWARD_OP)
def _backward_fake(
    grad_out, grad_lse, q, k, v, block_indices, block_counts, full_counts, operands, out, lse,
    program, tile, block_size, wanted,
):  # fmt: skip
    chosen = [operand for operand, want in zip(operands, wanted, strict=True) if want]
    return [tensor.new_empty(tensor.shape) for tensor in (q, k, v, *chosen)]


@torch.library.register_fake(LIST_OP)
def _list_fake(q, k, operands, program, tile, block_size, capacity):
    n_tiles, n_blocks = block_sparse_lists.counts_of(q, k, tile, block_size)
    shape = (*block_sparse_lists.sizes(q, k, program), n_tiles)
    counts, full = (q.new_empty(shape, dtype=torch.int32) for _ in range(2))
    slots = n_blocks if capacity is None else capacity
    return q.new_empty((*shape, slots), dtype=torch.int32), counts, full


def _setup_context(ctx, inputs, output):
    *tensors, full_counts, operands, ctx.program, ctx.tile, ctx.block_size = inputs
    ctx.set_materialize_grads(False)
    ctx.has_full = full_counts is not None
    saved = [*tensors, *output, *([full_counts] if ctx.has_full else []), *operands]
    ctx.save_for_backward(*saved)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, indices, counts, out, lse, *rest = ctx.saved_tensors
    full = rest.pop(0) if ctx.has_full else None
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    wanted = list(ctx.needs_input_grad[6])
    grads = torch.ops.sparse_compile.block_sparse_attention_backward_v1(
        grad_out, grad_lse, q, k, v, indices, counts, full, rest, out, lse, ctx.program, ctx.tile,
        ctx.block_size, wanted,
    )  # fmt: skip
    chosen = iter(grads[3:])
    operand_grads = [next(chosen) if want else None for want in wanted]
    return (*grads[:3], None, None, None, operand_grads, None, None, None)


def _no_second_backward(ctx, *grads):
    raise NotImplementedError("block_sparse_attention has no second derivative")


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)
torch.library.register_autograd(BACKWARD_OP, _no_second_backward)
