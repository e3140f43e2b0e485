"""Which nodes of a shadow have the same value, since they compute the same from the same.

Layers compute their masks, positions and tables anew; proven once, they hold for every layer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from sparse_compile.passes.mutation import opaque, storage_root


def representatives(graph: fx.Graph, written: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For every node, the first node of the same value.

    Args:
        graph: A shadow's graph.
        written: Storage roots that are written into; what is read from them depends on when.
    """
    first: dict[fx.Node, fx.Node] = {}
    known: dict[Any, fx.Node] = {}
    unstable: set[fx.Node] = set()
    for node in graph.nodes:
        first[node] = node
        if storage_root(node) in written or any(n in unstable for n in node.all_input_nodes):
            unstable.add(node)
        elif _is_function(node):
            try:
                first[node] = known.setdefault(_key(node, first), node)
            except TypeError:  # an argument has no hash
                continue
    return first


def _is_function(node: fx.Node) -> bool:
    """Whether equal arguments give equal values."""
    if node.op != "call_function" or node.target is opaque:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not is_random and not node.target._schema.is_mutable


def _key(node: fx.Node, first: dict[fx.Node, fx.Node]) -> Any:
    def frozen(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return first[value]
        if isinstance(value, (list, tuple)):
            return tuple(frozen(item) for item in value)
        if isinstance(value, dict):
            return tuple((key, frozen(item)) for key, item in sorted(value.items()))
        return type(value), value  # 1, 1.0 and True are equal, what they make is not

    return node.target, frozen(node.args), frozen(node.kwargs)
