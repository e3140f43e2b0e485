"""What looks like an attention but is none, and what is one although its layout is not understood.

Asked by detection where layouts alone do not decide: a product may be a layer, a softmax may run
over channels, scores may be mixed over heads or copied together from chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from torch import fx

from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.axes import Axis, AxisMismatch, Layout, axes_of, new_axes, resolve
from sparse_compile.passes.mutation import storage_root
from sparse_compile.passes.score_walk import ScorePath, score_paths
from sparse_compile.passes.shapes import shape_of

if TYPE_CHECKING:
    from sparse_compile.passes.candidates import Tensor
    from sparse_compile.passes.shadow import Shadow

_CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d", "convolution"])
_LAYERS = _CONVOLUTIONS | {"linear"}
_ENDS = _LAYERS | {"layer_norm", "rms_norm", "group_norm", "embedding", "gather", "topk"}
_PARTS = frozenset(["chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk"])
_COPIES = frozenset(["pad", "constant_pad_nd", "as_strided", "unfold", "cat", "stack"])
_MOVES = voc.RESHAPES | voc.SAME | voc.CASTS | {"slice", "select", "expand"}
_REACH = 16  # operators; how far a way that is not understood is followed
_LAYERS_BACK = 2  # a layer over tokens (Linformer) may follow the layer that makes the keys


def is_linear_map(path: ScorePath, shadow: Shadow) -> bool:
    """Whether a product is a layer: one factor is a parameter, so no keys meet queries."""
    bare = [_is_parameter(side, shadow) for side in (path.q, path.k)]
    if bare[1]:
        return True
    return bare[0] and len(set(axes_of(path.q.layout))) <= 1


def mixes_heads(path: ScorePath, shadow: Shadow) -> bool:
    """Whether a product is a layer over the scores of several heads (talking heads).

    "Talking-Heads Attention" (Shazeer et al., 2020).
    """
    if not _is_parameter(path.q, shadow):
        return False
    reader = min(path.k.node.users, key=shadow.positions.__getitem__)
    inner = score_paths(path.k.node, path.k.layout, path.keys, reader)
    return any(not is_linear_map(one, shadow) for one in inner)


def is_over_channels(path: ScorePath) -> bool:
    """Whether the softmax runs over channels, and tokens are what the product sums (XCiT, DaViT).

    The layers in front of K tell: their features are the keys, and never the summed axes.
    """
    keys, summed = set(resolve(path.keys)), set(resolve(path.summed))
    seen: list[set[Axis]] = [set(features) for features in _features(path.k)]
    return any(keys <= own for own in seen) and not any(summed & own for own in seen)


def looks_like_scores(logits: fx.Node, shadow: Shadow) -> bool:
    """Whether a softmax's input comes from a product of activations by way of copies and views."""
    pending, seen = [(logits, 0)], set()
    while pending:
        node, depth = pending.pop()
        if node in seen or depth > _REACH:
            continue
        seen.add(node)
        product = voc.contraction(node)
        if product is not None:
            sides = [node for node, _ in product.operands()]
            if all(_is_activation(side, shadow) for side in sides):
                return True
            pending.extend((side, depth + 1) for side in sides)
            continue
        if voc.op_name(node) in _ENDS and not _has_sizes_of(node, logits):
            continue  # a layer over heads keeps the sizes
        written = shadow.writes.get(storage_root(node), ())
        sources = [
            *node.all_input_nodes,
            *(other for write in written for other in write.all_input_nodes),
        ]
        pending.extend((source, depth + 1) for source in sources)
    return False


def way_to_values(weights: fx.Node, shadow: Shadow) -> Literal["mixed", "copied"] | None:
    """How a softmax's output comes to a product with an activation, if not by views alone.

    Returns:
        "mixed" where a layer stands between, "copied" where parts are copied together.
    """
    pending: list[tuple[fx.Node, int, Literal["mixed", "copied"] | None]] = [(weights, 0, None)]
    seen = set()
    while pending:
        node, depth, way = pending.pop()
        if (node, way) in seen or depth > _REACH:
            continue
        seen.add((node, way))
        for user in node.users:
            name = voc.op_name(user)
            product = voc.contraction(user)
            if product is not None and node in (product.left, product.right):
                other = product.right if node is product.left else product.left
                if not _is_activation(other, shadow):
                    pending.append((user, depth + 1, "mixed"))
                elif way is not None and len(shape_of(other)) > 1:
                    return way
            elif name in _LAYERS:
                if _has_sizes_of(user, weights):
                    pending.append((user, depth + 1, "mixed"))
            elif name in _COPIES:
                pending.append((user, depth + 1, way or "copied"))
            elif name in _MOVES or voc.permutation(user) or _keeps_shape(user, node):
                pending.append((user, depth + 1, way))
    return None


