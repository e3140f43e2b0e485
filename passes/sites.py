"""The `AttentionSite` of what was proven: values only, for plans and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from sparse_compile import ir
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import size_of
from sparse_compile.passes.distance_tables import Table
from sparse_compile.passes.mutation import mutated_arguments, storage_root
from sparse_compile.passes.paged_sites import gather_of
from sparse_compile.passes.roles import index_map

if TYPE_CHECKING:
    from sparse_compile.passes.programs import OperandRef, Proven
    from sparse_compile.passes.shadow import Shadow


def site_of(
    place: ir.UnreadSite | ir.AttentionSite, proven: Proven, shadow: Shadow
) -> ir.AttentionSite:
    """What was proven about the site at `place`."""
    roles, candidate = proven.roles, proven.candidate
    out = candidate.out.node.meta["val"]
    return ir.AttentionSite(
        name=place.name,
        anchor=place.anchor,
        source=place.source,
        batch=size_of(roles.batch),
        query_heads=size_of(roles.query_heads),
        kv_heads=size_of(roles.kv_heads),
        query_tokens=size_of(roles.queries),
        key_tokens=size_of(roles.keys),
        head_dim=size_of(roles.head),
        value_dim=size_of(roles.value),
        dtype=str(out.dtype).removeprefix("torch."),
        scale=_scale(proven),
        transforms=proven.transforms,
        mask=proven.mask,
        empty_rows=proven.program.empty_rows,
        operands=tuple(_operand(ref, shadow) for ref in proven.operands),
        q_map=index_map(_name(proven.q.tensor.node, shadow), proven.q.tensor, roles),
        k_map=index_map(_name(proven.k.tensor.node, shadow), proven.k.tensor, roles),
        v_map=index_map(_name(proven.v.tensor.node, shadow), proven.v.tensor, roles),
        softmax_dtype=candidate.softmax_dtype,
        dropout_p=candidate.dropout_p,
        kv_source=_kv_source(proven.k.tensor.node),
        training=candidate.out.node in shadow.differentiable,
    )


def _scale(proven: Proven) -> float:
    """The constant that the raw scores are multiplied by, before anything else happens to them."""
    scale = 1.0
    for transform in proven.transforms:
        if not isinstance(transform, ir.Scale):
            break
        if transform.factor.is_number:
            scale *= float(transform.factor)
    return scale


def _name(node: fx.Node, shadow: Shadow) -> str:
    """What the model's graph calls a value: the Dynamo name without its decoration."""
    origin = shadow.origins.get(node)
    name = node.name if origin is None else origin.name
    if node.op == "placeholder":
        name = name.removeprefix("l_").removesuffix("_")
    return name


def _operand(ref: OperandRef, shadow: Shadow) -> ir.Operand:
    if isinstance(ref.node, Table):
        shape = (*map(str, ref.node.symbols), str(ref.node.queries + ref.node.keys - 1))
        dtype = str(ref.node.dtype).removeprefix("torch.")
        return ir.Operand(name="by_distance", shape=shape, dtype=dtype)
    if not isinstance(ref.node, fx.Node):
        return ir.Operand(name=str(ref.node), shape=(), dtype="int64")
    value = ref.node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return ir.Operand(name=_name(ref.node, shadow), shape=(), dtype="float64")
    dtype = str(value.dtype).removeprefix("torch.")
    return ir.Operand(name=_name(ref.node, shadow), shape=tuple(map(str, value.shape)), dtype=dtype)


def _kv_source(node: fx.Node) -> ir.KvSource:
    """Where K comes from.

    `paged` where it is gathered from pages, `static_cache` where it is read from a tensor of the
    caller's that the graph writes into.
    """
    seen = 0
    while seen < 8:
        if mutated_arguments(node):
            return "static_cache"
        root = storage_root(node)
        if gather_of(node, 0) is not None:
            return "paged"
        if root is node:
            return (
                "static_cache" if voc.op_name(node) in ("index_copy", "index_put") else "contiguous"
            )
        node, seen = root, seen + 1
    return "contiguous"
