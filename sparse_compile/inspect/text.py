"""A report as a table for terminals."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_compile.inspect.folding import Fold, fold
from sparse_compile.inspect.formulas import transform_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from sparse_compile.inspect.report import Report, SiteReport

WIDE = 150  # columns from which every fact of a site fits into one row
UNKNOWN = "-"  # a fact that was not proven


def render(report: Report, *, width: int | None = None, expand: bool = False) -> str:
    """The report as plain text without colour.

    Args:
        report: What to show.
        width: Columns; by default those of the terminal, or 100 where there is none.
        expand: Show identical layers one by one.
    """
    from rich.console import Console

    width = width or shutil.get_terminal_size((100, 24)).columns
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False)
    for part in renderables(report, width=width, expand=expand):
        console.print(part)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def renderables(report: Report, *, width: int, expand: bool = False) -> Iterator[RenderableType]:
    """What rich prints for a report: the sites, what went wrong, one line of summary."""
    from rich.text import Text

    folds = fold(report.sites, expand=expand)
    if folds:
        yield from (_rows(folds),) if width >= WIDE else _cards(folds, width)
    for number, graph in enumerate(report.graphs):
        if graph.error:
            cause = graph.error.strip().splitlines()[-1]
            yield Text(f"graph {number}: a pass failed, the graph was left as it was", "bold red")
            yield Text(f"  {cause}", "red")
    for graph_break in report.graph_breaks:
        yield Text(f"graph break: {graph_break}", "yellow")
    yield Text(summary(report), "bold")


def summary(report: Report) -> str:
    """One line: how many sites, what became of them, graph breaks, time of the passes."""
    parts = [
        counted(len(report.sites), "site"),
        f"{len(report.rewritten)} rewritten",
        f"{len(report.declined)} declined",
        counted(len(report.graph_breaks), "graph break"),
        f"passes {duration(sum(graph.pass_ms for graph in report.graphs))}",
    ]
    validated = [site for site in report.sites if site.validation is not None]
    if validated:
        n_failed = len(report.failed_validations)
        parts.insert(3, f"{len(validated) - n_failed} of {len(validated)} validated")
    if report.errors:
        parts.append(f"{counted(len(report.errors), 'graph')} with a failed pass")
    return ", ".join(parts)


def counted(number: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(ms: float) -> str:
    """Milliseconds with three digits, or seconds."""
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.3g} ms"


def heads_text(site: SiteReport) -> str:
    """Query heads / KV heads and the group, e.g. `32/8 x4`; `-` where not proven."""
    if site.query_heads is None:
        return UNKNOWN
    return f"{site.query_heads}/{site.kv_heads} x{site.group}"


def tokens_text(site: SiteReport) -> str:
    """Query tokens by key tokens, e.g. `1 x 4096`; `-` where not proven."""
    return f"{site.query_tokens} x {site.key_tokens}" if site.site else UNKNOWN


def mask_text(site: SiteReport) -> str:
    """The proven mask, e.g. `causal & window(left=512)`; `-` where not proven."""
    return UNKNOWN if site.mask is None else site.mask


def transforms_text(site: SiteReport) -> str:
    """The score transforms in order, the scale among them; `-` where not proven."""
    if site.scale is None:
        return UNKNOWN
    if site.site:
        steps = tuple(transform_text(step, site.site.operands) for step in site.site.transforms)
    else:
        steps = site.score_transforms
    return ", ".join((*scale_texts(site), *steps))


def scale_texts(site: SiteReport) -> tuple[str, ...]:
    """The scale, unless the transforms hold it or it is 1."""
    is_listed = any(step.startswith("scale(") for step in site.score_transforms)
    return () if is_listed or site.scale in (1, None) else (f"scale({site.scale:.6g})",)


def why_text(site: SiteReport) -> str:
    """Why the site was planned so, or was declined; and a failed validation."""
    declined = f"{site.reason_code}: {site.reason}"
    text = declined if site.status == "declined" else (site.why or "")
    return f"{text} [validation {site.validation}]" if site.failed_validation else text


def source_text(source: str) -> str:
    """A source line with the part of its path that tells: below the package folder or the cwd."""
    path = source.replace(os.sep, "/")
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in path:
            return path.rpartition(marker)[2]
    folders = sorted(
        (f"{Path(folder).as_posix()}/" for folder in (*sys.path, os.getcwd())), key=len
    )
    for folder in reversed(folders):
        if len(folder) > 2 and path.startswith(folder):
            return path[len(folder) :]
    return path


def _kernel(site: SiteReport, *, between: str = " ") -> Text:
    from rich.text import Text

    if site.status == "declined":
        return Text("declined", "bold yellow")
    style = "bold red" if site.failed_validation else "green"
    return Text(between.join(filter(None, (site.kernel, site.loop_order))), style)


def _rows(folds: tuple[Fold, ...]) -> Table:
    """One row a fold, every fact in its column."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for header, ratio in {"site": 7, "heads": 0, "tokens": 0, "mask": 6, "transforms": 6}.items():
        table.add_column(header, overflow="fold", ratio=ratio or None, no_wrap=not ratio)
    table.add_column("kernel", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=9)
    table.add_column("source", overflow="fold", ratio=6)
    for piece in folds:
        site = piece.site
        table.add_row(
            Text(piece.label, "bold"),
            heads_text(site),
            tokens_text(site),
            Text(mask_text(site).replace(" & ", "\n& ")),
            Text(transforms_text(site).replace(", ", "\n")),
            _kernel(site, between="\n"),
            Text(why_text(site)),
            Text(source_text(site.source), "dim"),
        )
    return table


def _cards(folds: tuple[Fold, ...], width: int) -> Iterator[RenderableType]:
    """One short row a fold with its long facts below it, for narrow terminals."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    rows = [("site", "heads", "tokens", Text("kernel"))]
    rows += [
        (
            piece.label,
            heads_text(piece.site),
            tokens_text(piece.site),
            _kernel(piece.site, between="\n"),
        )
        for piece in folds
    ]
    heads, tokens = (max(len(row[i]) for row in rows) for i in (1, 2))
    kernel = max(len(line) for row in rows for line in row[3].plain.splitlines())
    site = max(width - heads - tokens - kernel - 6, 16)
    for row, piece in zip(rows, (None, *folds), strict=True):
        table = Table.grid(padding=(0, 2, 0, 0))
        for columns in (site, heads, tokens, kernel):
            table.add_column(width=columns, overflow="fold")
        table.add_row(Text(row[0], "bold"), *row[1:])
        yield table
        if piece is None:
            yield Text("─" * width, "dim")
            continue
        details = Table.grid(padding=(0, 1))
        details.add_column(style="dim", no_wrap=True)
        details.add_column(overflow="fold")
        details.add_row("mask", Text(mask_text(piece.site)))
        details.add_row("score", Text(transforms_text(piece.site)))
        details.add_row("why", Text(why_text(piece.site)))
        details.add_row("source", Text(source_text(piece.site.source), "dim"))
        yield Padding(details, (0, 0, 1, 2))
