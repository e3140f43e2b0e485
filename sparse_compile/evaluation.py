"""Computes expressions of `sparse_compile.expressions` with PyTorch operators.

Only operators and `torch` functions are applied to values, and no value is looked at, so the values
may be tensors, numbers, symbolic sizes or `torch.fx.Proxy` objects (which makes an expression print
itself into a graph).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import sympy
import torch
from sympy.core.relational import Relational

from sparse_compile.expressions import Load, cleared, whole_quotient

Kind = Literal["bool", "int", "float"]


class Source(NamedTuple):
    """A tensor that cannot be asked for its dtype and shape, such as a proxy."""

    value: Any
    dtype: torch.dtype
    shape: tuple[Any, ...]  # integers where known


class _Value(NamedTuple):
    kind: Kind
    value: Any
    is_scalar: bool = False  # a number or a symbolic size, no tensor


def evaluate(
    expr: sympy.Basic,
    env: Mapping[sympy.Basic, Any],
    operands: Sequence[torch.Tensor | Source] = (),
    *,
    dtype: torch.dtype = torch.float32,
    lengths: Mapping[sympy.Symbol, Any] | None = None,
) -> Any:
    """The value of `expr`, broadcast over the values of its symbols.

    Whole numbers are computed as int64 and never meet a float division; everything else is computed
    in `dtype`. Equal subexpressions are computed once. A constant comes back as a Python number.

    Args:
        expr: A number or a Boolean over indices, sizes, `x` and loads.
        env: Values of the symbols: broadcastable int64 tensors for indices, numbers or tensors of no
            dimensions for sizes. It may also hold the values of whole subexpressions, such as a
            `Load` that the caller has read already.
        operands: What `Load(i, ...)` reads. Negative positions count from the end; a position
            outside of the operand, which only a branch not taken may have, reads some element.
        dtype: Of fractions and of loaded floating values.
        lengths: How many values the index symbols have, where that is known. It saves the check of
            positions that are such a symbol.
    Raises:
        NotImplementedError: `expr` holds a function that is not known here.
    """
    evaluator = _Evaluator(env, operands, dtype, lengths)
    return evaluator.visit(sympy.sympify(expr)).value


def read_positions(
    load: Load, env: Mapping[sympy.Basic, Any], operands: Sequence[torch.Tensor | Source]
) -> tuple[Any, ...]:
    """The positions at which `evaluate` reads an operand for `load`: whole numbers, or tensors."""
    return _Evaluator(env, operands).positions(load, source_of(operands[int(load.args[0])]))


def source_of(operand: torch.Tensor | Source) -> Source:
    """An operand with its dtype and shape."""
    if isinstance(operand, torch.Tensor):
        return Source(operand, operand.dtype, tuple(operand.shape))
    return operand


def fits(length: Any, size: Any) -> bool:
    """Whether indices below `length` are known to be positions in an axis of this size."""
    if isinstance(length, int) and isinstance(size, int):
        return length <= size
    if isinstance(length, torch.SymInt) and isinstance(size, torch.SymInt):
        return length.node.expr == size.node.expr
    return False


def slice_of(
    operand: torch.Tensor | Source,
    load: Load,
    ranges: Mapping[sympy.Symbol, tuple[Any, Any]],
    lengths: Mapping[sympy.Symbol, Any],
) -> Any:
    """The elements that `load` reads over ranges of indices, as a view of `operand`.

    Args:
        operand: What `load` reads.
        load: Every position must be a symbol of `ranges`, each at most once, or a whole number.
        ranges: First index and end of each symbol, in the order of the result's axes.
        lengths: How many values each symbol has in all; the operand must hold as many.

    Returns:
        A view with one axis per symbol of `ranges`, of size 1 for a symbol that does not occur;
        None if the positions have another form or may lie outside of the operand.
    """
    part, _, shape = source_of(operand)
    positions = load.args[1:]
    symbols = [position for position in positions if position.is_Symbol]
    if len(set(symbols)) != len(symbols):
        return None
    for position, size in zip(positions, shape, strict=True):
        if not (position.is_Integer or (position in ranges and fits(lengths[position], size))):
            return None
    if positions:
        index = (slice(*ranges[p]) if p.is_Symbol else int(p) for p in positions)
        part = part[tuple(index)]
    order = [symbols.index(symbol) for symbol in ranges if symbol in symbols]
    if order != sorted(order):
        part = part.permute(order)
    for axis, symbol in enumerate(ranges):
        if symbol not in symbols:
            part = part.unsqueeze(axis)
    return part


class _Evaluator:
    """One call of `evaluate`; remembers what it computed."""

    def __init__(
        self,
        env: Mapping[sympy.Basic, Any],
        operands: Sequence[torch.Tensor | Source],
        dtype: torch.dtype = torch.float32,
        lengths: Mapping[sympy.Symbol, Any] | None = None,
    ) -> None:
        self.operands = operands
        self.dtype = dtype
        self.lengths = lengths or {}
        self.done: dict[sympy.Basic, _Value] = {
            expr: self._given(expr, value) for expr, value in env.items()
        }

    def visit(self, expr: sympy.Basic) -> _Value:
        """The value of a subexpression, computed at most once."""
        found = self.done.get(expr)
        if found is None:
            found = self.done[expr] = self._compute(expr)
        return found

    def _given(self, expr: sympy.Basic, value: Any) -> _Value:
        """A value of the caller's; tensors tell their kind, others are what the symbol says."""
        if isinstance(value, Source):
            return self._loaded(value.value, value.dtype)
        if isinstance(value, torch.Tensor):
            return self._loaded(value, value.dtype)
        if isinstance(value, (bool, int, float, torch.SymInt, torch.SymFloat)):
            is_float = isinstance(value, (float, torch.SymFloat))
            return _Value("float" if is_float else "int", value, is_scalar=True)
        if expr.is_Symbol:
            is_size = expr.name not in ("b", "h", "t", "s", "x")
            return _Value("int" if expr.is_integer else "float", value, is_scalar=is_size)
        if isinstance(expr, Load) and int(expr.args[0]) < len(self.operands):
            return self._loaded(value, source_of(self.operands[int(expr.args[0])]).dtype)
        return _Value("float", value)

    def _loaded(self, value: Any, dtype: torch.dtype) -> _Value:
        if dtype == torch.bool:
            return _Value("bool", value)
        if dtype.is_floating_point:
            return _Value("float", value if dtype == self.dtype else value.to(self.dtype))
        return _Value("int", value if dtype == torch.int64 else value.to(torch.int64))

    def _compute(self, expr: sympy.Basic) -> _Value:
        if expr.is_Symbol:
            raise KeyError(f"no value for the symbol {expr}")
        if expr in (sympy.true, sympy.false):
            return _Value("bool", bool(expr), is_scalar=True)
        if expr.is_Integer:
            return _Value("int", int(expr), is_scalar=True)
        if expr.is_number:
            return _Value("float", float(expr), is_scalar=True)
        if isinstance(expr, Relational):
            return self._relation(expr)
        name = type(expr).__name__
        method = getattr(self, f"_compute_{name}", None)
        if method is not None:
            return method(expr)
        if name in _UNARY:
            return self._unary(_UNARY[name], expr.args[0])
        raise NotImplementedError(f"no PyTorch meaning for {name} in {expr}")

    def number(self, expr: sympy.Basic) -> _Value:
        """The value of a subexpression as a number; truths count as 0 and 1."""
        value = self.visit(expr)
        if value.kind != "bool":
            return value
        plain = int(value.value) if value.is_scalar else value.value.to(torch.int64)
        return _Value("int", plain, value.is_scalar)

    def floating(self, value: _Value) -> _Value:
        """The same number, fit for fractional arithmetic."""
        if value.kind == "float":
            return value
        return _Value(
            "float", value.value if value.is_scalar else value.value.to(self.dtype), value.is_scalar
        )

    def tensor(self, value: _Value) -> Any:
        """A floating tensor, for functions that take no numbers."""
        if value.is_scalar:
            return torch.scalar_tensor(value.value, dtype=self.dtype)
        return self.floating(value).value

    def _alike(self, values: Sequence[_Value]) -> tuple[Kind, list[_Value]]:
        if all(value.kind == "int" for value in values):
            return "int", list(values)
        return "float", [self.floating(value) for value in values]

    def _fold(self, function: Callable[[Any, Any], Any], values: Sequence[_Value]) -> _Value:
        """Combine whole numbers first, so that they stay exact, then the rest."""
        whole = [value for value in values if value.kind == "int"]
        rest = [value for value in values if value.kind != "int"]
        total = whole[0] if whole else rest.pop(0)
        for value in whole[1:]:
            total = _Value("int", function(total.value, value.value), _both(total, value))
        for value in rest:
            left = self.floating(total)
            total = _Value("float", function(left.value, value.value), _both(left, value))
        return total

    def _compute_Add(self, expr: sympy.Add) -> _Value:
        plus, minus = [], []
        for term in expr.args:
            factor, rest = term.as_coeff_Mul()
            (minus if factor == -1 else plus).append(rest if factor == -1 else term)
        total = self._fold(operator.add, [self.number(term) for term in plus]) if plus else None
        if not minus:
            assert total is not None
            return total
        taken = self._fold(operator.add, [self.number(term) for term in minus])
        if total is None:
            return taken._replace(value=-taken.value)
        kind, (left, right) = self._alike([total, taken])
        return _Value(kind, left.value - right.value, _both(left, right))

    def _compute_Mul(self, expr: sympy.Mul) -> _Value:
        above, below = [], []
        for factor in expr.args:
            if factor.is_Pow and factor.exp == -1:
                below.append(self.number(factor.base))
            else:
                above.append(self.number(factor))
        if not below:
            return self._fold(operator.mul, above)
        divisor = self.floating(self._fold(operator.mul, below))
        product = self.floating(self._fold(operator.mul, above)) if above else _ONE
        return _Value("float", product.value / divisor.value, _both(product, divisor))

    def _compute_Pow(self, expr: sympy.Pow) -> _Value:
        base, power = self.number(expr.base), expr.exp
        if power.is_Integer and power > 0:
            return _Value(base.kind, base.value ** int(power), base.is_scalar)
        left = self.floating(base)
        if power == -1:
            return _Value("float", 1.0 / left.value, left.is_scalar)
        if power == sympy.Rational(1, 2):
            return _Value("float", torch.sqrt(self.tensor(left)))
        right = self.floating(self.number(power))
        if left.is_scalar and right.is_scalar:
            return _Value("float", left.value**right.value, is_scalar=True)
        return _Value("float", torch.pow(left.value, right.value))

    def _compute_floor(self, expr: sympy.Basic) -> _Value:
        parts = whole_quotient(expr.args[0])
        if parts is not None:
            above, below = self.number(parts[0]), self.number(parts[1])
            if above.kind == below.kind == "int":
                return _Value("int", above.value // below.value, _both(above, below))
        value = self.number(expr.args[0])
        if value.kind == "int":
            return value
        return _Value("float", torch.floor(self.tensor(value)))

    def _compute_ceiling(self, expr: sympy.Basic) -> _Value:
        below = self._compute_floor(sympy.floor(-expr.args[0], evaluate=False))
        return below._replace(value=-below.value)

    def _compute_FloorDiv(self, expr: sympy.Basic) -> _Value:
        return self._pair(operator.floordiv, expr)

    _compute_CleanDiv = _compute_FloorDiv

    def _compute_Mod(self, expr: sympy.Basic) -> _Value:
        return self._pair(operator.mod, expr)

    _compute_PythonMod = _compute_Mod

    def _pair(self, function: Callable[[Any, Any], Any], expr: sympy.Basic) -> _Value:
        kind, (left, right) = self._alike([self.number(arg) for arg in expr.args])
        return _Value(kind, function(left.value, right.value), _both(left, right))

    def _compute_Abs(self, expr: sympy.Basic) -> _Value:
        value = self.number(expr.args[0])
        result = abs(value.value) if value.is_scalar else torch.abs(value.value)
        return value._replace(value=result)

    def _compute_sign(self, expr: sympy.Basic) -> _Value:
        value = self.number(expr.args[0])
        if value.is_scalar:
            return value._replace(value=(value.value > 0) - (value.value < 0))
        return value._replace(value=torch.sign(value.value))

    def _compute_Max(self, expr: sympy.Basic) -> _Value:
        return self._extreme(maximum, expr)

    def _compute_Min(self, expr: sympy.Basic) -> _Value:
        return self._extreme(minimum, expr)

    def _extreme(self, function: Callable[..., Any], expr: sympy.Basic) -> _Value:
        kind, values = self._alike([self.number(arg) for arg in expr.args])
        total = values[0]
        for value in values[1:]:
            result = function(total.value, value.value, total.is_scalar, value.is_scalar)
            total = _Value(kind, result, _both(total, value))
        return total

    def _unary(self, function: Callable[[Any], Any], arg: sympy.Basic) -> _Value:
        return _Value("float", function(self.tensor(self.number(arg))))

    def _relation(self, expr: Relational) -> _Value:
        left, right = (self.visit(side) for side in cleared(expr))
        for truth, other in ((left, right), (right, left)):
            is_test = expr.rel_op in ("==", "!=") and truth.kind == "bool" and not truth.is_scalar
            if is_test and other.is_scalar and other.value in (0, 1):
                wanted = (expr.rel_op == "==") == bool(other.value)
                return truth if wanted else truth._replace(value=~truth.value)
        _, (left, right) = self._alike([self.number(side) for side in cleared(expr)])
        result = _COMPARE[expr.rel_op](left.value, right.value)
        return _Value("bool", result, _both(left, right))

    def truth(self, expr: sympy.Basic) -> _Value:
        """The value of a subexpression as a Boolean."""
        value = self.visit(expr)
        return value if value.kind == "bool" else _Value("bool", value.value != 0, value.is_scalar)

    def _logic(self, function: Callable[[Any, Any], Any], expr: sympy.Basic) -> _Value:
        values = [self.truth(arg) for arg in sorted(expr.args, key=sympy.default_sort_key)]
        total = values[0]
        for value in values[1:]:
            total = _Value("bool", function(total.value, value.value), _both(total, value))
        return total

    def _compute_And(self, expr: sympy.Basic) -> _Value:
        return self._logic(operator.and_, expr)

    def _compute_Or(self, expr: sympy.Basic) -> _Value:
        return self._logic(operator.or_, expr)

    def _compute_Xor(self, expr: sympy.Basic) -> _Value:
        return self._logic(operator.xor, expr)

    def _compute_Not(self, expr: sympy.Basic) -> _Value:
        value = self.truth(expr.args[0])
        return value._replace(value=not value.value if value.is_scalar else ~value.value)

    def _compute_Where(self, expr: sympy.Basic) -> _Value:
        condition = self.truth(expr.args[0])
        kind, (left, right) = self._alike([self.number(arg) for arg in expr.args[1:]])
        if condition.is_scalar and isinstance(condition.value, bool):
            return left if condition.value else right
        if left.is_scalar and right.is_scalar and kind == "float":
            # torch.where would give two Python numbers the default dtype
            left = _Value(kind, torch.full_like(condition.value, left.value, dtype=self.dtype))
        return _Value(kind, torch.where(condition.value, left.value, right.value))

    def _compute_Truth(self, expr: sympy.Basic) -> _Value:
        value = self.truth(expr.args[0])
        plain = int(value.value) if value.is_scalar else value.value.to(torch.int64)
        return _Value("int", plain, value.is_scalar)

    def _compute_Heaviside(self, expr: sympy.Basic) -> _Value:
        value = self.tensor(self.number(expr.args[0]))
        return _Value("float", (torch.sign(value) + 1) / 2)

    def _compute_Load(self, expr: sympy.Basic) -> _Value:
        operand = source_of(self.operands[int(expr.args[0])])
        index = self.positions(expr, operand)
        return self._loaded(operand.value[index] if index else operand.value, operand.dtype)

    def positions(self, load: Load, operand: Source) -> tuple[Any, ...]:
        """What an operand is indexed with."""
        return tuple(
            self._position(position, operand, axis) for axis, position in enumerate(load.args[1:])
        )

    def _position(self, position: sympy.Basic, operand: Source, axis: int) -> Any:
        found, size = self.number(position), operand.shape[axis]
        if found.is_scalar:
            return found.value
        value = found.value if found.kind == "int" else found.value.to(torch.int64)
        if position in self.lengths and fits(self.lengths[position], size):
            return value
        if isinstance(size, int) and size == 0:
            return value
        if isinstance(size, torch.SymInt) and not isinstance(operand.value, torch.Tensor):
            size = operand.value.size(axis)  # a graph holds the size as a node
        return torch.clamp(value, max=size - 1) if position.is_nonnegative else value % size


_ONE = _Value("float", 1.0, is_scalar=True)
_UNARY: dict[str, Callable[[Any], Any]] = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _both(left: _Value, right: _Value) -> bool:
    return left.is_scalar and right.is_scalar


def maximum(left: Any, right: Any, left_scalar: bool, right_scalar: bool) -> Any:
    """The larger of two values, each a tensor or (as said) a number."""
    if left_scalar and right_scalar:
        return max(left, right) if _plain(left, right) else torch.sym_max(left, right)
    if left_scalar:
        return torch.clamp(right, min=left)
    return torch.clamp(left, min=right) if right_scalar else torch.maximum(left, right)


def minimum(left: Any, right: Any, left_scalar: bool, right_scalar: bool) -> Any:
    """The smaller of two values, each a tensor or (as said) a number."""
    if left_scalar and right_scalar:
        return min(left, right) if _plain(left, right) else torch.sym_min(left, right)
    if left_scalar:
        return torch.clamp(right, max=left)
    return torch.clamp(left, max=right) if right_scalar else torch.minimum(left, right)


def _plain(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not math.isnan(value) for value in values)
