"""Masks as small SVG pictures; colours come from the page's style sheet."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_compile.inspect.mask_grid import MaskGrid

SIDE = 192  # of the longer side of a picture, in pixels
_THINNEST = 16  # of the shorter side
_LEVELS = 4  # shades of a cell that is read in part
_MARGIN = 22  # left and above, for the axes

HATCH = (
    '<svg class="definitions" aria-hidden="true"><defs>'
    '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect class="hatch-ground" width="6" height="6"/>'
    '<rect class="hatch-line" width="2.4" height="6"/></pattern>'
    '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path class="arrow-head" d="M0 0.8 L8 4 L0 7.2 Z"/></marker>'
    "</defs></svg>"
)
"""Patterns and markers that the page's pictures share; once in a page."""


def mask_svg(grid: MaskGrid, *, label: str) -> str:
    """A mask: dark cells are read, hatched cells by the data, empty cells never.

    Args:
        grid: The sampled mask.
        label: What it shows, for readers who do not see it.
    """
    rows, columns = grid.read.shape
    longest = max(len(grid.queries), len(grid.keys))
    width = max(SIDE * len(grid.keys) / longest, _THINNEST)
    height = max(SIDE * len(grid.queries) / longest, _THINNEST)
    cell_width, cell_height = width / columns, height / rows
    cells = []
    for row in range(rows):
        kinds = (
            (_level(float(read)), float(maybe) > 0)
            for read, maybe in zip(grid.read[row], grid.maybe[row], strict=True)
        )
        column = 0
        for (level, hatched), run in groupby(kinds):
            length = len(list(run))
            place = (
                f'x="{column * cell_width:.2f}" y="{row * cell_height:.2f}" '
                f'width="{length * cell_width:.2f}" height="{cell_height:.2f}"'
            )
            if hatched:
                cells.append(f'<rect class="maybe" {place}/>')
            if level:
                cells.append(f'<rect class="read-{level}" {place}/>')
            column += length
    box_width, box_height = width + _MARGIN + 2, height + _MARGIN + 2
    return (
        f'<svg class="mask" role="img" width="{box_width:.0f}" height="{box_height:.0f}" '
        f'viewBox="{-_MARGIN} {-_MARGIN} {box_width:.0f} {box_height:.0f}">'
        f"<title>{escape(label)}</title>"
        f'<rect class="mask-ground" width="{width:.2f}" height="{height:.2f}"/>'
        f'<g shape-rendering="crispEdges">{"".join(cells)}</g>'
        f'<rect class="mask-frame" width="{width:.2f}" height="{height:.2f}"/>'
        f"{_axes(grid, width, height)}</svg>"
    )


def _level(share: float) -> int:
    """0 for none, else the shade from 1 to `_LEVELS`."""
    return 0 if share <= 0 else max(1, round(share * _LEVELS))


def _axes(grid: MaskGrid, width: float, height: float) -> str:
    """First and last position of both axes; keys run right, queries down."""
    keys, queries = grid.keys, grid.queries
    parts = [f'<text class="axis" x="0" y="-6">s {keys.start}</text>']
    if len(keys) > 1 and width > 80:
        parts.append(_text(f"{keys.stop - 1}", width, -6, "end"))
    if height > 80:
        parts.append(_rotated(f"t {queries.start}", 0, "end"))
        parts.append(_rotated(f"{queries.stop - 1}", height, "start"))
    else:
        parts.append(_text("t", -8, height / 2 + 4, "middle"))
    return "".join(parts)


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _rotated(text: str, y: float, anchor: str) -> str:
    return (
        f'<text class="axis" transform="translate(-7 {y:.1f}) rotate(-90)" '
        f'text-anchor="{anchor}">{text}</text>'
    )
