"""A report as one HTML file that needs no network and no scripts."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from sparse_compile.inspect import html_site, text
from sparse_compile.inspect.drawing import HATCH
from sparse_compile.inspect.folding import Fold, fold

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparse_compile.inspect.report import Report

_BY = " &times; "
_MOST_OPEN = 4  # with more distinct sites than this, the first and declined ones stand open


def render(report: Report, *, title: str = "") -> str:
    """The whole file.

    Args:
        report: What to show.
        title: What was inspected; by default the heading says "Attention sites".
    """
    style = resources.files("sparse_compile.inspect").joinpath("style.css").read_text("utf-8")
    folds = fold(report.sites)
    heading = title or "Attention sites"
    body = "".join(
        (
            _header(report, folds, heading),
            _problems(report, folds),
            _overview(folds),
            _times(report),
            _sites(folds),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)} - sparse_compile</title><style>\n{style}</style></head>\n"
        f"<body>{HATCH}<main>{body}"
        f"<footer>sparse_compile inspect, report version {report.version}. "
        "Masks, graphs and proofs are those of the first site of each fold.</footer>"
        "</main></body></html>\n"
    )


def _header(report: Report, folds: Sequence[Fold], heading: str) -> str:
    n_declined, n_breaks = len(report.declined), len(report.graph_breaks)
    tiles = [
        (str(len(report.sites)), _plural(len(report.sites), "site"), ""),
        (str(len(report.rewritten)), "rewritten", "good" if report.rewritten else ""),
        (str(n_declined), "declined", "bad" if n_declined else ""),
        (str(len(folds)), "distinct", ""),
        (str(n_breaks), _plural(n_breaks, "graph break"), "warn" if n_breaks else ""),
        (text.duration(sum(graph.pass_ms for graph in report.graphs)), "in the passes", ""),
    ]
    n_validated = sum(site.validation is not None for site in report.sites)
    if n_validated:
        n_failed = len(report.failed_validations)
        share = f"{n_validated - n_failed}/{n_validated}"
        tiles.append((share, "validated", "bad" if n_failed else "good"))
    items = "".join(
        f'<li class="{kind}"><b>{escape(value)}</b><span>{label}</span></li>'
        for value, label, kind in tiles
    )
    return (
        f'<header><p class="eyebrow">sparse_compile inspect</p><h1>{escape(heading)}</h1>'
        f'<ul class="tiles">{items}</ul></header>'
    )


def _problems(report: Report, folds: Sequence[Fold]) -> str:
    """What a reader should see first: failures, declined sites, graph breaks."""
    items = [*_failures(report, folds)]
    for piece in folds:
        site = piece.site
        if site.status == "declined":
            items.append(
                f'<div class="problem"><span class="badge bad">{escape(str(site.reason_code))}'
                f"</span> <b>{html_site.link(piece)}</b>"
                f"<p>Left as it was: {escape(str(site.reason))}.</p>"
                f'<p class="quiet mono">{escape(text.source_text(site.source))}</p></div>'
            )
    for graph_break in report.graph_breaks:
        items.append(
            '<div class="problem warn"><span class="badge warn">graph break</span> '
            f"{escape(graph_break.reason)} "
            f'<p class="quiet mono">{escape(text.source_text(graph_break.source))}</p></div>'
        )
    return f"<section><h2>What needs a look</h2>{''.join(items)}</section>" if items else ""


def _failures(report: Report, folds: Sequence[Fold]) -> Iterator[str]:
    for number, graph in enumerate(report.graphs):
        if graph.error:
            cause = graph.error.strip().splitlines()[-1]
            yield (
                '<div class="problem"><span class="badge bad">pass failed</span> '
                f"<b>graph {number}</b> was left as it was: <code>{escape(cause)}</code>"
                '<details class="more"><summary>Traceback</summary>'
                f"<pre>{escape(graph.error)}</pre></details></div>"
            )
    for piece in folds:
        for site in piece.sites:
            if site.failed_validation:
                yield (
                    '<div class="problem"><span class="badge bad">validation failed</span> '
                    f"<b>{html_site.link(piece, escape(site.name))}</b>"
                    f"<p>{escape(str(site.validation))}</p></div>"
                )


def _overview(folds: Sequence[Fold]) -> str:
    if not folds:
        return (
            '<section><h2>Sites</h2><div class="card">No attention was found: '
            "the model runs as torch.compile's default backend would run it.</div></section>"
        )
    rows = "".join(
        f"<tr><td>{html_site.link(piece)}</td>"
        f'<td class="nowrap">{escape(text.heads_text(piece.site))}</td>'
        f'<td class="nowrap">{escape(text.tokens_text(piece.site)).replace(" x ", _BY)}</td>'
        f"<td>{escape(text.mask_text(piece.site))}</td><td>{html_site.status(piece.site)}</td></tr>"
        for piece in folds
    )
    return (
        '<section><h2>Sites</h2><div class="card wide"><table><thead><tr><th>site</th>'
        "<th>heads (Hq/Hkv xG)</th><th>tokens (T &times; S)</th><th>mask</th><th>runs as</th>"
        f"</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _times(report: Report) -> str:
    """A bar a pass, summed over the graphs; and a row a graph where there are several."""
    spent: dict[str, float] = {}
    for graph in report.graphs:
        for timing in graph.timings:
            spent[timing.name] = spent.get(timing.name, 0.0) + timing.ms
    if not spent:
        return ""
    longest, total = max(spent.values()) or 1.0, sum(spent.values())
    rows = "".join(
        f'<span>{escape(name)}</span><span class="bar"><i style="width:{100 * ms / longest:.2f}%">'
        f'</i></span><span class="ms">{text.duration(ms)}</span>'
        for name, ms in spent.items()
    )
    rows += (
        '<span class="total">together</span><span class="total">&nbsp;</span>'
        f'<span class="ms total">{text.duration(total)}</span>'
    )
    graphs = ""
    if len(report.graphs) > 1:
        lines = "".join(
            f'<tr><td class="nowrap">{number}</td><td class="nowrap">{graph.n_nodes}</td>'
            f'<td class="nowrap">{len(graph.sites)}</td>'
            f'<td class="nowrap">{text.duration(graph.pass_ms)}</td></tr>'
            for number, graph in enumerate(report.graphs)
        )
        graphs = (
            f'<details class="more"><summary>By graph ({len(report.graphs)})</summary>'
            "<table><thead><tr><th>graph</th><th>nodes</th><th>sites</th><th>passes</th></tr>"
            f"</thead><tbody>{lines}</tbody></table></details>"
        )
    return (
        '<section><h2>Time of the passes</h2><div class="card">'
        f'<div class="times">{rows}</div>{graphs}</div></section>'
    )


def _sites(folds: Sequence[Fold]) -> str:
    """One section a place in the model, its distinct sites below it."""
    places: dict[str, list[Fold]] = {}
    for piece in folds:
        places.setdefault(piece.layer, []).append(piece)
    sections = []
    for place, pieces in places.items():
        n_sites = sum(len(piece.sites) for piece in pieces)
        articles = "".join(
            html_site.article(
                piece,
                is_open=len(folds) <= _MOST_OPEN
                or piece is folds[0]
                or piece.site.status == "declined",
            )
            for piece in pieces
        )
        sections.append(
            f"<section><h2>{escape(place or 'model')}"
            f"<small>{text.counted(n_sites, 'site')}, {len(pieces)} distinct</small></h2>"
            f"{articles}</section>"
        )
    return "".join(sections)


def _plural(number: int, noun: str) -> str:
    return noun if number == 1 else f"{noun}s"
