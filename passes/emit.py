"""Write nodes into a Dynamo graph: sizes, values of the shadow, tensors brought to [B, H, T, D]."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparse_compile.passes.axes import Axis, Layout, axes_of, resolve, resolve_layout, size_of
from sparse_compile.passes.candidates import Declined
from sparse_compile.passes.shadow import Shadow, is_impure, opaque
from sparse_compile.passes.shapes import expression

Size = Any  # int or fx.Node


class Emitter:
    """Adds nodes to a Dynamo graph in front of one of its nodes."""

    def __init__(
        self,
        gm: fx.GraphModule,
        shadow: Shadow,
        before: fx.Node,
        shared: dict[Any, tuple[fx.Node, ...]],
        swapped: dict[fx.Node, fx.Node],
    ) -> None:
        """New nodes go right before `before`; values of nodes after it cannot be used."""
        self.shared = shared  # block masks and tables written so far, for later sites
        self.swapped = swapped  # Dynamo nodes that were replaced so far
        self.gm = gm
        self.graph = gm.graph
        self.shadow = shadow
        self.before = before
        self.limit = shadow.order[before]
        self.new: list[fx.Node] = []
        self.replaced: dict[fx.Node, fx.Node] = {}  # shadow node -> Dynamo node
        self._sizes: dict[sympy.Expr, Size] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A function call."""
        with self.graph.inserting_before(self.before):
            return self._finish(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A method call on the first argument."""
        with self.graph.inserting_before(self.before):
            return self._finish(self.graph.call_method(name, args, kwargs))

    def traced(self, function: Callable[..., Any], *nodes: fx.Node) -> fx.Node:
        """Write what `function` does to proxies of nodes; it may use only torch functions."""
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        with self.recording(), self.graph.inserting_before(self.before):
            return function(*(fx.Proxy(node, tracer) for node in nodes)).node

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Nodes that something else writes in front of the site count as ours."""
        last = self.before.prev
        yield
        node = last.next
        while node is not self.before:
            self._finish(node)
            node = node.next

    def _finish(self, node: fx.Node) -> fx.Node:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        self.new.append(node)
        if "example_value" not in node.meta and node.op != "get_attr":
            set_example_value(node, self.shadow.mode)
        return node

    def value(self, node: fx.Node) -> fx.Node:
        """The Dynamo node that has a shadow node's value; recomputed if Dynamo has none.

        Raises:
            Declined: the value cannot be computed at this place.
        """
        if node in self.replaced:
            return self.replaced[node]
        origin = self.shadow.origins.get(node)
        if origin is not None and self.shadow.order[origin] < self.limit:
            if origin in self.swapped:
                self.replaced[node] = origin = self.swapped[origin]
            return origin
        return self._recompute(node)

    def value_after(self, node: fx.Node) -> fx.Node:
        """Like `value`, for something that the owner itself computes: its replacement's version."""
        return self.replaced[node] if node in self.replaced else self._recompute(node)

    def forget_erased(self) -> None:
        """Drop what was remembered of nodes that have been erased again."""
        alive = set(self.graph.nodes)
        for key, nodes in list(self.shared.items()):
            if not alive.issuperset(nodes):
                del self.shared[key]
        self.replaced = {key: node for key, node in self.replaced.items() if node in alive}
        self._sizes = {
            key: node
            for key, node in self._sizes.items()
            if not isinstance(node, fx.Node) or node in alive
        }

    def _recompute(self, node: fx.Node) -> fx.Node:
        if node.op != "call_function" or node.target is opaque or is_impure(node):
            raise Declined(
                "value-unavailable", f"{node.name} cannot be computed in front of the site"
            )

        def known(item: Any) -> Any:
            return self.value(item) if isinstance(item, fx.Node) else item

        args = pytree.tree_map_only(fx.Node, known, tuple(node.args))
        kwargs = pytree.tree_map_only(fx.Node, known, dict(node.kwargs))
        new = self.call(node.target, *args, **kwargs)  # type: ignore[arg-type]
        self.replaced[node] = new
        return new

    def size(self, size: sympy.Expr) -> Size:
        """A size as an int or as a node of the Dynamo graph.

        Raises:
            Declined: a symbol of the size is nowhere to be read.
        """
        if size.is_Integer:
            return int(size)
        if size not in self._sizes:
            self._sizes[size] = self._read_size(size)
        return self._sizes[size]

    def size_tensor(self, size: sympy.Expr, device: torch.device) -> fx.Node:
        """A size as a tensor of no dimensions."""
        return self.call(torch.full, (), self.size(size), dtype=torch.int64, device=device)

    def _read_size(self, size: sympy.Expr) -> fx.Node:
        for node in self.graph.nodes:
            if node is self.before or self.shadow.order.get(node, 0) >= self.limit:
                break
            value = node.meta.get("example_value")
            if isinstance(value, torch.SymInt) and expression(value) == size:
                return node
            if isinstance(value, torch.Tensor) and node.op == "placeholder":
                for dim, found in enumerate(value.shape):
                    if isinstance(found, torch.SymInt) and expression(found) == size:
                        return self.method("size", node, dim)
        return self._compute_size(size)

    def _compute_size(self, size: sympy.Expr) -> fx.Node:
        if size.is_Symbol:
            raise Declined("size-unavailable", f"the size {size} cannot be read from an input")
        numerator, denominator = size.as_numer_denom()
        if denominator != 1:
            return self.call(operator.floordiv, self.size(numerator), self.size(denominator))
        functions = {sympy.Add: operator.add, sympy.Mul: operator.mul}
        name = type(size).__name__
        if name in ("FloorDiv", "CleanDiv"):
            return self.call(operator.floordiv, *(self.size(arg) for arg in size.args))
        if name in ("Mod", "PythonMod"):
            return self.call(operator.mod, *(self.size(arg) for arg in size.args))
        if name == "floor":
            above, below = size.args[0].as_numer_denom()
            return self.call(operator.floordiv, self.size(above), self.size(below))
        if size.is_Pow and size.exp.is_Integer and size.exp > 0:
            return self.call(operator.pow, self.size(size.base), int(size.exp))
        function = functions.get(type(size))
        if function is None:
            raise Declined("size-unavailable", f"the size {size} cannot be computed")
        total = self.size(size.args[0])
        for arg in size.args[1:]:
            total = self.call(function, total, self.size(arg))
        return total

    def reshape(self, node: fx.Node, sizes: Sequence[sympy.Expr]) -> fx.Node:
        """A reshape, left out where the shape is already right."""
        if tuple(sizes) == _shape(node):
            return node
        return self.method("reshape", node, tuple(self.size(size) for size in sizes))

    def arrange(
        self,
        node: fx.Node,
        layout: Layout,
        order: Sequence[tuple[Axis, ...]],
        *,
        whole: Sequence[bool] | None = None,
    ) -> fx.Node:
        """Bring a tensor to one dimension per group of axes.

        Args:
            node: A Dynamo node whose tensor has `layout`.
            layout: Its dimensions' axes.
            order: The wanted dimensions.
            whole: Per wanted dimension, whether axes that the tensor lacks are expanded; else a
                dimension with none of its axes stays 1.
        """
        layout = resolve_layout(layout)
        here = axes_of(layout)
        wanted = [axis for dim in order for axis in resolve(dim)]
        present = [axis for axis in wanted if axis in here]
        if len(present) != len(here):
            raise Declined("layout", "a tensor has an axis that the attention does not know")
        node = self._permuted(node, here, present)
        sizes: list[sympy.Expr] = []
        for position, dim in enumerate(order):
            axes = resolve(dim)
            missing = [axis for axis in axes if axis not in present]
            if missing and (len(missing) < len(axes) or (whole is not None and whole[position])):
                node = self._expand(node, wanted, present, missing)
                present = [axis for axis in wanted if axis in present or axis in missing]
            sizes.append(size_of(axis for axis in axes if axis in present))
        return self.reshape(node, sizes)

    def _expand(
        self, node: fx.Node, wanted: list[Axis], present: list[Axis], missing: list[Axis]
    ) -> fx.Node:
        shown = [axis for axis in wanted if axis in present or axis in missing]
        one = sympy.Integer(1)
        node = self.reshape(node, [axis.size if axis in present else one for axis in shown])
        return self.method("expand", node, tuple(self.size(axis.size) for axis in shown))

    def restore(self, node: fx.Node, order: Sequence[tuple[Axis, ...]], layout: Layout) -> fx.Node:
        """The inverse of `arrange`: from one dimension per group of axes back to `layout`."""
        layout = resolve_layout(layout)
        here = [axis for dim in order for axis in resolve(dim)]
        wanted = list(axes_of(layout))
        if set(wanted) != set(here):
            raise Declined("layout", "the output lacks an axis of the attention")
        node = self._permuted(node, here, wanted)
        return self.reshape(node, [size_of(dim) for dim in layout])

    def _permuted(self, node: fx.Node, axes: Sequence[Axis], wanted: Sequence[Axis]) -> fx.Node:
        """One dimension per axis, in the wanted order; as it is where that is the order already."""
        if list(axes) == list(wanted):
            return node
        node = self.reshape(node, [axis.size for axis in axes])
        return self.method("permute", node, tuple(axes.index(axis) for axis in wanted))


def _shape(node: fx.Node) -> tuple[sympy.Expr, ...] | None:
    value = node.meta.get("example_value")
    return (
        tuple(expression(size) for size in value.shape) if isinstance(value, torch.Tensor) else None
    )


def set_example_value(node: fx.Node, mode: Any) -> None:
    """Run a new node on its arguments' example values, as Dynamo does for its own nodes."""

    def example(item: fx.Node) -> Any:
        return item.meta["example_value"]

    args = pytree.tree_map_only(fx.Node, example, tuple(node.args))
    kwargs = pytree.tree_map_only(fx.Node, example, dict(node.kwargs))
    with mode:
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
