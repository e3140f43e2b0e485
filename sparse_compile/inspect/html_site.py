"""The part of the HTML report that shows one distinct site."""

from __future__ import annotations

import linecache
import zlib
from html import escape
from typing import TYPE_CHECKING

from sparse_compile import ir
from sparse_compile.expressions import Load
from sparse_compile.inspect import text
from sparse_compile.inspect.drawing import mask_svg
from sparse_compile.inspect.formulas import readable, transform_text
from sparse_compile.inspect.graph_drawing import graph_svg, nearest
from sparse_compile.inspect.mask_grid import MaskGrid, grids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparse_compile.inspect.folding import Fold
    from sparse_compile.inspect.report import GraphSlice, SiteReport

_CONTEXT = 5  # source lines shown before and after a site's line
_ROLES = {
    "q": "Q",
    "k": "K",
    "v": "V",
    "mask": "mask",
    "score": "scores",
    "softmax": "softmax, weights",
    "out": "output",
    "new": "replacement",
}


def anchor(piece: Fold) -> str:
    """The fold's place in the page; the same for the same name and site."""
    return f"site-{zlib.crc32(f'{piece.name} {piece.site}'.encode()):08x}"


def link(piece: Fold, content: str | None = None) -> str:
    """A link to the fold's article; `content` is HTML."""
    return f'<a href="#{anchor(piece)}">{content or _title(piece)}</a>'


def status(site: SiteReport) -> str:
    """A badge: the kernel, or that and why the site was declined."""
    if site.status == "declined":
        return f'<span class="badge bad">declined: {escape(str(site.reason_code))}</span>'
    kind = "bad" if site.failed_validation else "good"
    name = " ".join(filter(None, (site.kernel, site.loop_order)))
    return f'<span class="badge {kind}">{escape(name)}</span>'


def article(piece: Fold, *, is_open: bool) -> str:
    """All that is known of one distinct site."""
    site = piece.site
    parts = [
        f'<div class="lead">{_masks(site)}{_facts(site, len(piece.sites))}</div>',
        *([] if site.scale is None else [_chain(site)]),
    ]
    if site.site:
        parts += [_proof(site.site), _maps(site.site)]
    parts += [_graphs(site), _source(site.source), _names(piece)]
    return (
        f'<details class="site" id="{anchor(piece)}"{" open" if is_open else ""}><summary>'
        f'<span class="title">{_title(piece)}</span>'
        f'<span class="gist">{escape(site.mask or "")}</span>{status(site)}</summary>'
        f'<div class="body">{"".join(parts)}</div></details>'
    )


def _title(piece: Fold) -> str:
    count = f'<span class="count">&times;{len(piece.sites)}</span>' if len(piece.sites) > 1 else ""
    return f"{escape(piece.name)}{count}"


def _masks(site: SiteReport) -> str:
    record = site.site
    if record is None:
        return ""
    try:
        pictures = grids(record)
    except NotImplementedError as error:
        caption = f"No picture: {escape(str(error))}."
        return f'<figure class="masks"><figcaption>{caption}</figcaption></figure>'
    figures = "".join(
        f"<figure>{mask_svg(grid, label=f'mask {site.mask}')}"
        f"<figcaption>{_caption(grid, record, number)}</figcaption></figure>"
        for number, grid in enumerate(pictures)
    )
    return f'<div class="masks">{figures}</div>'


def _caption(grid: MaskGrid, record: ir.AttentionSite, number: int) -> str:
    least, most = grid.share
    if most - least < 5e-4:
        share = f"reads about {100 * most:.3g} % of the scores"
    else:
        share = f"reads at most {100 * most:.3g} % of the scores; hatched: depends on data"
    if record.mask.opaque:
        share = "hatched: the mask is a tensor that is added to the scores"
    where = "Detail" if number else "Keys to the right, queries down"
    assumed = ", ".join(f"{name} = {value}" for name, value in grid.sizes)
    return f"{where}: {share}{f'. Drawn for {escape(assumed)}' if assumed else ''}."


def _facts(site: SiteReport, n_alike: int) -> str:
    record = site.site
    facts: dict[str, str] = {"runs as": status(site)}
    if site.status == "declined":
        facts["reason"] = f"{escape(str(site.reason))}"
    if site.why:
        facts["planner"] = escape(site.why)
    if site.query_heads is not None:
        heads = f"{site.query_heads} query, {site.kv_heads} KV, group {site.group}"
        facts["heads"] = escape(heads)
    if record:
        facts["tokens"] = escape(f"{site.query_tokens} query, {site.key_tokens} key")
        facts["batch"] = escape(str(record.batch))
        facts["head size"] = escape(f"{record.head_dim}, values {record.value_dim}")
        facts["dtype"] = escape(f"{record.dtype}, softmax {record.softmax_dtype or record.dtype}")
        facts["empty rows"] = escape(_EMPTY_ROWS[record.empty_rows])
    if site.scale is not None:
        facts["scale"] = f"{site.scale:.9g}"
    if site.kv_source is not None:
        facts["KV source"] = escape(site.kv_source.replace("_", " "))
    if site.validation is not None:
        kind = "bad" if site.failed_validation else "good"
        facts["validation"] = f'<span class="badge {kind}">{escape(site.validation)}</span>'
        if n_alike > 1:
            facts["validation"] += f' <span class="quiet">and {n_alike - 1} more alike</span>'
    facts["source"] = f"<code>{escape(text.source_text(site.source))}</code>"
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f'<div class="facts"><dl>{rows}</dl></div>'


