"""Which keys a query reads, proven from the formula of a mask term.

Before:  a formula of what is added to, or selects, the scores (`passes.elements`)
After:   keep (a predicate), what stands in place of a dropped score, and what is added to a kept one

A number of -1e4 or less, added to a score, drops the key: its weight is exp(-1e4) at most.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sympy

from sparse_compile.expressions import Load, Truth, Where, s, t
from sparse_compile.passes import bounds
from sparse_compile.passes.elements import Unproven
from sparse_compile.passes.logic import Opaque, by_cases, choose
from sparse_compile.passes.mask_atoms import classify
from sparse_compile.passes.predicates import normalise

__all__ = [
    "DROP",
    "TermProof",
    "classify",
    "is_dense_load",
    "normalise",
    "prove_additive",
    "prove_boolean",
    "row_may_be_empty",
]

DROP = -1e4  # added to a score: the key is dropped
_FIXED = (sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
OUTWEIGHS = -1e8  # added to a score with its other biases: the key is dropped whatever they are
SWALLOWS = -1e30  # added to a score in float32 or bfloat16: nothing of the score is left


@dataclass(frozen=True)
class TermProof:
    """What one term of the scores does.

    Where `keep` holds, the term adds `bias`; elsewhere it drops the key. If `dense`, a part of the
    term is a tensor over query and key: the caller must apply the term's own tensor, and `keep`
    says only what is known besides (every key that it drops is dropped by the tensor, too).
    """

    keep: sympy.Basic = sympy.true
    fill: float | None = None  # what stands at dropped keys; the greatest if several; None: no mask
    absorbing: bool = False  # nothing of the score is left at a dropped key
    bias: sympy.Expr = sympy.S.Zero
    dense: bool = False
    uniform: bool = True  # every dropped key has exactly `fill`


def prove_boolean(keep: sympy.Basic, ranges: bounds.Ranges) -> TermProof:
    """A predicate that says which keys are read; the others are overwritten with -inf."""
    keep, dense = _without_dense(normalise(keep, ranges))
    if keep is sympy.true and not dense:
        return TermProof()
    return TermProof(keep=keep, fill=float("-inf"), absorbing=True, dense=dense)


def prove_additive(
    value: sympy.Basic, ranges: bounds.Ranges, *, binary: Collection[int] = ()
) -> TermProof:
    """A number that is added to the scores, taken apart into a mask and a bias.

    Args:
        value: The number's formula.
        ranges: The sizes of the index symbols.
        binary: Operands that hold nothing but 0 and 1. Without that, `(1 - m) * -1e4` has to be
            kept as a bias where it does not drop: `m` may be anything.

    Raises:
        Unproven: The formula gives +inf or NaN, or has too many cases.
    """
    for load in value.atoms(Load):
        if load.args[0] in binary:
            value = value.xreplace({load: Truth(sympy.Ne(load, 0))})
    leaves: list[_Leaf] = []

    def split(leaf: sympy.Expr) -> sympy.Basic:
        leaves.append(_leaf(leaf))
        return sympy.Tuple(leaves[-1].keep, leaves[-1].bias)

    try:
        keep, bias = by_cases(split, _join, value)
    except Opaque:
        raise Unproven("too-many-cases", "the mask term has too many cases") from None
    keep = normalise(keep, ranges)
    if keep is sympy.true:
        return TermProof(bias=bias, dense=is_dense_load(bias))
    fills = {leaf.fill for leaf in leaves if leaf.fill is not None}
    uniform = len(fills) == 1 and all(leaf.exact for leaf in leaves)
    keep, dense = _without_dense(keep)
    return TermProof(
        keep=keep,
        fill=max(fills),
        absorbing=max(fills) <= SWALLOWS,
        bias=bias,
        dense=dense or is_dense_load(bias),
        uniform=uniform,
    )


@dataclass(frozen=True)
class _Leaf:
    keep: sympy.Basic
    bias: sympy.Expr
    fill: float | None = None
    exact: bool = True  # a dropped key has exactly `fill`


def _leaf(value: sympy.Expr) -> _Leaf:
    """One case of a term: a number, or a formula without cases."""
    if value.has(sympy.oo, sympy.nan, sympy.zoo) or (value.has(-sympy.oo) and not value.is_number):
        raise Unproven("not-finite", f"the mask term gives {value}")
    if value.is_number:
        if value <= DROP:
            return _Leaf(sympy.false, sympy.Integer(0), float(value))
        return _Leaf(sympy.true, value)
    constant, rest = sympy.expand(value).as_coeff_Add()
    largest = max(_load_factors(rest), default=0)
    if largest >= -DROP:  # a mask of numbers: 1e4 * m - 1e4
        fill = constant if constant <= DROP else -largest
        return _Leaf(sympy.Gt(value, DROP), value, float(fill), exact=False)
    if constant <= OUTWEIGHS:
        return _Leaf(sympy.false, sympy.Integer(0), float(constant), exact=False)
    if constant <= DROP:  # the rest may bring it back
        return _Leaf(sympy.Gt(value, DROP), value, float(constant), exact=False)
    return _Leaf(sympy.true, value)


def _load_factors(value: sympy.Expr) -> list[sympy.Expr]:
    """How much loads are multiplied by."""
    terms = [term for term in sympy.Add.make_args(value) if term.has(Load)]
    return [abs(term.as_coeff_Mul()[0]) for term in terms]


def _join(condition: sympy.Basic, yes: sympy.Tuple, no: sympy.Tuple) -> sympy.Tuple:
    (keep_yes, bias_yes), (keep_no, bias_no) = yes, no
    if keep_yes is sympy.false:
        bias = bias_no
    elif keep_no is sympy.false:
        bias = bias_yes
    else:
        bias = Where(condition, bias_yes, bias_no)
    return sympy.Tuple(choose(condition, keep_yes, keep_no), bias)


def _without_dense(keep: sympy.Basic) -> tuple[sympy.Basic, bool]:
    """The conjuncts that load no tensor over query and key, and whether there were others."""
    parts = sympy.And.make_args(keep)
    light = [part for part in parts if not is_dense_load(part)]
    return sympy.And(*light), len(light) < len(parts)


def is_dense_load(expr: sympy.Basic) -> bool:
    """True if a load's indices depend on the query and on the key, and not on `s - t` alone."""
    return any(_reads_pairs(load) for load in expr.atoms(Load))


