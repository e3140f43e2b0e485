"""Layouts followed back through views, against where PyTorch really moves the elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.evaluation import evaluate
from sparse_compile.passes import axes as ax
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.shapes import shape_of

Op = Callable[[Tensor], Tensor]
n = sympy.Symbol("n", integer=True, positive=True)


def sizes(*values: int | sympy.Expr) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.sympify(value) for value in values)


def fresh(*values: int | sympy.Expr) -> ax.Layout:
    return tuple(ax.new_axes(size) for size in sizes(*values))


def shown(layout: ax.Layout) -> list[list[sympy.Expr]]:
    return [[axis.size for axis in dim] for dim in ax.resolve_layout(layout)]


def peeled_to(op: Op, x: Tensor) -> tuple[list[tuple[fx.Node, ax.Layout]], fx.Graph, ax.Layout]:
    """What the output of `op` is a view of, each with its layout; and the output's own layout."""
    graph = make_fx(op, pre_dispatch=True, tracing_mode="fake")(x).graph
    (out,) = graph.output_node().all_input_nodes
    layout = tuple(ax.new_axes(size) for size in shape_of(out))
    return voc.peel(out, layout), graph, layout


def assert_same_elements(op: Op, x: Tensor) -> fx.Node:
    """Check every step of the way back, element by element; gives the node where it ends."""
    steps, graph, top = peeled_to(op, x)
    values: dict[fx.Node, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Tensor:
            values[node] = super().run_node(node)
            return values[node]

    out = Keep(fx.GraphModule({}, graph)).run(x)
    symbols = sympy.symbols(f"i:{out.ndim}", integer=True, nonnegative=True)
    env = {
        symbol: torch.arange(size).view([-1 if d == dim else 1 for d in range(out.ndim)])
        for dim, (symbol, size) in enumerate(zip(symbols, out.shape, strict=True))
    }
    where = ax.Indexing(list(zip(ax.resolve_layout(top), symbols, strict=True)))
    for node, layout in steps:
        index = [evaluate(where.dim(dim), env) for dim in ax.resolve_layout(layout)]
        index = [torch.as_tensor(position).expand(out.shape) for position in index]
        torch.testing.assert_close(values[node][tuple(index)], out, rtol=0, atol=0)
    return steps[-1][0]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, Op]]]:
    """A shape and up to five operators that only move or copy elements."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    ops: list[tuple[str, Op]] = []
    x = torch.empty(shape, device="meta")
    for _ in range(draw(st.integers(1, 5))):
        name, op = draw(movements(x))
        if op(x).numel() <= 2000 and op(x).ndim <= 6:
            x = op(x)
            ops.append((name, op))
    return shape, ops


@st.composite
def movements(draw: st.DrawFn, x: Tensor) -> tuple[str, Op]:
    """An operator for a tensor of this shape, with its spelling."""
    kind = draw(
        st.sampled_from(
            ["permute", "transpose", "view", "unsqueeze", "expand", "repeat", "interleave"]
        )
    )
    dim = draw(st.integers(0, x.ndim - 1))
    if kind == "permute":
        order = draw(st.permutations(range(x.ndim)))
        return f"permute{order}", lambda y: y.permute(order)
    if kind == "transpose":
        other = draw(st.integers(-x.ndim, x.ndim - 1))
        return f"transpose({dim}, {other})", lambda y: y.transpose(dim, other)
    if kind == "view":
        shape = list(x.shape)
        if dim + 1 < x.ndim and draw(st.booleans()):
            shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
        else:
            parts = [size for size in (1, 2, 3) if shape[dim] % size == 0]
            outer = draw(st.sampled_from(parts))
            shape[dim : dim + 1] = [outer, shape[dim] // outer]
        return f"reshape{shape}", lambda y: y.reshape(shape)
    if kind == "unsqueeze":
        return f"unsqueeze({dim})", lambda y: y.unsqueeze(dim)
    copies = draw(st.integers(1, 3))
    if kind == "expand":
        whole = [copies if size == 1 else -1 for size in x.shape]
        return f"expand{whole}", lambda y: y.expand(whole)
    if kind == "repeat":
        times = [copies if d == dim else 1 for d in range(x.ndim)]
        return f"repeat{times}", lambda y: y.repeat(times)
    return f"interleave({copies}, {dim})", lambda y: y.repeat_interleave(copies, dim)


@settings(max_examples=50, deadline=None)
@given(chains())
def test_random_views_are_followed_element_by_element(
    chain: tuple[list[int], list[tuple[str, Op]]],
) -> None:
    shape, ops = chain

    def moved(x: Tensor) -> Tensor:
        for _, op in ops:
            x = op(x)
        return x.clone()

    assert_same_elements(moved, torch.arange(torch.Size(shape).numel()).view(shape))


WHOLE_WAY: dict[str, tuple[tuple[int, ...], Op]] = {
    "repeat_interleave": ((2, 2, 3, 4), lambda k: k.repeat_interleave(3, 1)),
    "repeat": ((2, 2, 3, 4), lambda k: k.repeat(1, 3, 1, 1)),
    "repeat-with-new-dims": ((2, 3), lambda k: k.repeat(4, 1, 2)),
    "tile": ((2, 3), lambda k: k.tile(2)),
    "expand-reshape": ((2, 2, 3, 4), lambda k: k[:, :, None].expand(2, 2, 3, 3, 4).reshape(2, 6, 3, 4)),
    "cat-of-copies": ((2, 3), lambda k: torch.cat([k, k], 1)),
    "stack-of-copies": ((2, 3), lambda k: torch.stack([k, k, k], 1)),
    "fused-heads": ((2, 3, 8), lambda k: k.view(2, 3, 2, 4).transpose(1, 2)),
    "movedim": ((2, 3, 4), lambda k: k.movedim(0, 2)),
    "movedim-of-two": ((2, 3, 4, 5), lambda k: k.movedim((0, 1), (3, 0))),
    "swapaxes": ((2, 3, 4), lambda k: k.swapaxes(0, 2)),
    "mT": ((2, 3, 4), lambda k: k.mT),
    "T": ((2, 3), lambda k: k.T),
    "squeeze": ((2, 1, 4), lambda k: k.squeeze(1)),
    "flatten-unflatten": ((2, 3, 4), lambda k: k.flatten(0, 1).unflatten(0, (2, 3))),
    "narrow-to-all": ((2, 3), lambda k: k.narrow(1, 0, 3)),
    "same-dtype": ((2, 3), lambda k: k.to(torch.int64)),
    "dropout-off": ((2, 3), lambda k: torch.dropout(k, 0.5, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_WAY)
def test_views_are_followed_to_their_input(name: str) -> None:
    shape, op = WHOLE_WAY[name]
    last = assert_same_elements(op, torch.arange(torch.Size(shape).numel()).view(shape))
    assert last.op == "placeholder"


STOPS: dict[str, Op] = {
    "part": lambda k: k[:, :2],
    "select": lambda k: k[:, 0],
    "cast": lambda k: k.to(torch.float32),
    "arithmetic": lambda k: k + 1,
    "two-tensors": lambda k: torch.cat([k, k + 1]),
    "roll": lambda k: k.roll(1, 0),
    "repeats-per-element": lambda k: k.repeat_interleave(torch.tensor([1, 2]), 0),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_computes_or_cuts_is_no_view(name: str) -> None:
    steps, _, _ = peeled_to(STOPS[name], torch.arange(6).view(2, 3))
    assert steps[-1][0].op != "placeholder"


def test_a_view_across_axes_ends_the_way() -> None:
    steps, _, _ = peeled_to(
        lambda k: k.transpose(0, 1).reshape(2, 3, 2), torch.arange(12).view(2, 6)
    )
    assert [voc.op_name(node) for node, _ in steps] == ["reshape", "transpose", ""]
    steps, _, _ = peeled_to(lambda k: k.transpose(0, 1).reshape(4, 3), torch.arange(12).view(4, 3))
    assert [voc.op_name(node) for node, _ in steps] == ["reshape"]


def test_regroup_splits_everywhere_at_once() -> None:
    layout = fresh(2, 12)
    heads = ax.regroup(layout, sizes(2, 3, 4))
    assert shown(heads) == [[2], [3], [4]]
    assert shown(layout) == [[2], [3, 4]]
    assert ax.axes_of(heads) == ax.axes_of(layout)


def test_regroup_merges_and_drops_ones() -> None:
    layout = fresh(2, 1, 3)
    assert ax.regroup(layout, sizes(1, 6)) == ((), ax.axes_of(layout))


def test_regroup_with_free_sizes() -> None:
    layout = fresh(n, 8)
    assert shown(ax.regroup(layout, sizes(8 * n))) == [[n, 8]]
    assert shown(ax.regroup(ax.regroup(layout, sizes(8 * n)), sizes(n, 2, 4))) == [[n], [2], [4]]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((6, 4), (4, 6)), ((n,), (2, 4)), ((4,), (2,)), ((4,), (8,)), ((2 * n + 1,), (2, n))],
)
def test_regroup_refuses_what_cuts_across(
    shape: tuple[sympy.Expr, ...], wanted: tuple[sympy.Expr, ...]
) -> None:
    with pytest.raises(ax.AxisMismatch):
        ax.regroup(fresh(*shape), sizes(*wanted))


@pytest.mark.parametrize(
    ("size", "by", "whole"),
    [(12, 4, 3), (12, 5, None), (6 * n, 2 * n, 3), (n, 2, None), (n**2, n, n), (n + 1, n, None)],
)
def test_quotient_is_whole_or_none(
    size: sympy.Expr, by: sympy.Expr, whole: sympy.Expr | None
) -> None:
    assert ax.quotient(*sizes(size, by)) == whole


def test_unify_takes_over_the_parts() -> None:
    (one,), (whole,) = fresh(6), fresh(6)
    (two,) = (ax.axes_of(ax.regroup((whole,), sizes(2, 3))),)
    ax.unify(one, two)
    assert ax.resolve(one) == two
    with pytest.raises(ax.AxisMismatch):
        ax.unify(fresh(4)[0], two)


def test_indexing_writes_groups_as_floor_and_mod() -> None:
    kv, group, keys = fresh(2, 3, 5)
    h, s = sympy.symbols("h s", integer=True, nonnegative=True)
    indexing = ax.Indexing([((*kv, *group), h), (keys, s)])
    assert indexing.dim(kv) == sympy.floor(h / 3)
    assert indexing.dim(group) == sympy.Mod(h, 3)
    assert indexing.dim((*kv, *group)) == h
    assert indexing.dim((*group, *kv)) == 2 * sympy.Mod(h, 3) + sympy.floor(h / 3)
    assert indexing.dim((*keys, *group)) == 3 * s + sympy.Mod(h, 3)
    assert indexing.dim(()) == 0
    with pytest.raises(KeyError):
        indexing.dim(fresh(2)[0])
