"""A slice of a graph as SVG: boxes in layers from top to bottom, arrows along the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import networkx as nx

from sparse_compile.inspect.report import GraphSlice

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from sparse_compile.inspect.report import SliceNode

_LETTER = 7.4  # pixels a character of the label takes
_HEIGHT = 34  # of a box
_GAP_X = 14
_GAP_Y = 24
_LONGEST = 30  # characters of a label
_BEND = 10  # width of the lane of an edge that passes a layer
_SWEEPS = 6
_SMALLEST = 0.6  # share of its size to which a wide picture shrinks before it scrolls
MOST = 40  # nodes drawn of a slice


@dataclass(kw_only=True)
class _Layout:
    """Where everything is: boxes by name, and the lanes (`(source, target, layer)`) of edges."""

    layers: list[list[Hashable]]
    widths: dict[Hashable, float]
    graph: nx.DiGraph  # of boxes and lanes; every edge joins neighbouring layers
    centres: dict[Hashable, float] = field(default_factory=dict)


def nearest(piece: GraphSlice) -> GraphSlice:
    """What is drawn of a slice: all of a small one, else the nodes next to its last one."""
    if len(piece.nodes) <= MOST:
        return piece
    nodes = {node.name: node for node in piece.nodes}
    kept = [piece.nodes[-1].name]
    for name in kept:  # grows meanwhile: breadth first
        new = [source for source in nodes[name].inputs if source in nodes and source not in kept]
        kept += dict.fromkeys(new[: MOST - len(kept)])
    return GraphSlice(nodes=tuple(node for node in piece.nodes if node.name in kept))


def graph_svg(piece: GraphSlice, *, label: str) -> str:
    """The slice as one SVG picture; an empty string for an empty slice.

    Args:
        piece: Its nodes; inputs from outside of it are not drawn, nor is what `nearest` leaves out.
        label: What it shows, for readers who do not see it.
    """
    piece = nearest(piece)
    if not piece.nodes:
        return ""
    nodes = {node.name: node for node in piece.nodes}
    layout = _layout(nodes)
    left = min(layout.centres[name] - layout.widths[name] / 2 for name in layout.centres)
    right = max(layout.centres[name] + layout.widths[name] / 2 for name in layout.centres)
    width = right - left + 4
    height = len(layout.layers) * (_HEIGHT + _GAP_Y) - _GAP_Y + 4
    level = {name: number for number, layer in enumerate(layout.layers) for name in layer}
    edges = "".join(
        _edge(layout, level, name, target)
        for name in layout.graph
        if name in nodes
        for target in layout.graph.successors(name)
    )
    boxes = "".join(_box(node, layout, level[node.name]) for node in nodes.values())
    return (
        f'<svg class="graph" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'style="min-width:{_SMALLEST * width:.0f}px" viewBox="{left - 2:.1f} -2 {width:.1f} {height:.1f}"><title>{escape(label)}</title>'
        f"{edges}{boxes}</svg>"
    )


def _layout(nodes: Mapping[str, SliceNode]) -> _Layout:
    """Layers, an order in each that crosses few edges, and x positions."""
    data = nx.DiGraph()
    for node in nodes.values():
        # only what came before: a slice is in execution order
        data.add_edges_from([(source, node.name) for source in node.inputs if source in data])
        data.add_node(node.name)
    level = _levels(data)
    graph = nx.DiGraph()
    layers: list[list[Hashable]] = [[] for _ in range(max(level.values()) + 1)]
    for name in nodes:
        graph.add_node(name)
        layers[level[name]].append(name)
    widths: dict[Hashable, float] = {node.name: _width(node) for node in nodes.values()}
    for source, target in data.edges:
        last: Hashable = source
        for between in range(level[source] + 1, level[target]):
            lane = (source, target, between)
            layers[between].append(lane)
            widths[lane] = _BEND
            graph.add_edge(last, lane)
            last = lane
        graph.add_edge(last, target)
    layout = _Layout(layers=layers, widths=widths, graph=graph)
    _order(layout)
    _place(layout)
    return layout


def _levels(data: nx.DiGraph) -> dict[str, int]:
    """Each node's layer: its generation, but a node without inputs stands just above its use."""
    level = {
        name: number
        for number, generation in enumerate(nx.topological_generations(data))
        for name in generation
    }
    for name in reversed(list(nx.topological_sort(data))):
        uses = [level[target] for target in data.successors(name)]
        # moving it down must not stretch more edges than it shortens
        if uses and data.in_degree(name) <= data.out_degree(name):
            level[name] = min(uses) - 1
    return level


