"""The backend through `torch.compile`: options, reports, failures, training and caches."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import sparse_compile
from sparse_compile import ConfigError, DeclinedSiteError, ModelError, _compat, backend, pipeline
from tests.small_attention import Attention, Buffered, H, T, compiled, the_site, tokens

ROOT = Path(__file__).resolve().parent.parent


def with_weights(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x @ x.mT).softmax(-1)
    return weights @ x, weights


# -- with Inductor: tiny graphs, since every one of them is compiled by the C++ compiler


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_training_through_inductor(mode: str | None) -> None:
    model, x = Attention(), tokens()
    run = compiled(model, full=True, mode=mode)
    grads = []
    for function in (model, run):
        model.zero_grad()
        function(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 4
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)  # of sums of 96 squares
    site = the_site()
    assert (site.kernel, site.mask) == ("sdpa", "causal")
    assert site.site.training


def test_inductor_options_reach_inductor() -> None:
    seen: list[str] = []

    def function(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    def watch(graph: torch.fx.Graph) -> None:
        seen.extend(str(node.target) for node in graph.nodes)

    options = {"inductor": {"post_grad_custom_pre_pass": watch}, "verify": True}
    run = compiled(function, full=True, options=options)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(run(x), function(x))
    assert any("attention" in target for target in seen)
    assert the_site().validation.startswith("passed")


WARM_START = """
import torch, sys
from torch._dynamo.utils import counters
import sparse_compile
from sparse_compile.backend import sparse_compile as ours
def function(q, k, v):
    keep = torch.arange(8) <= torch.arange(8)[:, None]
    return torch.tanh(q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
with torch.no_grad(), torch.profiler.profile() as profile:
    out = torch.compile(function, backend=ours)(q, k, v)
torch.testing.assert_close(out, function(q, k, v))
ran = {event.key for event in profile.key_averages()}
print(counters["inductor"]["fxgraph_cache_hit"],
      sum("program_attention" in name for name in ran),
      [site.status for site in sparse_compile.last_report().sites])
"""


def test_a_warm_start_from_disk_keeps_the_rewrite(tmp_path: Path) -> None:
    environ = {
        **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    lines = []
    for _ in range(2):
        command = [sys.executable, "-c", WARM_START]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.split(maxsplit=2))
    assert lines[0][0] == "0"
    assert int(lines[1][0]) > 0
    for _, kernels, sites in lines:
        assert int(kernels) > 0
        assert sites.strip() == "['rewritten']"


def test_a_changed_mask_buffer_is_compiled_again() -> None:
    model, x = Buffered(), tokens()
    run = compiled(model, full=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
        assert the_site().mask == "causal"
        model.keep[:, 0] = False  # the first query has no key left
        model.keep[0, 2] = True
        torch.testing.assert_close(run(x), model(x))
        model.keep.copy_(torch.ones(T, T, dtype=torch.bool))
        torch.testing.assert_close(run(x), model(x))


def test_graph_breaks_are_listed() -> None:
    model = Attention()

    def function(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(compiled(function)(x), function(x))
    report = sparse_compile.last_report()
    assert [site.status for site in report.sites] == ["rewritten"] * 2
    assert len(report.graphs) == 2
    (found,) = report.graph_breaks
    assert "test_backend.py" in found.source
    assert found.reason


def test_reset_clears_the_report() -> None:
    compiled(Attention())(tokens())
    assert sparse_compile.last_report().sites
    torch._dynamo.reset()
    assert sparse_compile.last_report().graphs == ()


def test_graphs_come_in_the_order_of_compilation() -> None:
    compiled(Attention())(tokens())
    compiled(with_weights)(tokens())
    statuses = [
        [site.status for site in graph.sites] for graph in sparse_compile.last_report().graphs
    ]
    assert statuses == [["rewritten"], ["declined"]]


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"options": {"polcy": "exact"}}, 'unknown option "polcy"'),
    "type": ({"options": {"strict": "yes"}}, "strict is"),
    "p-out-of-range": ({"options": {"policy": "top_p", "p": 1.5}}, "p is 1.5"),
    "p-with-exact": ({"options": {"p": 0.9}}, 'policy is "exact"'),
    "inductor": ({"options": {"inductor": {"no_such_option": 1}}}, "no_such_option"),
    "mode": ({"mode": "fast"}, "mode is 'fast'"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options_are_refused_before_anything_is_compiled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = WRONG_OPTIONS[name]
    monkeypatch.setattr(backend, "run_passes", lambda *args: pytest.fail("passes ran"))
    with pytest.raises(ConfigError, match=message) as caught:
        compiled(Attention(), full=True, **options)(tokens())
    assert not isinstance(caught.value, torch._dynamo.exc.BackendCompilerFailed)
    assert sparse_compile.last_report().graphs == ()


def test_strict_raises_with_the_sites_it_declines() -> None:
    run = compiled(with_weights, options={"strict": True})
    with pytest.raises(DeclinedSiteError, match="weights-escape") as caught:
        run(tokens())
    assert "test_backend.py" in str(caught.value)
    compiled(Attention(), options={"strict": True})(tokens())


def broken_pass(*args: Any, **kwargs: Any) -> Any:
    raise ZeroDivisionError("a pass that fails")


@pytest.mark.parametrize("stage", ["build_shadow", "find_candidates", "plan_site", "rewrite"])
def test_a_pass_that_fails_leaves_the_model_working(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, stage, broken_pass)
    model, x = Attention(), tokens()
    with caplog.at_level(logging.WARNING, logger="sparse_compile"):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a pass that fails" in caplog.text
    (graph,) = sparse_compile.last_report().graphs
    assert graph.sites == ()
    assert graph.error is not None
    assert "ZeroDivisionError: a pass that fails" in graph.error
    with pytest.raises(DeclinedSiteError, match="a pass failed"):
        compiled(Attention(), options={"strict": True})(tokens())


def test_a_pass_that_fails_half_way_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(gm: torch.fx.GraphModule, *args: Any) -> Any:
        for node in list(gm.graph.nodes):
            if node.target == "softmax":
                node.target = "exp"
                node.args = node.args[:1]
        gm.recompile()
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "rewrite", half)
    model, x = Attention(), tokens()
    torch.testing.assert_close(compiled(model)(x), model(x))


def test_a_proof_that_fails_declines_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "prove", broken_pass)
    model, x = Attention(), tokens()
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert (the_site().status, the_site().reason_code) == ("declined", "internal-error")


def test_explain_replaces_nothing_and_works_twice() -> None:
    model, x = Attention(), tokens()
    wanted = model(x)
    first, second = (sparse_compile.explain(model, x) for _ in range(2))
    for report in (first, second):
        (site,) = report.sites
        assert (site.status, site.mask, site.query_heads) == ("rewritten", "causal", H)
    assert first.sites[0].name == second.sites[0].name
    assert sparse_compile.last_report().graphs == ()
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


def test_explain_names_a_model_that_fails_by_itself() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ x

    with pytest.raises(ModelError, match="fails in eager mode") as caught:
        sparse_compile.explain(wrong, tokens())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_graphs_without_attention_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "build_shadow", broken_pass)
    x = tokens()
    torch.testing.assert_close(compiled(lambda x: x @ x.mT)(x), x @ x.mT)
    (graph,) = sparse_compile.last_report().graphs
    assert (graph.sites, graph.error) == ((), None)


def test_a_rewritten_graph_that_does_not_compile_runs_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_or_fail(gm: fx.GraphModule, inputs: object, patches: object) -> object:
        if "scaled_dot_product_attention" in gm.code:
            raise RuntimeError("no kernel for this")
        return gm.forward

    monkeypatch.setattr(_compat, "compile_with_inductor", compile_or_fail)
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    out = torch.compile(attend, backend=backend.sparse_compile)(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v))
    (graph,) = backend.last_report().graphs
    assert "no kernel for this" in (graph.error or "")
    assert [site.reason_code for site in graph.sites] == ["compile-failed"]
    assert "could not be compiled" in caplog.text


def test_a_graph_that_dynamo_traces_again_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor may ask Dynamo to trace a frame again; that is no failure of the rewritten graph."""
    seen = []

    def restart_once(gm: fx.GraphModule, inputs: object, patches: object) -> object:
        seen.append(gm.code)
        if len(seen) == 1:
            raise _compat.RestartAnalysis
        return gm.forward

    monkeypatch.setattr(_compat, "compile_with_inductor", restart_once)
    compiled(Attention(), full=True)(tokens())
    (graph,) = sparse_compile.last_report().graphs
    assert [site.status for site in graph.sites] == ["rewritten"]
    assert len(seen) == 2
    assert all("scaled_dot_product_attention" in code for code in seen)
