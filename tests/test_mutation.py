"""Which tensors share storage, which are written into, and when that matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.passes import mutation
from sparse_compile.passes import vocabulary as voc
from sparse_compile.testing import rewritten_alike, shadow_of

Function = Callable[[Tensor], Tensor]


def traced(function: Function) -> fx.Graph:
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(torch.randn(4, 6)).graph


def out_of(graph: fx.Graph) -> fx.Node:
    return graph.output_node().all_input_nodes[0]


def named(graph: fx.Graph, name: str) -> fx.Node:
    (found,) = [node for node in graph.nodes if voc.op_name(node) == name]
    return found


VIEWS: dict[str, Function] = {
    "view": lambda x: x.view(24),
    "reshape": lambda x: x.reshape(2, 12),
    "transpose": lambda x: x.t().mT.transpose(0, 1),
    "slice": lambda x: x[1:, 2:],
    "select": lambda x: x[0],
    "expand": lambda x: x[None].expand(3, 4, 6),
    "chunk": lambda x: x.chunk(2, 1)[0],
    "unbind": lambda x: x.unbind(0)[1],
    "split-then-view": lambda x: x.split(3, 1)[1].unsqueeze(0),
    "contiguous": lambda x: x.contiguous(),
    "same-dtype": lambda x: x.to(torch.float32),
    "in-place": lambda x: x.mul_(2).add_(1),
    "in-place-on-view": lambda x: x[0].mul_(2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_live_in_their_input(name: str) -> None:
    graph = traced(VIEWS[name])
    assert mutation.storage_root(out_of(graph)).op == "placeholder"


OWN: dict[str, Function] = {
    "clone": lambda x: x.clone().view(24),
    "arithmetic": lambda x: (x + 1).t(),
    "gather": lambda x: x[torch.tensor([1, 0])],
}


@pytest.mark.parametrize("name", OWN)
def test_computed_tensors_have_storage_of_their_own(name: str) -> None:
    graph = traced(OWN[name])
    root = mutation.storage_root(out_of(graph))
    assert root.op == "call_function"
    assert voc.op_name(root) in ("clone", "add", "index")


WRITES: dict[str, Function] = {
    "in-place": lambda x: x.mul_(2),
    "masked_fill": lambda x: x.masked_fill_(x > 0, 0.0),
    "copy-into-view": lambda x: x[0].copy_(x[1]),
    "setitem": lambda x: _set(x),
    "index_copy": lambda x: x.index_copy_(0, x[0, :1].long() * 0, x[1:2] * 2),
    "index_put": lambda x: x.index_put_((x[0, :1].long() * 0,), x[1] * 2),
    "out": lambda x: torch.add(x[0], 1.0, out=x[1]),
    "foreach": lambda x: _foreach(x),
}  # fmt: skip


def _set(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x


def _foreach(x: Tensor) -> Tensor:
    torch._foreach_add_([x], 1.0)
    return x


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_listed_with_the_storage_they_change(name: str) -> None:
    graph = traced(WRITES[name])
    (placeholder,) = graph.find_nodes(op="placeholder")
    assert list(mutation.writes(graph)) == [placeholder]


def test_pure_operators_write_nothing() -> None:
    assert mutation.writes(traced(lambda x: (x.t() * 2).masked_fill(x.t() > 0, 0.0))) == {}


def test_only_writes_through_views_freeze_a_tensor() -> None:
    direct = traced(lambda x: torch.zeros(4, 6).masked_fill_(x > 0, 1.0))
    assert mutation.frozen_nodes(direct) == set()

    def through_a_view(x: Tensor) -> Tensor:
        mask = torch.zeros(4, 6)
        mask[:, 2:] = 1.0
        return x + mask

    graph = traced(through_a_view)
    frozen = mutation.frozen_nodes(graph)
    assert named(graph, "zeros") in frozen
    assert named(graph, "add") not in frozen
    assert not any(node.op == "placeholder" for node in frozen)


def attention(q: Tensor, k: Tensor, v: Tensor, meanwhile: Callable[..., object]) -> Tensor:
    scores = q @ k.mT
    meanwhile(q, k, v, scores)
    return scores.softmax(-1) @ v


OVERWRITTEN: dict[str, Callable[..., object]] = {
    "k": lambda q, k, v, scores: k.zero_(),
    "q-through-a-view": lambda q, k, v, scores: q[:, :, 0].fill_(1.0),
    "k-by-setitem": lambda q, k, v, scores: k.__setitem__((0, 0), 1.0),
    "q-by-out": lambda q, k, v, scores: torch.mul(k, 2.0, out=q),
    "k-by-foreach": lambda q, k, v, scores: torch._foreach_mul_([k], 2.0),
    "scores": lambda q, k, v, scores: scores[:, :, 0].fill_(0.5),
}  # fmt: skip


def qkv() -> list[Tensor]:
    return [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_attention_over_overwritten_tensors_is_right(name: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, OVERWRITTEN[name])

    for site in rewritten_alike(function, *qkv()):
        assert site.status == "declined"


def test_the_overwritten_tensor_is_named() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, OVERWRITTEN["k"])

    (site,) = rewritten_alike(function, *qkv())
    assert site.reason_code == "overwritten"


def test_a_write_before_or_after_the_site_does_no_harm() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k.mul_(0.5)
        out = (q @ k.mT).softmax(-1) @ v
        k.zero_()
        return out

    (site,) = rewritten_alike(function, *qkv())
    assert site.status == "rewritten"


def test_v_written_between_softmax_and_product_is_read_afterwards() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        v.mul_(2.0)
        return weights @ v

    (site,) = rewritten_alike(function, *qkv())
    assert site.status == "rewritten", site.reason


def test_scores_that_are_an_out_argument_are_followed() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, lambda q, k, v, scores: torch.tanh(scores, out=scores))

    (site,) = rewritten_alike(function, *qkv())
    assert site.score_transforms == ("map(tanh(x))",)


def test_in_place_steps_on_the_scores_are_followed() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT)
        scores.mul_(0.5)
        scores.masked_fill_(torch.ones(4, 4).triu(1) > 0, float("-inf"))
        return torch.softmax(scores, -1) @ v

    (site,) = rewritten_alike(function, *qkv())
    assert site.score_transforms == ("scale(0.5)", "mask")
    assert site.mask == "causal"


def test_a_mask_buffer_written_through_a_view_is_not_believed() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(4, 4).tril()
        keep[3, 0] = 0.0
        return (q @ k.mT).masked_fill(keep == 0, -1e9).softmax(-1) @ v

    for site in rewritten_alike(function, *qkv()):
        assert site.mask != "causal"


def test_overwritten_names_what_changes_between_its_first_read_and_the_output() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        z = y.view(24)
        early = z * 2
        y.zero_()
        return early + x.sum()

    shadow = shadow_of(function, torch.randn(4, 6))
    names = {voc.op_name(node): node for node in shadow.graph.nodes}
    x = next(iter(shadow.graph.nodes))
    assert mutation.overwritten(shadow, [x, names["view"]], names["add"]) is names["view"]
    assert mutation.overwritten(shadow, [x], names["add"]) is None
    assert mutation.overwritten(shadow, [names["view"]], names["mul"]) is None


def test_a_tensor_first_read_after_the_write_is_not_lost() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        z = y.view(24)
        y.zero_()
        return z * 2 + x.sum()

    shadow = shadow_of(function, torch.randn(4, 6))
    names = {voc.op_name(node): node for node in shadow.graph.nodes}
    assert mutation.overwritten(shadow, [names["view"]], names["add"]) is None
