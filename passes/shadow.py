"""The shadow: a Dynamo graph traced once more to ATen, before autograd, for analysis only.

Before:  the torch-level graph that Dynamo hands to a backend.
After:   an ATen graph; every node carries `meta["dynamo"]`, the Dynamo node it was traced for, and
         `Shadow.origins` names the Dynamo node that has the same value, if there is one.
Skips:   higher-order operators and whatever cannot be traced become opaque nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparse_compile import _compat
from sparse_compile.passes import fast_paths, known_calls
from sparse_compile.passes.mutation import mutated_arguments, opaque, writes


@dataclass(frozen=True)
class Shadow:
    """A shadow graph and its ties to the Dynamo graph."""

    graph: fx.Graph
    origins: dict[fx.Node, fx.Node]  # shadow -> earliest Dynamo node of the same value
    aliases: dict[fx.Node, list[fx.Node]]  # shadow -> all Dynamo nodes of the same value
    constants: dict[fx.Node, torch.Tensor]  # shadow nodes whose real value is in hand
    parameters: frozenset[fx.Node]  # placeholders that are parameters of the model
    order: dict[fx.Node, int] = field(repr=False)  # position of every Dynamo node
    positions: dict[fx.Node, int] = field(repr=False)  # position of every shadow node
    writes: dict[fx.Node, list[fx.Node]] = field(repr=False)  # storage -> in-place operators
    mode: Any = field(repr=False)  # the fake tensor mode of both graphs
    differentiable: frozenset[fx.Node] = field(repr=False)  # nodes that may need a gradient

    def owner(self, node: fx.Node) -> fx.Node:
        """The Dynamo node during which a shadow node was traced."""
        return node.meta["dynamo"]


class _Recorder(fx.Interpreter):
    """Runs a Dynamo graph under a trace and notes which nodes each step added."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.mode = mode
        self.tracer: Any = None
        self.values: list[tuple[fx.Node, fx.Node]] = []  # (Dynamo, shadow) of equal value
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.may_write_down = known_calls.has_stable_examples(gm.graph)

    def run_node(self, n: fx.Node) -> Any:
        if self.tracer is None:
            self.tracer = _compat.current_tracer()
        last = _last_node(self.tracer.graph)
        if n.op in ("placeholder", "output"):
            value = super().run_node(n)
        elif n.op == "get_attr":
            value = self._constant(n)
        elif n.op == "call_module" or _compat.is_higher_order(n.target):
            value = self._opaque(n)
        else:
            value = self._traced(n)
        self._note(n, value, last)
        return value

    def _traced(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is torch.amp.autocast_mode._enter_autocast:
            context = torch.autocast(*args)  # a pre-dispatch trace would only record it
            context.__enter__()
            return context
        if n.target is torch.amp.autocast_mode._exit_autocast:
            return args[0].__exit__(None, None, None)
        slow = fast_paths.decomposition(n.target, args)
        if slow is None and self.may_write_down:
            with _compat.no_torch_functions():
                value = self._written_down(n, args, kwargs)
            if value is not None:
                return value
        try:
            if slow is not None:
                return slow(*args, **kwargs)
            return getattr(self, n.op)(n.target, args, kwargs)
        except Exception:
            # Analysis must not fail where the model's own compilation would succeed.
            return self._opaque(n)

    def _written_down(
        self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """The value of a call whose node needs no trace; None where it does."""
        example = n.meta.get("example_value")
        if type(example) is not _compat.FakeTensor or _compat.is_autocast_on():
            return None
        call = known_calls.aten_call(n, args, kwargs)
        if call is None:
            return None
        for source in n.all_input_nodes:  # the call gives back its input
            if source.meta.get("example_value") is example:
                return self.env[source]
        if _compat.traced_node(example, self.tracer) is not None:
            return None
        target, *rest = call
        kinds = (torch.Tensor, torch.SymInt)
        values = [leaf for leaf in pytree.tree_leaves(rest) if isinstance(leaf, kinds)]
        nodes = [_compat.traced_node(value, self.tracer) for value in values]
        if None in nodes:
            return None
        proxies = {
            id(value): fx.Proxy(node, self.tracer)  # type: ignore[arg-type]
            for value, node in zip(values, nodes, strict=True)
        }
        args, kwargs = pytree.tree_map(lambda leaf: proxies.get(id(leaf), leaf), tuple(rest))
        name = target.overloadpacket.__name__
        proxy = self.tracer.create_proxy("call_function", target, args, kwargs, name=name)
        _compat.track_one(example, proxy, self.tracer)
        return example

    def _constant(self, n: fx.Node) -> Any:
        value = self.fetch_attr(n.target)
        if not isinstance(value, torch.Tensor):
            return value
        with _compat.paused_trace():
            fake = n.meta.get("example_value")
            if not isinstance(fake, torch.Tensor):
                fake = self.mode.from_tensor(value, static_shapes=True)
        proxy = self.tracer.create_proxy("get_attr", n.target, (), {})
        _compat.track(fake, proxy, self.tracer)
        self.constants[proxy.node] = value
        return fake

    def _opaque(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = [
            node
            for value in pytree.tree_leaves((args, kwargs))
            if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat))
            and (node := _compat.traced_node(value, self.tracer)) is not None
        ]
        value = n.meta.get("example_value")
        proxies = tuple(fx.Proxy(node, self.tracer) for node in inputs)
        proxy = self.tracer.create_proxy("call_function", opaque, proxies, {})
        with _compat.paused_trace():
            fresh = pytree.tree_map_only(torch.Tensor, torch.empty_like, value)
        if fresh is not None:
            _compat.track(fresh, proxy, self.tracer)
        proxy.node.meta.setdefault("val", fresh)
        return fresh

    def _note(self, n: fx.Node, value: Any, last: fx.Node) -> None:
        added = []
        node = last.next
        while node.op != "root":
            node.meta["dynamo"] = n
            added.append(node)
            node = node.next
        if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat)):
            found = _compat.traced_node(value, self.tracer)
            if found is not None:
                found.meta.setdefault("dynamo", n)
                self.values.append((n, found))
                if n.target in (torch.tensor, torch.as_tensor) and not n.all_input_nodes:
                    with _compat.paused_trace(), _compat.unset_fake():
                        self.constants[found] = torch.tensor(*n.args)
        for node in added:
            for written in mutated_arguments(node):  # the tensor's Dynamo node has the new value
                self.values.extend((d, node) for d, s in self.values[::-1] if s is written)


