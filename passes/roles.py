"""Which axes of an attention are batch, KV heads, group, query tokens, key tokens and head dims.

The roles follow from where an axis occurs: keys are what the softmax runs over, the group is what
Q has and K and V lack, however the model repeated its KV heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from sparse_compile import expressions as ex
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import (
    Axis,
    Indexing,
    Layout,
    axes_of,
    drop_expanded,
    resolve,
    resolve_layout,
    size_of,
)
from sparse_compile.passes.candidates import Candidate, Tensor
from sparse_compile.passes.score_walk import scalar
from sparse_compile.passes.shapes import shape_of


@dataclass(frozen=True)
class Source:
    """One thing that Q, K or V is a view of: `factor * cast(tensor)`."""

    tensor: Tensor
    factor: sympy.Expr
    dtype: torch.dtype


@dataclass(frozen=True)
class Roles:
    """The axes of an attention by role, outermost first; splits applied."""

    batch: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    group: tuple[Axis, ...]
    queries: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    head: tuple[Axis, ...]
    value: tuple[Axis, ...]

    @property
    def query_heads(self) -> tuple[Axis, ...]:
        """KV heads, each with its group."""
        return (*self.kv_heads, *self.group)

    def indexing(self, *more: tuple[tuple[Axis, ...], sympy.Symbol]) -> Indexing:
        """Every score axis in terms of `b`, `h`, `t` and `s`."""
        groups = ((self.batch, ex.b), (self.query_heads, ex.h), (self.queries, ex.t))
        return Indexing([*groups, (self.keys, ex.s), *more])

    def sizes(self) -> dict[sympy.Symbol, sympy.Expr]:
        """How far each index symbol runs."""
        return {
            ex.b: size_of(self.batch),
            ex.h: size_of(self.query_heads),
            ex.t: size_of(self.queries),
            ex.s: size_of(self.keys),
        }


def sources(tensor: Tensor, *, fold_factors: bool) -> list[Source]:
    """What a tensor is a view of, nearest first; constant factors and upcasts are looked through."""
    found: list[Source] = []
    factor: sympy.Expr = sympy.Integer(1)
    node, layout = tensor.node, tensor.layout
    while True:
        for view, own in voc.peel(node, layout):
            found.append(Source(Tensor(view, own), factor, view.meta["val"].dtype))
        node, layout = found[-1].tensor.node, found[-1].tensor.layout
        inner = _through_factor(node, layout) if fold_factors else None
        if inner is not None:
            node, layout, by = inner
            factor = factor * by
        elif (narrow := _through_upcast(node)) is not None:
            node = narrow
        else:
            return found
        found.append(Source(Tensor(node, layout), factor, node.meta["val"].dtype))


def _through_factor(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, sympy.Expr] | None:
    if voc.op_name(node) not in ("mul", "div") or node.kwargs.get("rounding_mode") is not None:
        return None
    pairs = [(node.args[0], node.args[1])]
    if voc.op_name(node) == "mul":
        pairs.append((node.args[1], node.args[0]))
    for inner, by in pairs:
        value = scalar(by)
        if value is None or not value.is_number or value == 0 or not voc.is_tensor(inner):
            continue
        assert isinstance(inner, fx.Node)
        if inner.meta["val"].dtype == node.meta["val"].dtype:
            own = drop_expanded(layout, shape_of(inner))
            return inner, own, value if voc.op_name(node) == "mul" else 1 / value
    return None


def _through_upcast(node: fx.Node) -> fx.Node | None:
    """The input of a cast to a wider float: products are accumulated in float32 in any case."""
    if voc.op_name(node) not in voc.CASTS or not voc.is_tensor(node.args[0]):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    wider = before in (torch.float16, torch.bfloat16) and after == torch.float32
    return source if wider else None


def assign_roles(
    candidate: Candidate, q: Sequence[Source], k: Sequence[Source], v: Sequence[Source]
) -> Roles:
    """Give every axis of an attention its role."""
    in_k, in_v = set(_deepest(k)), set(_deepest(v))
    keys = candidate.key_axes
    score = axes_of(candidate.score)
    others = [axis for axis in score if axis not in keys]
    value_axes = [axis for axis in axes_of(candidate.v.layout) if axis not in score]
    shared = [axis for axis in others if axis in in_k or axis in in_v]
    alone = [axis for axis in others if axis not in shared]
    kept_in_k = set(axes_of(resolve_layout(candidate.k.layout)))
    group = [axis for axis in alone if axis in kept_in_k]
    rows = [axis for axis in alone if axis not in group]
    queries, more_group = _split_rows(rows, candidate)
    heads = _head_axes(shared, candidate, (*q, *k, *v))
    return Roles(
        batch=tuple(axis for axis in shared if axis not in heads),
        kv_heads=tuple(axis for axis in shared if axis in heads),
        group=(*group, *more_group),
        queries=tuple(queries),
        keys=keys,
        head=resolve(candidate.summed),
        value=tuple(value_axes),
    )


def _deepest(found: Sequence[Source]) -> tuple[Axis, ...]:
    return axes_of(found[-1].tensor.layout)


def _split_rows(rows: list[Axis], candidate: Candidate) -> tuple[list[Axis], list[Axis]]:
    """Tell query tokens from heads among the axes that only Q has.

    Tokens are what a mask or bias over keys runs over; without one, the last dimension of the
    scores before the keys.
    """
    if len(rows) < 2:
        return rows, []
    keys = set(candidate.key_axes)
    seen: set[Axis] = set()
    for step in candidate.steps:
        axes = set(axes_of(step.layout))
        if axes & keys:
            seen |= axes
    tokens = {axis for axis in rows if axis in seen}
    if not tokens or len(tokens) == len(rows):
        last = next(d for d in reversed(resolve_layout(candidate.score)) if set(d) & set(rows))
        tokens |= set(last) & set(rows)
    return [a for a in rows if a in tokens], [a for a in rows if a not in tokens]


def _head_axes(shared: list[Axis], candidate: Candidate, found: Iterable[Source]) -> set[Axis]:
    """Which of the axes that Q, K and V share are heads: those merged with a head dimension."""
    features = {*resolve(candidate.summed), *axes_of(candidate.v.layout)}
    features -= {*shared, *candidate.key_axes}
    merged: set[Axis] = set()
    for source in found:
        for dim in resolve_layout(source.tensor.layout):
            if set(dim) & features:
                merged |= set(dim) & set(shared)
    if merged:
        return merged
    return {shared[-1]} if len(shared) > 1 else set()


def index_map(name: str, tensor: Tensor, roles: Roles) -> str:
    """Where an element comes from, e.g. `k_proj[b, s, 64*floor(h/3) + d]`."""
    last = [(axes, sympy.Symbol("d")) for axes in (roles.head, roles.value)]
    here = tensor.axes
    indexing = roles.indexing(*(group for group in last if set(group[0]) & set(here)))
    parts = [str(indexing.dim(dim)) for dim in resolve_layout(tensor.layout)]
    return f"{name}[{', '.join(parts)}]"