def _reads_pairs(load: Load) -> bool:
    here = [part for part in load.args[1:] if part.free_symbols & {s, t}]
    if not {s, t} <= load.free_symbols or len(here) != 1:
        return {s, t} <= load.free_symbols
    return bool((here[0] - (s - t)).free_symbols & {s, t})


def row_may_be_empty(predicate: sympy.Basic, ranges: bounds.Ranges) -> bool:
    """False if it is proven that every query reads at least one key."""
    if predicate is sympy.true:
        return False
    if any(part.has(Load) and isinstance(part, _FIXED) for part in sympy.And.make_args(predicate)):
        return True  # whatever is loaded may be false
    for key in _candidates(predicate, ranges):
        low, high = bounds.interval(key, ranges)
        inside = bounds.is_nonnegative(low) and (
            s not in ranges or bounds.is_nonnegative(ranges[s] - 1 - high)
        )
        if inside and normalise(predicate.xreplace({s: key}), ranges) is sympy.true:
            return False
    return True


def _candidates(predicate: sympy.Basic, ranges: bounds.Ranges) -> list[sympy.Expr]:
    """Keys that a query is likely to read: itself, the first, the last."""
    found = [t, sympy.Integer(0)]
    if s in ranges:
        found.append(sympy.sympify(ranges[s]) - 1)
        if t in ranges:
            found.append(t + ranges[s] - ranges[t])
    for relation in predicate.atoms(sympy.Le, sympy.Eq):
        if relation.lhs == s and not relation.rhs.has(Load):
            found.append(relation.rhs)
    return list(dict.fromkeys(found))
