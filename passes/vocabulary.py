"""The small vocabulary that detection reads a shadow in: operator names, views, contractions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.passes.axes import (
    Axis,
    AxisMismatch,
    Layout,
    drop_expanded,
    drop_repeated,
    new_axes,
    quotient,
    regroup,
)
from sparse_compile.passes.shapes import expression, shape_of

RESHAPES = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "view_copy",
        "_reshape_alias",
    ]
)
SAME = frozenset(["contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "view_as_real_"])
CASTS = frozenset(
    ["to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "convert_element_type"]
)


def op_name(node: fx.Node) -> str:
    """The operator's base name without overload; in-place operators under their own name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims"):
        return target._schema.name.split("::")[1]
    return ""


def plain_name(node: fx.Node) -> str:
    """`op_name` with the underscore of in-place operators removed: what value it computes."""
    name = op_name(node)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


_TAKES_SHAPE = frozenset(["expand_as", "view_as", "reshape_as", "type_as"])  # of the second
_TAKES_NO_VALUE = frozenset(
    ["zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"]
)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose elements matter: not those that only lend their shape or dtype."""
    name = plain_name(node)
    if name in _TAKES_NO_VALUE:
        return []
    return node.all_input_nodes[:1] if name in _TAKES_SHAPE else node.all_input_nodes


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node that yields one tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def same_dtype(node: fx.Node) -> bool:
    """Whether a cast leaves the dtype as it is."""
    source = node.args[0]
    return node.meta["val"].dtype == source.meta["val"].dtype  # type: ignore[union-attr]


def unview(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """One step back through an operator that only moves elements.

    Args:
        node: A shadow node whose dimensions have `layout`.
    Returns:
        Its input and the input's layout, or None where `node` computes something.
    Raises:
        AxisMismatch: the view cuts across axes.
    """
    name = op_name(node)
    source = node.args[0] if node.args else None
    if name in ("stack", "cat"):
        return _unview_copies(node, name, layout)
    if not is_tensor(source):
        return None
    assert isinstance(source, fx.Node)
    shape = shape_of(source)
    if name in RESHAPES:
        return source, regroup(layout, shape)
    if name in SAME or (name in CASTS and same_dtype(node)):
        return source, layout
    if name == "dropout" and not (argument(node, 1, "p") and argument(node, 2, "train")):
        return source, layout
    if name in ("expand", "expand_as", "broadcast_to"):
        return source, drop_expanded(layout, shape)
    if name in ("repeat", "tile"):
        return source, drop_repeated(layout, shape)
    if name == "repeat_interleave" and isinstance(argument(node, 1, "repeats"), (int, fx.Node)):
        return _unview_interleave(node, source, layout)
    if name in ("slice", "narrow") and shape_of(node) == shape:
        return source, layout
    order = permutation(node)
    if order is not None:
        back: list[tuple[Axis, ...]] = [()] * len(order)
        for position, origin in enumerate(order):
            back[origin] = layout[position]
        return source, tuple(back)
    return None


def _unview_copies(node: fx.Node, name: str, layout: Layout) -> tuple[fx.Node, Layout] | None:
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(set(parts)) != 1 or not is_tensor(parts[0]):
        return None
    source = parts[0]
    dim = argument(node, 1, "dim", 0) % len(layout)
    if name == "stack":
        return source, layout[:dim] + layout[dim + 1 :]
    if len(parts) == 1:
        return source, layout
    return source, drop_repeated(layout, shape_of(source))


def _unview_interleave(
    node: fx.Node, source: fx.Node, layout: Layout
) -> tuple[fx.Node, Layout] | None:
    dim = argument(node, 2, "dim")
    shape = shape_of(source)
    if dim is None or (
        isinstance(argument(node, 1, "repeats"), fx.Node) and is_tensor(node.args[1])
    ):
        return None
    dim = dim % len(shape)
    total = shape_of(node)[dim]
    copies = quotient(total, shape[dim])
    if copies is None:
        return None
    kept = () if shape[dim] == 1 else regroup((layout[dim],), (shape[dim], copies))[0]
    return source, (*layout[:dim], kept, *layout[dim + 1 :])


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """For an operator that reorders dimensions: the input dimension of each output dimension."""
    name = op_name(node)
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    rank = value.dim()
    if name == "permute":
        return tuple(d % rank for d in node.args[1])  # type: ignore[union-attr]
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = (d % rank for d in node.args[1:3])  # type: ignore[operator]
    elif name in ("t", "mT", "adjoint", "matrix_H", "mH") and rank >= 2:
        a, b = rank - 2, rank - 1
    elif name in ("numpy_T", "T"):
        return tuple(reversed(range(rank)))
    elif name in ("movedim", "moveaxis"):
        return _moved(node.args[1], node.args[2], rank)
    else:
        return None
    order = list(range(rank))
    order[a], order[b] = b, a
    return tuple(order)


def _moved(source: Any, target: Any, rank: int) -> tuple[int, ...]:
    froms = [d % rank for d in (source if isinstance(source, (list, tuple)) else [source])]
    tos = [d % rank for d in (target if isinstance(target, (list, tuple)) else [target])]
    rest = iter(d for d in range(rank) if d not in froms)
    placed = dict(zip(tos, froms, strict=True))
    return tuple(placed[d] if d in placed else next(rest) for d in range(rank))


def peel(node: fx.Node, layout: Layout) -> list[tuple[fx.Node, Layout]]:
    """A node and, step by step, what it is a view of; stops where something is computed."""
    found = [(node, layout)]
    while True:
        try:
            step = unview(*found[-1])
        except AxisMismatch:
            return found
        if step is None:
            return found
        found.append(step)


def follow_view(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout after an operator that only moves elements, given its input's layout."""
    name = op_name(node)
    shape = shape_of(node)
    if name in RESHAPES:
        return regroup(layout, shape)
    if name in SAME or name in CASTS or name == "detach_":
        return layout
    if name in ("expand", "slice", "narrow") and shape == shape_of(node.args[0]):  # type: ignore[arg-type]
        return layout
    order = permutation(node)
    return None if order is None else tuple(layout[origin] for origin in order)


