"""The Dynamo graph before and after: what is written, what stays, what a second run does."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_compile.config import Config
from sparse_compile.passes.rewrite import has_effect
from sparse_compile.pipeline import Outcome, run_passes
from sparse_compile.testing import in_backend, rewritten_alike

B, H, T, D = 2, 3, 4, 8


def qkv() -> list[Tensor]:
    return [torch.randn(B, H, T, D, dtype=torch.float64) for _ in range(3)]


def text_of(graph: fx.Graph) -> str:
    """One line a node, without inputs and outputs."""
    lines = []
    for node in graph.nodes:
        if node.op.startswith("call"):
            name = node.target if isinstance(node.target, str) else node.target.__name__
            args = [str(arg) for arg in node.args]
            args += [f"{key}={value}" for key, value in node.kwargs.items()]
            lines.append(f"{node.name} = {name}({', '.join(args)})")
    return "\n".join(lines)


def rewritten_text(function: Callable[..., Any], *args: Tensor, runs: int = 1) -> list[str]:
    """The graph's text before and after each of some runs of all passes."""

    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
        texts = [text_of(gm.graph)]
        for _ in range(runs):
            outcome: Outcome = run_passes(gm, inputs, Config())
            assert outcome.report.error is None
            gm.graph.lint()
            texts.append(text_of(gm.graph))
        return texts

    return in_backend(use, function, *args)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.5
    mask = torch.ones(T, T).triu(1)
    return torch.softmax(scores.masked_fill(mask > 0, float("-inf")), -1) @ v


class TestText(expecttest.TestCase):
    """The text of graphs before and after."""

    def test_causal_attention(self) -> None:
        before, after = rewritten_text(causal, *qkv())
        self.assertExpectedInline(
            before,
            """\
transpose = transpose(l_k_, -1, -2)
matmul = matmul(l_q_, transpose)
scores = mul(matmul, 0.5)
ones = ones(4, 4)
mask = triu(ones, 1)
gt = gt(mask, 0)
masked_fill = masked_fill(scores, gt, -inf)
softmax = softmax(masked_fill, -1)
matmul_1 = matmul(softmax, l_v_)""",
        )
        self.assertExpectedInline(
            after,
            """\
scaled_dot_product_attention = scaled_dot_product_attention(l_q_, l_k_, l_v_, scale=0.5, is_causal=True)""",
        )

    def test_token_major_einsum(self) -> None:
        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
            return torch.einsum("bhts,bshd->bthd", weights, v)

        _, after = rewritten_text(function, *qkv())
        self.assertExpectedInline(
            after,
            """\
permute = permute(l_q_, (0, 2, 1, 3))
permute_1 = permute(l_k_, (0, 2, 1, 3))
permute_2 = permute(l_v_, (0, 2, 1, 3))
scaled_dot_product_attention = scaled_dot_product_attention(permute, permute_1, permute_2, scale=1.0)
permute_3 = permute(scaled_dot_product_attention, (0, 2, 1, 3))""",
        )


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "causal": causal,
    "dense": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "formula": lambda q, k, v: torch.tanh(q @ k.mT).softmax(-1) @ v,
    "padding": lambda q, k, v: (
        (q @ k.mT).masked_fill(v[:, :1, None, :, 0] > 1, -1e9).softmax(-1) @ v
    ),
    "merged-heads": lambda q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).view(B, H, T, D),
    "declined": lambda q, k, v: (lambda w: w @ v + w.sum())((q @ k.mT).softmax(-1)),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_second_run_does_nothing(name: str) -> None:
    before, once, twice = rewritten_text(FORMS[name], *qkv(), runs=2)
    names = r"\b([a-z_]+?)(_\d+)?\b"  # the numbers behind names may change
    assert re.sub(names, r"\1", once) == re.sub(names, r"\1", twice)
    assert (once == before) == (name == "declined")


def test_no_part_of_the_old_attention_is_left() -> None:
    _, after = rewritten_text(FORMS["formula"], *qkv())
    for word in ("softmax", "tanh", "matmul"):
        assert not re.search(rf"= {word}\(", after)


def test_what_others_use_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.mT) * 0.5
        return scores.softmax(-1) @ v, scores.amax()

    _, after = rewritten_text(function, *qkv())
    assert "scaled_dot_product_attention" in after
    assert "amax" in after
    assert after.count("= matmul(") == 1


