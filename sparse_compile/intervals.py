"""Interval arithmetic over blocks of indices: what a predicate can be anywhere in a block.

Like `evaluate`, `bounds` applies only operators and `torch` functions to values, so it also prints
itself into a graph when it is given proxies.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from sympy.core.relational import Relational

from sparse_compile.evaluation import Source, maximum, minimum, slice_of, source_of
from sparse_compile.expressions import Load, cleared, whole_quotient

_SLACK = 1e-5  # relative; `evaluate` rounds to float32, whose steps are 6e-8, a few times over


class Interval(NamedTuple):
    """All values of a number in a block lie between `low` and `high`."""

    low: Any  # Python floats or float64 tensors
    high: Any
    is_exact: bool = True  # `evaluate` finds numbers in it, not only up to rounding
    is_whole: bool = True  # `evaluate` computes with whole numbers, so sums stay exact
    is_finite: bool = True


class Possible(NamedTuple):
    """What a Boolean is in a block: `some` may be too true, `every` too false, never the reverse."""

    some: Any  # Python bools or bool tensors
    every: Any


_ANYTHING = Interval(-math.inf, math.inf, is_exact=False, is_whole=False, is_finite=False)


def bounds(expr: sympy.Basic, intervals: Mapping[sympy.Basic, tuple[Any, Any]]) -> tuple[Any, Any]:
    """The least and greatest value of `expr` over blocks; for a Boolean, (possible, certain).

    The answer is conservative: `low` may be too low, `high` too high, `possible` too true and
    `certain` too false, never the reverse.

    Args:
        expr: A number or a Boolean over indices, sizes and loads.
        intervals: Lowest and highest value (both included; numbers or broadcastable tensors) of
            each symbol, and of each `Load` that something is known about, as `load_extrema` gives
            it; other loads may be anything. NaN as an end means the same.
    """
    expr = sympy.sympify(expr)
    known = {one: ends for one, ends in intervals.items() if expr.has(one)}
    return tuple(_Bounds(known).visit(expr))[:2]


def load_extrema(
    operand: torch.Tensor | Source,
    load: Load,
    blocks: Mapping[sympy.Symbol, tuple[Any, int, Any]],
    lengths: Mapping[sympy.Symbol, Any],
    arange: Callable[[Any], Any],
) -> Interval | None:
    """Least and greatest value that `load` reads for each block of its indices.

    Args:
        operand: What `load` reads.
        load: The read; its positions must be as `slice_of` wants them.
        blocks: Length, block size and number of blocks of each index symbol, in the order of the
            result's axes. Blocks may lie behind the end.
        lengths: The lengths as numbers or symbolic sizes, where those of `blocks` may be proxies.
        arange: Makes the numbers up to a length, where the operand is.

    Returns:
        Float64 tensors with one axis per symbol of `blocks` (of size 1 for a symbol that does not
        occur), or None if the positions have another form.
    """
    ranges = {symbol: (0, length) for symbol, (length, _, _) in blocks.items()}
    part = slice_of(operand, load, ranges, lengths)
    if part is None:
        return None
    low = high = part.detach().to(torch.float64)
    for axis, (symbol, (length, size, count)) in enumerate(blocks.items()):
        if size > 1 and symbol in load.args:
            # positions past the end repeat the last element, which changes no extremum
            padded = arange(count * size)
            position = torch.clamp(padded, max=length - 1)
            low, high = (
                reduce(value.index_select(axis, position).unflatten(axis, (-1, size)), axis + 1)
                for value, reduce in ((low, torch.amin), (high, torch.amax))
            )
    is_whole = not source_of(operand).dtype.is_floating_point
    return Interval(low, high, True, is_whole, is_finite=is_whole)


class _Bounds:
    """One call of `bounds`; remembers what it computed."""

    def __init__(self, intervals: Mapping[sympy.Basic, tuple[Any, Any] | Interval]) -> None:
        self.done: dict[sympy.Basic, Interval | Possible] = {}
        for expr, ends in intervals.items():
            low = _double(ends[0])
            high = low if ends[1] is ends[0] else _double(ends[1])
            if isinstance(ends, Interval):
                found = ends._replace(low=low, high=high)
            else:
                is_index = not isinstance(expr, Load)
                found = Interval(low, high, True, is_whole=is_index, is_finite=is_index)
            self.done[expr] = found if found.is_finite else _without_nan(found)

    def visit(self, expr: sympy.Basic) -> Interval | Possible:
        found = self.done.get(expr)
        if found is None:
            found = self.done[expr] = self._compute(expr)
        return found

    def number(self, expr: sympy.Basic) -> Interval:
        found = self.visit(expr)
        if isinstance(found, Interval):
            return found
        return Interval(_as_number(found.every), _as_number(found.some))

    def truth(self, expr: sympy.Basic) -> Possible:
        found = self.visit(expr)
        return found if isinstance(found, Possible) else _differ(found, Interval(0.0, 0.0))

    def _compute(self, expr: sympy.Basic) -> Interval | Possible:
        if expr in (sympy.true, sympy.false):
            return Possible(bool(expr), bool(expr))
        if expr.is_number:
            value = float(expr)
            # `evaluate` compares with short binary fractions exactly
            is_exact = math.isinf(value) or (value * 1024).is_integer()
            return Interval(value, value, is_exact, bool(expr.is_Integer), math.isfinite(value))
        if isinstance(expr, Relational):
            return self._relation(expr)
        method = getattr(self, f"_compute_{type(expr).__name__}", None)
        return _ANYTHING if method is None else method(expr)

    def _relation(self, expr: Relational) -> Possible:
        left, right = (self.number(side) for side in cleared(expr))
        if expr.rel_op in (">", ">="):
            left, right = right, left
        if expr.rel_op in ("<", ">"):
            return _less(left, right, strict=True)
        if expr.rel_op in ("<=", ">="):
            return _less(left, right, strict=False)
        differ = _differ(left, right)
        return differ if expr.rel_op == "!=" else Possible(_not(differ.every), _not(differ.some))

    def _compute_And(self, expr: sympy.Basic) -> Possible:
        parts = [self.truth(arg) for arg in sorted(expr.args, key=sympy.default_sort_key)]
        return Possible(_all([p.some for p in parts]), _all([p.every for p in parts]))

    def _compute_Or(self, expr: sympy.Basic) -> Possible:
        parts = [self.truth(arg) for arg in sorted(expr.args, key=sympy.default_sort_key)]
        return Possible(_any([p.some for p in parts]), _any([p.every for p in parts]))

    def _compute_Not(self, expr: sympy.Basic) -> Possible:
        part = self.truth(expr.args[0])
        return Possible(_not(part.every), _not(part.some))

    def _compute_Xor(self, expr: sympy.Basic) -> Possible:
        first, *others = (self.truth(arg) for arg in expr.args)
        for other in others:
            both = _all([first.every, other.every])
            neither = _all([_not(first.some), _not(other.some)])
            one = _all([first.every, _not(other.some)])
            another = _all([_not(first.some), other.every])
            first = Possible(_not(_any([both, neither])), _any([one, another]))
        return first

    def _compute_Add(self, expr: sympy.Add) -> Interval:
        parts = [self.number(arg) for arg in expr.args]
        low, high = _total([p.low for p in parts]), _total([p.high for p in parts])
        return _computed(low, high, parts)

    def _compute_Mul(self, expr: sympy.Mul) -> Interval:
        factor, rest = expr.as_coeff_Mul()
        total = self.number(factor) if factor != 1 else None
        for arg in sympy.Mul.make_args(rest):
            part = self.number(arg)
            total = part if total is None else _product(total, part)
        assert total is not None
        return total

    def _compute_Pow(self, expr: sympy.Pow) -> Interval:
        base, power = self.number(expr.base), expr.exp
        if not (power.is_Integer and power > 0):
            return _ANYTHING
        total = base
        for _ in range(int(power) - 1):
            total = _product(total, base)
        return total

    def _compute_floor(self, expr: sympy.Basic) -> Interval:
        above, below = whole_quotient(expr.args[0]) or (expr.args[0], sympy.Integer(1))
        part = self.number(above)
        if not (below.is_Integer and below.is_positive and (part.is_whole or below == 1)):
            return _ANYTHING
        if not part.is_exact:
            return _ANYTHING
        low, high = (_floor(end / int(below)) for end in part[:2])
        return part._replace(low=low, high=high)

    def _compute_FloorDiv(self, expr: sympy.Basic) -> Interval:
        return self._compute_floor(sympy.floor(expr.args[0] / expr.args[1], evaluate=False))

    def _compute_Mod(self, expr: sympy.Basic) -> Interval:
        value, modulus = self.number(expr.args[0]), expr.args[1]
        if not (modulus.is_Integer and modulus.is_positive and value.is_whole and value.is_finite):
            return _ANYTHING
        size = int(modulus)
        first, last = _floor(value.low / size), _floor(value.high / size)
        low, high = value.low - size * first, value.high - size * last
        if _is_tensor(first) or _is_tensor(last):
            together = first == last
            low = torch.where(together, low, 0.0)
            high = torch.where(together, high, float(size - 1))
        elif first != last:
            low, high = 0.0, float(size - 1)
        return value._replace(low=low, high=high)

    def _compute_Abs(self, expr: sympy.Basic) -> Interval:
        part = self.number(expr.args[0])
        low = _larger(_larger(part.low, -part.high), 0.0)
        return part._replace(low=low, high=_larger(-part.low, part.high))

    def _compute_Max(self, expr: sympy.Basic) -> Interval:
        return self._extreme(_larger, expr)

    def _compute_Min(self, expr: sympy.Basic) -> Interval:
        return self._extreme(_smaller, expr)

    def _extreme(self, function: Callable[[Any, Any], Any], expr: sympy.Basic) -> Interval:
        parts = [self.number(arg) for arg in expr.args]
        low, high = parts[0].low, parts[0].high
        for part in parts[1:]:
            low, high = function(low, part.low), function(high, part.high)
        return _chosen(low, high, parts)

    def _compute_Where(self, expr: sympy.Basic) -> Interval:
        condition = self.truth(expr.args[0])
        left, right = self.number(expr.args[1]), self.number(expr.args[2])
        low = _pick(condition, left.low, right.low, _smaller(left.low, right.low))
        high = _pick(condition, left.high, right.high, _larger(left.high, right.high))
        return _chosen(low, high, (left, right))

    def _compute_Truth(self, expr: sympy.Basic) -> Interval:
        part = self.truth(expr.args[0])
        return Interval(_as_number(part.every), _as_number(part.some))


def _less(left: Interval, right: Interval, *, strict: bool) -> Possible:
    if not (left.is_exact and right.is_exact):
        slack = _slack(left, right)
        # written so that a NaN leaves it possible and not certain
        return Possible(_not(left.low - right.high > slack), right.low - left.high > slack)
    if strict:
        return Possible(_not(left.low >= right.high), left.high < right.low)
    return Possible(_not(left.low > right.high), left.high <= right.low)


def _differ(left: Interval, right: Interval) -> Possible:
    if not (left.is_exact and right.is_exact):
        slack = _slack(left, right)
        apart = _any([left.low - right.high > slack, right.low - left.high > slack])
        return Possible(True, apart)
    apart = _any([left.low > right.high, right.low > left.high])
    same = _all([left.low >= right.high, right.low >= left.high])
    return Possible(_not(same), apart)


def _slack(left: Interval, right: Interval) -> Any:
    ends = [_larger(end, -end) for end in (left.low, left.high, right.low, right.high)]
    return _SLACK * (1.0 + _total(ends))


def _product(left: Interval, right: Interval) -> Interval:
    for number, part in ((left, right), (right, left)):
        if not _is_tensor(number.low) and number.low == number.high and number.low != 0:
            ends = part.low * number.low, part.high * number.low
            low, high = ends if number.low > 0 else ends[::-1]
            return _computed(low, high, (left, right))
    ends = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
    low = _smaller(_smaller(ends[0], ends[1]), _smaller(ends[2], ends[3]))
    high = _larger(_larger(ends[0], ends[1]), _larger(ends[2], ends[3]))
    return _computed(low, high, (left, right))


def _computed(low: Any, high: Any, parts: Sequence[Interval]) -> Interval:
    """The interval of something calculated from `parts`."""
    is_whole = all(part.is_whole for part in parts)
    total = Interval(low, high, is_whole, is_whole, all(part.is_finite for part in parts))
    return total if total.is_finite else _without_nan(total)


def _chosen(low: Any, high: Any, parts: Sequence[Interval]) -> Interval:
    """The interval of something that is always one of `parts`."""
    exact, whole, finite = (all(flags) for flags in zip(*(part[2:] for part in parts), strict=True))
    return Interval(low, high, exact, whole, finite)


def _without_nan(part: Interval) -> Interval:
    """NaN (of the operand, or of infinity minus infinity) says nothing, so it becomes anything."""
    low, high = part.low, part.high
    if _is_tensor(low):
        low = torch.where(low == low, low, -math.inf)
    elif math.isnan(low):
        low = -math.inf
    if _is_tensor(high):
        high = torch.where(high == high, high, math.inf)
    elif math.isnan(high):
        high = math.inf
    return part._replace(low=low, high=high)


def _is_tensor(value: Any) -> bool:
    return not isinstance(value, (bool, int, float))


def _double(value: Any) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return torch.scalar_tensor(value, dtype=torch.float64)
    return value.to(torch.float64) if _is_tensor(value) else float(value)


def _as_number(truth: Any) -> Any:
    return truth.to(torch.float64) if _is_tensor(truth) else float(truth)


def _floor(value: Any) -> Any:
    if _is_tensor(value):
        return torch.floor(value)
    return float(math.floor(value)) if math.isfinite(value) else value


def _larger(left: Any, right: Any) -> Any:
    return maximum(left, right, not _is_tensor(left), not _is_tensor(right))


def _smaller(left: Any, right: Any) -> Any:
    return minimum(left, right, not _is_tensor(left), not _is_tensor(right))


def _not(truth: Any) -> Any:
    return ~truth if _is_tensor(truth) else not truth


def _total(values: Sequence[Any]) -> Any:
    return functools.reduce(operator.add, values)


def _all(truths: Sequence[Any]) -> Any:
    return functools.reduce(operator.and_, truths)


def _any(truths: Sequence[Any]) -> Any:
    return functools.reduce(operator.or_, truths)


def _pick(condition: Possible, left: Any, right: Any, either: Any) -> Any:
    for decided, value in ((condition.every, left), (_not(condition.some), right)):
        if _is_tensor(decided):
            # torch.where would give two Python numbers the default dtype
            if not _is_tensor(value):
                value = torch.full_like(decided, value, dtype=torch.float64)
            either = torch.where(decided, value, either)
        elif decided:
            return value
    return either
