"""Mask predicates in a normal form: a conjunction without what always holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sympy
from sympy.core.relational import Relational

from sparse_compile.expressions import INDICES, Load, s, t
from sparse_compile.passes import bounds

_INDICES = frozenset(INDICES)


class Halfspace(NamedTuple):
    """`form <= bound` over integers; `form` holds the indices, `bound` numbers and sizes only."""

    form: sympy.Expr
    bound: sympy.Expr


def normalise(predicate: sympy.Basic, ranges: bounds.Ranges) -> sympy.Basic:
    """The predicate as a conjunction; what holds for every index is dropped.

    Args:
        predicate: A Boolean over indices, loads and sizes.
        ranges: For each index symbol the number of its values: integers, or expressions over sizes.
            Two sizes are equal only if their expressions are.
    """
    return _normal(_without_not(predicate), ranges)


def _without_not(predicate: sympy.Basic) -> sympy.Basic:
    """Negations moved down to what they negate."""
    if isinstance(predicate, (sympy.And, sympy.Or)):
        return predicate.func(*(_without_not(part) for part in predicate.args))
    if not isinstance(predicate, sympy.Not):
        return predicate
    negated = predicate.args[0]
    if isinstance(negated, sympy.And):
        return sympy.Or(*(_without_not(sympy.Not(part)) for part in negated.args))
    if isinstance(negated, sympy.Or):
        return sympy.And(*(_without_not(sympy.Not(part)) for part in negated.args))
    return predicate


def _normal(predicate: sympy.Basic, ranges: bounds.Ranges) -> sympy.Basic:
    if isinstance(predicate, sympy.And):
        parts: list[sympy.Basic] = []
        for part in predicate.args:
            parts += sympy.And.make_args(_normal(part, ranges))
        return _conjunction(parts, ranges)
    if isinstance(predicate, sympy.Or):
        return _disjunction([_normal(part, ranges) for part in predicate.args], ranges)
    if isinstance(predicate, Relational):
        return _relation(predicate, ranges)
    return predicate


def _relation(relation: Relational, ranges: bounds.Ranges) -> sympy.Basic:
    decided = bounds.decide(relation, ranges)
    if decided is not None:
        return sympy.true if decided else sympy.false
    space = halfspace(relation)
    return relation if space is None else written(space)


def halfspace(relation: sympy.Basic) -> Halfspace | None:
    """An inequality between integers without loads as `form <= bound`; None for anything else."""
    if not isinstance(relation, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or relation.has(Load):
        return None
    difference = relation.lhs - relation.rhs
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        difference = -difference
    difference = sympy.expand(difference)
    if not difference.is_integer:
        return None
    form, constant = [], []
    for term in sympy.Add.make_args(difference):
        (form if term.free_symbols & _INDICES else constant).append(term)
    strict = isinstance(relation, (sympy.Lt, sympy.Gt))
    bound = -sympy.Add(*constant) - int(strict)
    content, primitive = sympy.Add(*form).as_content_primitive()
    if content == 1 or not content.is_positive:
        return Halfspace(sympy.Add(*form), bound)
    return Halfspace(sympy.expand(primitive), sympy.floor(bound / content))


def written(space: Halfspace) -> sympy.Basic:
    """A halfspace the way a reader expects it."""
    form, bound = space
    if form == s - t:
        return sympy.Le(s, t + bound)
    if form == t - s:
        return sympy.Lt(t - s, bound + 1)
    if form == s:
        return sympy.Lt(s, bound + 1)
    if form == -s:
        return sympy.Ge(s, -bound)
    return sympy.Le(form, bound)


def _conjunction(parts: Sequence[sympy.Basic], ranges: bounds.Ranges) -> sympy.Basic:
    if any(part is sympy.false for part in parts):
        return sympy.false
    tightest: dict[sympy.Expr, sympy.Expr] = {}
    others: list[sympy.Basic] = []
    for part in parts:
        space = halfspace(part)
        if space is None:
            others.append(part)
            continue
        known = tightest.get(space.form)
        if known is None or bounds.is_nonnegative(known - space.bound):
            tightest[space.form] = space.bound
        elif not bounds.is_nonnegative(space.bound - known):
            others.append(part)
    for form, bound in tightest.items():
        opposite = tightest.get(-form)
        if opposite is not None and bounds.is_nonnegative(-1 - bound - opposite):
            return sympy.false
    return sympy.And(*(written(Halfspace(*item)) for item in tightest.items()), *others)


def _disjunction(parts: Sequence[sympy.Basic], ranges: bounds.Ranges) -> sympy.Basic:
    """An Or of normal parts; what all parts have in common is moved in front of it."""
    parts = list(dict.fromkeys(part for part in parts if part is not sympy.false))
    if not parts:
        return sympy.false
    if len(parts) == 1 or any(part is sympy.true for part in parts):
        return parts[0] if len(parts) == 1 else sympy.true
    sets = [set(sympy.And.make_args(part)) for part in parts]
    common = set.intersection(*sets)
    if any(own == common for own in sets):  # this part says nothing more: the others add nothing
        return sympy.And(*common)
    rest = sympy.Or(*(sympy.And(*(own - common)) for own in sets))
    if _is_tautology(rest, ranges):
        rest = sympy.true
    return sympy.And(*common, rest)


def _is_tautology(predicate: sympy.Basic, ranges: bounds.Ranges) -> bool:
    """`form <= c or form >= d` with d <= c + 1 leaves nothing out."""
    spaces = [halfspace(part) for part in sympy.Or.make_args(predicate)]
    for one in spaces:
        for other in spaces:
            opposite = one is not None and other is not None and one.form == -other.form
            if opposite and bounds.is_nonnegative(one.bound + other.bound + 1):
                return True
    return False
