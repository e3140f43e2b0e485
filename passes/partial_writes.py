"""What a model adds to a part of its scores in place: `scores[:, :, 1:, 1:] += bias`.

The scores' node stays the same while its elements change, so a walk back along inputs would not see
it. Only additions are read; any other write leaves the scores to be declined as overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import (
    AxisMismatch,
    Layout,
    drop_expanded,
    new_axes,
    resolve_layout,
)
from sparse_compile.passes.candidates import Cut, Step
from sparse_compile.passes.mutation import mutated_arguments, storage_root
from sparse_compile.passes.shapes import shape_of

if TYPE_CHECKING:
    import sympy

Read = tuple[
    list[Step], list[fx.Node]
]  # additions in the order of computation; nodes that make them


def partial_writes(scores: fx.Node, layout: Layout, reader: fx.Node) -> Read | None:
    """What is added to parts of `scores` before `reader` reads them.

    Args:
        scores: A node of the shadow whose dimensions have `layout`.
        layout: The axes of its dimensions.
        reader: Later writes do not count.
    Returns:
        The additions and the nodes that make them; None if there are none, or if something else is
        written.
    """
    writes = [
        user
        for view in _views(scores)
        for user in view.users
        if mutated_arguments(user) == [view] and voc.op_name(user) in ("copy_", "add_")
    ]
    if not writes:
        return None
    order = {node: position for position, node in enumerate(scores.graph.nodes)}
    parts = _Parts(scores, layout)
    steps: list[Step] = []
    region: list[fx.Node] = []
    for write in sorted(writes, key=order.__getitem__):
        if order[write] > order[reader]:
            break
        try:
            found = parts.read(write)
        except AxisMismatch:
            found = None
        if found is None:
            return None
        steps.extend(found[0])
        region.extend(found[1])
    return (steps, region) if steps else None


def _views(scores: fx.Node) -> list[fx.Node]:
    """Views of the scores, but not the scores themselves."""
    found, pending = [], [scores]
    while pending:
        node = pending.pop()
        for user in node.users:
            is_view = voc.op_name(user) in ("slice", *voc.RESHAPES)
            if is_view and user.args[0] is node and storage_root(user) is storage_root(scores):
                found.append(user)
                pending.append(user)
    return found


@dataclass(frozen=True)
class _Part:
    """A view of a part of the scores: first slices, then maybe reshapes."""

    cut: Layout  # of the slices
    layout: Layout
    starts: tuple[int, ...]  # per dimension of the scores
    nodes: tuple[fx.Node, ...]


class _Parts:
    """The parts of one tensor of scores; parts with the same elements have the same axes."""

    def __init__(self, scores: fx.Node, layout: Layout) -> None:
        self.scores, self.layout = scores, layout
        self.known: dict[tuple[tuple[int, ...], tuple[sympy.Expr, ...]], Layout] = {}

    def holds(self, node: fx.Node) -> bool:
        """Whether a node is a view of the scores."""
        return storage_root(node) is storage_root(self.scores)

    def read(self, write: fx.Node) -> Read | None:
        """What one write adds; None where it does something else."""
        view, value = write.args[:2]
        part = self.part(view)  # type: ignore[arg-type]
        if part is None or not voc.is_tensor(value):
            return None
        if voc.op_name(write) == "add_":
            steps, nodes = [self.step(write, value, part)], []  # type: ignore[arg-type]
        elif self.holds(value):  # type: ignore[arg-type]
            steps, nodes = [], []  # copied onto itself, as Python does after `scores[...] += bias`
        else:
            found = self.additions(value, part)  # type: ignore[arg-type]
            if found is None:
                return None
            steps, nodes = found
        return steps, [*part.nodes, *nodes, write]

    def part(self, view: fx.Node) -> _Part | None:
        """What a view of the scores shows; None where it is no range of positions."""
        chain: list[fx.Node] = []
        while view is not self.scores:
            chain.insert(0, view)
            view = view.args[0]  # type: ignore[assignment]
        starts = [0] * len(self.layout)
        cuts = [node for node in chain if voc.op_name(node) == "slice"]
        for node in cuts:
            start = voc.argument(node, 2, "start", 0) or 0
            if not isinstance(start, int) or start < 0 or voc.argument(node, 4, "step", 1) != 1:
                return None
            starts[voc.argument(node, 1, "dim", 0)] += start
        if chain[: len(cuts)] != cuts:
            return None
        sizes = shape_of(cuts[-1] if cuts else self.scores)
        cut = layout = self._cut_layout(tuple(starts), sizes)
        for node in chain[len(cuts) :]:
            layout = voc.follow_view(node, layout)  # type: ignore[assignment]
        return _Part(cut, layout, tuple(starts), tuple(chain))

    def _cut_layout(self, starts: tuple[int, ...], sizes: tuple[sympy.Expr, ...]) -> Layout:
        if (starts, sizes) not in self.known:
            whole = shape_of(self.scores)
            self.known[starts, sizes] = tuple(
                dim if size == all_of_it else new_axes(size)
                for dim, size, all_of_it in zip(self.layout, sizes, whole, strict=True)
            )
        return self.known[starts, sizes]

    def additions(self, value: fx.Node, part: _Part) -> Read | None:
        """Read `part + a + b` back to the part itself."""
        steps: list[Step] = []
        nodes: list[fx.Node] = []
        while not self.holds(value):
            nodes.append(value)
            back = voc.unview(value, part.layout)
            if back is not None:
                value, layout = back
                part = replace(part, layout=layout)
                continue
            if voc.op_name(value) != "add" or value.kwargs.get("alpha", 1) != 1:
                return None
            first, second = value.args[:2]
            if not voc.is_tensor(first) or not voc.is_tensor(second):
                return None
            if not self._leads_here(first):  # type: ignore[arg-type]
                first, second = second, first
            steps.insert(0, self.step(value, second, part))  # type: ignore[arg-type]
            part = replace(part, layout=drop_expanded(part.layout, shape_of(first)))  # type: ignore[arg-type]
            value = first  # type: ignore[assignment]
        same = self.part(value)
        if same is None or same.starts != part.starts:
            return None
        if resolve_layout(same.layout) != resolve_layout(part.layout):
            return None
        return steps, [*nodes, *same.nodes]

    def _leads_here(self, node: fx.Node) -> bool:
        while not self.holds(node):
            if voc.op_name(node) not in ("add", *voc.RESHAPES):
                return False
            node = node.args[0]  # type: ignore[assignment]
        return True

    def step(self, node: fx.Node, term: fx.Node, part: _Part) -> Step:
        """The addition of a term to a part."""
        cuts = tuple(
            Cut(whole, own, start)
            for whole, own, start in zip(self.layout, part.cut, part.starts, strict=True)
            if own is not whole
        )
        return Step("add", node, term, drop_expanded(part.layout, shape_of(term)), cuts=cuts)
