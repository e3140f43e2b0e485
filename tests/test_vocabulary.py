"""Contractions and names read from traced graphs, against what the operators compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.passes import axes as ax
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.shapes import shape_of

Product = Callable[[Tensor, Tensor], Tensor]


def product_of(function: Product, *shapes: tuple[int, ...]) -> tuple[voc.Contraction | None, list]:
    """The contraction that a function's output is read as, and its inputs."""
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    graph = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs).graph
    (out,) = graph.output_node().all_input_nodes
    return voc.contraction(out), inputs


def brute_force(found: voc.Contraction, left: Tensor, right: Tensor) -> Tensor:
    """The einsum that the labels stand for; a kept dimension of size 1 has the label ""."""
    number = {label: i for i, label in enumerate({*found.left_labels, *found.right_labels})}
    out = torch.einsum(
        left, [number[label] for label in found.left_labels],
        right, [number[label] for label in found.right_labels],
        [number[label] for label in found.out_labels if label],
    )  # fmt: skip
    for dim, label in enumerate(found.out_labels):
        out = out if label else out.unsqueeze(dim)
    return out


PRODUCTS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "matmul": (torch.matmul, (2, 3, 4, 5), (2, 3, 5, 6)),
    "matmul-broadcast-batch": (torch.matmul, (2, 1, 4, 5), (3, 5, 6)),
    "matmul-broadcast-left": (torch.matmul, (3, 4, 5), (2, 3, 5, 6)),
    "matmul-shared-right": (torch.matmul, (2, 3, 4, 5), (5, 6)),
    "matmul-shared-left": (torch.matmul, (4, 5), (3, 5, 6)),
    "matmul-vector-left": (torch.matmul, (5,), (3, 5, 6)),
    "matmul-vector-right": (torch.matmul, (3, 4, 5), (5,)),
    "matmul-2d": (torch.matmul, (4, 5), (5, 6)),
    "mm": (torch.mm, (4, 5), (5, 6)),
    "mv": (torch.mv, (4, 5), (5,)),
    "bmm": (torch.bmm, (3, 4, 5), (3, 5, 6)),
    "einsum": (lambda a, b: torch.einsum("bhtd,bhsd->bhts", a, b), (2, 3, 4, 5), (2, 3, 6, 5)),
    "einsum-permuted": (lambda a, b: torch.einsum("b h t d, b s h d -> s b t h", a, b), (2, 3, 4, 5), (2, 6, 3, 5)),
    "einsum-grouped": (lambda a, b: torch.einsum("bkgtd,bksd->bkgts", a, b), (2, 3, 2, 4, 5), (2, 3, 6, 5)),
    "einsum-implicit": (lambda a, b: torch.einsum("bij,bjk", a, b), (2, 3, 4), (2, 4, 5)),
    "einsum-implicit-order": (lambda a, b: torch.einsum("zy,yA", a, b), (2, 3), (3, 4)),
    "einsum-ellipsis": (lambda a, b: torch.einsum("...td,...sd->...ts", a, b), (2, 3, 4, 5), (2, 3, 6, 5)),
    "einsum-ellipsis-ranks": (lambda a, b: torch.einsum("...td,...sd->...ts", a, b), (2, 3, 4, 5), (3, 6, 5)),
    "einsum-ellipsis-last": (lambda a, b: torch.einsum("td...,sd...->ts...", a, b), (4, 5, 2), (6, 5, 2)),
    "einsum-implicit-ellipsis": (lambda a, b: torch.einsum("...ij,...jk", a, b), (2, 3, 4), (2, 4, 5)),
    "einsum-broadcast": (lambda a, b: torch.einsum("bhtd,bhsd->bhts", a, b), (2, 3, 4, 5), (2, 1, 6, 5)),
    "mul-sum": (lambda a, b: (a[:, :, None] * b[:, None]).sum(-1), (2, 4, 5), (2, 6, 5)),
    "mul-sum-keepdim": (lambda a, b: (a * b).sum(-2, keepdim=True), (2, 4, 5), (2, 4, 5)),
    "mul-sum-two": (lambda a, b: (a * b).sum((0, -1)), (2, 4, 5), (2, 4, 5)),
    "mul-sum-ranks": (lambda a, b: (a * b).sum(1), (2, 4, 5), (5,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_read_as_contractions(name: str) -> None:
    function, left, right = PRODUCTS[name]
    found, inputs = product_of(function, left, right)
    assert found is not None
    graph = found.node.graph
    values = fx.Interpreter(fx.GraphModule({}, graph), garbage_collect_values=False)
    wanted = values.run(*inputs)
    ours = brute_force(found, values.env[found.left], values.env[found.right])
    # sums of at most ten products of order one, in another order: 1e-12 is far above their rounding
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_the_added_tensor_of_baddbmm_is_no_factor() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(torch.zeros(3, 4, 6, dtype=a.dtype), a, b, beta=0.5, alpha=2)

    found, inputs = product_of(function, (3, 4, 5), (3, 5, 6))
    assert found is not None
    assert brute_force(found, *inputs).shape == (3, 4, 6)
    assert [found.left.name, found.right.name] == ["a_1", "b_1"]


NO_PRODUCTS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "three-factors": (lambda a, b: torch.einsum("ij,jk,kl->il", a, b, b), (3, 3), (3, 3)),
    "diagonal": (lambda a, b: torch.einsum("ii,ij->j", a, b), (3, 3), (3, 4)),
    "sum-of-one-factor": (lambda a, b: torch.einsum("ij,kl->ik", a, b), (3, 4), (3, 4)),
    "sum-of-a-sum": (lambda a, b: (a + b).sum(-1), (3, 4), (3, 4)),
    "sum-over-everything": (lambda a, b: (a * b).sum(), (3, 4), (3, 4)),
    "product-with-a-number": (lambda a, b: (a * 2.0).sum(-1), (3, 4), (3, 4)),
    "elementwise": (torch.mul, (3, 4), (3, 4)),
    "product-used-twice": (lambda a, b: (lambda m: m.sum(-1) + m.amax(-1))(a * b), (3, 4), (3, 4)),
}


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_other_operators_are_no_contractions(name: str) -> None:
    function, *shapes = NO_PRODUCTS[name]
    found, _ = product_of(function, *shapes)
    assert found is None


def sizes_of(layout: ax.Layout) -> list[list[int]]:
    return [[int(axis.size) for axis in dim] for dim in ax.resolve_layout(layout)]


def test_layouts_from_the_output_share_its_axes() -> None:
    found, _ = product_of(torch.matmul, (2, 3, 4, 5), (3, 5, 6))
    assert found is not None
    out = tuple(ax.new_axes(size) for size in shape_of(found.node))
    left, right, summed = found.layouts_from_output(out)
    assert left == (out[0], out[1], out[2], summed)
    assert right == (out[1], summed, out[3])
    assert [axis.size for axis in summed] == [5]


def test_layouts_from_an_operand_leave_out_what_is_summed() -> None:
    found, _ = product_of(PRODUCTS["einsum-grouped"][0], (2, 3, 2, 4, 5), (2, 3, 6, 5))
    assert found is not None
    left = tuple(ax.new_axes(size) for size in shape_of(found.left))
    right, out = found.layouts_from_operand(found.left, left)
    assert (right[0], right[1], right[3]) == (left[0], left[1], left[4])
    assert out == (*left[:4], right[2])
    right = tuple(ax.new_axes(size) for size in shape_of(found.right))
    left, out = found.layouts_from_operand(found.right, right)
    assert sizes_of(left) == [[2], [3], [2], [4], [5]]
    assert left[4] == right[3]


def test_a_broadcast_dimension_has_no_axis() -> None:
    found, _ = product_of(torch.matmul, (2, 1, 4, 5), (2, 3, 5, 6))
    assert found is not None
    out = tuple(ax.new_axes(size) for size in shape_of(found.node))
    left, _, _ = found.layouts_from_output(out)
    assert left[1] == ()


def traced(function: Callable[[Tensor], Tensor]) -> fx.Node:
    graph = make_fx(function, pre_dispatch=True, tracing_mode="fake")(torch.randn(2, 3)).graph
    return graph.output_node().all_input_nodes[0]


def test_names_of_operators() -> None:
    node = traced(lambda x: x.clone().mul_(2))
    assert (voc.op_name(node), voc.plain_name(node)) == ("mul_", "mul")
    assert voc.op_name(next(iter(node.graph.nodes))) == ""


def test_arguments_by_position_name_and_default() -> None:
    node = traced(lambda x: torch.dropout(x, 0.5, train=True))
    assert voc.argument(node, 1, "p") == 0.5
    assert voc.argument(node, 2, "train") is True
    assert voc.argument(node, 9, "nothing", "default") == "default"


def test_numbers_are_scalars_only() -> None:
    node = traced(lambda x: x + 1)
    assert voc.number(2) == sympy.Integer(2)
    assert voc.number(0.5) == sympy.Float(0.5)
    assert voc.number(node) is None
    assert voc.number("2") is None


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.transpose(0, 1), (3, 2)),
        (lambda x: x.reshape(6), (6,)),
        (lambda x: x.to(torch.float64), (2, 3)),
        (lambda x: x[:, 0:3], (2, 3)),
    ],
    ids=["transpose", "reshape", "cast", "whole-slice"],
)
def test_views_are_followed_forward(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    node = traced(function)
    layout = tuple(ax.new_axes(sympy.Integer(size)) for size in (2, 3))
    after = voc.follow_view(node, layout) if node.op == "call_function" else layout
    assert after is not None
    assert tuple(int(ax.size_of(dim)) for dim in after) == shape
    assert set(ax.axes_of(after)) == set(ax.axes_of(layout))


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, :2], lambda x: x * 2, lambda x: x.roll(1)],
    ids=["cut", "mul", "roll"],
)
def test_what_is_no_view_is_not_followed(function: Callable[[Tensor], Tensor]) -> None:
    layout = tuple(ax.new_axes(sympy.Integer(size)) for size in (2, 3))
    assert voc.follow_view(traced(function), layout) is None
