"""Anchors: every softmax of a shadow, however it is written, and every fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch import fx

from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.shapes import shape_of

SOFTMAX = frozenset("softmax _softmax _safe_softmax special_softmax".split())
FUSED = "scaled_dot_product_attention"
EPSILON = 1e-5  # a smaller addend of a softmax's denominator is taken for rounding protection


@dataclass(frozen=True)
class Anchor:
    """Attention weights `weights = softmax(logits, dim)`."""

    weights: fx.Node
    logits: fx.Node
    dim: int
    inner: frozenset[fx.Node] = frozenset()  # what computes the softmax by hand
    sink: sympy.Expr | None = None  # a constant logit in the denominator
    safe: bool = False  # rows without any key give zeros
    keep: fx.Node | None = None  # exp(logits) was multiplied by this 0/1 mask


def find_anchors(graph: fx.Graph) -> Iterator[Anchor]:
    """All softmaxes in the order of the graph."""
    for node in graph.nodes:
        name = voc.op_name(node)
        if name in SOFTMAX and voc.is_tensor(node.args[0]):
            rank = node.meta["val"].dim()
            dim = voc.argument(node, 1, "dim", -1)
            safe = name == "_safe_softmax"
            if rank:
                yield Anchor(node, node.args[0], dim % rank, safe=safe)
        elif name in ("exp", "special_exp"):
            yield from _exp_of_log_softmax(node)
        elif name in ("div", "mul"):
            yield from _normalised_exp(node)


def _exp_of_log_softmax(node: fx.Node) -> Iterator[Anchor]:
    """`exp(log_softmax(x))` and `exp(x - logsumexp(x))`."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return
    name = voc.op_name(source)
    if name in ("log_softmax", "_log_softmax", "special_log_softmax"):
        rank = node.meta["val"].dim()
        dim = voc.argument(source, 1, "dim", -1) % rank
        yield Anchor(node, source.args[0], dim, frozenset({source}))  # type: ignore[arg-type]
    elif name == "sub":
        logits, total = source.args[0], source.args[1]
        if not isinstance(total, fx.Node) or not voc.is_tensor(logits):
            return
        reduced, between = _strip(total, ("unsqueeze", "detach", "view", "reshape"))
        if voc.op_name(reduced) == "logsumexp" and reduced.args[0] is logits:
            dim = _single_dim(reduced)
            if dim is not None and _keeps_place(total, node, dim):
                inner = frozenset({source, reduced, *between})
                yield Anchor(node, logits, dim, inner)  # type: ignore[arg-type]


def _normalised_exp(node: fx.Node) -> Iterator[Anchor]:
    """`e / e.sum(dim, keepdim=True)` with `e = exp(x)`, maybe masked, maybe plus a constant."""
    numerator, denominator = node.args[0], node.args[1]
    if not voc.is_tensor(numerator) or not isinstance(denominator, fx.Node):
        return
    assert isinstance(numerator, fx.Node)
    between: list[fx.Node] = []
    if voc.op_name(node) == "mul":
        if voc.op_name(denominator) != "reciprocal":
            return
        between.append(denominator)
        denominator = denominator.args[0]  # type: ignore[assignment]
    addend: sympy.Expr | None = None
    total, skipped = _strip(denominator, ("unsqueeze", "clamp", "clamp_min", "expand", "expand_as"))
    between.extend(skipped)
    if voc.op_name(total) == "add" and (addend := voc.number(total.args[1])) is not None:
        between.append(total)
        total, skipped = _strip(total.args[0], ("unsqueeze",))  # type: ignore[arg-type]
        between.extend(skipped)
    if voc.op_name(total) != "sum" or total.args[0] is not numerator:
        return
    dim = _single_dim(total)
    exp, keep = _unmasked(numerator)
    if dim is None or voc.op_name(exp) != "exp" or not _keeps_place(denominator, node, dim):
        return
    logits = exp.args[0]
    assert isinstance(logits, fx.Node)
    shifted = voc.op_name(logits) == "sub" and _is_max(logits.args[1])
    sink: sympy.Expr | None = None
    if addend is not None and not (shifted and addend <= EPSILON):
        if shifted or addend <= 0:
            return
        sink = sympy.log(addend)
    if any(user not in (node, total) for user in numerator.users):
        return
    inner = frozenset({numerator, exp, total, *between})
    yield Anchor(node, logits, dim, inner, sink, keep=keep)


def _unmasked(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """`exp(x) * m` as `exp(x)` and the mask `m`, where `m` was a Boolean tensor."""
    if voc.plain_name(node) == "masked_fill" and voc.number(node.args[2]) == 0:
        return node, None
    if voc.plain_name(node) != "mul":
        return node, None
    for exp, mask in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if isinstance(exp, fx.Node) and voc.op_name(exp) == "exp" and isinstance(mask, fx.Node):
            return exp, mask
    return node, None


def _strip(node: fx.Node, names: tuple[str, ...]) -> tuple[fx.Node, list[fx.Node]]:
    skipped = []
    while voc.op_name(node) in names and isinstance(node.args[0], fx.Node):
        skipped.append(node)
        node = node.args[0]
    return node, skipped


def _single_dim(node: fx.Node) -> int | None:
    dims = voc.argument(node, 1, "dim")
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    source = node.args[0]
    if len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return dims[0] % source.meta["val"].dim()  # type: ignore[union-attr]


def _keeps_place(reduced: fx.Node, whole: fx.Node, dim: int) -> bool:
    """Whether a reduced tensor lines up with the whole one again at size 1 of `dim`."""
    small, large = shape_of(reduced), shape_of(whole)
    if small == large and voc.op_name(reduced) in ("expand", "expand_as"):
        source = reduced.args[0]
        return isinstance(source, fx.Node) and _keeps_place(source, whole, dim)
    return len(small) == len(large) and all(
        a == (1 if i == dim else b) for i, (a, b) in enumerate(zip(small, large, strict=True))
    )


def _is_max(value: object) -> bool:
    while isinstance(value, fx.Node) and (
        voc.op_name(value) in ("detach", "unsqueeze") or voc.op_name(value) == ""
    ):
        value = value.args[0] if value.args else None
    return isinstance(value, fx.Node) and voc.op_name(value) in ("amax", "max")
