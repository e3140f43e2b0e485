"""Values inside a Triton function that is being printed: operators and torch functions on them print.

`evaluate` and `bounds` apply only operators and torch functions to values, so given these they print
themselves. Whole numbers know their range, so that they are 32 bits wide only where that is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

_INT32 = 2**31 - 1
_FLOAT_WHOLE = 2**24  # float32 holds all whole numbers up to this
_FLOATS = ("float32", "float64")
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.int64: "int64"}


class Body:
    """The lines of a function, each computing one value."""

    def __init__(self, *, tanh: str = "tanh_accurate") -> None:
        """No lines yet; `tanh` names the function that computes it."""
        self.lines: list[str] = []
        self.tanh = tanh
        self._known: dict[str, str] = {}

    def name(self, code: str) -> str:
        """The variable that holds the value of `code`, computed at most once."""
        if code not in self._known:
            self._known[code] = f"v{len(self.lines)}"
            self.lines.append(f"{self._known[code]} = {code}")
        return self._known[code]

    def value(self, code: str, dtype: str, low: float = -math.inf, high: float = math.inf) -> Text:
        """The value of `code`; `low` and `high` are the range of a whole number."""
        return Text(self, self.name(code), dtype, low, high)

    def constant(self, value: float) -> Text:
        """A number."""
        if isinstance(value, bool):
            return Text(self, str(value), "int1")
        if isinstance(value, int):
            return Text(
                self, f"({value})", "int32" if abs(value) <= _INT32 else "int64", value, value
            )
        code = repr(value) if math.isfinite(value) else f'float("{value}")'
        return Text(self, f"({code})", "constant")


class Text:
    """A number or a truth in a function that is being printed."""

    __hash__ = object.__hash__

    def __init__(
        self, body: Body, code: str, dtype: str, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """The value of `code`; a whole number is known to be from `low` to `high`."""
        self.body, self.code, self.dtype = body, code, dtype
        self.low, self.high = low, high
        self.sum: tuple[str, Text, Text] | None = None  # it is this sum or difference

    def __repr__(self) -> str:
        return f"Text({self.code}: {self.dtype})"

    def __bool__(self) -> bool:
        raise TypeError("a value that is being printed is not known")

    @property
    def is_float(self) -> bool:
        """Whether it is no whole number and no truth."""
        return self.dtype in (*_FLOATS, "constant")

    def to(self, dtype: torch.dtype) -> Text:
        """The same number in another dtype; whole numbers keep their width."""
        name = _NAMES[dtype]
        if name == self.dtype or (name == "int64" and self.dtype == "int32"):
            return self
        if name == "int64":
            if self.dtype == "int1":
                return self.body.value(f"{self.code}.to(tl.int32)", "int32", 0, 1)
            return self.body.value(f"{self.code}.to(tl.int64)", "int64")
        if self.dtype == "constant":
            return self
        if self.sum is not None and max(abs(self.low), abs(self.high)) <= _FLOAT_WHOLE:
            # the parts are rows or columns of a tile, so that fewer numbers are converted
            symbol, left, right = self.sum
            parts = [part.to(dtype) for part in (left, right)]
            if all(max(abs(p.low), abs(p.high)) <= _FLOAT_WHOLE for p in (left, right)):
                return self.body.value(f"{parts[0].code} {symbol} {parts[1].code}", name)
        if self.low == self.high:
            return self.body.constant(float(self.low))
        return self.body.value(f"{self.code}.to(tl.{name})", name)

    def __add__(self, other: Any) -> Text:
        return _arithmetic("+", self, other)

    def __radd__(self, other: Any) -> Text:
        return _arithmetic("+", _text(self.body, other), self)

    def __sub__(self, other: Any) -> Text:
        return _arithmetic("-", self, other)

    def __rsub__(self, other: Any) -> Text:
        return _arithmetic("-", _text(self.body, other), self)

    def __mul__(self, other: Any) -> Text:
        return _arithmetic("*", self, other)

    def __rmul__(self, other: Any) -> Text:
        return _arithmetic("*", _text(self.body, other), self)

    def __truediv__(self, other: Any) -> Text:
        return _quotient(self, _text(self.body, other))

    def __rtruediv__(self, other: Any) -> Text:
        return _quotient(_text(self.body, other), self)

    def __floordiv__(self, other: Any) -> Text:
        return _whole("floor_div", self, _text(self.body, other))

    def __mod__(self, other: Any) -> Text:
        return _whole("floor_mod", self, _text(self.body, other))

    def __rfloordiv__(self, other: Any) -> Text:
        return _whole("floor_div", _text(self.body, other), self)

    def __rmod__(self, other: Any) -> Text:
        return _whole("floor_mod", _text(self.body, other), self)

    def __neg__(self) -> Text:
        return 0.0 - self if self.is_float else 0 - self

    def __pow__(self, power: int) -> Text:
        if not isinstance(power, int) or power < 1:
            raise NotImplementedError(f"no Triton meaning for the power {power}")
        total = self
        for _ in range(power - 1):
            total = total * self
        return total

    def __abs__(self) -> Text:
        return _absolute(self)

    def __invert__(self) -> Text:
        return self.body.value(f"~{self.code}", "int1")

    def __and__(self, other: Any) -> Any:
        return _logic("&", self, other)

    def __or__(self, other: Any) -> Any:
        return _logic("|", self, other)

    def __xor__(self, other: Any) -> Any:
        return _logic("^", self, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __eq__(self, other: Any) -> Any:
        return _comparison("==", self, other)

    def __ne__(self, other: Any) -> Any:
        return _comparison("!=", self, other)

    def __lt__(self, other: Any) -> Text:
        return _comparison("<", self, other)

    def __le__(self, other: Any) -> Text:
        return _comparison("<=", self, other)

    def __gt__(self, other: Any) -> Text:
        return _comparison(">", self, other)

    def __ge__(self, other: Any) -> Text:
        return _comparison(">=", self, other)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function not in _FUNCTIONS:
            name = getattr(function, "__name__", function)
            raise NotImplementedError(f"no Triton meaning for torch.{name}")
        return _FUNCTIONS[function](*args, **(kwargs or {}))


def _text(body: Body, value: Any) -> Text:
    return value if isinstance(value, Text) else body.constant(value)


def _pair(left: Any, right: Any) -> tuple[Text, Text]:
    """Two values, one of which may be a number; truths become numbers."""
    body = left.body if isinstance(left, Text) else right.body
    pair = [_text(body, value) for value in (left, right)]
    first, second = (value.to(torch.int64) if value.dtype == "int1" else value for value in pair)
    return first, second


def _float_dtype(*values: Text) -> str:
    return "float64" if any(value.dtype == "float64" for value in values) else "float32"


def _floating(*values: Text) -> list[Text]:
    dtype = getattr(torch, _float_dtype(*values))
    return [value if value.is_float else value.to(dtype) for value in values]


def _wide(value: Text) -> str:
    return value.code if value.low == value.high else f"{value.code}.to(tl.int64)"


_RANGES: dict[str, Callable[[Text, Text], list[float]]] = {
    "+": lambda a, b: [a.low + b.low, a.high + b.high],
    "-": lambda a, b: [a.low - b.high, a.high - b.low],
    "*": lambda a, b: [x * y for x in (a.low, a.high) for y in (b.low, b.high)],
}


def _arithmetic(symbol: str, left: Any, right: Any) -> Text:
    left, right = _pair(left, right)
    body = left.body
    if left.is_float or right.is_float:
        dtype = _float_dtype(left, right)
        left, right = _floating(left, right)
        return body.value(f"{left.code} {symbol} {right.code}", dtype)
    ends = [0.0 if math.isnan(end) else end for end in _RANGES[symbol](left, right)]
    low, high = min(ends), max(ends)
    is_wide = "int64" in (left.dtype, right.dtype)
    if not is_wide and max(abs(low), abs(high)) > _INT32:
        result = body.value(f"{_wide(left)} {symbol} {_wide(right)}", "int64", low, high)
    else:
        dtype = "int64" if is_wide else "int32"
        result = body.value(f"{left.code} {symbol} {right.code}", dtype, low, high)
    if symbol != "*":
        result.sum = (symbol, left, right)
    return result


def _quotient(left: Text, right: Text) -> Text:
    left, right = _floating(*_pair(left, right))
    return left.body.value(f"{left.code} / {right.code}", _float_dtype(left, right))


def _whole(function: str, left: Text, right: Text) -> Text:
    """A quotient rounded down, or what it leaves."""
    left, right = _pair(left, right)
    body = left.body
    if left.is_float or right.is_float:
        left, right = _floating(left, right)
        ratio = body.value(f"tl.floor({left.code} / {right.code})", _float_dtype(left, right))
        return ratio if function == "floor_div" else left - ratio * right
    dtype = "int64" if "int64" in (left.dtype, right.dtype) else "int32"
    symbol = "//" if function == "floor_div" else "%"
    plain = left.low >= 0 and right.low > 0
    code = (
        f"{left.code} {symbol} {right.code}" if plain else f"{function}({left.code}, {right.code})"
    )
    low, high = -math.inf, math.inf
    if right.low == right.high and right.low > 0:
        if function == "floor_mod":
            low, high = 0, right.low - 1
        elif math.isfinite(left.low) and math.isfinite(left.high):
            low, high = left.low // right.low, left.high // right.low
    return body.value(code, dtype, low, high)


def _comparison(symbol: str, left: Any, right: Any) -> Text:
    if isinstance(left, Text) and isinstance(right, bool) and left.dtype == "int1":
        return left if (symbol == "==") == right else ~left
    left, right = _pair(left, right)
    if left.is_float != right.is_float:
        left, right = _floating(left, right)
    return left.body.value(f"{left.code} {symbol} {right.code}", "int1")


def _logic(symbol: str, left: Text, right: Any) -> Any:
    if isinstance(right, Text):
        return left.body.value(f"{left.code} {symbol} {right.code}", "int1")
    if symbol == "^":
        return ~left if right else left
    return left if (symbol == "&") == bool(right) else bool(right)


def _where(condition: Text, left: Any, right: Any) -> Text:
    body = condition.body
    left, right = (_text(body, value) for value in (left, right))
    if left.dtype == right.dtype == "int1":
        return (condition & left) | (~condition & right)
    left, right = _pair(left, right)
    if left.is_float or right.is_float:
        left, right = _floating(left, right)
        dtype = _float_dtype(left, right)
    else:
        dtype = "int64" if "int64" in (left.dtype, right.dtype) else "int32"
    code = f"tl.where({condition.code}, {left.code}, {right.code})"
    return body.value(code, dtype, min(left.low, right.low), max(left.high, right.high))


def _extreme(name: str) -> Callable[[Any, Any], Text]:
    pick = max if name == "maximum" else min

    def function(left: Any, right: Any) -> Text:
        left, right = _pair(left, right)
        if left.is_float or right.is_float:
            left, right = _floating(left, right)
            dtype = _float_dtype(left, right)
        else:
            dtype = "int64" if "int64" in (left.dtype, right.dtype) else "int32"
        ends = pick(left.low, right.low), pick(left.high, right.high)
        return left.body.value(f"tl.{name}({left.code}, {right.code})", dtype, *ends)

    return function


_maximum, _minimum = _extreme("maximum"), _extreme("minimum")


def _clamp(value: Any, min: Any = None, max: Any = None) -> Any:
    value = value if min is None else _maximum(value, min)
    return value if max is None else _minimum(value, max)


def _absolute(value: Text) -> Text:
    if value.is_float:
        return value.body.value(f"tl.abs({value.code})", value.dtype)
    return _maximum(value, 0 - value)


def _sign(value: Text) -> Text:
    zero, one, less = (0.0, 1.0, -1.0) if value.is_float else (0, 1, -1)
    return _where(value > zero, one, _where(value < zero, less, zero))


def _power(left: Any, right: Any) -> Text:
    if not isinstance(left, Text) or isinstance(right, Text):
        raise NotImplementedError("no Triton meaning for a power that is not a constant")
    (left,) = _floating(left)
    if right == int(right):
        return 1.0 / left ** int(-right) if right < 0 else left ** int(right)
    root = left.body.value(f"tl.sqrt({left.code})", left.dtype)
    if right in (0.5, -0.5):
        return root if right > 0 else 1.0 / root
    # of negative numbers, the logarithm is NaN as the power is
    code = f"tl.exp2({left.body.constant(float(right)).code} * tl.log2({left.code}))"
    return left.body.value(code, left.dtype)


def _unary(code: str) -> Callable[[Text], Text]:
    def function(value: Text) -> Text:
        (value,) = _floating(value)
        text = code.format(x=value.code, tanh=value.body.tanh)
        return value.body.value(text, _float_dtype(value))

    return function


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.where: _where,
    torch.maximum: _maximum,
    torch.minimum: _minimum,
    torch.clamp: _clamp,
    torch.abs: _absolute,
    torch.sign: _sign,
    torch.pow: _power,
    torch.full_like: lambda like, value, dtype=None: like.body.constant(value),
    torch.floor: _unary("tl.floor({x})"),
    torch.exp: _unary("tl.exp({x})"),
    torch.log: _unary("tl.log({x})"),
    torch.sqrt: _unary("tl.sqrt({x})"),
    torch.tanh: _unary("{tanh}({x})"),
    torch.sin: _unary("tl.sin({x})"),
    torch.cos: _unary("tl.cos({x})"),
    torch.erf: _unary("tl.erf({x})"),
    torch.sinh: _unary("(tl.exp({x}) - tl.exp(-{x})) * 0.5"),
    torch.cosh: _unary("(tl.exp({x}) + tl.exp(-{x})) * 0.5"),
}


_PRINTED = frozenset([
    "Add", "Mul", "Abs", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "floor",
    "ceiling", "sign", "exp", "log", "tanh", "sin", "cos", "erf", "sinh", "cosh", "Load", "Where",
    "Truth", "And", "Or", "Not", "Xor",
])  # fmt: skip


def unprintable(formula: sympy.Basic) -> str | None:
    """A part of a formula that has no Triton text; None if there is none."""
    for part in sympy.preorder_traversal(formula):
        if isinstance(part, sympy.Pow):
            known = bool(part.exp.is_number)
        elif not part.args or isinstance(part, sympy.core.relational.Relational):
            known = True
        else:
            known = type(part).__name__ in _PRINTED
        if not known:
            return str(part)
    return None