def _last_node(graph: fx.Graph) -> fx.Node:
    return graph._root.prev


def build_shadow(gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> Shadow:
    """Trace a Dynamo graph to its shadow.

    Args:
        gm: A graph whose placeholders carry `meta["example_value"]` (fake tensors, SymInts).
        example_inputs: What the backend was given, in placeholder order; real tensors among them
            tell the values of buffers.
    Returns:
        The shadow, free of dead nodes.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [node.meta.get("example_value") for node in placeholders]
    mode = _compat.fake_mode_of(inputs) or _compat.new_fake_mode()
    recorder = _Recorder(gm, mode)

    def run(*values: Any) -> Any:
        out = recorder.run(*values)
        kept = (torch.Tensor, torch.SymInt, torch.SymFloat)
        return tuple(v for v in pytree.tree_leaves(out) if isinstance(v, kept))

    with _compat.preserved_modes(), mode:
        traced = _compat.trace_pre_dispatch(run, inputs)
    graph = traced.graph
    _remove_dead(graph)
    alive = set(graph.nodes)
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    origins: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, list[fx.Node]] = {}
    for dynamo, node in recorder.values:
        if node not in alive:
            continue
        origins.setdefault(node, dynamo)
        aliases.setdefault(node, []).append(dynamo)
    constants = {node: value for node, value in recorder.constants.items() if node in alive}
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target), None)
        value = getattr(value, "constant", value)  # of a fake tensor
        if isinstance(value, torch.Tensor) and not hasattr(value, "fake_mode"):
            constants.setdefault(node, value)
    for node, dynamo, value in zip(
        graph.find_nodes(op="placeholder"), placeholders, example_inputs or (), strict=False
    ):
        node.meta["dynamo"] = dynamo
        origins.setdefault(node, dynamo)
        if _is_known(dynamo, value):
            constants[node] = value
    for node, value in constants.items():
        if value.numel() == 1:
            node.meta["constant_value"] = value.item()
    parameters = frozenset(
        node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta["dynamo"].meta.get("example_value"), torch.nn.Parameter)
    )
    positions = {node: position for position, node in enumerate(graph.nodes)}
    return Shadow(
        graph, origins, aliases, constants, parameters, order, positions, writes(graph), mode,
        _differentiable(graph),
    )  # fmt: skip


def _is_known(dynamo: fx.Node, value: Any) -> bool:
    """Whether a backend input is a real tensor that lives longer than a call: a buffer."""
    return (
        isinstance(value, torch.Tensor)
        and not hasattr(value, "fake_mode")
        and not value.requires_grad
        and _compat.is_module_state(dynamo)
    )


def _differentiable(graph: fx.Graph) -> frozenset[fx.Node]:
    """Everything computed from an input that requires grad, in training."""
    found: set[fx.Node] = set()
    if not torch.is_grad_enabled():
        return frozenset()
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["dynamo"].meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.requires_grad:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def is_impure(node: fx.Node) -> bool:
    """Whether a shadow node does something besides computing its value."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr" or node.target is opaque:
        return node.target is opaque
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable or not node.target.namespace
    return not _is_pure_function(node.target)


def _is_pure_function(target: Callable[..., Any]) -> bool:
    return getattr(target, "__module__", "") in ("_operator", "math") or target is torch.sym_sum


def _remove_dead(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and not is_impure(node):
            graph.erase_node(node)
