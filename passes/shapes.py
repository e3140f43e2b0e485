"""Sizes of traced tensors as sympy expressions."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx


def expression(size: int | float | torch.SymInt | torch.SymFloat) -> sympy.Expr:
    """A size or scalar of a trace as sympy; symbolic ones as their shape expression."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size.node.expr
    return sympy.sympify(size)


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The sizes of the tensor that a shadow node yields."""
    return tuple(expression(size) for size in node.meta["val"].shape)


def product(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    """The product of sizes; 1 for none."""
    return sympy.Mul(*sizes)
