"""Anchors: every softmax of a shadow, however it is written, and every fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch import fx

from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.shapes import shape_of

SOFTMAX = frozenset(["softmax", "_softmax", "_safe_softmax", "special_softmax"])
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
    keep: fx.Node | None = None  # exp(logits) was zeroed by this mask
    keep_if: bool = True  # the truth value of `keep` at which a key is kept
    divided: fx.Node | None = None  # where the division comes after the product with V: its node


def find_anchors(graph: fx.Graph) -> Iterator[Anchor]:
    """All softmaxes, one that is only a part of another one left out."""
    found = list(_softmaxes(graph))
    inner = {node for anchor in found for node in anchor.inner}
    return (anchor for anchor in found if anchor.weights not in inner)


def _softmaxes(graph: fx.Graph) -> Iterator[Anchor]:
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
    """`e / e.sum(dim)` with `e = exp(x)`, maybe masked; also `(e @ v) / e.sum(dim)`."""
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
    total, addend = _sum_and_addend(denominator, between)
    if total is None or not voc.is_tensor(total.args[0]):
        return
    weights = total.args[0]
    assert isinstance(weights, fx.Node)
    exp, keep, keep_if = _unmasked(weights)
    dim = _single_dim(total)
    if dim is None or (voc.op_name(exp) != "exp" and voc.op_name(exp) not in SOFTMAX):
        return
    divided = None
    if weights is not numerator:
        product = voc.contraction(numerator)
        if product is None or weights not in (product.left, product.right):
            return
        divided = node
    elif not _keeps_place(denominator, node, dim):
        return
    logits, sink = _logits_and_sink(exp, addend, dim)
    if logits is None or not all(_protects(node, exp, dim) for node in between):
        return
    inner = {exp, total, numerator, *between} - {node, weights if divided is not None else node}
    safe = any(voc.op_name(part) in ("clamp", "clamp_min") for part in between)
    yield Anchor(
        weights if divided is not None else node, logits, dim, frozenset(inner), sink,
        safe=safe, keep=keep, keep_if=keep_if, divided=divided,
    )  # fmt: skip


def _sum_and_addend(
    denominator: fx.Node, between: list[fx.Node]
) -> tuple[fx.Node | None, object | None]:
    """Read a denominator as a sum over keys plus, maybe, something that has no keys."""
    strippable = ("unsqueeze", "clamp", "clamp_min", "expand", "expand_as")
    total, skipped = _strip(denominator, strippable)
    between.extend(skipped)
    addend: object | None = None
    if voc.op_name(total) == "add" and total.kwargs.get("alpha", 1) == 1:
        between.append(total)
        pairs = ((total.args[0], total.args[1]), (total.args[1], total.args[0]))
        for part, other in pairs:
            if not isinstance(part, fx.Node):
                continue
            inner, skipped = _strip(part, ("unsqueeze",))
            if voc.op_name(inner) == "sum":
                between.extend(skipped)
                total, addend = inner, other
                break
    return (total if voc.op_name(total) == "sum" else None), addend


def _logits_and_sink(
    exp: fx.Node, addend: object | None, dim: int
) -> tuple[fx.Node | None, sympy.Expr | None]:
    """The logits behind an exponential, and the constant logit that an addend stands for."""
    logits = exp.args[0]
    assert isinstance(logits, fx.Node)
    if addend is None:
        return logits, None
    if voc.op_name(exp) in SOFTMAX:
        value = voc.number(addend)
        return (logits, None) if value is not None and value <= EPSILON / 100 else (None, None)
    shift = logits.args[1] if voc.op_name(logits) == "sub" else None
    if isinstance(addend, fx.Node) and voc.op_name(addend) == "exp":
        power = addend.args[0]
        if isinstance(power, fx.Node) and voc.op_name(power) == "neg" and power.args[0] is shift:
            return logits.args[0], sympy.Integer(0)  # type: ignore[return-value]
        return None, None
    value = voc.number(addend)
    if value is None or value < 0:
        return None, None
    if _is_max(exp, dim):
        return (logits, None) if value <= EPSILON else (None, None)
    if shift is not None and value != 0:
        return None, None
    return logits, (sympy.log(value) if value > 0 else None)


def _unmasked(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """`exp(x) * m` or `exp(x).masked_fill(m, 0)`: the exponential, the mask and what it keeps."""
    if voc.plain_name(node) == "masked_fill" and voc.number(node.args[2]) == 0:
        return node.args[0], node.args[1], False  # type: ignore[return-value]
    if voc.plain_name(node) != "mul":
        return node, None, True
    for exp, mask in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        powers = isinstance(exp, fx.Node) and (
            voc.op_name(exp) == "exp" or voc.op_name(exp) in SOFTMAX
        )
        if powers and isinstance(mask, fx.Node):
            return exp, mask, True  # type: ignore[return-value]
    return node, None, True


def _protects(node: fx.Node, exp: fx.Node, dim: int) -> bool:
    """Whether a bound of the denominator, if `node` is one, never counts."""
    if voc.op_name(node) not in ("clamp", "clamp_min"):
        return True
    low, high = voc.number(voc.argument(node, 1, "min")), voc.argument(node, 2, "max")
    if low is None or high is not None:
        return False
    return bool(low <= EPSILON) or (bool(low <= 1) and _is_max(exp, dim))


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


def _is_max(exp: fx.Node, dim: int) -> bool:
    """Whether `exp` is `exp(x - max(x, dim))`, so that its sum over `dim` is at least 1."""
    shifted = exp.args[0]
    if not isinstance(shifted, fx.Node) or voc.op_name(shifted) != "sub":
        return False
    logits, top = shifted.args[0], shifted.args[1]
    while isinstance(top, fx.Node) and (
        voc.op_name(top) in ("detach", "unsqueeze") or voc.op_name(top) == ""
    ):
        top = top.args[0] if top.args else None
    if not isinstance(top, fx.Node) or voc.op_name(top) not in ("amax", "max"):
        return False
    return top.args[0] is logits and len(top.args) > 1 and _single_dim(top) == dim
