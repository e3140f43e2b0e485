"""Attention by a score program: the operator that means the same on every device.

`program_attention` computes what `ScoreProgram` says without ever holding a [T, S] tensor. The
program travels as a string, so that the operator's arguments are plain and its graph can be cached.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile import expressions
from sparse_compile.errors import OperatorError
from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import INDICES, Load
from sparse_compile.ir import ScoreProgram
from sparse_compile.kernels import program_attention_cpu as tiled

OP = "sparse_compile::program_attention_v1"
BACKWARD_OP = "sparse_compile::program_attention_backward_v1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

torch.library.define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor[] operands, str program, float dropout_p, "
    "Tensor? seed) -> (Tensor out, Tensor lse)",
)
# the gradients of q, k, v and then of the wanted operands
torch.library.define(
    BACKWARD_OP,
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor lse, str program, "
    "float dropout_p, Tensor? seed, bool[] wanted) -> Tensor[]",
)
for _op, _function in ((OP, tiled.forward), (BACKWARD_OP, tiled.backward)):
    torch.library.impl(_op, ("cpu", "cuda"), _function)


@torch.library.register_fake(OP)
def _forward_fake(q, k, v, operands, program, dropout_p, seed):
    rows = q.shape[:3]
    lse = q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((*rows, v.shape[3])), lse


@torch.library.register_fake(BACKWARD_OP)
def _backward_fake(grad_out, q, k, v, operands, lse, program, dropout_p, seed, wanted):
    chosen = [operand for operand, want in zip(operands, wanted, strict=True) if want]
    return [tensor.new_empty(tensor.shape) for tensor in (q, k, v, *chosen)]


def _setup_context(ctx, inputs, output):
    q, k, v, operands, ctx.program, ctx.dropout_p, seed = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.has_seed = seed is not None
    ctx.save_for_backward(q, k, v, lse, *([seed] if ctx.has_seed else []), *operands)


def _backward(ctx, grad_out, _):
    q, k, v, lse, *rest = ctx.saved_tensors
    seed = rest.pop(0) if ctx.has_seed else None
    wanted = list(ctx.needs_input_grad[3])
    grads = torch.ops.sparse_compile.program_attention_backward_v1(
        grad_out, q, k, v, rest, lse, ctx.program, ctx.dropout_p, seed, wanted
    )
    chosen = iter(grads[3:])
    operand_grads = [next(chosen) if want else None for want in wanted]
    return (*grads[:3], operand_grads, None, None, None)


def _no_second_backward(ctx, *grads):
    raise NotImplementedError("program_attention has no second derivative")


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)
torch.library.register_autograd(BACKWARD_OP, _no_second_backward)


def program_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor] = (),
    program: ScoreProgram | str = ScoreProgram(),  # noqa: B008 (frozen)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose scores, mask and sink are given by formulas; differentiable.

    Args:
        q: Queries, [B, Hq, T, D].
        k: Keys, [B, Hkv, S, D]; query head `h` reads head `h // (Hq // Hkv)`.
        v: Values, [B, Hkv, S, Dv].
        operands: The tensors that the program loads from; floating ones may require grad.
        program: What is computed between the two products, or its `encode()`. `t` and `s` are row
            numbers of `q` and `k`.
        dropout_p: Share of the attention weights that is zeroed; the rest grows accordingly.
        seed: Decides which; one int64 number, needed if `dropout_p` is not 0.

    Returns:
        The output, [B, Hq, T, Dv] in the dtype of `q`, and the natural log-sum-exp of every row's
        logits, sink included, [B, Hq, T] in float32 (float64 for float64 inputs). A row that keeps
        no key has -inf there. The log-sum-exp carries no gradient.

    Raises:
        OperatorError: An argument has a wrong shape, dtype or device, or does not fit the program.
    """
    text = program if isinstance(program, str) else program.encode()
    _check_tensors(q, k, v)
    if not torch.compiler.is_dynamo_compiling():  # which cannot trace the parser
        check_program(tiled.parsed(text), q, operands)
    if not 0.0 <= dropout_p <= 1.0:
        raise OperatorError(f"dropout_p is {dropout_p}. Expected a share from 0 to 1.")
    if dropout_p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        found = "None" if seed is None else f"{seed.dtype} {tuple(seed.shape)}"
        raise OperatorError(
            f"seed is {found}. Expected one int64 number, because dropout_p is {dropout_p}; "
            "torch.randint(2**62, ()) makes one."
        )
    return torch.ops.sparse_compile.program_attention_v1(
        q, k, v, list(operands), text, dropout_p, seed
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise OperatorError(
                f"{name} has shape {tuple(tensor.shape)}. Expected four axes: batch, heads, "
                "tokens, head size."
            )
        if tensor.dtype not in _DTYPES or tensor.dtype != q.dtype:
            raise OperatorError(
                f"{name} is {tensor.dtype}. Expected float16, bfloat16, float32 or float64, the "
                f"same for q, k and v (q is {q.dtype})."
            )
        if tensor.device != q.device:
            raise OperatorError(f"{name} is on {tensor.device}. Expected {q.device}, as q.")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] == 0:
        raise OperatorError(
            f"k has shape {tuple(k.shape)}. Expected [{q.shape[0]}, Hkv, S, {q.shape[3]}], to fit "
            f"q of shape {tuple(q.shape)}."
        )
    if q.shape[1] % k.shape[1]:
        raise OperatorError(
            f"k has {k.shape[1]} heads. Expected a number that divides the {q.shape[1]} heads of q."
        )
    if v.shape[:3] != k.shape[:3]:
        raise OperatorError(
            f"v has shape {tuple(v.shape)}. Expected [{', '.join(map(str, k.shape[:3]))}, Dv], to "
            f"fit k of shape {tuple(k.shape)}."
        )


