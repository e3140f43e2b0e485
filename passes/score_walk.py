"""Walk from a softmax back to the contraction of Q with K, collecting what happens to the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import (
    Axis,
    AxisMismatch,
    Layout,
    axes_of,
    drop_expanded,
    new_axes,
    resolve,
)
from sparse_compile.passes.candidates import Step, Tensor
from sparse_compile.passes.partial_writes import partial_writes
from sparse_compile.passes.shapes import shape_of

MAX_STEPS = 64
UNARY = frozenset(
    ["tanh", "sigmoid", "relu", "exp", "log", "abs", "neg", "square", "sqrt", "sign", "softplus"]
)


@dataclass(frozen=True)
class ScorePath:
    """A way from the softmax's input to a contraction; `steps` in the order of computation."""

    steps: tuple[Step, ...]
    q: Tensor
    k: Tensor
    summed: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    region: frozenset[fx.Node]

    @property
    def coverage(self) -> int:
        """How many axes Q and K span: content scores span more than positional ones."""
        return len(set(axes_of(self.q.layout))) + len(set(axes_of(self.k.layout)))


@dataclass(frozen=True)
class _State:
    """Where a walk stands."""

    node: fx.Node
    layout: Layout
    keys: tuple[Axis, ...]
    steps: tuple[Step, ...]  # latest computed first
    region: tuple[fx.Node, ...]
    settled: fx.Node | None = None  # the node whose later writes are among the steps already

    def to(self, node: fx.Node, layout: Layout, *steps: Step, **changes: Any) -> _State:
        keys = changes.get("keys", self.keys)
        return _State(node, layout, keys, (*self.steps, *steps), (*self.region, self.node))


def score_paths(
    node: fx.Node, layout: Layout, keys: tuple[Axis, ...], reader: fx.Node
) -> list[ScorePath]:
    """All ways from a softmax's input `node` back to a contraction over K's head dimension.

    Args:
        node: Where to start.
        layout: The axes of its dimensions.
        keys: Those that the softmax runs over.
        reader: What reads `node`; what is written into it later does not count.
    """
    found: list[ScorePath] = []
    pending = [_State(node, layout, keys, (), ())]
    seen = 0
    while pending and seen < MAX_STEPS * 4:
        state = pending.pop()
        seen += 1
        if state.settled is not state.node:
            state = _with_later_writes(state, state.region[-1] if state.region else reader)
        product = voc.contraction(state.node)
        if product is not None and (path := _finish(state, product)) is not None:
            found.append(path)
            continue
        if len(state.region) < MAX_STEPS:
            try:
                pending.extend(_previous(state))
            except AxisMismatch:
                continue
    return found


def _with_later_writes(state: _State, reader: fx.Node) -> _State:
    """The state in front of what is added to parts of its node before `reader` reads it."""
    found = partial_writes(state.node, state.layout, reader)
    if found is None:
        return state
    steps, region = found
    return replace(
        state,
        steps=(*state.steps, *reversed(steps)),
        region=(*state.region, *region),
        settled=state.node,
    )


def _finish(state: _State, product: voc.Contraction) -> ScorePath | None:
    try:
        left, right, summed = product.layouts_from_output(state.layout)
    except AxisMismatch:
        return None
    keys = resolve(state.keys)
    in_left = [axis in axes_of(left) for axis in keys]
    in_right = [axis in axes_of(right) for axis in keys]
    steps = state.steps
    if voc.op_name(product.node) in ("baddbmm", "addmm"):
        steps = (*steps, *_addend(product.node, state.layout))
    operands = Tensor(product.left, left), Tensor(product.right, right)
    if all(in_right) and not any(in_left):
        q, k = operands
    elif all(in_left) and not any(in_right):
        k, q = operands
    else:
        return None
    if not keys or not set(product.left_labels) & set(product.right_labels) - set(
        product.out_labels
    ):
        return None
    region = frozenset((*state.region, product.node))
    return ScorePath(tuple(reversed(steps)), q, k, summed, state.keys, region)


