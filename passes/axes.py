"""Axes: what each dimension of a tensor means, followed through views, permutes and expands.

A tensor's layout is a tuple of dimensions, each an ordered tuple of axes (row-major, outermost
first); a dimension of size 1 has none. A view that splits a dimension splits the axis everywhere
at once, so two tensors share an axis exactly when they are indexed by the same quantity.
`K_rep[b, (hkv g), s, d]` peeled to `K[b, hkv, s, d]` has lost `g`: that is how a GQA ratio shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy

Layout = tuple[tuple["Axis", ...], ...]


class AxisMismatch(Exception):
    """A view cuts across axes, so that no layout describes its input."""


class Axis:
    """One index of an attention computation; may later turn out to consist of several."""

    __slots__ = ("label", "parts", "size")

    def __init__(self, size: sympy.Expr, label: str = "") -> None:
        """An axis of `size` elements, not split."""
        self.size = size
        self.label = label
        self.parts: tuple[Axis, ...] | None = None

    def __repr__(self) -> str:
        return f"{self.label or 'a'}{self.size}"


def new_axes(size: sympy.Expr, label: str = "") -> tuple[Axis, ...]:
    """The axes of a fresh dimension: none when its size is 1."""
    return () if size == 1 else (Axis(size, label),)


def resolve(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Axes with every split applied."""
    out: list[Axis] = []
    for axis in axes:
        out.extend(resolve(axis.parts) if axis.parts is not None else (axis,))
    return tuple(out)


def resolve_layout(layout: Layout) -> Layout:
    """A layout with every split applied."""
    return tuple(resolve(dim) for dim in layout)


def axes_of(layout: Layout) -> tuple[Axis, ...]:
    """All axes of a layout in row-major order."""
    return resolve(axis for dim in layout for axis in dim)


def size_of(axes: Iterable[Axis]) -> sympy.Expr:
    """The number of elements that axes span together."""
    return sympy.Mul(*(axis.size for axis in resolve(axes)))


def quotient(size: sympy.Expr, by: sympy.Expr) -> sympy.Expr | None:
    """`size / by` where that is provably whole, else None."""
    if size.is_Integer and by.is_Integer:
        return sympy.Integer(int(size) // int(by)) if int(size) % int(by) == 0 else None
    ratio = sympy.cancel(size / by)
    return ratio if ratio.is_integer and sympy.denom(ratio) == 1 else None


def split(axis: Axis, outer: sympy.Expr) -> tuple[Axis, Axis]:
    """Split an axis into `outer` groups, everywhere it is used.

    Raises:
        AxisMismatch: `outer` does not divide its size.
    """
    inner = quotient(axis.size, outer)
    if inner is None or inner == 1:
        raise AxisMismatch(f"an axis of {axis.size} cannot be split in {outer}")
    axis.parts = (Axis(outer, axis.label), Axis(inner, axis.label))
    return axis.parts  # type: ignore[return-value]


def unify(axes: Sequence[Axis], others: Sequence[Axis]) -> None:
    """Declare that two dimensions of equal size are indexed by the same quantity."""
    first, rest = resolve(axes), resolve(others)
    if first == rest:
        return
    if len(first) != 1 or first[0].size != size_of(rest):
        raise AxisMismatch("two dimensions differ")
    first[0].parts = rest


def regroup(layout: Layout, shape: Sequence[sympy.Expr]) -> Layout:
    """The layout of the same elements seen in another `shape` (view, reshape, squeeze).

    Raises:
        AxisMismatch: the shape cuts across axes.
    """
    pending = list(reversed(axes_of(layout)))
    out: list[tuple[Axis, ...]] = []
    for size in shape:
        dim: list[Axis] = []
        missing = size
        while missing != 1:
            if not pending:
                raise AxisMismatch("a view has more elements than its input")
            axis = pending.pop()
            rest = quotient(missing, axis.size)
            if rest is None:
                head, tail = split(axis, missing)
                pending.append(tail)
                axis, rest = head, sympy.Integer(1)
            dim.append(axis)
            missing = rest
        out.append(tuple(dim))
    if pending:
        raise AxisMismatch("a view has fewer elements than its input")
    return tuple(out)


def drop_expanded(layout: Layout, shape: Sequence[sympy.Expr]) -> Layout:
    """The layout of an expand's input, given the layout of its output."""
    tail = layout[len(layout) - len(shape) :]
    return tuple(() if size == 1 else dim for dim, size in zip(tail, shape, strict=True))


def drop_repeated(layout: Layout, shape: Sequence[sympy.Expr]) -> Layout:
    """The layout of the input of `Tensor.repeat`: copies are the outer part of each dimension.

    Raises:
        AxisMismatch: a repeated dimension is merged with others in a way that hides the copies.
    """
    tail = layout[len(layout) - len(shape) :]
    out = []
    for dim, size in zip(tail, shape, strict=True):
        total = size_of(dim)
        if size == 1:
            out.append(())
        elif total == size:
            out.append(dim)
        else:
            copies = quotient(total, size)
            if copies is None:
                raise AxisMismatch(f"{total} elements are no multiple of {size}")
            out.append(regroup((dim,), (copies, size))[1])
    return tuple(out)


class Indexing:
    """Writes indices of dimensions in terms of symbols that run over groups of axes."""

    def __init__(self, groups: Sequence[tuple[Sequence[Axis], sympy.Symbol]]) -> None:
        """Each symbol runs over its axes in row-major order."""
        self._place = {
            axis: (tuple(axes), position, symbol)
            for axes, symbol in groups
            for position, axis in enumerate(axes)
        }

    def knows(self, axis: Axis) -> bool:
        """Whether an axis belongs to a group."""
        return axis in self._place

    def dim(self, dim: Sequence[Axis]) -> sympy.Expr:
        """The index into one dimension; 0 for a dimension of size 1.

        Raises:
            KeyError: an axis belongs to no group.
        """
        total: sympy.Expr = sympy.Integer(0)
        start = 0
        while start < len(dim):
            axes, first, symbol = self._place[dim[start]]
            count = 1
            while axes[first + count : first + count + 1] == tuple(
                dim[start + count : start + count + 1]
            ) and start + count < len(dim):
                count += 1
            run = dim[start : start + count]
            total = total * size_of(run) + self._run(axes, first, count, symbol)
            start += count
        return total

    @staticmethod
    def _run(axes: Sequence[Axis], first: int, count: int, symbol: sympy.Symbol) -> sympy.Expr:
        inner = size_of(axes[first + count :])
        value = symbol if inner == 1 else sympy.floor(symbol / inner)
        return value if first == 0 else sympy.Mod(value, size_of(axes[first : first + count]))
