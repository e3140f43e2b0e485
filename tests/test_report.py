"""Reports as values, JSON and text, and the folding of identical layers."""

import json
import subprocess
import sys

import pytest
import sympy
from rich.console import Console

from sparse_compile import ir
from sparse_compile.errors import SparseCompileError
from sparse_compile.expressions import Load, Truth, Where, b, h, s, t, x
from sparse_compile.inspect import text
from sparse_compile.inspect.folding import fold
from sparse_compile.inspect.formulas import readable, transform_text
from sparse_compile.inspect.report import GraphReport, Report, SiteReport, write_atomically
from sparse_compile.inspect.samples import (
    CAUSAL,
    PADDING,
    PROGRAM,
    SDPA,
    WINDOW,
    operand,
    sample_report,
    sample_site,
    unread_site,
)


def one_graph(*sites: SiteReport) -> Report:
    return Report(graphs=(GraphReport(sites=sites),))


def planned(name: str, *atoms: ir.MaskAtom, **changes) -> SiteReport:
    return SiteReport.from_site(sample_site(name, *atoms, **changes), SDPA)


class TestSiteReport:
    def test_rewritten_site_says_how(self):
        report = SiteReport.from_site(sample_site("layer", CAUSAL, WINDOW), PROGRAM)
        assert report.status == "rewritten"
        assert (report.reason_code, report.reason) == (None, None)
        assert (report.kernel, report.loop_order) == ("program_attention", "query_major")
        assert report.mask == "causal & window(left=512)"
        assert (report.query_heads, report.kv_heads, report.group) == (32, 8, 4)
        assert (report.query_tokens, report.key_tokens, report.head_dim) == (1024, 1024, 128)
        assert report.scale == pytest.approx(128**-0.5)

    def test_reason_wins_over_a_plan(self):
        reason = ir.Reason(code="weights-escape", message="the weights are returned")
        report = SiteReport.from_site(sample_site("layer", reason=reason), SDPA)
        assert report.status == "declined"
        assert report.reason_code == "weights-escape"
        assert report.reason == "the weights are returned"
        assert (report.kernel, report.loop_order, report.why) == (None, None, None)

    def test_no_plan_is_a_coded_decline(self):
        report = SiteReport.from_site(sample_site("layer"), None)
        assert (report.status, report.reason_code) == ("declined", "no-plan")

    def test_nothing_is_said_that_was_not_proven(self):
        report = SiteReport.from_site(unread_site("layer", "weights-escape"), None)
        assert (report.status, report.reason_code) == ("declined", "weights-escape")
        facts = (report.mask, report.scale, report.kv_source, report.site)
        sizes = (report.query_heads, report.kv_heads, report.group)
        tokens = (report.query_tokens, report.key_tokens, report.head_dim)
        assert {*facts, *sizes, *tokens} == {None}
        (row,) = json.loads(one_graph(report).to_json())["graphs"][0]["sites"]
        assert (row["mask"], row["query_heads"], row["scale"]) == (None, None, None)
        assert Report.from_json(one_graph(report).to_json()) == one_graph(report)
        for width in (80, 200):
            shown = text.render(one_graph(report), width=width)
            assert "dense" not in shown
            assert "1/1" not in shown

    def test_symbolic_sizes_are_text(self):
        tokens = sympy.Symbol("s7", integer=True, positive=True)
        report = planned("layer", query_tokens=tokens, query_heads=2 * tokens)
        assert (report.query_tokens, report.query_heads, report.group) == ("s7", "2*s7", "s7/4")
        assert report.key_tokens == 1024

    def test_mask_names_its_operands(self):
        padding = ir.MaskAtom(
            kind="key_padding", predicate=sympy.Ne(Load(0, b, s), 0), text="key_padding(operand0)"
        )
        report = planned("layer", padding, operands=(operand("attention_mask", "2", "9"),))
        assert report.mask == "key_padding(attention_mask)"
        assert planned("layer", padding).mask == "key_padding(operand0)"

    def test_transforms_keep_their_order(self):
        steps = (ir.SoftCap(cap=sympy.Integer(30)), ir.Masked(keep=s <= t, fill=-1e9))
        assert planned("layer", transforms=steps).score_transforms == ("soft_cap(30)", "mask")


