"""Biases that depend on nothing but the distance from query to key, as tables (T5, relative positions).

Before:  a bias of [H, T, S] elements, looked up by a bucket that the model computes for every pair.
After:   a table of [H, T + S - 1] elements, looked up by `s - t`; the bucket is computed once for
         every distance, by the model's own operators.
Skips:   biases that may need a gradient (its sum over a diagonal is no lookup), other devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from sparse_compile.evaluation import Source, evaluate
from sparse_compile.expressions import Load, b, h, s, t
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.exactness import Exactness
from sparse_compile.passes.shapes import shape_of

if TYPE_CHECKING:
    from sparse_compile.passes.elements import ElementEvaluator
    from sparse_compile.passes.emit import Emitter

DEVICES = frozenset(["cuda"])  # on the CPU, fused attention with a bias tensor is twice as fast
distance = sympy.Symbol("u", integer=True)  # s - t


@dataclass(frozen=True)
class Leaf:
    """A tensor of the model whose elements are a formula of the distance."""

    formula: sympy.Basic
    dtype: torch.dtype


@dataclass(frozen=True)
class Pointwise:
    """An operator of the model, to be computed once for every distance."""

    node: fx.Node
    arguments: tuple[Any, ...]  # `Pointwise`, `Leaf`, or plain values


@dataclass(frozen=True)
class Table:
    """A formula of `b`, `h` and the distance; its loads read `operands`."""

    formula: sympy.Expr
    operands: tuple[fx.Node | Pointwise, ...]
    queries: sympy.Expr  # how many there are
    keys: sympy.Expr

    @property
    def index(self) -> tuple[sympy.Expr, ...]:
        """Where a score reads the table."""
        return (*self.symbols, s - t + self.queries - 1)

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The indices of the table before the distance."""
        return tuple(symbol for symbol in (b, h) if self.formula.has(symbol))

    @property
    def dtype(self) -> torch.dtype:
        """Float64 where a number that it reads is."""
        wide = (node.meta["val"].dtype == torch.float64 for node in self.nodes)
        return torch.float64 if any(wide) else torch.float32

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What it is computed from."""
        return tuple(node for node in self.operands if isinstance(node, fx.Node))


def find_table(
    value: sympy.Basic, evaluator: ElementEvaluator, sizes: Mapping[sympy.Symbol, sympy.Expr]
) -> Table | None:
    """The table of a bias, or None where it depends on more than the distance.

    Args:
        value: The bias as a formula, with loads of the evaluator's operands.
        evaluator: Of the site's shadow.
        sizes: How far each index symbol runs.
    """
    operands: list[fx.Node | Pointwise] = []

    def number(operand: fx.Node | Pointwise) -> int:
        if operand not in operands:
            operands.append(operand)
        return operands.index(operand)

    def rebuilt(part: sympy.Basic) -> sympy.Basic:
        if not part.args:
            return part
        if not isinstance(part, Load):
            return part.func(*map(rebuilt, part.args))
        node, index = evaluator.operands[int(part.args[0])], part.args[1:]
        if not _reads_a_pair(index):
            return Load(number(node), *map(rebuilt, index))
        entry = _entry(node, index, evaluator, sizes)
        if entry is not None:
            return rebuilt(entry)
        return Load(number(_recipe(node, index, evaluator, sizes)), distance + sizes[t] - 1)

    try:
        formula = _of_distance(rebuilt(value))
    except _MoreThanDistanceError:
        return None
    known = {b, h, distance}.union(*(size.free_symbols for size in sizes.values()))
    if not formula.has(Load) or not formula.has(distance) or formula.free_symbols - known:
        return None
    return Table(formula, tuple(operands), sizes[t], sizes[s])


class _MoreThanDistanceError(Exception):
    """A value differs between pairs of the same distance, or may do so."""


def _reads_a_pair(index: Sequence[sympy.Expr]) -> bool:
    return {s, t} <= set().union(*(part.free_symbols for part in index if part.is_Symbol))


def _of_distance(value: sympy.Basic) -> sympy.Basic:
    """A formula of `s` and `t` as one of `s - t`."""

    def together(part: Relational) -> sympy.Basic:
        return part.func(part.lhs - part.rhs, 0) if part.has(t) else part

    value = value.xreplace({s: t + distance})
    value = value.replace(lambda part: isinstance(part, Relational), together)
    if value.has(t):
        raise _MoreThanDistanceError
    return value


def _entry(
    node: fx.Node,
    index: Sequence[sympy.Expr],
    evaluator: ElementEvaluator,
    sizes: Mapping[sympy.Symbol, sympy.Expr],
) -> sympy.Basic | None:
    """An element of `weight[positions]`, where positions may count from the end."""
    if voc.op_name(node) != "index":
        return None
    source, indices = node.args[:2]
    given = [(place, one) for place, one in enumerate(indices) if one is not None]  # type: ignore[arg-type]
    if len(given) != 1 or given[0][1].meta["val"].dtype == torch.bool:
        return None
    ((place, positions),) = given
    behind = place + positions.meta["val"].dim()
    found = evaluator.element(positions, index[place:behind], sizes)
    wrapped = sympy.Mod(found, shape_of(source)[place])  # type: ignore[arg-type]
    return evaluator.element(source, (*index[:place], wrapped, *index[behind:]), sizes)  # type: ignore[arg-type]


def _recipe(
    node: fx.Node,
    index: Sequence[sympy.Expr],
    evaluator: ElementEvaluator,
    sizes: Mapping[sympy.Symbol, sympy.Expr],
) -> Pointwise:
    """How to compute an operator's result for every distance instead of every pair."""
    if not _is_pointwise(node) or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        raise _MoreThanDistanceError
    arguments: list[Any] = []
    for argument in node.args:
        if not isinstance(argument, fx.Node):
            arguments.append(argument)
            continue
        rank = argument.meta["val"].dim() if voc.is_tensor(argument) else 0
        if rank == 0:
            raise _MoreThanDistanceError
        own = index[len(index) - rank :]
        found = evaluator.element(argument, own, sizes)
        if found.has(Load) or not evaluator.is_exact(argument, Exactness.EXACT):
            arguments.append(_recipe(argument, own, evaluator, sizes))
        else:
            arguments.append(Leaf(_of_distance(found), argument.meta["val"].dtype))
    return Pointwise(node, tuple(arguments))