def _addend(node: fx.Node, layout: Layout) -> Iterator[Step]:
    """`beta * input + alpha * (a @ b)` as steps, latest first."""
    alpha = voc.number(node.kwargs.get("alpha", 1))
    beta = voc.number(node.kwargs.get("beta", 1))
    addend = node.args[0]
    assert isinstance(addend, fx.Node)
    if beta != 0:
        own = drop_expanded(layout, shape_of(addend))
        yield Step("add", node, term=addend, layout=own, value=beta)
    if alpha != 1:
        yield Step("mul", node, value=alpha)


def _previous(state: _State) -> Iterator[_State]:
    """The states one operator earlier; several where it is open which input holds the scores."""
    node, layout = state.node, state.layout
    back = voc.unview(node, layout)
    if back is not None:
        yield state.to(*back)
        return
    name = voc.plain_name(node)
    first = node.args[0] if node.args else None
    if name in voc.CASTS and voc.is_tensor(first):
        yield state.to(first, layout, Step("cast", node))  # type: ignore[arg-type]
    elif name in ("mul", "multiply"):
        yield from _commutative(state, "mul")
    elif name == "add":
        yield from _commutative(state, "add")
    elif name in ("div", "divide", "true_divide"):
        if node.kwargs.get("rounding_mode") is None:
            yield from _binary(state, "div", 0, 1)
    elif name in ("sub", "subtract"):
        yield from _subtraction(state)
    elif name == "rsub":
        yield from _binary(state, "rsub", 0, 1)
    elif name == "masked_fill":
        yield from _masked_fill(state)
    elif name == "where":
        yield from _where(state)
    elif name in ("maximum", "max", "minimum", "min") and len(node.args) == 2:
        yield from _commutative(state, "max" if name.startswith("max") else "min")
    elif name in ("clamp", "clamp_min", "clamp_max", "clip", "hardtanh"):
        yield from _clamp(state, name)
    elif name in UNARY:
        yield state.to(first, layout, Step("unary", node, name=name))  # type: ignore[arg-type]
    elif name == "cat":
        yield from _concatenated_sink(state)
    elif name == "index_put":
        yield from _assigned(state)
    elif name == "copy" and voc.is_tensor(node.args[1]):  # written over as a whole
        source = node.args[1]
        yield state.to(source, _operand_layout(state, source), Step("cast", node))  # type: ignore[arg-type]


def _operand_layout(state: _State, operand: fx.Node) -> Layout:
    return drop_expanded(state.layout, shape_of(operand))


def _binary(state: _State, kind: Any, chain: int, other: int) -> Iterator[_State]:
    """The scores are argument `chain`, the other argument is a number or a tensor."""
    node = state.node
    scores, term = node.args[chain], node.args[other]
    if not voc.is_tensor(scores):
        return
    assert isinstance(scores, fx.Node)
    alpha = voc.number(node.kwargs.get("alpha", 1))
    layout = _operand_layout(state, scores)
    if voc.is_tensor(term) and (value := scalar(term)) is not None:
        step = Step(kind, node, value=value * alpha)
    elif voc.is_tensor(term):
        assert isinstance(term, fx.Node)
        own = _operand_layout(state, term)
        step = Step(kind, node, term=term, layout=own, value=alpha)
    elif (value := voc.number(term)) is not None:
        step = Step(kind, node, value=value * alpha)
    elif isinstance(term, fx.Node):  # a symbolic float
        step = Step(kind, node, term=term, value=alpha)
    else:
        return
    yield state.to(scores, layout, step)


def _commutative(state: _State, kind: Any) -> Iterator[_State]:
    alpha = state.node.kwargs.get("alpha", 1)
    if alpha == 1:
        yield from _binary(state, kind, 1, 0)
    yield from _binary(state, kind, 0, 1)  # last: tried first


def _subtraction(state: _State) -> Iterator[_State]:
    node = state.node
    if voc.is_tensor(node.args[1]) and node.kwargs.get("alpha", 1) == 1:
        yield from _binary(state, "rsub", 1, 0)
    yield from _binary(state, "sub", 0, 1)


def _masked_fill(state: _State) -> Iterator[_State]:
    scores, mask, value = state.node.args[:3]
    if not voc.is_tensor(scores) or not voc.is_tensor(mask):
        return
    assert isinstance(scores, fx.Node)
    assert isinstance(mask, fx.Node)
    fill = scalar(value)
    if fill is None:
        return
    step = Step("fill", state.node, mask, _operand_layout(state, mask), value=fill, keep_if=False)
    yield state.to(scores, _operand_layout(state, scores), step)


