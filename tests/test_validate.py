"""A proof or a replacement that is wrong does not get through translation validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import sympy
import torch
from torch import Tensor, fx

from sparse_compile import expressions as ex
from sparse_compile import pipeline
from sparse_compile.config import Config
from sparse_compile.passes import validate as validation
from sparse_compile.passes.detect import find_candidates
from sparse_compile.passes.elements import ElementEvaluator
from sparse_compile.passes.programs import Proven, prove
from sparse_compile.passes.rewrite import rewrite
from sparse_compile.passes.shadow import build_shadow
from sparse_compile.passes.validate import validate
from sparse_compile.planner import plan
from sparse_compile.testing import in_backend

B, H, T, S, D = 2, 3, 4, 5, 6


def qkv() -> list[Tensor]:
    shapes = (B, H, T, D), (B, H, S, D), (B, H, S, D)
    return [torch.randn(shape) for shape in shapes]


def distance() -> Tensor:
    return torch.arange(S) - torch.arange(T)[:, None]


def capped_and_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.5) * 2.0
    return scores.masked_fill(distance() > 0, float("-inf")).softmax(-1) @ v


def with_empty_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).masked_fill(distance() >= 0, float("-inf")).softmax(-1) @ v


def program(**changes: Any) -> Callable[[Proven], Proven]:
    def change(proven: Proven) -> Proven:
        wrong = msgspec.structs.replace(proven.program, **changes)
        return Proven(**{**vars(proven), "program": wrong})

    return change


WRONG: dict[str, tuple[Callable[..., Tensor], Callable[[Proven], Proven]]] = {
    "scale": (capped_and_masked, program(scale=0.51)),
    "no-mask": (capped_and_masked, program(keep=sympy.true)),
    "mask-one-off": (capped_and_masked, program(keep=sympy.Le(ex.s, ex.t + 1))),
    "mask-one-short": (capped_and_masked, program(keep=sympy.Lt(ex.s, ex.t))),
    "mask-turned": (capped_and_masked, program(keep=sympy.Ge(ex.s, ex.t))),
    "no-soft-cap": (capped_and_masked, program(score=ex.x)),
    "bias": (capped_and_masked, program(score=2 * sympy.tanh(ex.x) + ex.s / 100)),
    "sink": (capped_and_masked, program(sink=sympy.Integer(0))),
    "weight": (capped_and_masked, program(weight=ex.s)),
    "empty-rows-zero": (with_empty_row, program(empty_rows="zero")),
    "empty-rows-mean": (with_empty_row, program(empty_rows="uniform")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_proof_is_caught_and_the_model_stays_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, change = WRONG[name]

    def wrong(*args: Any, **kwargs: Any) -> Proven:
        return change(prove(*args, **kwargs))

    monkeypatch.setattr(pipeline, "prove", wrong)
    args = qkv()

    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        report = pipeline.run_passes(gm, inputs, Config(verify=True)).report
        (site,) = report.sites
        assert (site.status, site.reason_code) == ("declined", "validation-failed")
        assert site.failed_validation
        assert "softmax" in gm.code  # the graph is back as it was
        torch.testing.assert_close(gm(*inputs)[0], function(*args), equal_nan=True)

    in_backend(use, function, *args)


def test_without_verify_the_same_mistake_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the test above would not show that validation caught it."""
    monkeypatch.setattr(pipeline, "prove", lambda *a, **k: program(scale=0.51)(prove(*a, **k)))
    args = qkv()

    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        (site,) = pipeline.run_passes(gm, inputs, Config()).report.sites
        assert (site.status, site.validation) == ("rewritten", None)
        assert not torch.allclose(gm(*inputs)[0], capped_and_masked(*args), atol=1e-4)

    in_backend(use, capped_and_masked, *args)


def test_only_the_wrong_site_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def second_wrong(*args: Any, **kwargs: Any) -> Proven:
        proven = prove(*args, **kwargs)
        return program(scale=3.0)(proven) if proven.program.scale == 0.25 else proven

    monkeypatch.setattr(pipeline, "prove", second_wrong)
    args = qkv()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.5).softmax(-1) @ v + (q @ k.mT * 0.25).softmax(-1) @ v

    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        report = pipeline.run_passes(gm, inputs, Config(verify=True)).report
        assert [site.status for site in report.sites] == ["rewritten", "declined"]
        assert len({site.name for site in report.sites}) == 2
        torch.testing.assert_close(gm(*inputs)[0], function(*args))

    in_backend(use, function, *args)


def verdict_of(
    function: Callable[..., Tensor],
    *args: Tensor,
    spoil: Callable[[fx.Node], None] = lambda node: None,
) -> str:
    """The verdict on the one site of a function, after `spoil` changed its replacement."""

    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
        gm = fx.GraphModule(gm, pipeline.copy_graph(gm.graph))
        shadow = build_shadow(gm, inputs)
        (found,) = find_candidates(shadow)
        assert found.candidate is not None
        proven = prove(found.candidate, ElementEvaluator(shadow.constants))
        job = plan(proven, device=torch.device("cpu"), training=False)
        (replacement,) = rewrite(gm, shadow, [(proven, job)])
        for node in replacement.new:
            spoil(node)
        return validate(proven, shadow, replacement)

    return in_backend(use, function, *args)


def test_a_right_replacement_passes() -> None:
    assert verdict_of(capped_and_masked, *qkv()).startswith("passed: max error")
    assert verdict_of(with_empty_row, *qkv()).startswith("passed")


def test_large_sites_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_ELEMENTS", B * H * T * S - 1)
    assert verdict_of(capped_and_masked, *qkv()) == (
        f"skipped: {B * H * T * S} scores are too many to compute"
    )


def test_dropout_is_skipped() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v

    assert verdict_of(function, *qkv()) == "skipped: dropout is random"


def test_a_replacement_that_raises_fails() -> None:
    def spoil(node: fx.Node) -> None:
        if "attention" in str(node.target) and "scale" in node.kwargs:
            node.kwargs = {**node.kwargs, "scale": "none"}

    verdict = verdict_of(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv(), spoil=spoil)
    assert verdict.startswith("failed: the replacement raised TypeError")


def test_a_literal_keeps_its_value() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / torch.sqrt(torch.tensor(4.0))).softmax(-1) @ v

    assert verdict_of(function, *qkv()).startswith("passed")


def test_one_attention_after_another_is_compared_by_itself() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT).softmax(-1) @ v
        return (first @ k.mT).softmax(-1) @ v

    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        report = pipeline.run_passes(gm, inputs, Config(verify=True)).report
        assert [str(site.validation)[:6] for site in report.sites] == ["passed", "passed"]

    in_backend(use, function, *qkv())