class TestReport:
    def test_sites_of_all_graphs_by_status(self):
        report = sample_report()
        assert len(report.sites) == 51
        assert [site.name for site in report.declined] == [
            "t5.block.0.layer.0.SelfAttention",
            "t5.block.1.layer.0.SelfAttention",
            "router.gate",
        ]
        assert len(report.rewritten) + len(report.declined) == len(report.sites)
        assert [site.name for site in report.failed_validations] == ["vit.blocks.0.attn"]
        assert len(report.errors) == 1

    def test_json_round_trip(self):
        report = sample_report()
        assert Report.from_json(report.to_json()) == report
        assert Report.from_json(report.to_json().encode()) == report

    def test_json_is_strict_and_keys_are_stable(self):
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        data = json.loads(sample_report().to_json(), parse_constant=refuse)
        assert list(data) == ["graphs", "graph_breaks", "version"]
        assert list(data["graphs"][0]) == ["sites", "n_nodes", "timings", "error"]
        site = data["graphs"][0]["sites"][0]
        assert list(site) == list(SiteReport.__struct_fields__)
        assert site["site"]["transforms"][0]["fill"] == "-inf"

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"graphs": 3, "version": 1}', "null"])
    def test_from_json_refuses_what_is_no_report(self, content):
        with pytest.raises(SparseCompileError, match="report"):
            Report.from_json(content)

    def test_from_json_names_a_foreign_version(self):
        with pytest.raises(SparseCompileError, match="version 99"):
            Report.from_json('{"version": 99, "graphs": []}')

    def test_importing_reports_is_cheap(self):
        code = (
            "import sys, sparse_compile.inspect\n"
            "sys.exit([n for n in ('torch', 'rich', 'networkx') if n in sys.modules] or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


class TestText:
    @pytest.mark.parametrize("width", [60, 80, text.WIDE - 1, text.WIDE, 200])
    def test_everything_is_there_at_any_width(self, width):
        shown = text.render(sample_report(), width=width)
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        # words may be folded over lines and beside other columns: compare without layout
        for fact in ("flex_attention", "program_attention", "query_major", "32768 x 32768"):
            assert fact in shown
        for word in ("weights-escape", "returned", "materialised", "soft_cap(50)", "16/16"):
            assert word in shown
        assert "51 sites, 48 rewritten, 3 declined" in shown

    def test_one_line_a_site_when_there_is_room(self):
        lines = text.render(one_graph(planned("a.attn", CAUSAL)), width=220).splitlines()
        (row,) = [line for line in lines if "a.attn" in line]
        for fact in ("32/8 x4", "1024 x 1024", "causal", "scale(0.0883883)", "sdpa"):
            assert fact in row

    def test_scale_is_shown_once(self):
        scale = ir.Scale(factor=sympy.Rational(1, 8))
        listed = planned("attn", scale=0.125, transforms=(scale, ir.SoftCap(cap=sympy.Integer(9))))
        assert text.transforms_text(listed) == "scale(0.125), soft_cap(9)"
        assert text.transforms_text(planned("attn", scale=0.5)) == "scale(0.5)"
        assert text.transforms_text(planned("attn", scale=1.0)) == ""

    def test_identical_layers_share_a_row(self):
        shown = text.render(sample_report(), width=100)
        assert "model.layers.[0-29].self_attn  x30" in shown
        assert "decoder.blocks.[0,2..10].attn  x6" in shown
        assert "model.layers.7.self_attn" not in shown

    def test_expand_shows_every_layer(self):
        shown = text.render(sample_report(), width=100, expand=True)
        for layer in range(30):
            assert f"model.layers.{layer}.self_attn" in shown

    def test_names_are_no_markup(self):
        site = planned("net.[bold]x[/bold].attn", CAUSAL)
        assert "net.[bold]x[/bold].attn" in text.render(one_graph(site), width=100)

    def test_problems_are_named(self):
        shown = text.render(sample_report(), width=100)
        assert "graph 1: a pass failed" in shown
        assert "KeyError: '<unknown>'" in shown
        assert "graph break: model.py:44: call to print()" in shown
        assert "validation failed: max error 3e-2" in " ".join(shown.split())
        assert "30 of 31 validated" in shown

    def test_no_sites(self):
        assert str(Report()).startswith("0 sites, 0 rewritten, 0 declined, 0 graph breaks")

    def test_str_and_rich_show_the_same(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "90")
        console = Console(width=90, color_system=None)
        with console.capture() as capture:
            console.print(sample_report())
        lines = [line.rstrip() for line in capture.get().splitlines()]
        assert "\n".join(lines) + "\n" == str(sample_report())

    def test_sources_are_shown_without_the_way_to_their_package(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert text.source_text(f"{tmp_path}/net.py:3") == "net.py:3"
        assert text.source_text("/x/site-packages/timm/vit.py:9") == "timm/vit.py:9"
        assert text.source_text("/elsewhere/net.py:3") == "/elsewhere/net.py:3"


class TestFolding:
    @pytest.mark.parametrize(
        ("layers", "name"),
        [
            ([3], "net.3.attn"),
            ([0, 1, 2], "net.[0-2].attn"),
            ([0, 2, 4, 6], "net.[0,2..6].attn"),
            ([0, 1, 2, 7], "net.[0-2,7].attn"),
            ([9, 10, 11], "net.[9-11].attn"),
        ],
    )
    def test_pattern_names_the_layers(self, layers, name):
        (piece,) = fold(planned(f"net.{layer}.attn") for layer in layers)
        assert piece.name == name
        assert piece.layer == "net"
        assert len(piece.sites) == len(layers)

    @pytest.mark.parametrize(
        "other",
        [
            planned("net.1.attn", CAUSAL),
            planned("net.1.attn", scale=1.0),
            planned("net.1.attn", kv_heads=32),
            planned("net.1.attn", key_tokens=7),
            planned("net.1.attn", q_map="q_proj[b, t, 64*h + d]"),
            planned("net.1.cross"),
            SiteReport.from_site(sample_site("net.1.attn"), PROGRAM),
            SiteReport.from_site(sample_site("net.1.attn"), SDPA, validation="failed: 1"),
        ],
        ids=["mask", "scale", "heads", "tokens", "map", "name", "plan", "validation"],
    )
    def test_what_differs_stays_apart(self, other):
        assert len(fold([planned("net.0.attn"), other])) == 2

    def test_numbers_in_value_names_do_not_matter(self):
        values = ("linear", "linear_1", "linear_12")
        sites = [planned("net.0.attn", q_map=f"{value}[b, t, 128*h + d]") for value in values]
        assert len(fold(sites)) == 1

    def test_pattern_never_names_a_site_that_is_not_there(self):
        places = [(0, 0), (0, 1), (1, 0)]
        pieces = fold(planned(f"net.{stage}.blocks.{block}") for stage, block in places)
        assert [piece.name for piece in pieces] == ["net.0.blocks.[0-1]", "net.1.blocks.0"]

    def test_sites_of_one_module_are_counted(self):
        (piece,) = fold([planned("net.attn"), planned("net.attn#2"), planned("net.attn#3")])
        assert (piece.label, piece.layer) == ("net.attn  x3", "net")

    def test_same_site_compiled_twice_is_counted_twice(self):
        (piece,) = fold([planned("net.0.attn"), planned("net.0.attn")])
        assert piece.label == "net.0.attn  x2"

    def test_same_numbers_and_other_names_keep_their_order(self):
        names = [piece.name for piece in fold([planned("b"), planned("a"), planned("b")])]
        assert names == ["b", "a"]


class TestFormulas:
    @pytest.mark.parametrize(
        ("formula", "shown"),
        [
            (s <= t, "s ≤ t"),
            (t - s < 512, "t - s < 512"),
            (sympy.Eq(sympy.floor(t / 8), sympy.floor(s / 8)), "⌊t/8⌋ = ⌊s/8⌋"),
            (sympy.Eq(Load(0, b, t), Load(0, b, s)), "doc[b, t] = doc[b, s]"),
            (sympy.Ne(Load(1, b, s), 0), "operand1[b, s] ≠ 0"),
            (s <= Load(0), "s ≤ doc"),
            (sympy.Or(s <= t, sympy.And(s < 16, t > 3)), "s ≤ t or (t > 3 and s < 16)"),
            (sympy.And(sympy.Or(s < 3, t < 2), s <= t), "s ≤ t and (s < 3 or t < 2)"),
            (sympy.Not(sympy.Or(s < 3, t < 2)), "not (s < 3 or t < 2)"),
            (sympy.Abs(t - s) <= 4, "|s - t| ≤ 4"),
            (sympy.Mod(t - s, 4) < 2, "(t - s) mod 4 < 2"),
            (sympy.Ne(Where(s <= t, Load(0, s), 0), 0), "(doc[s] if s ≤ t else 0) ≠ 0"),
            (sympy.Ne(Truth(s <= t), 0), "[s ≤ t] ≠ 0"),
            (0.125 * x, "0.125*x"),
            (sympy.true, "always"),
        ],
        ids=str,
    )
    def test_reads_like_mathematics(self, formula, shown):
        assert readable(formula, (operand("doc", "2", "s0"),)) == shown

    def test_transforms_name_their_operands(self):
        bias = ir.Bias(value=Load(0, 0, h, t, s))
        assert transform_text(bias, (operand("table"),)) == "bias(table[0, h, t, s])"
        assert transform_text(ir.Scale(factor=Load(0, h)), (operand("g"),)) == "scale(g[h])"
        assert transform_text(ir.Sink(logit=Load(0, h)), (operand("sinks"),)) == "sink(sinks[h])"

    def test_table_names_them_too(self):
        site = planned(
            "attn",
            PADDING,
            transforms=(ir.Bias(value=Load(0, h, t, s)),),
            operands=(operand("rel"),),
        )
        assert "bias(rel[h, t, s])" in text.render(one_graph(site), width=100)


class TestWriteAtomically:
    def test_replaces_the_old_file(self, tmp_path):
        path = tmp_path / "report.txt"
        path.write_text("old")
        write_atomically(path, "new ≤")
        assert path.read_text("utf-8") == "new ≤"
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.txt"]

    def test_a_failure_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "report.txt"
        path.write_text("old")
        with pytest.raises(UnicodeEncodeError):
            write_atomically(path, "\ud800")
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["report.txt"]
