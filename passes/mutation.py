"""Which tensors of a shadow are overwritten in place, and when."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from sparse_compile.passes.shadow import Shadow


def opaque(*args: Any) -> Any:
    """Stands for a Dynamo node that is not looked into; never called."""
    raise AssertionError("an opaque node cannot be run")


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose storage a node's value lives in."""
    while isinstance(node.target, torch._ops.OpOverload) and node.op == "call_function":
        source = _aliased_argument(node)
        if source is None:
            return node
        node = source
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
        return storage_root(node.args[0])
    return node


def _aliased_argument(node: fx.Node) -> fx.Node | None:
    schema = node.target._schema  # type: ignore[union-attr]
    if not any(result.alias_info for result in schema.returns):
        composite = schema.name.split("::")[1] in _MAY_ALIAS
        first = node.args[0] if node.args else None
        return first if composite and isinstance(first, fx.Node) else None
    for argument, value in zip(schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


_MAY_ALIAS = frozenset(["reshape", "contiguous", "to", "flatten", "type_as"])


def mutated_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes into."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        found.extend(item for item in values if isinstance(item, fx.Node))
    return found


def writes(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every storage root, the nodes that write into it, in order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for argument in mutated_arguments(node):
            found.setdefault(storage_root(argument), []).append(node)
    return found


def frozen_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value cannot be read from their operator: a view of them was written into.

    A direct in-place operator (`x.masked_fill_(...)`) is a value of its own; a write through a
    view (`x[..., 0] = 1`) changes tensors that the trace does not show as changed.
    """
    indirect = set()
    for root, nodes in writes(graph).items():
        for node in nodes:
            target = mutated_arguments(node)[0]
            if target is not root and _shares_more_than_value(target):
                indirect.add(root)
    if not indirect:
        return set()
    return {node for node in graph.nodes if node.op != "output" and storage_root(node) in indirect}


def _shares_more_than_value(target: fx.Node) -> bool:
    """Whether a written tensor is a view made by an operator, not the result of another write."""
    while mutated_arguments(target):
        target = mutated_arguments(target)[0]
    return _is_view(target)


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is opaque:
        return False
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    return isinstance(node.target, torch._ops.OpOverload) and _aliased_argument(node) is not None


def overwritten(shadow: Shadow, reads: Iterable[fx.Node], out: fx.Node) -> fx.Node | None:
    """The first of `reads` that is written into after the model read it and before `out`.

    A replacement reads its inputs in front of `out`, later than the model did.
    """
    return next((node for node in reads if first_write(shadow, node, out) is not None), None)


def first_write(shadow: Shadow, node: fx.Node, out: fx.Node) -> fx.Node | None:
    """The first operator that writes into `node` after the model read it and before `out`."""
    found = shadow.writes.get(storage_root(node), ())
    if not found:
        return None
    start, end = _first_read(node, shadow), shadow.positions[out]
    return next((write for write in found if start < shadow.positions[write] < end), None)


def _first_read(node: fx.Node, shadow: Shadow) -> int:
    """The position of the first operator that computes something from a node or a view of it."""
    first = len(shadow.positions)
    pending = [node]
    while pending:
        source = pending.pop()
        for user in source.users:
            if _is_view(user):
                pending.append(user)
            elif source not in mutated_arguments(user):
                first = min(first, shadow.positions.get(user, first))
    return first
