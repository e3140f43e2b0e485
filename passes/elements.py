"""What one element of a traced tensor is, as a formula over its indices.

`ElementEvaluator.element(mask, (b, 0, t, s))` reads the shadow graph backwards from `mask` and
gives a sympy expression: a number, a formula of the indices, or loads from the tensors that it
could not see through. Tensors of dtype bool give Booleans.

Two things are taken for granted: indices and positions are below 2**24 (so that float32 holds
them), and tensors that masks are made of hold no NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.expressions import Load, Truth
from sparse_compile.passes import bounds, element_layout, element_rules
from sparse_compile.passes.buffer_values import BufferValue, recognise
from sparse_compile.passes.calls import Arguments, bind, operator_name
from sparse_compile.passes.exactness import HALF, Exactness, ExactnessOf
from sparse_compile.passes.logic import Opaque, exact_float, leaves
from sparse_compile.passes.rounding import is_representable
from sparse_compile.passes.shapes import expression, shape_of

MAX_STEPS = 5000
MAX_DEPTH = 120

Index = tuple[sympy.Expr, ...]
_Memo = dict[tuple[fx.Node, Index], sympy.Basic]
Rule = Callable[["ElementEvaluator", fx.Node, Index, Arguments], sympy.Basic]

RULES: Mapping[str, Rule] = {**element_layout.RULES, **element_rules.RULES}


class Unproven(Exception):
    """The elements of a node cannot be written as a formula."""

    def __init__(self, code: str, message: str) -> None:
        """A stable code and a sentence."""
        super().__init__(message)
        self.code = code
        self.message = message


class ElementEvaluator:
    """Gives elements of shadow nodes as formulas; remembers what it found.

    Args:
        constants: Placeholders and attributes whose real values are known when compiling. Their
            contents are looked at, and every one that a formula depends on is a value guard.
        frozen: Nodes whose storage a view changes later: always loaded, never seen through.
        ranges: Sizes of index symbols, where the caller's indices are compound expressions;
            plain symbols are bounded by the shape of the node that they index.
        same: For nodes whose value another one has too, that one: it is looked at instead.
    """

    def __init__(
        self,
        constants: Mapping[fx.Node, torch.Tensor] | None = None,
        frozen: Collection[fx.Node] = (),
        ranges: bounds.Ranges | None = None,
        same: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        """An evaluator that has seen nothing yet."""
        self.operands: list[fx.Node] = []
        self.value_guards: list[fx.Node] = []
        self.ranges: dict[sympy.Symbol, sympy.Expr] = {}  # of the element that is asked for
        self.exactness = ExactnessOf(self.is_leaf)
        self._constants = dict(constants or {})
        self._frozen = frozenset(frozen)
        self._same = same or {}
        self._given_ranges = dict(ranges or {})
        self._dummy_ranges: dict[sympy.Symbol, sympy.Expr] = {}
        # what was concluded for some ranges need not hold for others
        self._memos: dict[frozenset[Any], _Memo] = {}
        self._memo: _Memo = {}
        self._shapes: dict[fx.Node, tuple[sympy.Expr, ...]] = {}
        self._values: dict[fx.Node, BufferValue] = {}
        self._dummies: dict[tuple[fx.Node, int], sympy.Symbol] = {}
        self._steps = 0
        self._depth = 0

    def element(
        self, node: fx.Node, index: Sequence[sympy.Expr], ranges: bounds.Ranges | None = None
    ) -> sympy.Basic:
        """`node[index]` as a formula over the symbols of `index`, loads and sizes.

        Args:
            node: A tensor of the shadow.
            index: One expression per dimension.
            ranges: Sizes of the symbols, where the index does not tell: `b * H + h`.

        Raises:
            Unproven: The node is no tensor, or the formula would be too long.
        """
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise Unproven("not-a-tensor", f"{node.name} is not a tensor")
        shape = self.shape(node)
        if len(shape) != len(index):
            raise Unproven("rank", f"{node.name} has {len(shape)} dimensions, not {len(index)}")
        here = {**self._given_ranges, **(ranges or {})}
        for position, size in zip(index, shape, strict=True):
            if isinstance(position, sympy.Symbol) and size != 1:
                here.setdefault(position, size)
        self._memo = self._memos.setdefault(frozenset(here.items()), {})
        self.ranges = {**self._dummy_ranges, **here}
        self._steps = self._depth = 0
        return self.at(node, tuple(sympy.sympify(position) for position in index))

    def at(self, node: fx.Node, index: Index) -> sympy.Basic:
        """`node[index]` for rules; an index along a dimension of size 1 is taken as 0."""
        node = self._same.get(node, node)
        index = self._clipped(node, index)
        key = (node, index)
        if key not in self._memo:
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise Unproven("too-complex", f"the formula of {node.name} is too long")
            self._depth += 1
            try:
                self._memo[key] = self._evaluate(node, index)
            finally:
                self._depth -= 1
        return self._memo[key]

    def _clipped(self, node: fx.Node, index: Index) -> Index:
        return tuple(
            sympy.Integer(0) if size == 1 else position
            for position, size in zip(index, self.shape(node), strict=True)
        )

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """The sizes of the tensor that a node yields."""
        known = self._shapes.get(node)
        if known is None:
            known = self._shapes[node] = shape_of(node)
        return known

    def is_leaf(self, node: fx.Node) -> bool:
        """True if nothing is known of how the node's elements come about."""
        if node in self._frozen or node.op != "call_function":
            return True
        return _rule_of(node) is None

    def _evaluate(self, node: fx.Node, index: Index) -> sympy.Basic:
        if node in self._frozen:
            return self._load(node, index)
        known = self._buffer_element(node, index)
        if known is not None:
            return known
        rule = None if self.is_leaf(node) else _rule_of(node)
        if rule is None or self._depth > MAX_DEPTH:
            return self._load(node, index)
        try:
            value = rule(self, node, index, bind(node))
        except Opaque:
            return self._load(node, index)
        if value.has(sympy.nan, sympy.zoo):
            return self._load(node, index)
        return value

    def _load(self, node: fx.Node, index: Index) -> sympy.Basic:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise Unproven("not-a-tensor", f"{node.name} is not a tensor")
        if node not in self.operands:
            self.operands.append(node)
        value = Load(sympy.Integer(self.operands.index(node)), *index)
        return sympy.Ne(value, 0) if self.is_boolean(node) else value

    def _buffer_element(self, node: fx.Node, index: Index) -> sympy.Basic | None:
        tensor = self.constant(node)
        if tensor is None:
            return None
        sizes = []
        for position, size in zip(index, tensor.shape, strict=True):
            high = bounds.interval(position, self.ranges)[1]
            used = high + 1 if high.is_Integer and 0 <= high < size else sympy.Integer(size)
            sizes.append(int(used))
        value = self._values.get(node)
        if value is None or not value.covers(sizes):
            value = self._values[node] = recognise(tensor, sizes)
        if value.formula is None:
            return None
        self.guard(node)
        return value.formula(index)

    def guard(self, node: fx.Node) -> None:
        """Note that a formula rests on the contents of a buffer."""
        if node not in self.value_guards:
            self.value_guards.append(node)

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The real value of a buffer or a literal, if it is known and fixed."""
        if node.op not in ("placeholder", "get_attr") or node in self._frozen:
            return None
        return self._constants.get(node)

    def is_boolean(self, node: fx.Node) -> bool:
        """True if the node's elements are Booleans."""
        return node.meta["val"].dtype == torch.bool

    def operand(self, argument: Any, index: Index) -> sympy.Basic:
        """An argument of an element-wise operator that yields `[index]`: broadcast, as it is."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            rank = argument.meta["val"].ndim
            return self.at(argument, index[len(index) - rank :])
        return self.number(argument)

    def numeric(self, argument: Any, index: Index, node: fx.Node | None = None) -> sympy.Expr:
        """Like `operand`; Booleans become 0 and 1. `node` computes with it, in its own type."""
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta["val"], torch.Tensor):
            return self.number(argument)
        if self.is_boolean(argument):
            return Truth(self.operand(argument, index))
        dtype = argument.meta["val"].dtype if node is None else node.meta["val"].dtype
        return self.widened(argument, index, dtype)

    def widened(self, source: fx.Node, index: Index, dtype: torch.dtype) -> sympy.Basic:
        """An element of `source`, broadcast, fit to be converted to `dtype`.

        A formula that was rounded to 16 bits is loaded where a wider type would show the rounding.
        """
        value = self.operand(source, index)
        narrow = source.meta["val"].dtype
        if narrow not in HALF or not dtype.is_floating_point or dtype == narrow:
            return value
        if self.is_exact(source, Exactness.EXACT) or isinstance(value, Load):
            return value
        if all(is_representable(leaf, narrow) for leaf in leaves(value)):
            return value
        return self._load(
            source, self._clipped(source, index[len(index) - len(self.shape(source)) :])
        )

    def number(self, argument: Any) -> sympy.Expr:
        """A scalar argument: Python number, or a node that yields one."""
        if isinstance(argument, fx.Node):
            argument = argument.meta["val"]
        if isinstance(argument, bool):
            return sympy.Integer(int(argument))
        if isinstance(argument, (torch.SymBool, torch.Tensor)) or argument is None:
            raise Opaque
        if isinstance(argument, float):
            return exact_float(argument)
        return expression(argument)

    def dummy(self, node: fx.Node, dim: int, size: sympy.Expr) -> sympy.Symbol:
        """An index symbol for a dimension that the node reduces over."""
        if (node, dim) not in self._dummies:
            symbol = sympy.Dummy("j", integer=True, nonnegative=True)
            self._dummies[node, dim] = symbol
            self._dummy_ranges[symbol] = self.ranges[symbol] = size
        return self._dummies[node, dim]

    def is_exact(self, argument: Any, least: Exactness) -> bool:
        """True if comparing the argument decides as its formula does; see `Exactness`."""
        return self.exactness(argument) >= least


def _rule_of(node: fx.Node) -> Rule | None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    rule = RULES.get(operator_name(node))
    if isinstance(node.target, torch._ops.OpOverload):
        return None if any(argument.is_out for argument in node.target._schema.arguments) else rule
    return rule
