"""Score programs of formulas that users write."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import sympy
import torch

from sparse_compile import expressions
from sparse_compile.errors import OperatorError
from sparse_compile.ir import ScoreProgram

if TYPE_CHECKING:
    from sparse_compile.ir import EmptyRows

COMPUTABLE = "arithmetic, comparisons, Where, exp, log, sqrt, tanh, sin, cos, erf, floor, Mod, Abs, Min and Max"


@torch.compiler.assume_constant_result  # a formula is, and Dynamo cannot trace sympy
def encoded(
    scale: float, mask: sympy.Basic | None, score: sympy.Expr | None, sink: sympy.Expr | None,
    empty_rows: EmptyRows,
) -> str:  # fmt: skip
    """A score program made of a user's formulas, as a string.

    Args:
        scale: Multiplies the scores.
        mask: Which keys a query reads; all if left out.
        score: The logit; the score itself if left out.
        sink: One more logit in the denominator.
        empty_rows: What a row that reads no key gives.
    Raises:
        OperatorError: A formula is not of its kind, or speaks of what it cannot know.
    """
    return _program(scale, mask, score, sink, empty_rows)


@functools.lru_cache(maxsize=1024)
def _program(
    scale: float, mask: sympy.Basic | None, score: sympy.Expr | None, sink: sympy.Expr | None,
    empty_rows: EmptyRows,
) -> str:  # fmt: skip
    """A program as a string."""
    keep = sympy.true if mask is None else sympy.sympify(mask)
    if not expressions.is_predicate(keep):
        raise OperatorError(f"mask is {keep}. Expected a Boolean, such as a comparison.")
    if keep.has(expressions.x):
        raise OperatorError(f"mask is {keep}. Expected none of the score in it, x.")
    formulas = {"score": expressions.x if score is None else sympy.sympify(score)}
    if sink is not None:
        formulas["sink"] = sympy.sympify(sink)
        if formulas["sink"].has(expressions.x, expressions.s):
            raise OperatorError(f"sink is {sink}. Expected a formula of b, h and t only.")
    for name, formula in formulas.items():
        if expressions.is_predicate(formula):
            raise OperatorError(f"{name} is {formula}. Expected a number, not a Boolean.")
    if empty_rows not in ("zero", "uniform", "nan"):
        raise OperatorError(f'empty_rows is "{empty_rows}". Expected "zero", "uniform" or "nan".')
    program = ScoreProgram(scale=scale, keep=keep, empty_rows=empty_rows, **formulas)
    return program.encode()