@dataclass(frozen=True)
class Contraction:
    """A product of two tensors summed over the labels that its output lacks, like an einsum."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    out_labels: tuple[str, ...]  # "" for a kept dimension of size 1

    def operands(self) -> tuple[tuple[fx.Node, tuple[str, ...]], tuple[fx.Node, tuple[str, ...]]]:
        """Both factors with their labels."""
        return (self.left, self.left_labels), (self.right, self.right_labels)

    def layouts_from_output(self, layout: Layout) -> tuple[Layout, Layout, tuple[Axis, ...]]:
        """Both factors' layouts and the summed axes, from the output's layout."""
        axes = dict(zip(self.out_labels, layout, strict=True))
        summed: list[Axis] = []
        for node, labels in self.operands():
            for label, size in zip(labels, shape_of(node), strict=True):
                if label not in axes and size != 1:
                    axes[label] = new_axes(size, "d")
                    summed.extend(axes[label])
        left, right = (self._layout(node, labels, axes) for node, labels in self.operands())
        return left, right, tuple(summed)

    def layouts_from_operand(self, operand: fx.Node, layout: Layout) -> tuple[Layout, Layout]:
        """The other factor's and the output's layout, from one factor's layout."""
        (first, first_labels), (second, second_labels) = self.operands()
        if operand is not first:
            first_labels, (second, second_labels) = second_labels, (first, first_labels)
        axes = dict(zip(first_labels, layout, strict=True))
        for label, size in zip(second_labels, shape_of(second), strict=True):
            if not axes.get(label) and size != 1:
                axes[label] = new_axes(size, "v")
        other = self._layout(second, second_labels, axes)
        return other, tuple(axes.get(label, ()) for label in self.out_labels)

    @staticmethod
    def _layout(node: fx.Node, labels: Sequence[str], axes: dict[str, tuple[Axis, ...]]) -> Layout:
        return tuple(
            () if size == 1 else axes[label]
            for label, size in zip(labels, shape_of(node), strict=True)
        )


