"""Rules for operators that make or compute elements: creation, casts, arithmetic, comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from sparse_compile.expressions import Load, Truth, Where
from sparse_compile.passes import bounds, element_gathers
from sparse_compile.passes.calls import Arguments, operator_name
from sparse_compile.passes.element_layout import quotient_remainder
from sparse_compile.passes.exactness import SMALL, Exactness
from sparse_compile.passes.logic import (
    Opaque,
    by_cases,
    choose,
    exact_float,
    leaves,
    relate,
    select,
)
from sparse_compile.passes.rounding import round_to

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sympy.core.relational import Relational

    from sparse_compile.passes.elements import ElementEvaluator, Index, Rule

_NARROW = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
}


def as_type(value: sympy.Expr, dtype: torch.dtype) -> sympy.Basic:
    """A number that an operator writes into a tensor of type `dtype`: what it reads back as."""
    if dtype == torch.bool:
        return relate(sympy.Ne, value, sympy.Integer(0))
    if dtype.is_complex:
        raise Opaque
    if dtype.is_floating_point:
        return _map_numbers(value, partial(_rounded, dtype=dtype))
    if value.is_number and not (value.is_finite and value.is_integer):
        raise Opaque
    return in_range(value, dtype)


def in_range(value: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """An integer that is sure not to wrap around in a narrow type."""
    if dtype in _NARROW:
        low, high = _NARROW[dtype]
        if not all(leaf.is_Integer and low <= leaf <= high for leaf in leaves(value)):
            raise Opaque
    return value


def _rounded(number: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    if number.is_infinite:
        return number
    value = round_to(float(number), dtype)
    if value is None:
        raise Opaque
    return exact_float(value)


def _map_numbers(value: sympy.Expr, function: Callable[[sympy.Expr], sympy.Expr]) -> sympy.Expr:
    """`function` of the numbers that `value` consists of, all cases of it."""
    if value.is_number:
        return function(value)
    if isinstance(value, Where):
        condition, a, b = value.args
        return Where(condition, _map_numbers(a, function), _map_numbers(b, function))
    return value


def filled(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """full, zeros, ones and their kin: the same number everywhere."""
    name = operator_name(node)
    if name in ("aten::fill", "aten::full", "aten::full_like", "aten::new_full"):
        source = a.get("fill_value", a.get("value"))
        value = ev.numeric(source, ()) if isinstance(source, fx.Node) else ev.number(source)
    elif name == "aten::scalar_tensor":
        value = ev.number(a["s"])
    else:
        value = sympy.Integer(1 if "ones" in name else 0)
    return as_type(value, node.meta["val"].dtype)


def arange(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """arange: start + index * step."""
    start, step = ev.number(a.get("start", 0)), ev.number(a.get("step", 1))
    value = start + index[0] * step
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point and not (start.is_integer and step.is_integer):
        raise Opaque
    if dtype in _NARROW and not _fits(value, dtype, ev):
        raise Opaque
    return value


def _fits(value: sympy.Expr, dtype: torch.dtype, ev: ElementEvaluator) -> bool:
    low, high = bounds.interval(value, ev.ranges)
    least, most = _NARROW[dtype]
    return bool(low.is_Integer and high.is_Integer and low >= least and high <= most)


def eye(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """eye: one on the diagonal."""
    same = relate(sympy.Eq, *index)
    return same if ev.is_boolean(node) else Truth(same)


def cast(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """Conversion to the node's own type."""
    source = a.get("self", a.get("a"))
    return converted(ev, source, index, node.meta["val"].dtype)


def converted(
    ev: ElementEvaluator, source: fx.Node, index: Index, dtype: torch.dtype
) -> sympy.Basic:
    """An element of `source`, broadcast, as another type."""
    before = source.meta["val"].dtype
    value = ev.widened(source, index, dtype)
    if before == dtype:
        return value
    if before.is_complex or dtype.is_complex:
        raise Opaque
    if before == torch.bool:
        return Truth(value)
    if dtype == torch.bool:
        return decided(ev, sympy.Ne, (source, value), (0, sympy.Integer(0)))
    if before.is_floating_point and not dtype.is_floating_point:
        if value.is_number and value.is_finite:
            return in_range(sympy.Integer(int(value)), dtype)
        if ev.exactness(source) < Exactness.INTEGER:
            raise Opaque
    return as_type(value, dtype)