def _order(layout: _Layout) -> None:
    """Sort each layer by the mean place of its neighbours, down and up (barycentre method)."""
    place = {name: float(i) for layer in layout.layers for i, name in enumerate(layer)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = layout.graph.predecessors if down else layout.graph.successors
        for layer in layout.layers if down else reversed(layout.layers):
            wanted = {}
            for name in layer:
                places = [place[other] for other in near(name)]
                wanted[name] = sum(places) / len(places) if places else place[name]
            layer.sort(key=wanted.__getitem__)
            middle = (len(layer) - 1) / 2
            place.update({name: i - middle for i, name in enumerate(layer)})


def _place(layout: _Layout) -> None:
    """Put every node under its inputs, then over its uses: chains become straight lines."""
    for layer in layout.layers:
        _spread(layer, dict.fromkeys(layer, 0.0), layout)
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        near = layout.graph.predecessors if down else layout.graph.successors
        for layer in layout.layers if down else reversed(layout.layers):
            wanted = {}
            for name in layer:
                places = [layout.centres[other] for other in near(name)]
                wanted[name] = sum(places) / len(places) if places else layout.centres[name]
            _spread(layer, wanted, layout)


def _spread(layer: Sequence[Hashable], wanted: Mapping[Hashable, float], layout: _Layout) -> None:
    """Give a layer's nodes places near the wanted ones, in order and without overlap.

    Neighbours that would touch are merged into a block that moves to its mean wanted place.
    """
    blocks: list[tuple[list[Hashable], float, float]] = []  # nodes, width, centre
    for name in layer:
        block = ([name], layout.widths[name], wanted[name])
        while blocks and blocks[-1][2] + blocks[-1][1] / 2 + _GAP_X > block[2] - block[1] / 2:
            names, width, centre = blocks.pop()
            n_left, n_right = len(names), len(block[0])
            total = width + _GAP_X + block[1]
            # each part's wish for the centre of the merged block
            wish_left = centre + (total - width) / 2
            wish_right = block[2] - (total - block[1]) / 2
            mean = (wish_left * n_left + wish_right * n_right) / (n_left + n_right)
            block = (names + block[0], total, mean)
        blocks.append(block)
    for names, width, centre in blocks:
        left = centre - width / 2
        for name in names:
            layout.centres[name] = left + layout.widths[name] / 2
            left += layout.widths[name] + _GAP_X


def _edge(layout: _Layout, level: Mapping[Hashable, int], source: Hashable, first: Hashable) -> str:
    """An arrow from a box along its lanes to the next box."""
    x, y = layout.centres[source], level[source] * (_HEIGHT + _GAP_Y) + _HEIGHT
    path, name = [f"M{x:.1f} {y:.1f}"], first
    while True:
        x_next, y_next = layout.centres[name], level[name] * (_HEIGHT + _GAP_Y)
        half = (y + y_next) / 2
        path.append(f"C{x:.1f} {half:.1f} {x_next:.1f} {half:.1f} {x_next:.1f} {y_next:.1f}")
        if not isinstance(name, tuple):
            break
        x, y = x_next, y_next + _HEIGHT
        path.append(f"L{x:.1f} {y:.1f}")
        (name,) = layout.graph.successors(name)
    return f'<path class="edge" d="{"".join(path)}" marker-end="url(#arrow)"/>'


def _box(node: SliceNode, layout: _Layout, level: int) -> str:
    centre, width = layout.centres[node.name], layout.widths[node.name]
    top = level * (_HEIGHT + _GAP_Y)
    role = f"role-{node.role}" if node.role else "role-none"
    lines = _labels(node)
    first = top + (15 if len(lines) == 2 else 21)
    text = f'<text class="op" x="{centre:.1f}" y="{first}">{escape(lines[0])}</text>'
    if len(lines) == 2:
        text += f'<text class="name" x="{centre:.1f}" y="{top + 27}">{escape(lines[1])}</text>'
    return (
        f'<g class="{escape(role)}"><title>{escape(str(node))}</title><rect class="box" '
        f'x="{centre - width / 2:.1f}" y="{top}" width="{width:.1f}" height="{_HEIGHT}" rx="5"/>'
        f"{text}</g>"
    )


def _labels(node: SliceNode) -> tuple[str, ...]:
    """The operation and, where it says more, the value's name."""
    lines = (node.op, node.name) if node.name != node.op else (node.op,)
    return tuple(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…" for line in lines)


def _width(node: SliceNode) -> float:
    return max(len(line) for line in _labels(node)) * _LETTER + 20
