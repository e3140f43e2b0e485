"""Rules for operators that only move elements: where an element of the result comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from sparse_compile.expressions import Load
from sparse_compile.passes import bounds
from sparse_compile.passes.calls import Arguments, bind, operator_name
from sparse_compile.passes.logic import Opaque, choose, select
from sparse_compile.passes.shapes import expression, product

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparse_compile.passes.elements import ElementEvaluator, Index, Rule


def axis(dim: int, rank: int) -> int:
    """A dimension number that may count from the end, as one that counts from the start."""
    return dim + rank if dim < 0 else dim


def identity(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """The same element of the same tensor."""
    return ev.at(a["self"], index)


def reshaped(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """Elements in the same order in another shape."""
    source = a["self"]
    if "dtype" in a:  # view.dtype looks at the same bytes as another type
        raise Opaque
    return ev.at(source, reshape_index(index, ev.shape(node), ev.shape(source), ev.ranges))


def reshape_index(
    index: Index, shape: Sequence[sympy.Expr], source: Sequence[sympy.Expr], ranges: bounds.Ranges
) -> Index:
    """Where element `index` of a tensor of `shape` is in the same tensor of shape `source`."""
    outer = [(position, size) for position, size in zip(index, shape, strict=True) if size != 1]
    inner = [(axis, size) for axis, size in enumerate(source) if size != 1]
    result: list[sympy.Expr] = [sympy.Integer(0)] * len(source)
    while outer or inner:
        taken, given = _group(outer, inner)
        outer, inner = outer[len(taken) :], inner[len(given) :]
        if len(taken) == len(given) == 1:
            result[given[0][0]] = taken[0][0]
            continue
        flat = sympy.Integer(0)
        for position, size in taken:
            flat = flat * size + position
        for dim, size in reversed(given[1:]):
            flat, result[dim] = quotient_remainder(flat, size, ranges)
        if given:
            result[given[0][0]] = flat
    return tuple(result)


def _group(outer: list[Any], inner: list[Any]) -> tuple[list[Any], list[Any]]:
    """The shortest leading dimensions of both that hold equally many elements."""
    for n_outer in range(1, len(outer) + 1):
        for n_inner in range(1, len(inner) + 1):
            left = product([size for _, size in outer[:n_outer]])
            right = product([size for _, size in inner[:n_inner]])
            if left == right or sympy.expand(left - right) == 0:
                return outer[:n_outer], inner[:n_inner]
    return outer, inner


def quotient_remainder(
    value: sympy.Expr, divisor: sympy.Expr, ranges: bounds.Ranges
) -> tuple[sympy.Expr, sympy.Expr]:
    """`floor(value / divisor)` and `value mod divisor` of integers, split where it is certain."""
    whole, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(value)):
        part = term / divisor
        (whole if part.is_integer and part.as_numer_denom()[1] == 1 else rest).append(term)
    quotient = sympy.Add(*(term / divisor for term in whole))
    remainder = sympy.Add(*rest)
    low, high = bounds.interval(remainder, ranges)
    finite = not low.is_infinite and not high.is_infinite
    if finite and bounds.is_nonnegative(low) and bounds.is_nonnegative(divisor - 1 - high):
        return quotient, remainder
    if remainder.is_integer is not True and not remainder.has(Load):
        raise Opaque
    return quotient + _floor(rest, divisor), sympy.Mod(remainder, divisor)


def _floor(terms: list[sympy.Expr], divisor: sympy.Expr) -> sympy.Expr:
    """`floor(sum / divisor)`; a floor among integer terms is merged: it changes nothing."""
    inner = next((term for term in terms if isinstance(term, sympy.floor)), None)
    whole = all(term.is_integer for term in terms)
    if inner is not None and whole and divisor.is_Integer and divisor.is_positive:
        terms = [inner.args[0] if term is inner else term for term in terms]
    return sympy.floor(sympy.Add(*terms) / divisor)


def permuted(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """permute, transpose, t, mT, movedim: dimensions in another order."""
    source = a["self"]
    rank = len(index)
    name = operator_name(node)
    order = list(range(rank))
    if name == "aten::permute":
        order = [axis(dim, rank) for dim in a["dims"]]
    elif name in ("aten::movedim", "aten::moveaxis"):
        order = _moved(a["source"], a["destination"], rank)
    elif rank >= 2:
        first = a.get("dim0", a.get("axis0", -2))
        second = a.get("dim1", a.get("axis1", -1))
        first, second = axis(first, rank), axis(second, rank)
        order[first], order[second] = order[second], order[first]
    position: list[sympy.Expr] = [sympy.Integer(0)] * rank
    for out, dim in enumerate(order):
        position[dim] = index[out]
    return ev.at(source, tuple(position))


def _moved(source: int | list[int], destination: int | list[int], rank: int) -> list[int]:
    sources = [axis(dim, rank) for dim in ([source] if isinstance(source, int) else source)]
    targets = [
        axis(dim, rank) for dim in ([destination] if isinstance(destination, int) else destination)
    ]
    placed = dict(zip(targets, sources, strict=True))
    others = iter(dim for dim in range(rank) if dim not in sources)
    return [placed[out] if out in placed else next(others) for out in range(rank)]


def expanded(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """expand and broadcast_to: `at` itself takes index 0 where the source has size 1."""
    return ev.operand(a["self"], index)


def squeezed(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """squeeze and unsqueeze only drop or add dimensions of size 1."""
    return reshaped(ev, node, index, a)


def selected(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """select: one dimension fixed."""
    source = a["self"]
    shape = ev.shape(source)
    dim = axis(a["dim"], len(shape))
    position = wrapped(ev.number(a["index"]), shape[dim], ev)
    return ev.at(source, (*index[:dim], position, *index[dim:]))


def wrapped(position: sympy.Expr, size: sympy.Expr, ev: ElementEvaluator) -> sympy.Expr:
    """A position that may count from the end, as one that counts from the start."""
    low, high = bounds.interval(position, ev.ranges)
    if not low.is_infinite and bounds.is_nonnegative(low):
        return position
    if not high.is_infinite and bounds.is_nonnegative(-1 - high):
        return position + size
    raise Opaque


def sliced(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """slice: from `start` in steps of `step`."""
    source = a["self"]
    shape = ev.shape(source)
    dim = axis(a["dim"], len(shape))
    kept = ev.shape(node)[dim]
    step = ev.number(a["step"])
    start = sympy.Integer(0) if a["start"] is None else ev.number(a["start"])
    start = _slice_start(start, a["end"], step, shape[dim], kept, ev)
    return ev.at(source, (*index[:dim], start + step * index[dim], *index[dim + 1 :]))


def _slice_start(
    start: sympy.Expr,
    end: Any,
    step: sympy.Expr,
    size: sympy.Expr,
    kept: sympy.Expr,
    ev: ElementEvaluator,
) -> sympy.Expr:
    if kept == size and step == 1:
        return sympy.Integer(0)
    if bounds.is_nonnegative(start):
        return start  # past the end: then nothing is kept, and nothing is read
    if step == 1 and (end is None or (isinstance(end, int) and end >= 2**62)):
        return size - kept
    if bounds.is_nonnegative(-1 - start) and bounds.is_nonnegative(size + start):
        return size + start
    raise Opaque


def narrowed(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """narrow: from `start`, in steps of one."""
    source = a["self"]
    shape = ev.shape(source)
    dim = axis(a["dim"], len(shape))
    start = wrapped(ev.number(a["start"]), shape[dim], ev)
    return ev.at(source, (*index[:dim], start + index[dim], *index[dim + 1 :]))


def diagonal(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """diagonal: the last index walks along two dimensions at once."""
    source, offset = a["self"], a["offset"]
    rank = len(ev.shape(source))
    first, second = axis(a["dim1"], rank), axis(a["dim2"], rank)
    others = iter(index[:-1])
    along = {first: index[-1] + max(0, -offset), second: index[-1] + max(0, offset)}
    return ev.at(source, tuple(along[d] if d in along else next(others) for d in range(rank)))


def flipped(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """flip: counted from the end."""
    shape = ev.shape(node)
    dims = {axis(dim, len(shape)) for dim in a["dims"]}
    return ev.at(
        a["self"],
        tuple(shape[d] - 1 - i if d in dims else i for d, i in enumerate(index)),
    )


def rolled(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """roll along given dimensions."""
    if not a["dims"]:
        raise Opaque
    shape = ev.shape(node)
    position = list(index)
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        dim = axis(dim, len(shape))
        moved = position[dim] - ev.number(shift)
        position[dim] = quotient_remainder(moved, shape[dim], ev.ranges)[1]
    return ev.at(a["self"], tuple(position))


def repeated(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """repeat and tile: modulo the source's size."""
    source = a["self"]
    shape = ev.shape(source)
    used = index[len(index) - len(shape) :]
    out = ev.shape(node)[len(index) - len(shape) :]
    position = tuple(
        i if size == full else quotient_remainder(i, size, ev.ranges)[1]
        for i, size, full in zip(used, shape, out, strict=True)
    )
    return ev.at(source, position)


