"""Which floating-point values of a trace are exactly what their formulas say.

Formulas speak of real numbers. A rounded value may stand in a bias, but not in a comparison: one
unit in the last place turns `<` around. So a comparison asks first how exact its operands are.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import fx

from sparse_compile.passes.calls import bind, operator_name
from sparse_compile.passes.rounding import round_to

SMALL = 128  # integers up to this size are exact in every floating-point type


class Exactness(IntEnum):
    """What can be relied on, from nothing to everything."""

    ROUNDED = 0  # close to the formula
    SIGN = 1  # negative, zero or positive as the formula
    HALF_INTEGER = 2  # an integer rounded to 16 bits: compares with small integers as the formula
    EXACT = 3  # equals the formula
    INTEGER = 4  # equals the formula and is an integer


HALF = (torch.float16, torch.bfloat16)
_SAME_NAMES = """view reshape _unsafe_view flatten unflatten view_as reshape_as transpose permute t
mT mH numpy_T swapaxes swapdims movedim moveaxis expand expand_as broadcast_to squeeze unsqueeze
select slice narrow flip roll repeat repeat_interleave tile diagonal clone contiguous detach alias
lift_fresh_copy lift_fresh positive tril triu neg negative abs absolute index index_select gather
cat concat concatenate stack minimum maximum min max clamp clip clamp_min clamp_max where
masked_fill constant_pad_nd pad embedding amax amin"""
_CAST_NAMES = "to _to_copy type_as copy float double half bfloat16"
_FILLED_NAMES = """full full_like new_full fill zeros zeros_like new_zeros zero ones ones_like
new_ones scalar_tensor eye"""
_SUM_NAMES = "sum cumsum diff"
_ROUNDING_NAMES = "floor ceil trunc round"


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


_SAME = _aten(_SAME_NAMES) | {"getitem"}
_CAST = _aten(_CAST_NAMES) | {"prims::convert_element_type"}
_FILLED = _aten(_FILLED_NAMES)
_SUMS = _aten(_SUM_NAMES)
_ROUNDING = _aten(_ROUNDING_NAMES)
_INDEX_ARGUMENTS = frozenset(("indices", "index", "condition", "mask", "dim", "size", "shape"))


class ExactnessOf:
    """Answers for nodes and scalars, and remembers."""

    def __init__(self, is_leaf: Callable[[fx.Node], bool]) -> None:
        """`is_leaf` tells nodes whose values are loaded as they are."""
        self._is_leaf = is_leaf
        self._memo: dict[fx.Node, Exactness] = {}

    def __call__(self, argument: Any) -> Exactness:
        """How exact a node or a scalar argument is."""
        if isinstance(argument, (list, tuple)):
            return min((self(item) for item in argument), default=Exactness.INTEGER)
        if not isinstance(argument, fx.Node):
            if not isinstance(argument, float) or argument.is_integer():
                return Exactness.INTEGER
            exact = round_to(argument, torch.float32) == argument
            return Exactness.EXACT if exact else Exactness.ROUNDED
        if argument not in self._memo:
            self._memo[argument] = self._of_node(argument)
        return self._memo[argument]

    def _of_node(self, node: fx.Node) -> Exactness:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            floating = isinstance(value, (float, torch.SymFloat))
            return Exactness.EXACT if floating else Exactness.INTEGER
        if not value.dtype.is_floating_point:
            return Exactness.INTEGER
        if self._is_leaf(node):
            return Exactness.EXACT
        name = operator_name(node)
        arguments = bind(node)
        if name in _SAME:
            items = [item for key, item in arguments.items() if key not in _INDEX_ARGUMENTS]
            return min(self._kept(item, value.dtype) for item in items)
        if name in _CAST:
            return self._cast(
                arguments.get("src", arguments.get("self", arguments.get("a"))), value
            )
        if name in _FILLED:
            filling = ("fill_value", "value", "s")
            written = (self(arguments[key]) for key in filling if key in arguments)
            return min(written, default=Exactness.INTEGER)
        if name in _ROUNDING:
            return self(arguments["self"])
        if name == "aten::arange":
            whole = all(
                self(arguments.get(key)) == Exactness.INTEGER for key in ("start", "end", "step")
            )
            if not whole:
                return Exactness.ROUNDED
            return Exactness.HALF_INTEGER if value.dtype in HALF else Exactness.INTEGER
        if name in _SUMS and value.dtype not in HALF:
            terms = [arguments.get(key) for key in ("self", "prepend", "append")]
            whole = all(self(term) == Exactness.INTEGER for term in terms)
            return Exactness.INTEGER if whole else Exactness.ROUNDED
        return self._arithmetic(name, arguments, value)

    def _kept(self, item: Any, dtype: torch.dtype) -> Exactness:
        """Of an argument whose values are passed on, as numbers of type `dtype`."""
        if isinstance(item, (list, tuple)):
            return min((self._kept(one, dtype) for one in item), default=Exactness.INTEGER)
        if isinstance(item, float):
            return max(self(item), Exactness.EXACT)  # the rules round it as the operator does
        return self._promoted(item, dtype)

    def _promoted(self, item: Any, dtype: torch.dtype) -> Exactness:
        """Of an argument after type promotion to `dtype`."""
        level = self(item)
        value = item.meta.get("val") if isinstance(item, fx.Node) else None
        if dtype not in HALF or not isinstance(value, torch.Tensor):
            return level
        if value.dtype in (dtype, torch.bool):
            return level
        return min(
            level, Exactness.ROUNDED if value.dtype.is_floating_point else Exactness.HALF_INTEGER
        )

    def _cast(self, source: Any, value: torch.Tensor) -> Exactness:
        if not isinstance(source, fx.Node):
            return Exactness.ROUNDED
        before = source.meta["val"].dtype
        level = self(source)
        if value.dtype not in HALF:
            return (
                level
                if torch.promote_types(before, value.dtype) == value.dtype
                else min(level, Exactness.SIGN)
            )
        if before == torch.bool or before == value.dtype:
            return level
        if level == Exactness.INTEGER:
            return Exactness.HALF_INTEGER
        return Exactness.SIGN if level >= Exactness.SIGN else Exactness.ROUNDED

    def _arithmetic(self, name: str, arguments: dict[str, Any], value: torch.Tensor) -> Exactness:
        """Sums, differences and products; all else is rounded."""
        if name not in ("aten::add", "aten::sub", "aten::rsub", "aten::mul"):
            return Exactness.ROUNDED
        items = (arguments["self"], arguments["other"])
        low = min(self._promoted(item, value.dtype) for item in items)
        if arguments.get("alpha", 1) != 1 or low < Exactness.SIGN:
            return Exactness.ROUNDED
        if low == Exactness.INTEGER and value.dtype not in HALF:
            return Exactness.INTEGER
        constants = [item for item in items if isinstance(item, (int, float))]
        if name == "aten::mul":
            grows = any(abs(constant) >= 1 for constant in constants)
            return Exactness.SIGN if grows or low == Exactness.INTEGER else Exactness.ROUNDED
        if low >= Exactness.EXACT:
            return Exactness.SIGN
        small = any(float(c).is_integer() and abs(c) <= SMALL for c in constants)
        exact = low >= Exactness.HALF_INTEGER and small
        return Exactness.SIGN if exact else Exactness.ROUNDED
