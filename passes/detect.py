"""Find every attention of a shadow: from each softmax back to Q K^T and forward to the product with V.

No fixed patterns: layouts over axes are carried along, and what the walk meets on the way becomes
an ordered list of steps. What is no attention is skipped; an attention that cannot be replaced is
declined with a reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sympy
import torch
from torch import fx

from sparse_compile.ir import Reason
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.anchors import FUSED, Anchor, find_anchors
from sparse_compile.passes.axes import (
    Axis,
    AxisMismatch,
    Layout,
    axes_of,
    drop_expanded,
    new_axes,
    resolve,
    split,
    unify,
)
from sparse_compile.passes.candidates import DROPPED, Candidate, Declined, NotASite, Step, Tensor
from sparse_compile.passes.lookalikes import (
    is_linear_map,
    is_over_channels,
    looks_like_scores,
    mixes_heads,
    way_to_values,
)
from sparse_compile.passes.mutation import storage_root
from sparse_compile.passes.score_walk import ScorePath, scalar, score_paths
from sparse_compile.passes.shapes import expression, shape_of

if TYPE_CHECKING:
    from sparse_compile.passes.shadow import Shadow


@dataclass(frozen=True)
class Found:
    """An attention: a candidate, or the reason why it is left alone."""

    anchor: fx.Node
    candidate: Candidate | None = None
    reason: Reason | None = None


def find_candidates(shadow: Shadow) -> list[Found]:
    """Every attention of the shadow in the order of its softmaxes."""
    found: list[Found] = []
    for anchor in find_anchors(shadow.graph):
        try:
            found.extend(Found(anchor.weights, candidate) for candidate in _read(anchor, shadow))
        except NotASite:
            continue
        except Declined as declined:
            found.append(Found(anchor.weights, reason=declined.reason))
    for node in shadow.graph.nodes:
        if voc.op_name(node) == FUSED:
            found.append(_read_fused_or_decline(node))
        elif (reason := _opaque_attention(node, shadow)) is not None:
            found.append(Found(node, reason=reason))
    order = {node: position for position, node in enumerate(shadow.graph.nodes)}
    return sorted(found, key=lambda f: order[f.anchor])


def _opaque_attention(node: fx.Node, shadow: Shadow) -> Reason | None:
    target = shadow.owner(node).target if "dynamo" in node.meta else None
    if node.name.startswith("opaque") and getattr(target, "__name__", "") == "flex_attention":
        return Reason(
            code="flex-attention",
            message="the model calls flex_attention with a block mask of its own; it is kept",
        )
    return None


def _read(anchor: Anchor, shadow: Shadow) -> list[Candidate]:
    """The attentions of one softmax: one for every product of its weights with a V."""
    shape = shape_of(anchor.weights)
    layout: Layout = tuple(
        new_axes(size, "s" if i == anchor.dim else "") for i, size in enumerate(shape)
    )
    keys = layout[anchor.dim]
    if not keys:
        raise NotASite
    try:
        ways = _ways_ahead(anchor, layout, keys)
    except NotASite:
        way = way_to_values(anchor.weights, shadow)
        if way is None or not looks_like_scores(anchor.logits, shadow):
            raise
        if way == "mixed":
            message = "a layer mixes the attention weights of several heads"
            raise Declined("heads-mixed", message) from None
        message = "the attention weights are copied together from parts before they meet V"
        raise Declined("weights-copied", message) from None
    readers = {anchor.weights, *anchor.inner} & set(anchor.logits.users)
    first_reader = min(readers or anchor.logits.users, key=shadow.positions.__getitem__)
    paths = score_paths(anchor.logits, layout, keys, first_reader)
    paths = [path for path in paths if not is_linear_map(path, shadow)]
    if not paths:
        if looks_like_scores(anchor.logits, shadow):
            raise Declined(
                "scores-unknown",
                "the scores come from a product that no layout over query and key axes describes",
            )
        raise NotASite
    path = max(paths, key=lambda p: p.coverage)
    if is_over_channels(path):
        raise NotASite
    if any(mixes_heads(path, shadow) for path in paths):
        raise Declined("heads-mixed", "a layer mixes the scores of several heads")
    return [_candidate(anchor, shadow, layout, path, ahead) for ahead in ways]


def _candidate(
    anchor: Anchor, shadow: Shadow, layout: Layout, path: ScorePath, ahead: _Ahead
) -> Candidate:
    """Join the way back and the way ahead of a softmax.

    Raises:
        Declined: they do not fit together, or the attention is not closed in itself.
    """
    if ahead.reason is not None:
        raise Declined(ahead.reason.code, ahead.reason.message)
    sides = {step.name for step in path.steps if step.kind == "sink"}
    has_sink = bool(sides)
    if has_sink and not ahead.dropped_keys:
        raise Declined("sink-kept", "a concatenated logit is multiplied with a row of V")
    if ahead.dropped_keys:
        if sides != {ahead.dropped_keys}:
            raise Declined(
                "keys-dropped", "attention weights are cut off before the product with V"
            )
        unify(ahead.keys, path.keys)
    steps = path.steps
    if anchor.sink is None:
        steps = _without_cancelling(steps, set(resolve(path.keys)))
    if anchor.keep is not None:
        own = drop_expanded(layout, shape_of(anchor.keep))
        fill = sympy.S.NegativeInfinity
        step = Step("fill", anchor.keep, anchor.keep, own, fill, keep_if=anchor.keep_if)
        steps = (*steps, step)
    if anchor.sink is not None:
        steps = (*steps, Step("sink", anchor.weights, value=anchor.sink))
    score = tuple(path.keys if i == anchor.dim else dim for i, dim in enumerate(layout))
    region = path.region | anchor.inner | {anchor.weights} | ahead.region
    terms = [step.term for step in (*steps, *ahead.steps) if step.term is not None]
    _check_convex(shadow, region, [path.q.node, path.k.node, ahead.v.node, *terms])
    _check_untouched(shadow, region, ahead.out.node)
    return Candidate(
        anchor=anchor.weights,
        q=path.q,
        k=path.k,
        v=ahead.v,
        summed=path.summed,
        score=score,
        keys=path.keys,
        out=ahead.out,
        steps=steps,
        post=ahead.steps,
        dropout_p=ahead.dropout_p,
        softmax_dtype=str(anchor.weights.meta["val"].dtype).removeprefix("torch."),
        region=region,
        nan_to_zero=ahead.nan_to_zero or anchor.safe,
    )


def _without_cancelling(steps: tuple[Step, ...], keys: set[Axis]) -> tuple[Step, ...]:
    """Leave out steps that add the same to all keys of a row: softmax takes that away again."""

    def cancels(step: Step, later: tuple[Step, ...]) -> bool:
        if step.kind not in ("add", "sub") or step.cuts or set(axes_of(step.layout)) & keys:
            return False
        return all(
            other.kind in ("cast", "add", "sub")
            or (other.kind == "fill" and other.value is not None and other.value <= DROPPED)
            or (other.kind in ("mul", "div") and not set(axes_of(other.layout)) & keys)
            for other in later
        )

    return tuple(step for i, step in enumerate(steps) if not cancels(step, steps[i + 1 :]))


@dataclass(frozen=True)
class _Ahead:
    """The way from the attention weights to the product with V."""

    v: Tensor
    out: Tensor
    keys: tuple[Axis, ...]
    steps: tuple[Step, ...]
    dropout_p: float
    region: frozenset[fx.Node]
    dropped_keys: str  # "", "front" or "back"
    nan_to_zero: bool
    reason: Reason | None = None


def _ways_ahead(anchor: Anchor, layout: Layout, keys: tuple[Axis, ...]) -> list[_Ahead]:
    """Every way from the weights to a product with a V.

    Raises:
        NotASite: the keys are never summed against another tensor.
        Declined: they are, but something in between cannot be replaced.
    """
    start = _Way(anchor.weights, layout, keys)
    pending, found = [start], []
    while pending:
        way = pending.pop()
        users = [user for user in way.node.users if user not in anchor.inner]
        users = users if anchor.divided is None or way is not start else list(way.node.users)
        forward = [u for u in users if _reaches_sum(u, way.node, way.layout, way.keys, 12)]
        if not forward and way is start:
            raise NotASite
        others = [u for u in users if u not in forward]
        if others and not (anchor.divided is not None and set(others) <= anchor.inner):
            way.reason = Reason(
                code="weights-escape",
                message="the attention weights are used for something else than the product with V",
            )
        for user in forward:
            step = way.fork()
            end = _advance(step, user, anchor)
            if end is None:
                pending.append(step)
            else:
                found.append(end)
    if not found:
        raise NotASite
    return found


@dataclass
class _Way:
    """A walk forward from the weights."""

    node: fx.Node
    layout: Layout
    keys: tuple[Axis, ...]
    steps: tuple[Step, ...] = ()
    region: tuple[fx.Node, ...] = ()
    dropout_p: float = 0.0
    dropped_keys: str = ""
    nan_to_zero: bool = False
    reason: Reason | None = None

    def fork(self) -> _Way:
        return replace(self)


def _advance(way: _Way, user: fx.Node, anchor: Anchor) -> _Ahead | None:
    """Take one step to `user`; the finished way where that is the product with V."""
    product = voc.contraction(user)
    if product is not None and way.node in (product.left, product.right):
        return _finished(way, product, anchor)
    if voc.op_name(user) == "mul" and (product := _later_sum(user)) is not None:
        way.region = (*way.region, user)
        return _finished(way, product, anchor)
    name = voc.plain_name(user)
    try:
        after = voc.follow_view(user, way.layout)
    except AxisMismatch:
        raise Declined("weights-reshaped", "a view mixes keys and queries") from None
    if after is not None:
        way.layout = after
    elif name in ("dropout", "native_dropout"):
        way.dropout_p = _dropout(user, way.dropout_p)
    elif name == "nan_to_num" and voc.argument(user, 1, "nan") in (None, 0, 0.0):
        way.nan_to_zero = True
    elif name in ("slice", "narrow"):
        if way.dropped_keys:
            raise Declined("weights-cut", "the attention weights are cut twice")
        way.layout, way.keys, way.dropped_keys = _cut_keys(user, way.node, way.layout, way.keys)
    elif getattr(user.target, "__name__", "") != "getitem":  # that is native_dropout's result
        way.steps = (*way.steps, _post_step(user, way.node, way.layout))
    way.region = (*way.region, user)
    way.node = user
    return None


def _finished(way: _Way, product: voc.Contraction, anchor: Anchor) -> _Ahead:
    """The product with V, and behind it a division that was put off."""
    try:
        other, layout = product.layouts_from_operand(way.node, way.layout)
    except AxisMismatch:
        raise Declined("layout", "the product with V has a layout that is not understood") from None
    v = product.right if way.node is product.left else product.left
    out, region, reason = product.node, (*way.region, product.node), way.reason
    if anchor.divided is not None:
        if list(out.users) != [anchor.divided] or shape_of(anchor.divided) != shape_of(out):
            reason = Reason(code="division", message="the sum of weights divides something else")
        out, region = anchor.divided, (*region, anchor.divided)
    return _Ahead(
        Tensor(v, other), Tensor(out, layout), way.keys, way.steps, way.dropout_p,
        frozenset(region), way.dropped_keys, way.nan_to_zero, reason,
    )  # fmt: skip


def _later_sum(node: fx.Node) -> voc.Contraction | None:
    """A product whose only user sums it."""
    users = list(node.users)
    return voc.contraction(users[0]) if len(users) == 1 and voc.op_name(users[0]) == "sum" else None


def _reaches_sum(
    user: fx.Node, node: fx.Node, layout: Layout, keys: tuple[Axis, ...], depth: int
) -> bool:
    """Whether `user`, or what it feeds, sums exactly the key axes of `node` against a tensor."""
    product = voc.contraction(user)
    if product is None and voc.op_name(user) == "mul":
        product = _later_sum(user)
        if product is not None and node not in (product.left, product.right):
            product = None
    if product is not None and node in (product.left, product.right):
        try:
            other, out = product.layouts_from_operand(node, layout)
        except AxisMismatch:
            return False
        here = set(resolve(keys))
        return (
            product.left is not product.right
            and not here & set(axes_of(out))
            and here == here & set(axes_of(other))
        )
    if depth == 0 or not voc.is_tensor(user):
        return getattr(user.target, "__name__", "") == "getitem" and depth > 0
    name = voc.plain_name(user)
    try:
        after = voc.follow_view(user, layout)
    except AxisMismatch:
        return False
    if after is None and name in ("slice", "narrow"):
        cut = _cut_dim(user, node)
        if cut is None or resolve(layout[cut]) != resolve(keys):
            return False
        keys = new_axes(shape_of(user)[cut], "s")
        after = (*layout[:cut], keys, *layout[cut + 1 :])
    elementwise = name in _ELEMENTWISE or "dropout" in name
    if after is None and not elementwise:
        return False
    if after is None and shape_of(user) != shape_of(node):
        return False
    return any(_reaches_sum(u, user, after or layout, keys, depth - 1) for u in user.users)


_ELEMENTWISE = frozenset(["mul", "div", "masked_fill", "where", "nan_to_num", "add", "sub"])


def _dropout(node: fx.Node, so_far: float) -> float:
    p, train = voc.argument(node, 1, "p", 0.0), voc.argument(node, 2, "train", True)
    if not train or p == 0:
        return so_far
    if so_far or not isinstance(p, float):
        raise Declined("dropout-twice", "the attention weights are dropped twice")
    return p


def _cut_keys(
    user: fx.Node, node: fx.Node, layout: Layout, keys: tuple[Axis, ...]
) -> tuple[Layout, tuple[Axis, ...], str]:
    """The layout and keys without the cut, and the side it was on."""
    cut = _cut_dim(user, node)
    if cut is None or resolve(layout[cut]) != resolve(keys):
        raise Declined("weights-cut", "a part of the attention weights is cut off")
    start = voc.argument(user, 2, "start", 0) if voc.op_name(user) == "slice" else user.args[2]
    step = voc.argument(user, 4, "step", 1) if voc.op_name(user) == "slice" else 1
    size = shape_of(user)[cut]
    if start not in (0, 1, None) or step != 1 or shape_of(node)[cut] - size != 1:
        raise Declined("weights-cut", "more than one logit at an end is cut off")
    fresh = new_axes(size, "s")
    return (*layout[:cut], fresh, *layout[cut + 1 :]), fresh, "front" if start == 1 else "back"


def _cut_dim(user: fx.Node, node: fx.Node) -> int | None:
    """The one dimension that a slice shortens."""
    pairs = enumerate(zip(shape_of(node), shape_of(user), strict=True))
    cut = [i for i, (before, after) in pairs if before != after]
    return cut[0] if len(cut) == 1 else None


def _post_step(user: fx.Node, node: fx.Node, layout: Layout) -> Step:
    """A step between softmax and V: a factor, or a fill with zero."""
    name = voc.plain_name(user)
    args = user.args
    if name in ("mul", "div") and len(args) > 1 and not user.kwargs.get("rounding_mode"):
        other = args[1] if args[0] is node else args[0]
        if name == "mul" or args[0] is node:
            if voc.is_tensor(other) and shape_of(user) == shape_of(node):
                own = drop_expanded(layout, shape_of(other))  # type: ignore[arg-type]
                return Step("mul" if name == "mul" else "div", user, other, own)  # type: ignore[arg-type]
            if (value := voc.number(other)) is not None:
                return Step("mul" if name == "mul" else "div", user, value=value)
    if name in ("masked_fill", "where"):
        mask = args[1] if name == "masked_fill" else args[0]
        fill = scalar(args[2] if name == "masked_fill" or args[1] is node else args[1])
        keep_if = name == "where" and args[1] is node
        if fill == 0 and voc.is_tensor(mask):
            own = drop_expanded(layout, shape_of(mask))  # type: ignore[arg-type]
            return Step("fill", user, mask, own, fill, keep_if)  # type: ignore[arg-type]
    raise Declined("weights-op", f"{voc.op_name(user)} changes the attention weights after softmax")


def _check_convex(shadow: Shadow, region: frozenset[fx.Node], inputs: Collection[fx.Node]) -> None:
    """Decline when an input of the attention is computed from its own inside.

    Raises:
        Declined: the region is not convex.
    """
    inside = region
    first = min(shadow.positions[node] for node in inside)
    seen: set[fx.Node] = set()
    pending = [node for node in inputs if node not in inside]
    while pending:
        node = pending.pop()
        if node in seen or shadow.positions[node] < first:
            continue
        if node in inside:
            raise Declined("not-convex", "an input of the attention depends on its own scores")
        seen.add(node)
        pending.extend(voc.value_inputs(node))


def _check_untouched(shadow: Shadow, region: frozenset[fx.Node], out: fx.Node) -> None:
    """Decline when something else writes into the scores or weights before the attention ends.

    Raises:
        Declined: a view of them is written into.
    """
    for node in region:
        for write in shadow.writes.get(storage_root(node), ()):
            if write not in region and shadow.positions[write] < shadow.positions[out]:
                raise Declined("overwritten", f"a part of {node.name} is assigned in place")


def _read_fused_or_decline(node: fx.Node) -> Found:
    try:
        return Found(node, _read_fused(node))
    except (Declined, AxisMismatch) as error:
        reason = getattr(error, "reason", None) or Reason(code="layout", message=str(error))
        return Found(node, reason=reason)


def _read_fused(node: fx.Node) -> Candidate:
    """`scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)`."""
    q, k, v = node.args[:3]
    shapes = [shape_of(x) for x in (q, k, v)]  # type: ignore[arg-type]
    out_shape = shape_of(node)
    rank = len(out_shape)
    if rank < 2:
        raise Declined("layout", "attention over tensors without tokens")
    batch: list[tuple[Axis, ...]] = [new_axes(size) for size in out_shape[:-2]]
    tokens, keys = new_axes(out_shape[-2], "t"), new_axes(shapes[1][-2], "s")
    head, value = new_axes(shapes[0][-1], "d"), new_axes(out_shape[-1], "v")
    if not keys:
        keys = (Axis(sympy.Integer(1), "s"),)
    gqa = bool(node.kwargs.get("enable_gqa", False)) and shapes[0][-3] != shapes[1][-3]
    kv_batch = list(batch)
    if gqa and batch[-1]:
        kv_batch[-1] = () if shapes[1][-3] == 1 else (split(batch[-1][0], shapes[1][-3])[0],)

    def layout(
        dims: list[tuple[Axis, ...]], shape: tuple[sympy.Expr, ...], *tail: tuple[Axis, ...]
    ) -> Layout:
        whole = (*dims, *tail)[-len(shape) :]
        return tuple(() if size == 1 else dim for dim, size in zip(whole, shape, strict=True))

    score: Layout = (*batch, tokens, keys)
    steps: list[Step] = []
    mask = voc.argument(node, 3, "attn_mask")
    if voc.argument(node, 5, "is_causal", False):
        steps.append(Step("fill", node, value=sympy.S.NegativeInfinity, name="causal"))
    if mask is not None:
        own = drop_expanded(score, shape_of(mask))
        if mask.meta["val"].dtype == torch.bool:
            steps.append(Step("fill", node, mask, own, sympy.S.NegativeInfinity, keep_if=True))
        else:
            steps.append(Step("add", node, mask, own, sympy.Integer(1)))
    scale = node.kwargs.get("scale")
    factor = 1 / sympy.sqrt(shapes[0][-1]) if scale is None else _number(scale)
    return Candidate(
        anchor=node,
        q=Tensor(q, layout(batch, shapes[0], tokens, head)),  # type: ignore[arg-type]
        k=Tensor(k, layout(kv_batch, shapes[1], keys, head)),  # type: ignore[arg-type]
        v=Tensor(v, layout(kv_batch, shapes[2], keys, value)),  # type: ignore[arg-type]
        summed=head,
        score=score,
        keys=keys,
        out=Tensor(node, (*batch, tokens, value)),
        steps=tuple(steps),
        dropout_p=float(voc.argument(node, 4, "dropout_p", 0.0)),
        softmax_dtype="float32",
        factor=factor,
        region=frozenset({node}),
        nan_to_zero=True,
    )


def _number(value: object) -> sympy.Expr:
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return expression(value)  # type: ignore[arg-type]