def repeat_interleaved(
    ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments
) -> sympy.Basic:
    """repeat_interleave by a number: each element several times in a row."""
    source, repeats = a.get("self"), a["repeats"]
    if source is None or (isinstance(repeats, fx.Node) and _is_tensor(repeats)):
        raise Opaque
    shape = ev.shape(source)
    times = ev.number(repeats)
    if a["dim"] is None:
        flat = quotient_remainder(index[0], times, ev.ranges)[0]
        return ev.at(source, reshape_index((flat,), (product(shape),), shape, ev.ranges))
    dim = axis(a["dim"], len(shape))
    position = quotient_remainder(index[dim], times, ev.ranges)[0]
    return ev.at(source, (*index[:dim], position, *index[dim + 1 :]))


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def item(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """One of several results: a piece of split, chunk or unbind, or a grid of meshgrid."""
    source, which = a["source"], a["item"]
    if not isinstance(source, fx.Node) or not isinstance(which, int):
        raise Opaque
    name = operator_name(source)
    given = bind(source) if name else {}
    if name == "aten::meshgrid":
        return _grid(ev, given, which, index)
    if name == "aten::broadcast_tensors":
        return ev.operand(given["tensors"][which], index)
    if name not in _SPLITS:
        raise Opaque
    whole = given["self"]
    dim = axis(given["dim"], len(ev.shape(whole)))
    if name == "aten::unbind":
        position = wrapped(sympy.Integer(which), ev.shape(whole)[dim], ev)
        return ev.at(whole, (*index[:dim], position, *index[dim:]))
    pieces = source.meta["val"]
    which = axis(which, len(pieces))
    start = sympy.Add(*(expression(piece.shape[dim]) for piece in pieces[:which]))
    return ev.at(whole, (*index[:dim], start + index[dim], *index[dim + 1 :]))


def _grid(ev: ElementEvaluator, a: Arguments, which: int, index: Index) -> sympy.Basic:
    tensors = a["tensors"]
    which = axis(which, len(tensors))
    order = list(range(len(tensors)))
    if a.get("indexing", "ij") == "xy" and len(tensors) >= 2:
        order[0], order[1] = 1, 0
    tensor = tensors[which]
    return ev.at(tensor, (index[order[which]],) if ev.shape(tensor) else ())


def concatenated(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """cat: which part an index falls into, as cases."""
    parts = [part for part in a["tensors"] if ev.shape(part) != (0,)]
    dim = axis(a["dim"], len(index))
    return joined(ev, node, index, parts, dim)


def joined(
    ev: ElementEvaluator, node: fx.Node, index: Index, parts: Sequence[fx.Node], dim: int
) -> sympy.Basic:
    """An element of `parts` laid one after the other along `dim`."""
    position = index[dim]
    size = ev.shape(parts[0])[dim]
    first = sympy.Lt(position, size)
    decided = True if len(parts) == 1 else bounds.decide(first, ev.ranges)

    def here() -> sympy.Basic:
        return _converted(ev.at(parts[0], index), parts[0], node)

    def after() -> sympy.Basic:
        rest = (*index[:dim], position - size, *index[dim + 1 :])
        return joined(ev, node, rest, parts[1:], dim)

    if decided is not None:
        return here() if decided else after()
    a, b = here(), after()
    if a == b:
        return a
    if size == 1 and isinstance(position, sympy.Symbol) and b.xreplace({position: size - 1}) == a:
        return b  # only position 0 falls into the first part, and b says the same there
    a = clamp_loads(a, ev)
    b = clamp_loads(b, ev)
    return choose(first, a, b) if ev.is_boolean(node) else select(first, a, b)


def _converted(value: sympy.Basic, part: fx.Node, node: fx.Node) -> sympy.Basic:
    if part.meta["val"].dtype != node.meta["val"].dtype:
        raise Opaque
    return value


def clamp_loads(expr: sympy.Basic, ev: ElementEvaluator) -> sympy.Basic:
    """`expr`, with the indices of loads kept inside their tensors where nothing else keeps them.

    Needed in branches: both sides of a case are computed, and only one is used.
    """
    replaced = {}
    for load in expr.atoms(Load):
        if any(position.has(Load) for position in load.args[1:]):
            raise Opaque
        shape = ev.shape(ev.operands[int(load.args[0])])
        position = [
            _clamped(i, size, ev.ranges) for i, size in zip(load.args[1:], shape, strict=True)
        ]
        replaced[load] = Load(load.args[0], *position)
    return expr.xreplace(replaced)


def _clamped(position: sympy.Expr, size: sympy.Expr, ranges: bounds.Ranges) -> sympy.Expr:
    low, high = bounds.interval(position, ranges)
    if low.is_infinite or not bounds.is_nonnegative(low):
        position = sympy.Max(position, 0)
    if high.is_infinite or not bounds.is_nonnegative(size - 1 - high):
        position = sympy.Min(position, size - 1)
    return position


def stacked(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """stack: the index along the new dimension says which tensor."""
    tensors = a["tensors"]
    dim = axis(a["dim"], len(index))
    rest = (*index[:dim], *index[dim + 1 :])
    which = index[dim]
    values = [_converted(ev.at(tensor, rest), tensor, node) for tensor in tensors]
    if which.is_Integer:
        return values[int(which)]
    result = values[-1]
    for number in range(len(values) - 2, -1, -1):
        condition = sympy.Eq(which, number)
        join = choose if ev.is_boolean(node) else select
        result = (
            values[number] if values[number] == result else join(condition, values[number], result)
        )
    return result


def padded(ev: ElementEvaluator, node: fx.Node, index: Index, a: Arguments) -> sympy.Basic:
    """constant_pad_nd and pad: a constant outside of the source."""
    source = a["self"]
    shape = ev.shape(source)
    if a.get("mode", "constant") != "constant":
        raise Opaque
    fill = ev.number(a["value"] if a.get("value") is not None else 0)
    inside: list[sympy.Basic] = []
    position = list(index)
    for count, dim in enumerate(reversed(range(len(shape)))):
        if 2 * count >= len(a["pad"]):
            break
        before, behind = (ev.number(size) for size in a["pad"][2 * count : 2 * count + 2])
        if before == behind == 0:
            continue
        position[dim] = index[dim] - before
        inside += [sympy.Ge(index[dim], before), sympy.Lt(position[dim], shape[dim])]
    undecided = []
    for condition in inside:
        decided = bounds.decide(condition, ev.ranges)
        if decided is None:
            undecided.append(condition)
        elif not decided:
            return sympy.Ne(fill, 0) if ev.is_boolean(node) else fill
    value = ev.at(source, tuple(position))
    if not undecided:
        return value
    value = clamp_loads(value, ev)
    condition = sympy.And(*undecided)
    if ev.is_boolean(node):
        return choose(condition, value, sympy.Ne(fill, 0))
    return select(condition, value, fill)


_SPLITS = frozenset(
    f"aten::{name}"
    for name in (
        "split",
        "split_with_sizes",
        "chunk",
        "unsafe_split",
        "unsafe_chunk",
        "unbind",
        "unsafe_split_with_sizes",
    )
)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten::{name}": rule for name in names.split()}


RULES: Mapping[str, Rule] = {
    **_table(identity, "clone contiguous detach alias lift_fresh_copy lift_fresh positive"),
    **_table(reshaped, "view reshape _unsafe_view flatten unflatten view_as reshape_as"),
    **_table(permuted, "permute transpose t mT mH numpy_T swapaxes swapdims movedim moveaxis"),
    **_table(expanded, "expand expand_as broadcast_to"),
    **_table(squeezed, "squeeze unsqueeze"),
    **_table(selected, "select"),
    **_table(sliced, "slice"),
    **_table(narrowed, "narrow"),
    **_table(diagonal, "diagonal"),
    **_table(flipped, "flip"),
    **_table(rolled, "roll"),
    **_table(repeated, "repeat tile"),
    **_table(repeat_interleaved, "repeat_interleave"),
    **_table(concatenated, "cat concat concatenate"),
    **_table(stacked, "stack"),
    **_table(padded, "constant_pad_nd pad"),
    "getitem": item,
}