def check_program(program: ScoreProgram, q: Tensor, operands: Sequence[Tensor]) -> None:
    """Refuse operands that do not fit a program."""
    parts = [program.score, program.keep, program.sink, program.weight]
    known = {*INDICES, expressions.x}
    for part in parts:
        if part is None:
            continue
        if unknown := sorted(map(str, part.free_symbols - known)):
            raise OperatorError(
                f"program speaks of {', '.join(unknown)} in {part}. Expected only the symbols "
                "b, h, t, s and x; pass sizes as operands of no dimensions."
            )
        for load in part.atoms(Load):
            number, rank = int(load.args[0]), len(load.args) - 1
            if number >= len(operands):
                raise OperatorError(
                    f"operands holds {len(operands)} tensors. The program reads number {number} "
                    f"in {load}."
                )
            if operands[number].dim() != rank:
                raise OperatorError(
                    f"operands[{number}] has shape {tuple(operands[number].shape)}. The program "
                    f"reads it with {rank} positions: {load}."
                )
    for number, operand in enumerate(operands):
        if operand.device != q.device:
            raise OperatorError(
                f"operands[{number}] is on {operand.device}. Expected {q.device}, as q."
            )


def program_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], program: ScoreProgram
) -> Tensor:
    """What the operator must compute, in plain PyTorch, differentiable by autograd."""
    acc = torch.promote_types(q.dtype, torch.float32)
    batch, heads, rows, _ = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    k, v = (tensor.to(acc).repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = program.scale * q.to(acc) @ k.transpose(-1, -2)
    env: dict[Any, Any] = {expressions.x: scores}
    for axis, (symbol, size) in enumerate(zip(INDICES, (batch, heads, rows, keys), strict=True)):
        shape = [-1 if axis == i else 1 for i in range(4)]
        env[symbol] = torch.arange(size, device=q.device).reshape(shape)
    value = functools.partial(evaluate, env=env, operands=operands, dtype=acc)
    keep = torch.as_tensor(value(program.keep), device=q.device).expand(scores.shape)
    logits = torch.where(keep, value(program.score), float("-inf"))
    row_is_empty = ~keep.any(-1, keepdim=True)
    if program.sink is not None:
        sink = torch.as_tensor(value(program.sink), dtype=acc).expand(batch, heads, rows, 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        filled = {"zero": 0.0, "uniform": 1 / max(keys, 1), "nan": float("nan")}
        # softmax of an empty row is replaced before it can make NaN gradients
        weights = torch.where(row_is_empty, 0.0, logits).softmax(-1)
        weights = torch.where(row_is_empty, filled[program.empty_rows], weights)
    if program.weight is not None:
        weights = weights * value(program.weight)
    return weights @ v