def _has_sizes_of(node: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same sizes in any order."""
    return Counter(shape_of(node)) == Counter(shape_of(other))


def _keeps_shape(user: fx.Node, node: fx.Node) -> bool:
    return voc.is_tensor(user) and shape_of(user) == shape_of(node)


def _is_activation(node: fx.Node, shadow: Shadow) -> bool:
    last = voc.peel(node, tuple(new_axes(size) for size in shape_of(node)))[-1][0]
    return last not in shadow.parameters and last.op != "get_attr"


def _is_parameter(side: Tensor, shadow: Shadow) -> bool:
    return voc.peel(side.node, side.layout)[-1][0] in shadow.parameters


def _features(tensor: Tensor) -> Iterator[tuple[Axis, ...]]:
    """The axes in the output features of each layer behind a tensor, nearest layer first."""
    node, layout = tensor.node, tensor.layout
    n_layers = 0
    for _ in range(_REACH * 4):
        node, layout = voc.peel(node, layout)[-1]
        name = voc.op_name(node)
        before = None
        try:
            if name in _LAYERS or voc.contraction(node) is not None:
                own, before = _through_layer(node, layout)
                yield own
                n_layers += 1
            elif node.op == "call_function":
                before = _through_part(node, layout) or _through_elementwise(node, layout)
        except AxisMismatch:  # no layout describes what is behind
            return
        if before is None or n_layers == _LAYERS_BACK:
            return
        node, layout = before


def _through_layer(
    node: fx.Node, layout: Layout
) -> tuple[tuple[Axis, ...], tuple[fx.Node, Layout] | None]:
    """The axes of a layer's features; its input."""
    product = voc.contraction(node)
    if product is not None:
        # Which side is the layer's weight is told by the dimensions that only it has.
        left, right, _ = product.layouts_from_output(layout)
        first, second = (product.left, left), (product.right, right)
        weight, source = (first, second) if _rank(first) < _rank(second) else (second, first)
        own = tuple(axis for axis in axes_of(weight[1]) if axis in axes_of(layout))
        return own, source
    source = node.args[0]
    assert isinstance(source, fx.Node)
    at = len(layout) - 1 if voc.op_name(node) == "linear" else 1
    sizes = zip(shape_of(node), shape_of(source), strict=True)
    before = tuple(
        new_axes(size) if i == at or size != out else layout[i]
        for i, (out, size) in enumerate(sizes)
    )
    return resolve(layout[at]), (source, before)


def _rank(side: tuple[fx.Node, Layout]) -> int:
    return len(axes_of(side[1]))


def _through_part(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    """From a part of a tensor to the whole: q, k and v of one projection."""
    name = voc.op_name(node)
    source = node.args[0] if node.args else None
    if getattr(node.target, "__name__", "") == "getitem":
        parts, name = source, voc.op_name(source)  # type: ignore[arg-type]
        if name not in _PARTS:
            return None
        whole = parts.args[0]  # type: ignore[union-attr]
        dim = voc.argument(parts, 1 if name == "unbind" else 2, "dim", 0)  # type: ignore[arg-type]
    elif name in ("select", "slice", "narrow"):
        whole, dim = source, voc.argument(node, 1, "dim", 0)
    else:
        return None
    if not voc.is_tensor(whole) or not isinstance(dim, int):
        return None
    shape = shape_of(whole)
    dim = dim % len(shape)
    if name in ("select", "unbind"):
        return whole, (*layout[:dim], new_axes(shape[dim]), *layout[dim:])
    return whole, layout


def _through_elementwise(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
    shape = shape_of(node)
    same = [
        source
        for source in node.all_input_nodes
        if voc.is_tensor(source) and shape_of(source) == shape
    ]
    return (same[0], layout) if same else None