def copied(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """copy: the source, broadcast, as the node's type."""
    source = a["src"]
    return converted(ev, source, index, node.meta["val"].dtype)


def decided(
    ev: ElementEvaluator,
    relation: type[Relational],
    left: tuple[Any, sympy.Expr],
    right: tuple[Any, sympy.Expr],
) -> sympy.Basic:
    """A comparison of (argument, value) pairs, if rounding cannot turn it around."""
    for (argument, value), (_, other) in ((left, right), (right, left)):
        if value.is_number:
            continue
        needed = Exactness.EXACT
        if other == 0:
            needed = Exactness.SIGN
        elif other.is_Integer and abs(other) <= SMALL:
            needed = Exactness.HALF_INTEGER
        if not ev.is_exact(argument, needed):
            raise Opaque
    return relate(relation, left[1], right[1])


def compared(
    ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments, *, relation: type[Relational]
) -> sympy.Basic:
    """eq, ne, lt, le, gt, ge."""
    left, right = a["self"], a["other"]
    values = [ev.numeric(argument, index) for argument in (left, right)]
    kinds = [_tensor_type(argument) for argument in (left, right)]
    if None not in kinds and not _comparable(*kinds):
        raise Opaque
    for position in (0, 1):
        other = kinds[1 - position]
        if kinds[position] is None and other is not None and other.is_floating_point:
            values[position] = as_type(values[position], other)  # a scalar is rounded to the tensor
    return decided(ev, relation, (left, values[0]), (right, values[1]))


def _comparable(a: torch.dtype, b: torch.dtype) -> bool:
    """Comparing converts neither side to a type that rounds it."""
    if a.is_complex or b.is_complex:
        return False
    if a.is_floating_point == b.is_floating_point or torch.bool in (a, b):
        return True
    return torch.float16 not in (a, b) and torch.bfloat16 not in (a, b)


def _tensor_type(argument: Any) -> torch.dtype | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def truth(ev: ElementEvaluator, argument: Any, index: Index) -> sympy.Basic:
    """An argument of a logical operator as a Boolean."""
    value = ev.operand(argument, index)
    kind = _tensor_type(argument)
    if kind == torch.bool:
        return value
    return decided(ev, sympy.Ne, (argument, value), (0, sympy.Integer(0)))


def logical(
    ev: ElementEvaluator,
    node: fx.Node,
    index: Index,
    a: Arguments,
    *,
    function: Callable[..., sympy.Basic],
    bits: bool = False,
) -> sympy.Basic:
    """And, or, xor, not; the bitwise ones only of Booleans."""
    arguments = [a[key] for key in ("self", "other") if key in a]
    if bits and not ev.is_boolean(node):
        raise Opaque
    value = function(*(truth(ev, argument, index) for argument in arguments))
    return value if ev.is_boolean(node) else Truth(value)


def either(p: sympy.Basic, q: sympy.Basic) -> sympy.Basic:
    """Exclusive or."""
    return choose(p, sympy.Not(q), q)


def where(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """where and masked_fill: one of two, by a condition."""
    if operator_name(node) == "aten::masked_fill":
        condition, a_, b_ = a["mask"], a["value"], a["self"]
    elif "self" in a:
        condition, a_, b_ = a["condition"], a["self"], a["other"]
    else:
        raise Opaque
    holds = truth(ev, condition, index)
    if holds is sympy.true or holds is sympy.false:
        return _as_node(ev, node, a_ if holds is sympy.true else b_, index)
    yes, no = _as_node(ev, node, a_, index), _as_node(ev, node, b_, index)
    return choose(holds, yes, no) if ev.is_boolean(node) else select(holds, yes, no)


def _as_node(ev: ElementEvaluator, node: fx.Node, argument: Any, index: Index) -> sympy.Basic:
    """An argument's element in the node's type."""
    dtype = node.meta["val"].dtype
    if _tensor_type(argument) is None:
        return as_type(ev.number(argument), dtype)
    return converted(ev, argument, index, dtype)


def triangle(
    ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments, *, upper: bool
) -> sympy.Basic:
    """tril and triu: zero on one side of a diagonal."""
    offset = ev.number(a["diagonal"])
    row, column = index[-2:]
    kept = sympy.Ge(column, row + offset) if upper else sympy.Le(column, row + offset)
    if kept is sympy.false:
        return sympy.false if ev.is_boolean(node) else sympy.Integer(0)
    value = ev.at(a["self"], index)
    if ev.is_boolean(node):
        return choose(kept, value, sympy.false)
    return select(kept, value, sympy.Integer(0))


def arithmetic(
    ev: ElementEvaluator,
    node: fx.Node,
    index: Index,
    a: Arguments,
    *,
    function: Callable[[sympy.Expr, sympy.Expr], sympy.Expr],
) -> sympy.Basic:
    """add, sub, rsub, mul: as for real numbers, where the type cannot wrap around."""
    left, right = ev.numeric(a["self"], index, node), ev.numeric(a["other"], index, node)
    alpha = ev.number(a.get("alpha", 1))
    if operator_name(node) == "aten::rsub":
        left, right = right, left * alpha
    else:
        right = right * alpha
    return finished(function(left, right), node)


def finished(value: sympy.Expr, node: fx.Node) -> sympy.Basic:
    """A computed number as an element of the node."""
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return relate(sympy.Ne, value, sympy.Integer(0))
    if dtype.is_complex:
        raise Opaque
    if dtype.is_floating_point:
        return _map_numbers(value, partial(_rounded, dtype=dtype)) if value.is_number else value
    return in_range(value, dtype)


def divided(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """div with its rounding modes, floor_divide."""
    left, right = ev.numeric(a["self"], index, node), ev.numeric(a["other"], index, node)
    mode = a.get("rounding_mode")
    if operator_name(node) == "aten::floor_divide":
        mode = "floor"
    if mode is None:
        if right == 0 or not right.is_finite:
            raise Opaque
        return finished(left / right, node)
    return finished(_whole(ev, a, left, right, toward_zero=mode == "trunc")[0], node)


def remainder(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """remainder and fmod."""
    left, right = ev.numeric(a["self"], index, node), ev.numeric(a["other"], index, node)
    toward_zero = operator_name(node) == "aten::fmod"
    return finished(_whole(ev, a, left, right, toward_zero=toward_zero)[1], node)


def _whole(
    ev: ElementEvaluator,
    a: Arguments,
    left: sympy.Expr,
    right: sympy.Expr,
    *,
    toward_zero: bool,
) -> tuple[sympy.Expr, sympy.Expr]:
    """Quotient and remainder of integers by a positive integer."""
    exact = all(ev.is_exact(a[key], Exactness.INTEGER) for key in ("self", "other"))
    if not exact or right.has(Load) or not bounds.is_nonnegative(right - 1):
        raise Opaque
    if toward_zero:
        low = bounds.interval(left, ev.ranges)[0]
        if low.is_infinite or not bounds.is_nonnegative(low):
            raise Opaque
    return quotient_remainder(left, right, ev.ranges)


def unary(
    ev: ElementEvaluator,
    node: fx.Node,
    index: Index,
    a: Arguments,
    *,
    function: Callable[[sympy.Expr], sympy.Expr],
) -> sympy.Basic:
    """neg, abs, square: also of loads."""
    return finished(by_cases(function, select, ev.numeric(a["self"], index, node)), node)


def formula(
    ev: ElementEvaluator,
    node: fx.Node,
    index: Index,
    a: Arguments,
    *,
    function: Callable[[sympy.Expr], sympy.Expr],
) -> sympy.Basic:
    """exp, log, sqrt: of indices only; of loads, the result is loaded."""
    value = ev.numeric(a["self"], index, node)
    if value.has(Load):
        raise Opaque
    return finished(by_cases(function, select, value), node)


def rounding(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """floor, ceil, trunc, round of what is an integer already."""
    if a.get("decimals", 0) != 0 or not ev.is_exact(a["self"], Exactness.INTEGER):
        raise Opaque
    return ev.at(a["self"], index)


def power(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """pow: of a number, or by a small integer."""
    base, exponent = (ev.numeric(a[key], index, node) for key in ("self", "exponent"))
    if base.is_number and base.is_positive and base.is_finite and not exponent.has(Load):
        return finished(by_cases(lambda e: base**e, select, exponent), node)
    if exponent.is_Integer and 0 <= exponent <= 4:
        return finished(by_cases(lambda v: v**exponent, select, base), node)
    raise Opaque


def limited(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """clamp and its one-sided forms, minimum and maximum."""
    name = operator_name(node)
    value = ev.numeric(a["self"], index, node)
    if name in ("aten::minimum", "aten::maximum", "aten::min", "aten::max"):
        if "other" not in a:
            raise Opaque
        other = ev.numeric(a["other"], index, node)
        low = other if name.endswith(("maximum", "max")) else None
        high = None if low is not None else other
    else:
        low = None if a.get("min") is None else ev.numeric(a["min"], index, node)
        high = None if a.get("max") is None else ev.numeric(a["max"], index, node)
    if low is not None:
        value = by_cases(partial(_extreme, ev=ev, greatest=True), select, value, low)
    if high is not None:
        value = by_cases(partial(_extreme, ev=ev, greatest=False), select, value, high)
    return finished(value, node)


def _extreme(a: sympy.Expr, b: sympy.Expr, ev: ElementEvaluator, greatest: bool) -> sympy.Expr:
    """The greater or the smaller of two numbers without cases."""
    for larger, smaller in ((a, b), (b, a)):
        if smaller is -sympy.oo or larger is sympy.oo:
            return larger if greatest else smaller
        low, high = bounds.interval(larger - smaller, ev.ranges)
        if not low.is_infinite and not high.is_infinite and bounds.is_nonnegative(low):
            return larger if greatest else smaller
    return sympy.Max(a, b) if greatest else sympy.Min(a, b)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten::{name}": rule for name in names.split()}


_RELATIONS = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
    "not_equal": sympy.Ne,
    "less": sympy.Lt,
    "less_equal": sympy.Le,
    "greater": sympy.Gt,
    "greater_equal": sympy.Ge,
}

RULES: Mapping[str, Rule] = {
    **_table(filled, "full full_like new_full fill zeros zeros_like new_zeros zero"),
    **_table(filled, "ones ones_like new_ones scalar_tensor"),
    **_table(arange, "arange"),
    "prims::iota": arange,
    **_table(eye, "eye"),
    **_table(cast, "to _to_copy type_as float double half bfloat16"),
    "prims::convert_element_type": cast,
    **_table(copied, "copy"),
    **{f"aten::{name}": partial(compared, relation=kind) for name, kind in _RELATIONS.items()},
    **_table(partial(logical, function=sympy.And), "logical_and"),
    **_table(partial(logical, function=sympy.Or), "logical_or"),
    **_table(partial(logical, function=either), "logical_xor"),
    **_table(partial(logical, function=sympy.Not), "logical_not"),
    **_table(partial(logical, function=sympy.And, bits=True), "bitwise_and __and__"),
    **_table(partial(logical, function=sympy.Or, bits=True), "bitwise_or __or__"),
    **_table(partial(logical, function=either, bits=True), "bitwise_xor __xor__"),
    **_table(partial(logical, function=sympy.Not, bits=True), "bitwise_not"),
    **_table(where, "where masked_fill"),
    **_table(partial(triangle, upper=False), "tril"),
    **_table(partial(triangle, upper=True), "triu"),
    **_table(partial(arithmetic, function=lambda p, q: p + q), "add"),
    **_table(partial(arithmetic, function=lambda p, q: p - q), "sub rsub subtract"),
    **_table(partial(arithmetic, function=lambda p, q: p * q), "mul multiply"),
    **_table(divided, "div divide true_divide floor_divide"),
    **_table(remainder, "remainder fmod"),
    **_table(partial(unary, function=lambda v: -v), "neg negative"),
    **_table(partial(unary, function=sympy.Abs), "abs absolute"),
    **_table(partial(unary, function=lambda v: v**2), "square"),
    **_table(partial(formula, function=sympy.exp), "exp"),
    **_table(partial(formula, function=sympy.log), "log"),
    **_table(partial(formula, function=sympy.sqrt), "sqrt"),
    **_table(rounding, "floor ceil trunc round"),
    **_table(power, "pow"),
    **_table(limited, "clamp clip clamp_min clamp_max minimum maximum min max"),
    **element_gathers.RULES,
}
