"""Rules for operators that look elements up or run over a dimension: index, gather, cumsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from sparse_compile.expressions import Load
from sparse_compile.passes.calls import Arguments, operator_name
from sparse_compile.passes.element_layout import axis, joined, wrapped
from sparse_compile.passes.logic import Opaque
from sparse_compile.passes.shapes import product

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparse_compile.passes.elements import ElementEvaluator, Index, Rule


def indexed(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """index: some dimensions looked up by tensors that broadcast together."""
    source, positions = a["self"], list(a["indices"])
    shape = ev.shape(source)
    positions += [None] * (len(shape) - len(positions))
    looked_up = [dim for dim, position in enumerate(positions) if position is not None]
    if any(positions[dim].meta["val"].dtype in (torch.bool, torch.uint8) for dim in looked_up):
        raise Opaque
    rank = max((positions[dim].meta["val"].ndim for dim in looked_up), default=0)
    adjacent = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    first = looked_up[0] if adjacent else 0  # where the looked-up dimensions are in the result
    common = index[first : first + rank]
    rest = iter((*index[:first], *index[first + rank :]))
    found = []
    for dim, position in enumerate(positions):
        if position is None:
            found.append(next(rest))
        else:
            found.append(_position(ev, position, ev.operand(position, common), shape[dim]))
    return ev.at(source, tuple(found))


def _position(
    ev: ElementEvaluator, source: fx.Node, value: sympy.Expr, size: sympy.Expr
) -> sympy.Expr:
    """A looked-up position, which may count from the end where the operator allows it."""
    if isinstance(value, Load):
        table = ev.constant(ev.operands[int(value.args[0])])
        if table is not None and table.numel() and int(table.min()) >= 0:
            ev.guard(ev.operands[int(value.args[0])])
            return value
    return wrapped(value, size, ev)


def gathered(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """gather: one dimension looked up, element by element."""
    source = a["self"]
    dim = axis(a["dim"], len(index))
    position = ev.at(a["index"], index)
    return ev.at(source, (*index[:dim], position, *index[dim + 1 :]))


def index_selected(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """index_select: one dimension looked up by a vector."""
    dim = axis(a["dim"], len(index))
    positions = a["index"]
    at = (index[dim],) if positions.meta["val"].ndim else ()
    return ev.at(a["self"], (*index[:dim], ev.at(positions, at), *index[dim + 1 :]))


def embedded(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """embedding: a row of the table."""
    return ev.at(a["weight"], (ev.at(a["indices"], index[:-1]), index[-1]))


def summed_up(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """cumsum of what is constant or linear along the dimension."""
    if not index:
        raise Opaque
    dim = axis(a["dim"], len(index))
    j = ev.dummy(node, dim, ev.shape(node)[dim])
    value = ev.numeric(a["self"], (*index[:dim], j, *index[dim + 1 :]), node)
    slope = sympy.diff(value, j) if not value.atoms(sympy.Function) else None
    i = index[dim]
    if not value.has(j):
        return value * (i + 1)
    if slope is None or slope.has(j):
        raise Opaque
    constant = value.xreplace({j: sympy.Integer(0)})
    return constant * (i + 1) + slope * i * (i + 1) / 2


def difference(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """diff of neighbours, with what is put before and behind."""
    source = a["self"]
    dim = axis(a["dim"], len(index))
    if a["n"] != 1 or ev.is_boolean(source):
        raise Opaque
    parts = [part for part in (a["prepend"], source, a["append"]) if part is not None]
    following = (*index[:dim], index[dim] + 1, *index[dim + 1 :])
    return joined(ev, source, following, parts, dim) - joined(ev, source, index, parts, dim)


def reduced(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """any, all, sum, amax, amin, mean over dimensions that the elements do not depend on."""
    source = a["self"]
    shape = ev.shape(source)
    dims = _reduced_dims(a, len(shape))
    kept = iter(index)
    position: list[sympy.Expr] = []
    for dim, size in enumerate(shape):
        if dim in dims:
            position.append(sympy.Integer(0) if size == 1 else ev.dummy(node, dim, size))
            if a.get("keepdim"):
                next(kept)
        else:
            position.append(next(kept))
    value = ev.at(source, tuple(position))
    if any(symbol in value.free_symbols for symbol in position if isinstance(symbol, sympy.Dummy)):
        raise Opaque
    name = operator_name(node)
    if name in ("aten::any", "aten::all"):
        if ev.is_boolean(source):
            return value
        raise Opaque
    if name == "aten::sum":
        count = product([shape[dim] for dim in dims])
        return ev.numeric(source, tuple(position), node) * count
    return value


def _reduced_dims(a: Arguments, rank: int) -> Sequence[int]:
    dims: Any = a.get("dim")
    if dims is None or dims == []:
        return range(rank)
    return sorted(axis(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims))


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten::{name}": rule for name in names.split()}


RULES: Mapping[str, Rule] = {
    **_table(indexed, "index"),
    **_table(gathered, "gather"),
    **_table(index_selected, "index_select"),
    **_table(embedded, "embedding"),
    **_table(summed_up, "cumsum"),
    **_table(difference, "diff"),
    **_table(reduced, "any all sum amax amin"),
}