def test_metadata_survives() -> None:
    def use(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        run_passes(gm, inputs, Config())
        (new,) = [n for n in gm.graph.nodes if "scaled_dot" in n.name]
        assert "in causal" in new.meta["stack_trace"]
        assert new.meta["example_value"].shape == (B, H, T, D)

    in_backend(use, causal, *qkv())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x)
        return out


def test_multi_head_attention_is_expanded_in_place() -> None:
    x = torch.randn(B, T, 8, dtype=torch.float64)
    before, after = rewritten_text(Block(), x)
    assert "multi_head_attention_forward" in before
    assert "multi_head_attention_forward" not in after
    assert after.count("= scaled_dot_product_attention(") == 1
    (site,) = rewritten_alike(Block(), x)
    assert (site.name, site.query_heads) == ("attention", 2)


def test_multi_head_attention_with_weights_is_declined() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        out, weights = layer(x, x, x)
        return out + weights.sum()

    (site,) = rewritten_alike(function, torch.randn(B, T, 8, dtype=torch.float64))
    assert (site.status, site.reason_code) == ("declined", "weights-escape")


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda o: o.view(B * H, T, D),
    "view-of-last": lambda o: o.view(B, H, T * D),
    "view-behind-transpose": lambda o: o.transpose(1, 2).contiguous().view(B, T, H * D),
    "view-behind-unsqueeze": lambda o: o.unsqueeze(0).view(B, H * T, D),
    "view-as-dtype": lambda o: o.view(torch.int64).view(torch.float64),
    "flatten": lambda o: o.flatten(1),
    "in-place": lambda o: o.mul_(2).view(B, -1),
    "strides": lambda o: o.as_strided((4,), (1,)),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("layout", ["head-major", "token-major"])
def test_views_behind_the_site_survive(name: str, layout: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layout == "token-major":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return VIEWS[name](torch.tanh(q @ k.mT).softmax(-1) @ v) * 1

    (site,) = rewritten_alike(function, *qkv())
    assert site.score_transforms == ("map(tanh(x))",)


def test_two_outputs_of_one_node() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).softmax(-1) @ v
        return out + out.transpose(0, 0) + out.sum()

    (site,) = rewritten_alike(function, *qkv())
    assert site.status == "rewritten"


def test_names_are_paths_of_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    sites = rewritten_alike(Net(), torch.randn(B, T, 8, dtype=torch.float64))
    assert [site.name for site in sites] == ["blocks.0.attention", "blocks.1.attention"]
    assert all("test_rewrite.py:" in site.source for site in sites)


def test_a_second_site_of_a_module_gets_a_number() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal(q, k, v) + causal(k, q, v)

    first, second = rewritten_alike(Twice(), *qkv())
    assert second.name == f"{first.name}#2"


EFFECTS: dict[str, tuple[Callable[[fx.Graph, fx.Node], fx.Node], bool]] = {
    "method": (lambda g, x: g.call_method("sin", (x,)), False),
    "in-place-method": (lambda g, x: g.call_method("sin_", (x,)), True),
    "dunder-method": (lambda g, x: g.call_method("__and__", (x, x)), False),
    "function": (lambda g, x: g.call_function(torch.sin, (x,)), False),
    "functional": (lambda g, x: g.call_function(F.softmax, (x,), {"dim": -1}), False),
    "in-place-function": (lambda g, x: g.call_function(F.relu, (x,), {"inplace": True}), True),
    "out": (lambda g, x: g.call_function(torch.sin, (x,), {"out": x}), True),
    "operator": (lambda g, x: g.call_function(operator.and_, (x, x)), False),
    "in-place-operator": (lambda g, x: g.call_function(operator.iadd, (x, 1)), True),
    "setitem": (lambda g, x: g.call_function(operator.setitem, (x, 0, 1)), True),
    "inverse": (lambda g, x: g.call_function(operator.invert, (x,)), False),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_nodes_with_effects_are_told_apart(name: str) -> None:
    make, effect = EFFECTS[name]
    graph = fx.Graph()
    assert has_effect(make(graph, graph.placeholder("x"))) is effect
