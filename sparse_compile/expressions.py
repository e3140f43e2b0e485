"""The words of mask predicates and score formulas: sympy symbols and the few functions we add.

An expression speaks of one element of the attention score: sequence `b`, query head `h`, query
position `t`, key position `s`, and `x`, the score itself. Tensors enter only as `Load`.
"""

from __future__ import annotations

import sympy

b, h, t, s = sympy.symbols("b h t s", integer=True, nonnegative=True)
"""Indices of a score element: sequence, query head, query position, key position."""

x = sympy.Symbol("x", real=True)
"""The score that a transform is applied to."""

INDICES = (b, h, t, s)


class Load(sympy.Function):
    """`Load(i, j0, j1, ...)`: element `[j0, j1, ...]` of operand number `i`."""

    is_real = True
    is_number = False  # sympy would compute with `Load(0, 3)` as with a constant

    @classmethod
    def eval(cls, *args: sympy.Expr) -> None:
        """Never simplify: the operand's contents are not known."""


class Where(sympy.Function):
    """`Where(condition, a, b)`: `a` where `condition` (a Boolean) holds, else `b`.

    Stands in for `sympy.Piecewise`, whose automatic simplification is slow and reorders cases.
    """

    is_real = True

    @classmethod
    def eval(cls, condition: sympy.Basic, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        """Fold only what is decided."""
        if condition is sympy.true or a == b:
            return a
        if condition is sympy.false:
            return b
        return None


class Truth(sympy.Function):
    """`Truth(v)`: the Boolean `v != 0` of a loaded value, as the number 0 or 1.

    Predicates use `Ne(Load(...), 0)`; `Truth` turns a predicate back into a number.
    """

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, condition: sympy.Basic) -> sympy.Expr | None:
        """Fold only what is decided."""
        if condition is sympy.true:
            return sympy.Integer(1)
        if condition is sympy.false:
            return sympy.Integer(0)
        return None


def is_predicate(expr: sympy.Basic) -> bool:
    """Whether an expression is true or false. To sympy a symbol is both, Boolean and number."""
    return isinstance(expr, sympy.logic.boolalg.Boolean) and not expr.is_Symbol


def whole_quotient(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """`expr` as a quotient whose parts hold no fractions and no floats; None if it is none."""
    if expr.has(sympy.Float):
        return None
    whole = expr.atoms(sympy.floor, sympy.ceiling, sympy.Mod)
    inner = {part: sympy.Dummy(integer=True) for part in whole}  # their fractions are their own
    above, below = sympy.fraction(sympy.together(expr.xreplace(inner)))
    above = sympy.expand(above)
    if any(not number.is_Integer for number in above.atoms(sympy.Number)):
        return None
    outer = {dummy: part for part, dummy in inner.items()}
    return above.xreplace(outer), below.xreplace(outer)


def cleared(relation: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic]:
    """The two sides of a relation, multiplied until they hold no fractions.

    Sides with floats, and Boolean ones, stay as they are. Only positive whole numbers multiply.
    """
    left, right = relation.args
    numbers = relation.atoms(sympy.Rational)
    if all(number.is_Integer for number in numbers) or relation.has(sympy.Float):
        return left, right
    parts = whole_quotient(left - right)
    if parts is None or not (parts[1].is_Integer and parts[1].is_positive):
        return left, right
    return parts[0], sympy.Integer(0)


def derivative(expr: sympy.Expr, atom: sympy.Expr) -> sympy.Expr:
    """The derivative of `expr` with respect to `atom` (`x` or a `Load`), as autograd defines it.

    Conditions, positions and roundings count as constants; `Max` and `Min` pass everything to the
    first argument that attains them.
    """
    if expr == atom:
        return sympy.Integer(1)
    if not expr.has(atom) or isinstance(
        expr, (Load, Truth, sympy.floor, sympy.ceiling, sympy.sign)
    ):
        return sympy.Integer(0)
    if isinstance(expr, Where):
        condition, a, b = expr.args
        return Where(condition, derivative(a, atom), derivative(b, atom))
    if isinstance(expr, sympy.Mod):
        return derivative(expr.args[0], atom)
    if isinstance(expr, (sympy.Max, sympy.Min)):
        first, *others = sorted(expr.args, key=lambda arg: not arg.has(atom))
        rest = type(expr)(*others)
        attained = sympy.Ge(first, rest) if isinstance(expr, sympy.Max) else sympy.Le(first, rest)
        return Where(attained, derivative(first, atom), derivative(rest, atom))
    if isinstance(expr, sympy.Abs):
        return sympy.sign(expr.args[0]) * derivative(expr.args[0], atom)
    if isinstance(expr, sympy.Add):
        return sympy.Add(*(derivative(arg, atom) for arg in expr.args))
    if isinstance(expr, sympy.Mul):
        return sympy.Add(
            *(
                sympy.Mul(*expr.args[:i], derivative(arg, atom), *expr.args[i + 1 :])
                for i, arg in enumerate(expr.args)
            )
        )
    if isinstance(expr, sympy.Pow):
        base, power = expr.args
        total = power * base ** (power - 1) * derivative(base, atom)
        return total + expr * sympy.log(base) * derivative(power, atom)
    return sympy.Add(
        *(expr.fdiff(i + 1) * derivative(arg, atom) for i, arg in enumerate(expr.args))
    )
