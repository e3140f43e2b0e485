"""Calls of ATen operators in a traced graph: their names and arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

Arguments = dict[str, Any]


def bind(node: fx.Node) -> Arguments:
    """The arguments of a call by their schema's names, defaults filled in."""
    if node.target is operator.getitem:
        return {"source": node.args[0], "item": node.args[1]}
    bound: Arguments = {}
    for position, parameter in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not parameter.kwarg_only:
            bound[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            bound[parameter.name] = node.kwargs[parameter.name]
        elif parameter.has_default_value():
            bound[parameter.name] = parameter.default_value
    return bound


def operator_name(node: fx.Node) -> str:
    """The operator's name without overload and without the underscore of an in-place form."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name
    if name.startswith("aten::__i") and name.endswith("__"):
        return "aten::__" + name[len("aten::__i") :]
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1]
    return name
