"""Building Booleans and cases, with the few simplifications that masks need.

Only what is decided is folded; sympy's general simplification is slow and not needed here.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from sympy.core.relational import Relational

from sparse_compile.expressions import Load, Truth, Where

MAX_CASES = 8


class Opaque(Exception):
    """An operator cannot be seen through here: its result is loaded instead."""


def exact_float(value: float) -> sympy.Expr:
    """A float as sympy: integers stay integers, so that equal formulas are equal."""
    if value != value:
        raise Opaque
    if value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return (
        sympy.Integer(int(value))
        if value.is_integer() and abs(value) < 2**53
        else sympy.Float(value)
    )


def choose(condition: sympy.Basic, yes: sympy.Basic, no: sympy.Basic) -> sympy.Basic:
    """The Boolean `yes` where `condition` holds, else the Boolean `no`."""
    if condition is sympy.true or yes == no:
        return yes
    if condition is sympy.false:
        return no
    if yes is sympy.true:
        return sympy.Or(condition, no)
    if yes is sympy.false:
        return sympy.And(sympy.Not(condition), no)
    if no is sympy.true:
        return sympy.Or(sympy.Not(condition), yes)
    if no is sympy.false:
        return sympy.And(condition, yes)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def select(condition: sympy.Basic, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The number `a` where `condition` holds, else `b`; each is simplified by what it may assume."""
    a, b = assume(a, condition, True), assume(b, condition, False)
    return Where(condition, a, b)


def assume(expr: sympy.Basic, condition: sympy.Basic, holds: bool) -> sympy.Basic:
    """`expr` with every case that hangs on `condition` or its negation decided."""
    replaced = {}
    for case in expr.atoms(Truth, Where):
        if case.args[0] == condition:
            value = holds
        elif isinstance(condition, Relational) and case.args[0] == condition.negated:
            value = not holds
        else:
            continue
        if isinstance(case, Truth):
            replaced[case] = sympy.Integer(int(value))
        else:
            replaced[case] = case.args[1] if value else case.args[2]
    if not replaced:
        return expr
    result = expr.xreplace(replaced)
    return assume(result, condition, holds) if result != expr else result


def first_condition(*exprs: sympy.Basic) -> sympy.Basic | None:
    """A condition that the numbers depend on by `Truth` or `Where`, outside of loads' indices."""
    for expr in exprs:
        if isinstance(expr, (Truth, Where)):
            return expr.args[0]
        if isinstance(expr, Load) or not expr.args:
            continue
        found = first_condition(*expr.args)
        if found is not None:
            return found
    return None


def by_cases(
    function: Callable[..., sympy.Basic],
    join: Callable[[sympy.Basic, sympy.Basic, sympy.Basic], sympy.Basic],
    *numbers: sympy.Expr,
    limit: int = MAX_CASES,
) -> sympy.Basic:
    """`function(*numbers)` with all of their cases moved outside of it.

    Raises:
        Opaque: There are more than `limit` nested conditions.
    """
    condition = first_condition(*numbers)
    if condition is None:
        return function(*numbers)
    if limit == 0:
        raise Opaque
    yes = by_cases(function, join, *(assume(n, condition, True) for n in numbers), limit=limit - 1)
    no = by_cases(function, join, *(assume(n, condition, False) for n in numbers), limit=limit - 1)
    return join(condition, yes, no)


def leaves(value: sympy.Expr) -> list[sympy.Expr]:
    """What a number is in each of its cases.

    Raises:
        Opaque: Too many cases.
    """
    found: list[sympy.Expr] = []

    def collect(leaf: sympy.Expr) -> sympy.Expr:
        found.append(leaf)
        return sympy.S.Zero

    by_cases(collect, lambda *_: sympy.S.Zero, value)
    return found


def relate(relation: type[Relational], a: sympy.Expr, b: sympy.Expr) -> sympy.Basic:
    """The Boolean `relation(a, b)`, with cases moved out of it.

    Raises:
        Opaque: A load is compared with infinity (sympy takes loads for finite), or too many cases.
    """

    def compare(a: sympy.Expr, b: sympy.Expr) -> sympy.Basic:
        if sympy.nan in (a, b):
            raise Opaque
        if (a.is_infinite and b.has(Load)) or (b.is_infinite and a.has(Load)):
            raise Opaque
        if b == 0 and a.is_Mul and relation in (sympy.Eq, sympy.Ne):
            nonzero = sympy.And(*(sympy.Ne(factor, 0) for factor in a.args))
            return nonzero if relation is sympy.Ne else sympy.Not(nonzero)
        return relation(a, b)

    return by_cases(compare, choose, a, b)
