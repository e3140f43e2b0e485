"""The HTML report: its masks, graphs, words, safety, and how Chromium shows it."""

import re
import shutil
import struct
import subprocess
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compile import ir
from sparse_compile.expressions import Load, Truth, b, h, s, t
from sparse_compile.inspect import html
from sparse_compile.inspect.drawing import mask_svg
from sparse_compile.inspect.folding import fold
from sparse_compile.inspect.graph_drawing import graph_svg
from sparse_compile.inspect.html_site import article
from sparse_compile.inspect.mask_grid import CELLS, grids
from sparse_compile.inspect.report import (
    GraphBreak,
    GraphReport,
    GraphSlice,
    PassTiming,
    Report,
    SiteReport,
    SliceNode,
)
from sparse_compile.inspect.samples import (
    BEFORE,
    CAUSAL,
    DOCUMENT,
    KV_LENGTH,
    PADDING,
    SDPA,
    WINDOW,
    operand,
    sample_report,
    sample_site,
    unread_site,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH, HEIGHT = 1280, 2000
EVIL = "<script>alert('&\"')</script>"


def atom(predicate: sympy.Basic) -> ir.MaskAtom:
    return ir.MaskAtom(kind="structural", predicate=predicate, text="atom")


def shown(site: SiteReport) -> str:
    (piece,) = fold([site])
    return article(piece, is_open=True)


def words(page: str) -> str:
    """The text of a page without its tags."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


class TestMaskGrid:
    @pytest.mark.parametrize(
        "predicate",
        [
            s <= t,
            t - s < 5,
            sympy.Abs(t - s) <= 3,
            sympy.Eq(sympy.floor(t / 7), sympy.floor(s / 7)),
            sympy.Or(s <= t, s < 4),
            sympy.Eq(sympy.Mod(t - s, 3), 0),
            sympy.Not(sympy.And(s > 4, t < 9)),
        ],
        ids=str,
    )
    def test_small_masks_are_exact(self, predicate):
        site = sample_site("attn", atom(predicate), query_tokens=24, key_tokens=29)
        (grid,) = grids(site)
        truth = [[bool(predicate.subs({t: i, s: j})) for j in range(29)] for i in range(24)]
        assert torch.equal(grid.read, torch.tensor(truth, dtype=torch.float64))
        assert not grid.maybe.any()

    def test_data_is_unknown_only_where_structure_leaves_it_open(self):
        site = sample_site("attn", CAUSAL, PADDING, query_tokens=16, key_tokens=16)
        (grid,) = grids(site)
        assert torch.equal(grid.maybe, torch.ones(16, 16, dtype=torch.float64).tril())
        assert not grid.read.any()

    def test_data_behind_or_and_not_keeps_what_is_certain(self):
        predicate = sympy.Or(s < 4, sympy.Not(sympy.And(s < 8, sympy.Ne(Load(0, b, s), 0))))
        (grid,) = grids(sample_site("attn", atom(predicate), query_tokens=2, key_tokens=12))
        assert grid.read[0].tolist() == [1] * 4 + [0] * 4 + [1] * 4
        assert grid.maybe[0].tolist() == [0] * 4 + [1] * 4 + [0] * 4

    def test_dense_and_opaque(self):
        (dense,) = grids(sample_site("attn"))
        assert dense.share == (1, 1)
        (opaque,) = grids(sample_site("attn", mask=ir.MaskProof(atoms=(CAUSAL,), opaque=True)))
        assert opaque.share[0] == 0
        assert opaque.share[1] == pytest.approx(0.5, abs=0.02)

    def test_thin_structure_in_a_long_mask_gets_a_detail(self):
        site = sample_site("attn", CAUSAL, WINDOW, query_tokens=32768, key_tokens=32768)
        whole, detail = grids(site)
        assert whole.read.shape == (CELLS, CELLS)
        assert (whole.read.diagonal() > 0).all()
        assert whole.read.sum() == whole.read.diagonal().sum() + whole.read.diagonal(-1).sum()
        assert (detail.queries, detail.keys) == (range(1024), range(1024))
        assert not detail.is_uniform

    def test_detail_follows_an_offset(self):
        predicate = sympy.And(s <= t + 30000, t + 30000 - s < 64)
        site = sample_site("attn", atom(predicate), query_tokens=2768, key_tokens=32768)
        _, detail = grids(site)
        assert detail.keys.stop == 32768
        assert not detail.is_uniform

    def test_plain_causal_needs_no_detail(self):
        assert len(grids(sample_site("attn", CAUSAL, query_tokens=9999, key_tokens=9999))) == 1

    def test_decode_is_one_row(self):
        (grid,) = grids(sample_site("attn", KV_LENGTH, query_tokens=1, key_tokens=4096))
        assert grid.read.shape == (1, CELLS)
        assert grid.maybe.all()

    def test_symbolic_sizes_are_assumed_and_said(self):
        tokens = sympy.Symbol("s0", integer=True, positive=True)
        site = sample_site("attn", CAUSAL, WINDOW, query_tokens=tokens, key_tokens=tokens + 8)
        grid = grids(site)[0]
        assert grid.sizes == (("s0", 1024),)
        assert len(grid.keys) == 1032

    def test_unknown_functions_are_refused(self):
        strange = sympy.Function("strange")(t) > s
        with pytest.raises(NotImplementedError, match="strange"):
            grids(sample_site("attn", atom(strange)))


class TestMaskPicture:
    def areas(self, site: ir.AttentionSite) -> tuple[float, dict[str, float]]:
        root = ElementTree.fromstring(mask_svg(grids(site)[0], label="mask"))
        ground, areas = 0.0, {}
        for rect in root.iter("rect"):
            area = float(rect.get("width")) * float(rect.get("height"))
            kind = rect.get("class")
            if kind == "mask-ground":
                ground = area
            elif kind != "mask-frame":
                areas[kind] = areas.get(kind, 0.0) + area
        return ground, areas

    def test_painted_area_is_the_share_that_is_read(self):
        ground, areas = self.areas(sample_site("attn", CAUSAL, query_tokens=32, key_tokens=32))
        assert areas == {"read-4": pytest.approx(ground * (33 / 64), rel=0.01)}

    def test_data_is_hatched(self):
        ground, areas = self.areas(sample_site("attn", DOCUMENT, query_tokens=32, key_tokens=32))
        assert areas == {"maybe": pytest.approx(ground, rel=0.01)}

    def test_partly_read_cells_are_paler(self):
        _, areas = self.areas(sample_site("attn", CAUSAL))
        assert areas["read-4"] > 0
        assert {"read-2", "read-3"} & set(areas)


def rectangles(svg: str) -> dict[str, tuple[float, float, float, float]]:
    """Boxes of a graph by their tooltip: left, top, right, bottom."""
    boxes = {}
    for group in ElementTree.fromstring(svg).iter("g"):
        rect = group.find("rect")
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        boxes[group.find("title").text] = (x, y, x + width, y + height)
    return boxes


@st.composite
def slices(draw) -> GraphSlice:
    count = draw(st.integers(1, 14))
    nodes = []
    for i in range(count):
        inputs = draw(st.lists(st.integers(0, max(i - 1, 0)), max_size=3)) if i else []
        op = draw(st.sampled_from(["add", "scaled_dot_product_attention_with_a_long_name"]))
        nodes.append(SliceNode(name=f"n{i}", op=op, inputs=tuple(f"n{j}" for j in inputs)))
    return GraphSlice(nodes=tuple(nodes))


class TestGraphPicture:
    @settings(max_examples=60, deadline=None)
    @given(slices())
    def test_boxes_never_overlap_and_arrows_point_down(self, piece):
        svg = graph_svg(piece, label="graph")
        boxes = rectangles(svg)
        assert len(boxes) == len(piece.nodes)
        places = list(boxes.values())
        for i, (left, top, right, bottom) in enumerate(places):
            for other in places[i + 1 :]:
                apart = right < other[0] or other[2] < left or bottom < other[1] or other[3] < top
                assert apart
        tops = {node.name: boxes[str(node)][1] for node in piece.nodes}
        for node in piece.nodes:
            assert all(tops[name] < tops[node.name] for name in node.inputs)
        arrows = [p for p in ElementTree.fromstring(svg).iter("path") if p.get("class") == "edge"]
        assert len(arrows) == sum(len(set(node.inputs)) for node in piece.nodes)

    def test_everything_is_inside_the_picture(self):
        svg = graph_svg(BEFORE, label="before")
        left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())
        for box in rectangles(svg).values():
            assert left <= box[0] <= box[2] <= left + width
            assert top <= box[1] <= box[3] <= top + height

    def test_inputs_stand_just_above_their_use(self):
        boxes = {
            title.split()[0]: box for title, box in rectangles(graph_svg(BEFORE, label="")).items()
        }
        step = boxes["softmax"][1] - boxes["attn_weights_1"][1]
        assert boxes["causal"][1] - boxes["position"][1] == step
        assert boxes["attn_output"][1] - boxes["values"][1] == step

    def test_of_a_large_slice_the_part_next_to_the_result_is_drawn(self):
        chain = [SliceNode(name=f"n{i}", op="neg", inputs=(f"n{i - 1}",)) for i in range(100)]
        wide = [SliceNode(name=f"w{i}", op="arange", inputs=()) for i in range(100)]
        last = SliceNode(name="last", op="cat", inputs=("n99", *(f"w{i}" for i in range(3))))
        piece = GraphSlice(nodes=(*chain, *wide, last))
        names = {title.split()[0] for title in rectangles(graph_svg(piece, label="graph"))}
        assert names == {"last", "w0", "w1", "w2", *(f"n{i}" for i in range(64, 100))}
        page = words(shown(SiteReport.from_site(sample_site("attn"), SDPA, after=piece)))
        assert "After, 201 nodes; the 40 nearest to the result are drawn" in page

    def test_inputs_from_outside_are_left_out(self):
        node = SliceNode(name="a", op="add", inputs=("elsewhere", "a"))
        svg = graph_svg(GraphSlice(nodes=(node,)), label="graph")
        assert 'class="edge"' not in svg

    def test_nothing_for_nothing(self):
        assert graph_svg(GraphSlice(), label="graph") == ""


class TestPage:
    def test_every_site_is_in_the_page(self):
        page = words(html.render(sample_report()))
        for site in sample_report().sites:
            assert site.name in page
            assert (site.mask or "") in page

    def test_problems_come_first(self):
        page = words(html.render(sample_report()))
        problems = page[: page.index("Time of the passes")]
        for problem in (
            "weights-escape",
            "KeyError: '<unknown>'",
            "call to print()",
            "max error 3e-2",
        ):
            assert problem in problems

    def test_no_problems_no_section(self):
        site = SiteReport.from_site(sample_site("attn", CAUSAL), SDPA)
        page = html.render(Report(graphs=(GraphReport(sites=(site,)),)))
        assert "What needs a look" not in page
        assert "What needs a look" in html.render(sample_report())

    def test_no_sites(self):
        assert "No attention was found" in html.render(Report())

    def test_transforms_stand_in_the_order_they_are_applied(self):
        site = sample_site(
            "attn",
            CAUSAL,
            transforms=(
                ir.SoftCap(cap=sympy.Integer(50)),
                ir.Bias(value=h * (s - t), text="alibi"),
                ir.Masked(keep=s <= t, fill=-1e9),
                ir.Sink(logit=Load(0, h)),
                ir.Dropout(p=0.1),
            ),
            operands=(operand("sinks", "32"),),
        )
        page = shown(SiteReport.from_site(site, SDPA))
        chain = re.search(r'<ol class="chain">(.*?)</ol>', page)[1]
        assert [words(item) for item in chain.split("</li>")][:-1] == [
            "q · k",
            "scale(0.0883883)",
            "soft_cap(50)",
            "bias(alibi)",
            "mask: causal",
            "sink(sinks[h])",
            "softmax",
            "dropout(0.1)",
            "· v",
        ]

    def test_a_mask_without_a_place_of_its_own_comes_last(self):
        site = sample_site("attn", CAUSAL, transforms=(ir.SoftCap(cap=sympy.Integer(9)),))
        chain = re.search(r'<ol class="chain">(.*?)</ol>', shown(SiteReport.from_site(site, SDPA)))
        assert words(chain[1]).endswith("soft_cap(9) mask: causal softmax · v")

    def test_proof_and_maps_are_readable(self):
        site = sample_site("attn", CAUSAL, PADDING, operands=(operand("attention_mask", "2", "9"),))
        page = words(shown(SiteReport.from_site(site, SDPA)))
        assert "causal s ≤ t structure" in page
        assert "attention_mask[b, s] ≠ 0 data" in page
        assert "K[b, h, s, d] k_proj[b, s, 128*floor(h/4) + d]" in page
        assert "attention_mask operand, int64 [2, 9]" in page

    def test_source_lines_around_the_site(self, tmp_path):
        path = tmp_path / "net.py"
        path.write_text("".join(f"line_{i} = '<{i}>'\n" for i in range(1, 31)))
        page = shown(SiteReport.from_site(sample_site("attn", source=f"{path}:12"), SDPA))
        listing = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1]
        assert [int(n) for n in re.findall(r"line_(\d+)", listing)] == list(range(7, 18))
        assert "line_12" in re.search(r'<span class="here">(.*?)</span>\n', listing)[1]
        assert "&lt;12&gt;" in listing

    @pytest.mark.parametrize("source", ["", "gone.py:3", "no line", "/:1"])
    def test_sources_that_cannot_be_read_are_left_out(self, source):
        assert "<pre>" not in shown(SiteReport.from_site(sample_site("attn", source=source), SDPA))

    def test_masks_that_cannot_be_drawn_say_why(self):
        site = sample_site("attn", atom(sympy.Function("strange")(t) > s))
        page = words(shown(SiteReport.from_site(site, SDPA)))
        assert "No picture" in page
        assert "strange" in page

    def test_declined_before_the_mask_was_read_shows_no_mask(self):
        site = unread_site("attn", "not-convex")
        page = shown(SiteReport.from_site(site, None))
        assert "svg" not in page
        for fact in ("heads", "tokens", "scale", "KV source", "dense", "Scores, in order"):
            assert fact not in words(page), fact

    def test_a_report_without_records_is_shown(self):
        site = SiteReport(
            name="attn", status="rewritten", mask="dense", query_heads=4, kv_heads=4, group=1,
            scale=1.0, score_transforms=("soft_cap(3)",), kernel="sdpa",
        )  # fmt: skip
        page = words(html.render(Report(graphs=(GraphReport(sites=(site,)),))))
        assert "soft_cap(3)" in page


class TestSafety:
    @pytest.fixture
    def hostile(self) -> str:
        """A page of a report whose every text tries to break out."""
        node = SliceNode(name=EVIL, op=EVIL, inputs=())
        evil_atom = ir.MaskAtom(kind="data", predicate=sympy.Ne(Load(0, b, s), 0), text=EVIL)
        site = sample_site(
            EVIL,
            evil_atom,
            source=EVIL,
            q_map=EVIL,
            dtype=EVIL,
            softmax_dtype=EVIL,
            operands=(operand(EVIL, EVIL, dtype=EVIL),),
            transforms=(ir.Bias(value=Truth(s <= t), text=EVIL),),
        )
        piece = GraphSlice(nodes=(node,))
        plan = ir.KernelPlan(kernel=EVIL, loop_order=EVIL, why=EVIL)
        reason = ir.Reason(code=EVIL, message=EVIL)
        declined = sample_site(EVIL, reason=reason)
        graph = GraphReport(
            sites=(
                SiteReport.from_site(site, plan, before=piece, after=piece, validation=EVIL),
                SiteReport.from_site(declined, None),
            ),
            timings=(PassTiming(name=EVIL, ms=1.0),),
            error=EVIL,
        )
        report = Report(graphs=(graph,), graph_breaks=(GraphBreak(reason=EVIL, source=EVIL),))
        return html.render(report, title=EVIL)

    def test_everything_is_escaped(self, hostile):
        assert "script" in hostile
        assert "<script" not in hostile
        assert "alert('" not in hostile

    def test_nothing_is_loaded_from_elsewhere(self):
        page = html.render(sample_report())
        assert "<script" not in page
        assert "<link" not in page
        assert "@import" not in page
        assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
        assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#hatch", "#arrow"}

    def test_tags_are_balanced(self, hostile):
        for page in (hostile, html.render(sample_report())):
            check_balance(page)

    def test_links_lead_somewhere(self):
        page = html.render(sample_report())
        ids = re.findall(r' id="([^"]+)"', page)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def check_balance(page: str) -> None:
    void = {"meta", "br", "hr", "img", "input"}
    stack: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack, f"</{tag}> closes nothing"
            assert stack.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    Parser().feed(page)
    assert not stack


def png_lines(data: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and the distinct coded lines of an 8-bit PNG."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, _, colour = struct.unpack(">IIBB", data[16:26])
    body, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            body += data[at + 8 : at + 8 + length]
        at += length + 12
    raw = zlib.decompress(body)
    stride = 1 + width * {2: 3, 6: 4}[colour]
    return width, height, {raw[i : i + stride] for i in range(0, len(raw), stride)}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
class TestChromium:
    def browse(self, page: Path, profile: Path, *flags: str) -> str:
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            "--virtual-time-budget=2000",
            *flags,
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @pytest.fixture
    def page(self, tmp_path) -> Path:
        path = tmp_path / "report.html"
        sample_report().to_html(path, title="every kind of site")
        return path

    def test_screenshot_shows_the_report(self, page, tmp_path):
        picture, blank = tmp_path / "report.png", tmp_path / "blank.png"
        self.browse(page, tmp_path / "profile", f"--screenshot={picture}")
        width, height, lines = png_lines(picture.read_bytes())
        assert (width, height) == (WIDTH, HEIGHT)
        empty = tmp_path / "empty.html"
        empty.write_text("<!doctype html><title>empty</title>")
        self.browse(empty, tmp_path / "other", f"--screenshot={blank}")
        _, _, blank_lines = png_lines(blank.read_bytes())
        assert len(blank_lines) < 10
        # at least a third of the page's rows of pixels hold something of their own
        assert len(lines) > HEIGHT / 3

    def test_dom_holds_every_site(self, page, tmp_path):
        dom = words(self.browse(page, tmp_path / "profile", "--dump-dom"))
        for site in sample_report().sites:
            assert site.name in dom
