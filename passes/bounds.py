"""What is certain about an expression when each index lies in `0 <= index < size`.

Sizes are integers or expressions over positive integer symbols (the sizes of a traced graph), so
bounds are expressions too. Nothing here guesses: unknown is infinite, or None.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.core.relational import Relational

from sparse_compile.expressions import Truth, Where

Ranges = Mapping[sympy.Symbol, sympy.Expr]
Interval = tuple[sympy.Expr, sympy.Expr]

_ANYTHING: Interval = (-sympy.oo, sympy.oo)


def is_nonnegative(value: sympy.Expr) -> bool:
    """True if an expression over sizes is proven to be >= 0."""
    if value.is_number:
        return bool(value.is_extended_nonnegative)
    if value.is_nonnegative:
        return True
    sizes = [symbol for symbol in value.free_symbols if symbol.is_integer and symbol.is_positive]
    if not sizes:
        return False
    shifted = value.xreplace({size: size + 1 for size in sizes})
    # now every size symbol stands for a number >= 0: no negative term, no negative value
    return all(_is_nonnegative_term(term) for term in sympy.Add.make_args(shifted.expand()))


def _is_nonnegative_term(term: sympy.Expr) -> bool:
    return bool(term.is_extended_nonnegative)


def interval(expr: sympy.Expr, ranges: Ranges) -> Interval:
    """The least and the greatest value that `expr` can take, both inclusive."""
    if expr.is_number:
        return expr, expr
    if isinstance(expr, sympy.Symbol):
        if expr in ranges:
            return sympy.Integer(0), sympy.sympify(ranges[expr]) - 1
        return expr, expr  # a size: known to itself
    if isinstance(expr, sympy.Add):
        low, high = zip(*(interval(term, ranges) for term in expr.args), strict=True)
        return _sum(low, -sympy.oo), _sum(high, sympy.oo)
    if isinstance(expr, sympy.Mul):
        return _product(expr, ranges)
    if isinstance(expr, (sympy.floor, sympy.ceiling)):
        low, high = interval(expr.args[0], ranges)
        return expr.func(low), expr.func(high)
    if type(expr).__name__ == "FloorDiv":  # of the sizes of PyTorch traces
        low, high = interval(expr.args[0] / expr.args[1], ranges)
        return sympy.floor(low), sympy.floor(high)
    if isinstance(expr, sympy.Mod):
        return _remainder(expr, ranges)
    if isinstance(expr, sympy.Abs):
        return _magnitude(*interval(expr.args[0], ranges))
    if isinstance(expr, Truth):
        return sympy.Integer(0), sympy.Integer(1)
    if isinstance(expr, Where):
        (low_a, high_a), (low_b, high_b) = (interval(arg, ranges) for arg in expr.args[1:])
        return sympy.Min(low_a, low_b), sympy.Max(high_a, high_b)
    if isinstance(expr, (sympy.Max, sympy.Min)):
        low, high = zip(*(interval(arg, ranges) for arg in expr.args), strict=True)
        return expr.func(*low), expr.func(*high)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        low, high = interval(expr.base, ranges)
        return (low**expr.exp, high**expr.exp) if is_nonnegative(low) else _ANYTHING
    if not expr.free_symbols & ranges.keys() and _is_size(expr):
        return expr, expr
    return _ANYTHING


def _is_size(expr: sympy.Expr) -> bool:
    return not expr.atoms(sympy.Function) and bool(expr.is_integer)


def _sum(terms: tuple[sympy.Expr, ...], unknown: sympy.Expr) -> sympy.Expr:
    if any(term.is_infinite or term is sympy.nan for term in terms):
        return unknown
    return sympy.Add(*terms)


def _product(expr: sympy.Mul, ranges: Ranges) -> Interval:
    factor, rest = expr.as_coeff_Mul()
    lows, highs = [], []
    for term in sympy.Mul.make_args(rest):
        low, high = interval(term, ranges)
        if isinstance(term, sympy.Pow) and term.exp.is_negative and is_nonnegative(term.base - 1):
            low = high = term  # 1 / size
        elif low.is_infinite or not is_nonnegative(low):
            if len(rest.args) <= 1 or rest is term:
                return _scaled(factor, low, high)
            return _ANYTHING
        lows.append(low)
        highs.append(high)
    return _scaled(factor, sympy.Mul(*lows), sympy.Mul(*highs))


def _scaled(factor: sympy.Expr, low: sympy.Expr, high: sympy.Expr) -> Interval:
    if not factor.is_extended_real or factor.is_infinite:
        return _ANYTHING
    return (factor * high, factor * low) if factor.is_negative else (factor * low, factor * high)


def _remainder(expr: sympy.Mod, ranges: Ranges) -> Interval:
    value, modulus = expr.args
    if modulus.free_symbols & ranges.keys() or not is_nonnegative(modulus - 1):
        return _ANYTHING
    low, high = interval(value, ranges)
    finite = not low.is_infinite and not high.is_infinite
    if finite and is_nonnegative(low) and is_nonnegative(modulus - 1 - high):
        return low, high
    return sympy.Integer(0), modulus - 1 if value.is_integer else modulus


def _magnitude(low: sympy.Expr, high: sympy.Expr) -> Interval:
    if is_nonnegative(low):
        return low, high
    if is_nonnegative(-high):
        return -high, -low
    return sympy.Integer(0), sympy.Max(-low, high)


def decide(relation: sympy.Basic, ranges: Ranges) -> bool | None:
    """Whether a relation holds for every index (True), for none (False), or is not known (None)."""
    if relation in (sympy.true, sympy.false):
        return relation is sympy.true
    if not isinstance(relation, Relational):
        return None
    low, high = interval((relation.lhs - relation.rhs).expand(), ranges)
    if sympy.nan in (low, high):
        return None
    if isinstance(relation, sympy.Eq):
        return _decide_zero(low, high)
    if isinstance(relation, sympy.Ne):
        zero = _decide_zero(low, high)
        return None if zero is None else not zero
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        low, high = -high, -low
    if isinstance(relation, (sympy.Le, sympy.Ge)):  # low <= difference <= high, wanted <= 0
        return True if is_nonnegative(-high) else False if _is_positive(low) else None
    return True if _is_positive(-high) else False if is_nonnegative(low) else None


def _is_positive(value: sympy.Expr) -> bool:
    if value.is_number:
        return bool(value.is_extended_positive)
    return bool(value.is_positive) or bool(value.is_integer and is_nonnegative(value - 1))


def _decide_zero(low: sympy.Expr, high: sympy.Expr) -> bool | None:
    if low == 0 and high == 0:
        return True
    return False if _is_positive(low) or _is_positive(-high) else None
