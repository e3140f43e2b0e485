"""The shadow graph and its ties to the graph it was traced from."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from sparse_compile.passes import known_calls
from sparse_compile.passes import vocabulary as voc
from sparse_compile.passes.mutation import opaque
from sparse_compile.passes.shadow import Shadow, build_shadow, is_impure
from sparse_compile.testing import in_backend, rewritten_alike, shadow_of


def names_of(shadow: Shadow) -> list[str]:
    return [voc.op_name(node) for node in shadow.graph.nodes if voc.op_name(node)]


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, 4, 5, dtype=dtype) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: torch.softmax(x, -1),
    "method": lambda x: x.softmax(-1),
    "functional": lambda x: F.softmax(x, dim=-1),
    "module": nn.Softmax(-1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_become_one_operator(name: str) -> None:
    shadow = shadow_of(lambda x: SPELLINGS[name](x) * 1, torch.randn(2, 3))
    assert names_of(shadow) == ["softmax", "mul"]


def test_composite_operators_stay_whole() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        return F.dropout(torch.einsum("bhtd,bhsd->bhts", out, k), 0.5, training=True)

    found = names_of(shadow_of(function, *qkv()))
    assert found == ["scaled_dot_product_attention", "einsum", "dropout"]


def test_every_node_knows_where_it_comes_from() -> None:
    def check(gm: fx.GraphModule, inputs: Sequence[object]) -> None:
        shadow = build_shadow(gm, inputs)
        dynamo, own = list(gm.graph.nodes), list(shadow.graph.nodes)
        for position, node in enumerate(own[:-1]):
            assert shadow.owner(node) in dynamo
            assert shadow.positions[node] == position
        known = {found for nodes in shadow.aliases.values() for found in nodes}
        assert known >= {node for node in dynamo if node.op.startswith("call")}
        for node, origin in shadow.origins.items():
            assert node.meta["val"].shape == origin.meta["example_value"].shape
            assert shadow.order[origin] == dynamo.index(origin)

    in_backend(check, lambda q, k, v: F.gelu(attend(q, k, v)), *qkv())


def test_the_dynamo_graph_is_not_changed() -> None:
    def check(gm: fx.GraphModule, inputs: Sequence[object]) -> None:
        before = gm.code
        build_shadow(gm, inputs)
        gm.recompile()
        assert gm.code == before

    in_backend(check, attend, *qkv())


def test_dead_nodes_are_gone() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q @ k.mT).softmax(-1)
        return attend(q, k, v)

    assert names_of(shadow_of(function, *qkv())).count("softmax") == 1


def test_sizes_stay_symbols() -> None:
    shadow = shadow_of(attend, *qkv(), dynamic=True)
    (softmax,) = [node for node in shadow.graph.nodes if voc.op_name(node) == "softmax"]
    assert isinstance(softmax.meta["val"].shape[-1], torch.SymInt)


def test_autocast_shows_in_the_dtypes_and_ends_with_the_trace() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    shadow = shadow_of(function, *qkv(torch.float32))
    products = [node for node in shadow.graph.nodes if voc.op_name(node) == "matmul"]
    assert [node.meta["val"].dtype for node in products] == [torch.bfloat16] * 2
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("change", [torch.neg, torch.tanh], ids=["scale", "formula"])
def test_attention_in_autocast_keeps_its_dtype(change: Callable[[Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return change(q @ k.mT).softmax(-1) @ v

    # bfloat16 has 8 bits: weights and products of order one are off by a few times 2**-8
    (site,) = rewritten_alike(function, *qkv(torch.float32), tolerance=0.05)
    assert site.status == "rewritten"


def test_half_a_context_does_not_leak() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return y + x

    def check(gm: fx.GraphModule, inputs: Sequence[object]) -> None:
        changes = gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        half = fx.GraphModule(gm, graph)
        last = half.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)[-1]
        half.graph.erase_node(last)  # the context is never left
        assert len(changes) == 2
        build_shadow(half, inputs)
        assert torch.is_grad_enabled()

    in_backend(check, function, torch.randn(3, requires_grad=True))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 3  # not the derivative, so that its loss would show


def test_a_custom_function_keeps_its_backward() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(Doubled.apply(q), k, v)

    (site,) = rewritten_alike(function, *(x.requires_grad_() for x in qkv()))
    assert site.status == "rewritten"


def test_higher_order_operators_are_opaque() -> None:
    def function(x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return y * 2

    shadow = shadow_of(function, torch.randn(3))
    (hidden,) = [node for node in shadow.graph.nodes if node.target is opaque]
    assert is_impure(hidden)
    assert shadow.owner(hidden).target is torch.ops.higher_order.cond


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("it cannot be looked into")


def test_what_cannot_be_traced_is_opaque() -> None:
    def check(gm: fx.GraphModule, inputs: Sequence[object]) -> None:
        (sin,) = gm.graph.find_nodes(op="call_method", target="sin")
        sin.op, sin.target = "call_function", broken
        shadow = build_shadow(gm, inputs)
        hidden = [node for node in shadow.graph.nodes if node.target is opaque]
        assert [shadow.owner(node) for node in hidden] == [sin]
        assert names_of(shadow) == ["mT", "matmul", "softmax", "matmul"]
        sin.op, sin.target = "call_method", "sin"

    in_backend(check, lambda q, k, v: attend(q.sin(), k, v), *qkv())


def test_attention_in_a_checkpointed_body_is_replaced() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=False) * 2

    (site,) = rewritten_alike(function, *(x.requires_grad_() for x in qkv()))
    assert (site.status, site.kernel) == ("rewritten", "sdpa")


def test_fused_encoder_layers_are_opened() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x)

    (site,) = rewritten_alike(function, torch.randn(2, 5, 8, dtype=torch.float64))
    assert (site.status, site.query_heads) == ("rewritten", 2)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(4, 4, dtype=torch.bool).tril())
        self.register_buffer("fill", torch.tensor(-1e9))
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(self.keep, (q * self.weight) @ k.mT, self.fill).softmax(-1) @ v


def test_buffers_are_known_and_parameters_are_marked() -> None:
    shadow = shadow_of(Masked(), *qkv())
    assert sorted(tuple(value.shape) for value in shadow.constants.values()) == [(), (4, 4)]
    assert [tuple(node.meta["val"].shape) for node in shadow.parameters] == [(5,)]
    (fill,) = [node for node in shadow.constants if "constant_value" in node.meta]
    assert fill.meta["constant_value"] == pytest.approx(-1e9)


def test_inputs_of_a_call_are_no_constants() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    keep = torch.ones(4, 4, dtype=torch.bool).tril()
    assert shadow_of(function, *qkv(), keep).constants == {}


def test_literals_are_constants() -> None:
    shadow = shadow_of(lambda x: x * torch.tensor([1.0, 2.0, 3.0]), torch.randn(3))
    values = [value.tolist() for value in shadow.constants.values()]
    assert values
    assert all(value == [1.0, 2.0, 3.0] for value in values)


def test_which_nodes_have_effects() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pure = graph.call_function(torch.ops.aten.sin.default, (x,))
    in_place = graph.call_function(torch.ops.aten.sin_.default, (x,))
    size = graph.call_function(operator.mul, (2, 3))
    attribute = graph.get_attr("y")
    assert [is_impure(node) for node in (x, pure, in_place, size, attribute)] == [
        True, False, True, False, False,
    ]  # fmt: skip


# -- calls that are written down instead of traced

WRITTEN_DOWN = {
    "linear": lambda x: F.linear(x, x[0]),
    "matmul": lambda x: x @ x.mT + torch.matmul(x, x.mT),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "numbers": lambda x: 2.0 * x / 3 - (1 + x) * x,
    "rms-norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "rotary": lambda x: torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * x.cos() + x.sin(),
    "activations": lambda x: F.silu(x) + F.gelu(x, approximate="tanh") + torch.tanh(F.relu(x)),
    "views": lambda x: x.view(2, 3, 2, 2).transpose(1, 2).reshape(4, -1).unsqueeze(0),
    "heads": lambda x: x.unsqueeze(1).expand(2, 2, 3, 4).permute(0, 2, 1, 3).contiguous(),
    "itself": lambda x: x.contiguous().view(2, 3, 4) * 1,
    "inplace": lambda x: F.relu((x * 2).view(-1, 4), inplace=True).add_(1) * 2,
    "changed-sizes": lambda x: (x * 1).transpose_(1, 2).unsqueeze(0) + 1,
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", WRITTEN_DOWN)
def test_what_is_written_down_equals_the_trace(
    name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def calls(shadow: Shadow) -> list[tuple[object, ...]]:
        nodes = [node for node in shadow.graph.nodes if node.op == "call_function"]
        numbered = re.compile(r"_\d+")  # the names of sizes' operators may differ
        return [
            (node.target, numbered.sub("", f"{node.args} {node.kwargs}"), str(node.meta["val"]))
            for node in nodes
        ]

    seen: list[list[tuple[object, ...]]] = []

    def both(gm: fx.GraphModule, inputs: list[object]) -> object:
        seen.append(calls(build_shadow(gm, inputs)))
        with monkeypatch.context() as patch:
            patch.setattr(known_calls, "has_stable_examples", lambda graph: False)
            seen.append(calls(build_shadow(gm, inputs)))
        return gm.forward

    torch.compile(WRITTEN_DOWN[name], backend=both, dynamic=dynamic)(torch.randn(2, 3, 4))
    written, traced = seen
    assert written == traced