def _is_pointwise(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable:
        return False
    return torch.Tag.pointwise in node.target.tags or voc.op_name(node) in voc.CASTS


def emit_table(
    emitter: Emitter, table: Table, sizes: Mapping[sympy.Symbol, sympy.Expr], device: torch.device
) -> fx.Node:
    """Write a table in front of a site: [B, H, T + S - 1], without the axes that it has not.

    Sites behind it with the same table, as the layers of a T5 are, read the same node.
    """
    key = (table, device, *(sizes[symbol] for symbol in table.symbols))
    if key in emitter.shared:
        return emitter.shared[key][0]
    count = emitter.size(table.queries + table.keys - 1)
    positions = emitter.call(torch.arange, count, device=device)
    u = emitter.call(torch.sub, positions, emitter.size(table.queries - 1))

    def vector(item: Any) -> Any:
        if isinstance(item, Pointwise):
            return emitter.call(item.node.target, *map(vector, item.arguments), **item.node.kwargs)  # type: ignore[arg-type]
        if not isinstance(item, Leaf):
            return item
        return emitter.traced(lambda at: _values(item, at), u)

    nodes = [emitter.value(o) if isinstance(o, fx.Node) else vector(o) for o in table.operands]
    symbols = table.symbols
    indices = []
    for place, symbol in enumerate(symbols):
        index = emitter.call(torch.arange, emitter.size(sizes[symbol]), device=device)
        indices.append(emitter.method("reshape", index, (-1,) + (1,) * (len(symbols) - place)))
    free = sorted(table.formula.free_symbols - {b, h, distance}, key=str)
    lengths = [emitter.size_tensor(symbol, device) for symbol in free]

    def function(at: Any, *others: Any) -> Any:
        given, loaded = others[: len(indices) + len(lengths)], others[len(indices) + len(lengths) :]
        env: dict[sympy.Basic, Any] = dict(zip((*symbols, *free), given, strict=True))
        env = {k: Source(v, torch.int64, ()) for k, v in (*env.items(), (distance, at))}
        examples = (node.meta["example_value"] for node in nodes)
        sources = [
            Source(proxy, example.dtype, tuple(example.shape))
            for proxy, example in zip(loaded, examples, strict=True)
        ]
        return evaluate(table.formula, env, sources, dtype=table.dtype)

    emitter.shared[key] = (emitter.traced(function, u, *indices, *lengths, *nodes),)
    return emitter.shared[key][0]


def _values(leaf: Leaf, at: Any) -> Any:
    found = evaluate(leaf.formula, {distance: Source(at, torch.int64, ())}, [])
    if isinstance(found, (bool, int, float)):
        return torch.full_like(at, found, dtype=leaf.dtype)
    return found.to(leaf.dtype)