def contraction(node: fx.Node) -> Contraction | None:
    """Read a node as a contraction of two tensors, or None."""
    name = op_name(node)
    if name in ("matmul", "bmm", "mm", "mv", "linalg_matmul"):
        left, right = node.args[0], node.args[1]
    elif name in ("baddbmm", "addmm"):
        left, right = node.args[1], node.args[2]
    elif name == "einsum":
        return _einsum(node)
    elif name == "sum":
        return _summed_product(node)
    else:
        return None
    if not is_tensor(left) or not is_tensor(right):
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _matmul(node, left, right)


def _matmul(node: fx.Node, left: fx.Node, right: fx.Node) -> Contraction:
    a, b = left.meta["val"].dim(), right.meta["val"].dim()
    batch = [f"b{i}" for i in range(max(a, b) - 2)] if max(a, b) > 2 else []
    left_labels = (*batch[len(batch) - (a - 2) :], "m", "k") if a > 1 else ("k",)
    right_labels = (*batch[len(batch) - (b - 2) :], "k", "n") if b > 1 else ("k",)
    out = (*batch, *(("m",) if a > 1 else ()), *(("n",) if b > 1 else ()))
    return Contraction(node, left, right, left_labels, right_labels, out)


def _einsum(node: fx.Node) -> Contraction | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or len(operands) != 2:  # type: ignore[arg-type]
        return None
    left, right = operands  # type: ignore[misc]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    ranks = [operand.meta["val"].dim() for operand in (left, right)]
    dots = [rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True)]
    names = [f".{i}" for i in range(max(dots))]
    labels = [
        _labels(part, names[len(names) - count :]) for part, count in zip(parts, dots, strict=True)
    ]
    if not arrow:
        counts = list(itertools.chain(*labels))
        output = "..." + "".join(
            sorted({c for c in counts if counts.count(c) == 1 and len(c) == 1})
        )
    out = _labels(output, names if "..." in output else [])
    if any(len(set(found)) != len(found) for found in labels):
        return None
    only = (set(labels[0]) ^ set(labels[1])) - set(out)
    sizes = {
        label: size
        for found, operand in zip(labels, (left, right), strict=True)
        for label, size in zip(found, shape_of(operand), strict=True)
    }
    if any(sizes[label] != 1 for label in only):
        return None  # one operand is summed by itself
    return Contraction(node, left, right, labels[0], labels[1], out)


def _labels(text: str, ellipsis: list[str]) -> tuple[str, ...]:
    before, dots, after = text.partition("...")
    return (*before, *(ellipsis if dots else ()), *after)


def _summed_product(node: fx.Node) -> Contraction | None:
    product = node.args[0]
    dims = argument(node, 1, "dim")
    if not isinstance(product, fx.Node) or op_name(product) != "mul" or not dims:
        return None
    left, right = product.args[0], product.args[1]
    if not is_tensor(left) or not is_tensor(right) or len(product.users) != 1:
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rank = product.meta["val"].dim()
    labels = [f"a{i}" for i in range(rank)]
    summed = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    keep = bool(argument(node, 2, "keepdim", False))
    out = tuple(
        "" if i in summed else label for i, label in enumerate(labels) if keep or i not in summed
    )
    a, b = left.meta["val"].dim(), right.meta["val"].dim()
    return Contraction(node, left, right, tuple(labels[rank - a :]), tuple(labels[rank - b :]), out)


def number(value: Any) -> sympy.Expr | None:
    """A scalar argument as a number or size expression; None for tensors and unknown ones."""
    if isinstance(value, float) and abs(value) < 2**53 and value.is_integer():
        return sympy.Integer(int(value))  # sympy: Float(1.0) != Integer(1)
    if isinstance(value, (bool, int, float)):
        return sympy.Integer(value) if isinstance(value, bool) else sympy.sympify(value)
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), (int, float, torch.SymInt)):
        return expression(value.meta["val"])
    return None