def _assigned(state: _State) -> Iterator[_State]:
    """`scores[:, :, mask] = value` with a Boolean mask."""
    scores, indices, value = state.node.args[:3]
    masks = [index for index in indices if index is not None]  # type: ignore[union-attr]
    fill = scalar(value)
    if len(masks) != 1 or indices[-1] is not masks[0] or fill is None:  # type: ignore[index]
        return
    (mask,) = masks
    first = len(indices) - 1  # type: ignore[arg-type]
    rank = mask.meta["val"].dim()
    if mask.meta["val"].dtype != torch.bool or voc.argument(state.node, 3, "accumulate", False):
        return
    if first + rank != len(state.layout):
        return
    step = Step("fill", state.node, mask, state.layout[first:], value=fill, keep_if=False)
    yield state.to(scores, state.layout, step)  # type: ignore[arg-type]


def _where(state: _State) -> Iterator[_State]:
    if len(state.node.args) != 3:
        return
    mask, a, b = state.node.args
    if not voc.is_tensor(mask):
        return
    assert isinstance(mask, fx.Node)
    own = _operand_layout(state, mask)
    for scores, other, keep_if in ((b, a, False), (a, b, True)):
        if not voc.is_tensor(scores):
            continue
        assert isinstance(scores, fx.Node)
        fill = scalar(other)
        if fill is None:
            continue
        step = Step("fill", state.node, mask, own, value=fill, keep_if=keep_if)
        yield state.to(scores, _operand_layout(state, scores), step)


def _clamp(state: _State, name: str) -> Iterator[_State]:
    node = state.node
    low = voc.argument(node, 1, "min") if name != "clamp_max" else None
    high = voc.argument(node, 2, "max") if name != "clamp_max" else node.args[1]
    steps = [
        Step(kind, node, value=value)
        for kind, bound in (("min", high), ("max", low))
        if bound is not None and (value := scalar(bound)) is not None
    ]
    if len(steps) == (low is not None) + (high is not None):
        yield state.to(node.args[0], state.layout, *steps)  # type: ignore[arg-type]


def _concatenated_sink(state: _State) -> Iterator[_State]:
    """`cat([scores, sink], keys)`: one more logit for every row."""
    parts = state.node.args[0]
    rank = len(state.layout)
    dim = voc.argument(state.node, 1, "dim", 0) % rank
    keys = resolve(state.keys)
    if resolve(state.layout[dim]) != keys or not isinstance(parts, (list, tuple)):
        return
    wide = [part for part in parts if shape_of(part)[dim] != 1]
    narrow = [part for part in parts if shape_of(part)[dim] == 1]
    if len(wide) != 1 or (parts[0] is not wide[0] and parts[-1] is not wide[0]):
        return
    side = "back" if parts[0] is wide[0] else "front"
    inner = new_axes(shape_of(wide[0])[dim], "s")
    layout = (*state.layout[:dim], inner, *state.layout[dim + 1 :])
    sinks = [
        Step("sink", state.node, part, drop_expanded(state.layout, shape_of(part)), name=side)
        for part in narrow
    ]
    yield state.to(wide[0], layout, *sinks, keys=inner)


def scalar(value: Any) -> sympy.Expr | None:
    """A fill value: a number, or a 0-dimensional tensor whose value the graph shows."""
    found = voc.number(value)
    if found is not None or not isinstance(value, fx.Node):
        return found
    if "constant_value" in value.meta:
        value.meta["value_used"] = True  # a buffer's value has to be guarded
        return voc.number(value.meta["constant_value"])
    name = voc.op_name(value)
    if name in ("full", "scalar_tensor", "full_like", "new_full"):
        position = {"full": 1, "scalar_tensor": 0, "full_like": 1, "new_full": 2}[name]
        return voc.number(value.args[position])
    if name in ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones"):
        return sympy.Integer(int("ones" in name))
    if name in ("to", "_to_copy", "lift_fresh_copy", "clone", "detach", "detach_", "expand", "neg"):
        inner = scalar(value.args[0])
        return -inner if inner is not None and name == "neg" else inner
    return None