_EMPTY_ROWS = {
    "zero": "give zeros",
    "uniform": "give the mean of all values",
    "nan": "give NaN",
}


def _chain(site: SiteReport) -> str:
    """The way from q·k to the product with v, in the order of the model."""
    steps = [("end", "q · k"), *(("", label) for label in text.scale_texts(site))]
    late = []
    if site.site:
        for transform in site.site.transforms:
            kind = "mask-step" if isinstance(transform, ir.Masked) else ""
            label = f"mask: {site.mask}" if kind else transform_text(transform, site.site.operands)
            is_late = isinstance(transform, (ir.Dropout, ir.WeightFactor))
            (late if is_late else steps).append((kind, label))
        is_placed = any(isinstance(step, ir.Masked) for step in site.site.transforms)
        if not is_placed and not site.site.mask.is_dense:
            steps.append(("mask-step", f"mask: {site.mask}"))
    else:
        steps += [("", label) for label in site.score_transforms]
    steps += [("end", "softmax"), *late, ("end", "· v")]
    items = "".join(
        f'<li><span class="{kind}">{escape(label)}</span></li>' for kind, label in steps
    )
    return f'<h3>Scores, in order</h3><ol class="chain">{items}</ol>'


def _proof(record: ir.AttentionSite) -> str:
    rows = [
        f"<tr><td>{escape(atom.text)}</td>"
        f"<td><code>{escape(readable(atom.predicate, record.operands))}</code></td>"
        f"<td>{'data' if atom.predicate.has(Load) else 'structure'}</td></tr>"
        for atom in record.mask.atoms
    ]
    if record.mask.opaque:
        rows.append("<tr><td>tensor</td><td>not proven: added to the scores</td><td>data</td></tr>")
    if not rows:
        return ""
    return (
        "<h3>Proof of the mask: key s is read by query t where all of these hold</h3>"
        '<div class="wide"><table><thead><tr><th>part</th><th>predicate</th><th>known from</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _maps(record: ir.AttentionSite) -> str:
    maps = {
        "Q[b, h, t, d]": record.q_map,
        "K[b, h, s, d]": record.k_map,
        "V[b, h, s, d]": record.v_map,
    }
    rows = [
        f"<dt><code>{name}</code></dt><dd><code>{escape(value)}</code></dd>"
        for name, value in maps.items()
        if value
    ]
    rows += [
        f"<dt><code>{escape(operand.name)}</code></dt>"
        f"<dd>operand, {escape(operand.dtype)} [{escape(', '.join(operand.shape))}]</dd>"
        for operand in record.operands
    ]
    return f"<h3>Where the elements come from</h3><dl>{''.join(rows)}</dl>" if rows else ""


def _graphs(site: SiteReport) -> str:
    pictures = {"Before": site.before, "After": site.after}
    figures = "".join(
        f"<figure><figcaption>{name}, {text.counted(len(piece.nodes), 'node')}"
        f"{_left_out(piece)}</figcaption>"
        f'<div class="scroll">{graph_svg(piece, label=f"{name}: {site.name}")}</div></figure>'
        for name, piece in pictures.items()
        if piece.nodes
    )
    if not figures:
        return ""
    seen = {node.role for piece in pictures.values() for node in piece.nodes}
    seen |= {"softmax"} if "weights" in seen else set()
    legend = "".join(
        f'<li><i class="role-{role}"></i>{label}</li>'
        for role, label in _ROLES.items()
        if role in seen
    )
    return (
        f'<h3>The piece of the graph</h3><div class="graphs">{figures}</div>'
        f'<ul class="legend">{legend}</ul>'
    )


def _left_out(piece: GraphSlice) -> str:
    drawn = len(nearest(piece).nodes)
    return f"; the {drawn} nearest to the result are drawn" if drawn < len(piece.nodes) else ""


def _source(source: str) -> str:
    """The lines around `file:line`; nothing where the file cannot be read."""
    lines = "".join(_numbered(source))
    name = escape(text.source_text(source))
    return f"<h3>Source <code>{name}</code></h3><pre>{lines}</pre>" if lines else ""


def _numbered(source: str) -> Iterator[str]:
    path, _, number = source.rpartition(":")
    if not number.isdigit():
        return
    linecache.checkcache(path)
    lines, here = linecache.getlines(path), int(number)
    for i in range(max(1, here - _CONTEXT), min(len(lines), here + _CONTEXT) + 1):
        line = f'<span class="number">{i}</span>{escape(lines[i - 1].rstrip())}'
        yield f'<span class="here">{line}</span>\n' if i == here else f"{line}\n"


def _names(piece: Fold) -> str:
    """The sites that the fold stands for."""
    if len(piece.sites) == 1:
        return ""
    items = "".join(
        f"<li>{escape(site.name)}"
        + (f' <span class="quiet">{escape(site.validation)}</span>' if site.validation else "")
        + "</li>"
        for site in piece.sites
    )
    return (
        f'<details class="more"><summary>All {len(piece.sites)} sites</summary>'
        f'<ul class="names">{items}</ul></details>'
    )
