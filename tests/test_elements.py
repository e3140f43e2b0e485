"""Formulas of elements against the elements themselves, one by one, at several sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import INDICES, Load, b, h, s, t
from sparse_compile.passes.elements import ElementEvaluator, Unproven

TOLERANCE = 1e-6  # programs round to float32 (6e-8, relative) up to ten times; formulas are float64


class Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.values[node] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def sizes_of(module: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[sympy.Symbol, int]:
    sizes: dict[sympy.Symbol, int] = {}
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        for size, real in zip(node.meta["val"].shape, value.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                sizes[size.node.expr] = real
    return sizes


def guards_hold(module: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """True if the trace is valid for inputs of these sizes."""
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    shape_env = getattr(module, "shape_env", None)
    return shape_env is None or shape_env.evaluate_guards_for_args(fakes, inputs)


def element_of(
    function: Callable[..., torch.Tensor], inputs: tuple[Any, ...], mode: str, **options: Any
) -> tuple[fx.GraphModule, ElementEvaluator, sympy.Basic]:
    module = make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs)
    out = module.graph.output_node().args[0]
    literals = {n: getattr(module, n.target) for n in module.graph.find_nodes(op="get_attr")}
    evaluator = ElementEvaluator(literals, **options)
    return module, evaluator, evaluator.element(out, index_of(out.meta["val"]))


def index_of(value: torch.Tensor) -> tuple[sympy.Symbol, ...]:
    return INDICES[len(INDICES) - value.ndim :]


def assert_elements(
    module: fx.GraphModule,
    evaluator: ElementEvaluator,
    found: sympy.Basic,
    inputs: tuple[Any, ...],
) -> None:
    recorder = Recorder(module)
    wanted = recorder.run(*inputs)
    env: dict[sympy.Symbol, Any] = dict(sizes_of(module, inputs))
    for axis, symbol in enumerate(index_of(wanted)):
        shape = [-1 if axis == other else 1 for other in range(wanted.ndim)]
        env[symbol] = torch.arange(wanted.shape[axis]).view(shape)
    operands = [recorder.values[node] for node in evaluator.operands]
    value = torch.as_tensor(evaluate(found, env, operands, dtype=torch.float64))
    value = value.expand(wanted.shape).to(torch.float64)
    torch.testing.assert_close(value, wanted.to(torch.float64), rtol=TOLERANCE, atol=TOLERANCE)


def check(
    function: Callable[..., torch.Tensor],
    *batches: tuple[Any, ...],
    loads: tuple[str, ...] | None = (),
) -> sympy.Basic:
    """Trace with fixed and with free sizes; compare on every batch; nothing but `loads` is read."""
    found = sympy.true
    for mode in ("fake", "symbolic"):
        module, evaluator, found = element_of(function, batches[0], mode)
        for inputs in batches if mode == "symbolic" else batches[:1]:
            assert_elements(module, evaluator, found, inputs)
        used = {evaluator.operands[int(load.args[0])].name for load in found.atoms(Load)}
        assert loads is None or used == set(loads), (mode, found, used)
    return found


def tensors(*sizes: tuple[int, int]) -> list[tuple[torch.Tensor]]:
    return [(torch.randn(size),) for size in sizes]


SIZES = tensors((2, 6), (3, 9), (4, 8))

# name: (program of x [n, m], placeholders that the formula may load)
PROGRAMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arange": lambda x: torch.arange(3, 3 + 2 * x.shape[1], 2),
    "tril": lambda x: torch.ones(x.shape[1], x.shape[1]).tril(),
    "triu-bool": lambda x: torch.ones(x.shape, dtype=torch.bool).triu(diagonal=-1),
    "tril-in-place": lambda x: torch.full((x.shape[1], x.shape[1]), 5.0).tril_(-1).add_(1),
    "compare": lambda x: torch.arange(x.shape[0])[:, None] >= torch.arange(x.shape[1]),
    "masked-fill": lambda x: torch.zeros(x.shape).masked_fill(
        torch.arange(x.shape[1]) > 2, float("-inf")
    ),
    "masked-fill-in-place": lambda x: torch.zeros(x.shape).masked_fill_(
        torch.arange(x.shape[1]) < 3, torch.tensor(4.0)
    ),
    "where": lambda x: torch.where(torch.arange(x.shape[1]) % 2 == 0, 1.5, -2.0),
    "where-tensors": lambda x: torch.where(
        torch.arange(x.shape[1]) < 2, torch.zeros(()), torch.finfo(torch.float32).min
    ),
    "view-merge": lambda x: torch.arange(x.numel()).view(x.shape).reshape(-1) // 2,
    "view-split": lambda x: torch.arange(4 * x.shape[1]).view(2, 2, -1) + 1,
    "view-transposed": lambda x: torch.arange(x.numel()).view(x.shape).t().reshape(x.shape),
    "flatten": lambda x: torch.arange(x.numel() * 2).view(*x.shape, 2).flatten(1),
    "permute": lambda x: torch.arange(x.numel() * 3).view(*x.shape, 3).permute(2, 0, 1),
    "movedim": lambda x: torch.arange(x.numel() * 3).view(*x.shape, 3).movedim(0, -1),
    "expand": lambda x: torch.arange(x.shape[1])[None, :, None].expand(2, -1, 3),
    "select": lambda x: torch.arange(x.numel()).view(x.shape)[-1],
    "slice": lambda x: torch.arange(x.numel()).view(x.shape)[:, 1:-1],
    "slice-end": lambda x: torch.arange(x.shape[1] + 3)[-3:],
    "slice-step": lambda x: torch.arange(x.shape[1])[1::2],
    "slice-sizes": lambda x: torch.arange(x.shape[1])[x.shape[1] - 2 :],
    "narrow": lambda x: torch.arange(x.shape[1]).narrow(0, 1, 2),
    "split": lambda x: torch.arange(x.shape[1]).split([1, x.shape[1] - 1])[1],
    "chunk": lambda x: torch.arange(8).view(2, 4).chunk(2, dim=-1)[1],
    "unbind": lambda x: torch.arange(x.numel()).view(x.shape).unbind(0)[1],
    "flip": lambda x: torch.arange(x.shape[1]).flip(0),
    "roll": lambda x: torch.arange(x.shape[1]).roll(2, 0),
    "cat": lambda x: torch.cat([torch.arange(x.shape[1]), torch.ones(x.shape[0]).long()]),
    "stack": lambda x: torch.stack([torch.arange(x.shape[1]), torch.zeros(x.shape[1]).long()], 1),
    "repeat": lambda x: torch.arange(x.shape[1]).repeat(2, 3),
    "repeat-interleave": lambda x: torch.arange(x.shape[1]).repeat_interleave(3),
    "repeat-interleave-dim": lambda x: (
        torch.arange(x.numel()).view(x.shape).repeat_interleave(2, dim=0)
    ),
    "diagonal": lambda x: torch.arange(x.numel()).view(x.shape).diagonal(1),
    "pad": lambda x: F.pad(torch.arange(x.shape[1]), (2, 1), value=7),
    "meshgrid": lambda x: torch.meshgrid(
        torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij"
    )[1],
    "eye": lambda x: torch.eye(x.shape[1]),
    "float-cast": lambda x: (torch.arange(x.shape[1]).float() * 2 - 3).to(torch.int32),
    "bool-cast": lambda x: (torch.arange(x.shape[1]) - 2).bool(),
    "one-minus": lambda x: (1.0 - torch.ones(x.shape).tril()) * -10000.0,
    "bool-arithmetic": lambda x: (torch.arange(x.shape[1]) > 2).long() * 3 + 1,
    "xor": lambda x: torch.ones(x.shape).tril().bool() ^ torch.ones(x.shape).tril(-2).bool(),
    "logic": lambda x: (
        ~(torch.arange(x.shape[1]) > 1)
        | torch.logical_and(torch.arange(x.shape[1]) > 3, x.new_ones(()))
    ),
    "floor-divide": lambda x: torch.arange(x.shape[1]) // 3,
    "floor-divide-negative": lambda x: (torch.arange(x.shape[1]) - 4) // 3,
    "remainder-negative": lambda x: (torch.arange(x.shape[1]) - 4) % 3,
    "div-modes": lambda x: (
        torch.div(torch.arange(x.shape[1]), 2, rounding_mode="trunc")
        + torch.div(torch.arange(x.shape[1]) - 7, 2, rounding_mode="floor")
    ),
    "true-divide": lambda x: torch.arange(x.shape[1]) / 7,
    "abs": lambda x: (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs(),
    "clamp": lambda x: (torch.arange(x.shape[1]) - 3).clamp(min=-1, max=2),
    "minimum": lambda x: torch.minimum(torch.arange(x.shape[1]), torch.full((), 3)),
    "maximum-of-masks": lambda x: torch.maximum(
        torch.full(x.shape, float("-inf")).triu(1), torch.tensor(torch.finfo(torch.float32).min)
    ),
    "square": lambda x: (torch.arange(x.shape[1]) - 3).square(),
    "power": lambda x: 2.0 ** (-torch.arange(1, x.shape[1] + 1) / 2),
    "gather": lambda x: (
        torch.arange(x.numel()).view(x.shape).gather(1, torch.ones(x.shape).tril().long())
    ),
    "index-rows": lambda x: torch.arange(x.numel()).view(x.shape)[torch.arange(x.shape[0]) // 2],
    "index-both": lambda x: torch.arange(x.numel()).view(x.shape)[
        torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])[None, None]
    ],
    "index-apart": lambda x: torch.arange(x.numel() * 3).view(*x.shape, 3)[
        torch.tensor([0, 1]).clone() * 0, :, torch.arange(2)
    ],
    "index-negative": lambda x: torch.arange(x.shape[1])[torch.arange(2) - 2],
    "index-select": lambda x: torch.arange(x.shape[1]).index_select(0, torch.arange(3).flip(0)),
    "cumsum-ones": lambda x: torch.ones(x.shape, dtype=torch.long).cumsum(-1) - 1,
    "cumsum-arange": lambda x: (torch.arange(x.shape[1]) * 2 + 1).cumsum(0),
    "diff": lambda x: torch.arange(x.shape[1]).square().diff(prepend=torch.zeros(1).long()),
    "sum-of-ones": lambda x: torch.ones(x.shape).sum(-1),
    "any-row": lambda x: (torch.arange(x.shape[0])[:, None] > 0).expand(x.shape).any(-1),
    "new-ones": lambda x: x.new_ones(x.shape[1], dtype=torch.bool),
    "full-like": lambda x: torch.full_like(x, -1.5),
    "type-as": lambda x: torch.arange(x.shape[1]).type_as(x),
    "half-minimum": lambda x: torch.full((2, 2), torch.finfo(torch.float32).min).to(torch.bfloat16),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_indices_are_formulas(name: str) -> None:
    check(PROGRAMS[name], *SIZES)


def test_a_view_of_an_input_is_a_load_of_the_input() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x[:, None, None, :].expand(-1, 1, 5, -1) + 0.0

    found = check(program, *SIZES, loads=("x_1",))
    assert found == Load(0, b, s)


def test_a_boolean_input_is_a_boolean() -> None:
    inputs = [(torch.rand(size) > 0.4,) for size in ((2, 5), (3, 7))]
    found = check(lambda m: ~m[:, None, :].to(torch.long).bool(), *inputs, loads=("m_1",))
    assert found == sympy.Eq(Load(0, h, s), 0)


def test_a_table_is_read_at_a_computed_row() -> None:
    def program(table: torch.Tensor) -> torch.Tensor:
        distance = (torch.arange(5)[:, None] - torch.arange(7)).abs().clamp(max=3)
        return F.embedding(distance, table).permute(2, 0, 1)

    found = check(program, (torch.randn(4, 3),), loads=("table_1",))
    assert found == Load(0, sympy.Min(3, sympy.Abs(s - t)), h)


def test_positions_of_one_sequence_are_no_packed_sequences() -> None:
    """What transformers does to find packed sequences collapses when the positions are arange."""

    def program(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
        step = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
        return (step != 1).cumsum(-1)

    assert check(program, *SIZES) == 0


def test_given_positions_are_not_taken_for_one_sequence() -> None:
    def program(p: torch.Tensor) -> torch.Tensor:
        sequence = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        return sequence[:, :, None] == sequence[:, None, :]

    batches = [
        (torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]),),
        (torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 3]]),),
    ]
    check(program, *batches, loads=("cumsum",))


def test_padding_reads_nothing_outside() -> None:
    def program(m: torch.Tensor) -> torch.Tensor:
        return F.pad(m, (0, 4)).bool()

    inputs = [(torch.tensor([[1, 0, 1], [0, 1, 1]]),), (torch.ones(3, 5, dtype=torch.long),)]
    check(program, *inputs, loads=("m_1",))


def test_rounded_values_decide_nothing() -> None:
    """0.1 * 3 > 0.3 in float32, not in numbers: the comparison stays a tensor."""

    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.arange(x.shape[1]) * 0.1 >= 0.3

    check(program, *SIZES, loads=("ge",))


def test_half_precision_positions_decide_nothing() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        position = torch.arange(x.shape[1]).to(torch.bfloat16)
        return position[:, None] >= position

    inputs = [(torch.zeros(1, 600),), (torch.zeros(2, 300),)]
    check(program, *inputs, loads=("ge",))


def test_half_precision_is_not_forgotten_when_it_is_widened() -> None:
    """Falcon rounds its ALiBi slopes to bfloat16 and then goes on in float32."""

    def program(x: torch.Tensor) -> torch.Tensor:
        slopes = torch.pow(0.7, torch.arange(1, 5)).bfloat16()
        return (slopes[:, None] * torch.arange(x.shape[1]).float()) + 0.0

    check(program, *SIZES, loads=("unsqueeze",))


def test_zero_and_one_survive_half_precision() -> None:
    def program(m: torch.Tensor) -> torch.Tensor:
        return ((1.0 - m.to(torch.bfloat16)) * -1024).float()

    check(program, (torch.tensor([[True, False, True]]),), loads=("m_1",))


def test_a_float_mask_is_inverted_exactly() -> None:
    def program(m: torch.Tensor) -> torch.Tensor:
        return (1.0 - m).to(torch.bool)

    found = check(program, (torch.tensor([[1.0, 0.0, 0.5]]),), loads=("m_1",))
    assert found.atoms(Load) == {Load(0, 0, s)}


def test_infinity_in_a_tensor_is_not_decided() -> None:
    """Formulas take loads for finite; a mask may hold -inf."""

    def program(m: torch.Tensor) -> torch.Tensor:
        return m == float("-inf")

    check(program, (torch.tensor([[0.0, float("-inf")]]),), loads=("eq",))


def test_narrow_integers_wrap_around() -> None:
    def program(m: torch.Tensor) -> torch.Tensor:
        return (1 - m) > 0

    check(program, (torch.tensor([[0, 1, 2]], dtype=torch.uint8),), loads=("rsub",))


def test_negative_positions_of_a_tensor_are_not_guessed() -> None:
    def program(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x[0][i]

    check(program, (torch.randn(1, 5), torch.tensor([0, -1, 3])), loads=("index",))


def test_ranges_of_different_tensors_are_kept_apart() -> None:
    """`t` is below 4 in one tensor and below 8 in the other."""

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(8) // 4
        return half[:4], half + 0

    module = make_fx(program, pre_dispatch=True, tracing_mode="fake")(torch.zeros(1))
    short, long = module.graph.output_node().args[0]
    evaluator = ElementEvaluator()
    for _ in range(2):
        assert evaluator.element(short, (t,)) == 0
        assert evaluator.element(long, (t,)) == sympy.floor(t / 4)


def test_ranges_of_compound_indices_are_given() -> None:
    module = make_fx(lambda x: x.view(6, 5), tracing_mode="fake")(torch.zeros(2, 3, 5))
    out = module.graph.output_node().args[0]
    found = ElementEvaluator().element(out, (3 * b + h, s), {b: 2, h: 3})
    assert found == Load(0, b, h, s)


def test_a_frozen_node_is_loaded() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        base = torch.zeros(4, 4)
        base[:, :2] = 1
        return base + 0

    module = make_fx(program, pre_dispatch=True, tracing_mode="fake")(torch.zeros(1))
    base = next(node for node in module.graph.nodes if node.name == "zeros")
    evaluator = ElementEvaluator(frozen={base})
    found = evaluator.element(module.graph.output_node().args[0], (t, s))
    assert found == Load(0, t, s)
    assert evaluator.operands == [base]


def test_ops_that_are_not_seen_through_are_loaded() -> None:
    found = check(lambda x: torch.sigmoid(x @ x.T) + 1, *SIZES, loads=("sigmoid",))
    assert found == Load(0, t, s) + 1


def test_what_is_no_tensor_is_unproven() -> None:
    module = make_fx(lambda x: x.split(1), tracing_mode="fake")(torch.zeros(2, 2))
    split = next(node for node in module.graph.nodes if node.op == "call_function")
    with pytest.raises(Unproven, match="not a tensor") as caught:
        ElementEvaluator().element(split, (t, s))
    assert caught.value.code == "not-a-tensor"


def test_scalars_of_the_trace_stay_symbols() -> None:
    found = check(lambda x: torch.arange(x.shape[1]) < x.shape[0] + 1, *SIZES)
    assert {symbol.name[0] for symbol in found.free_symbols - {s}} == {"s"}


BUFFERS: dict[str, torch.Tensor] = {
    "constant": torch.full((4, 5), 2.5),
    "all-true": torch.ones(4, 5, dtype=torch.bool),
    "ramp": (torch.arange(6) * 3 - 2)[None, :].repeat(2, 1),
    "float-ramp": torch.arange(6.0)[:, None].repeat(1, 3),
    "causal": torch.ones(6, 6).tril().bool().view(1, 1, 6, 6),
    "causal-uint8": torch.ones(6, 6, dtype=torch.uint8).tril(),
    "additive": torch.full((5, 7), float("-inf")).triu(2),
    "window": torch.ones(7, 7).tril().triu(-2).bool(),
    "anti-window": ~torch.ones(7, 7).tril(2).triu(-2).bool(),
    "distance": torch.arange(5)[None, :] - torch.arange(4)[:, None],
    "prefix": torch.arange(8) < 3,
    "per-head": torch.ones(2, 4, 4).tril(),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_recognised_by_value(name: str) -> None:
    buffer = BUFFERS[name]
    module = make_fx(lambda x: x.clone(), pre_dispatch=True, tracing_mode="fake")(buffer)
    node = next(iter(module.graph.nodes))
    evaluator = ElementEvaluator({node: buffer})
    out = module.graph.output_node().args[0]
    found = evaluator.element(out, index_of(buffer))
    assert not found.has(Load), found
    assert evaluator.value_guards == [node]
    assert_elements(module, evaluator, found, (buffer,))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_wrong_element_is_noticed(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(BUFFERS)))
    buffer = BUFFERS[name].clone()
    position = tuple(data.draw(st.integers(0, size - 1)) for size in buffer.shape)
    buffer[position] = ~buffer[position] if buffer.dtype == torch.bool else buffer[position] + 1
    module = make_fx(lambda x: x.clone(), pre_dispatch=True, tracing_mode="fake")(buffer)
    evaluator = ElementEvaluator({next(iter(module.graph.nodes)): buffer})
    out = module.graph.output_node().args[0]
    assert_elements(module, evaluator, evaluator.element(out, index_of(buffer)), (buffer,))


def test_only_the_part_that_is_read_is_looked_at() -> None:
    """GPT-2's buffer, spoilt outside of the slice that the model reads."""
    buffer = torch.ones(1, 1, 64, 64).tril().bool()
    buffer[0, 0, 63, 0] = False

    def program(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return mask[:, :, : x.shape[1], : x.shape[1]]

    inputs = (buffer, torch.zeros(1, 8))
    module = make_fx(program, pre_dispatch=True, tracing_mode="fake")(*inputs)
    evaluator = ElementEvaluator({next(iter(module.graph.nodes)): buffer})
    found = evaluator.element(module.graph.output_node().args[0], (0, 0, t, s))
    assert found == sympy.Le(s - t, 0)


def test_a_huge_buffer_is_not_looked_at() -> None:
    buffer = torch.ones(1, dtype=torch.bool).expand(2**13, 2**13)
    module = make_fx(lambda m: m.clone(), pre_dispatch=True, tracing_mode="fake")(buffer)
    evaluator = ElementEvaluator({next(iter(module.graph.nodes)): buffer})
    found = evaluator.element(module.graph.output_node().args[0], (t, s))
    assert found == sympy.Ne(Load(0, t, s), 0)


def test_a_parameter_is_not_taken_for_a_constant() -> None:
    weight = torch.ones(3, 3, requires_grad=True)
    module = make_fx(lambda w: w * 2, pre_dispatch=True, tracing_mode="fake")(weight)
    evaluator = ElementEvaluator({next(iter(module.graph.nodes)): weight})
    assert evaluator.element(module.graph.output_node().args[0], (t, s)) == 2 * Load(0, t, s)
    assert evaluator.value_guards == []


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_random_layouts(data: st.DataObject) -> None:
    """Chains of layout operators over arange, with fixed sizes."""
    steps = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=5))
    seed = data.draw(st.integers(0, 2**16))

    def program(x: torch.Tensor) -> torch.Tensor:
        pick = random.Random(seed).randrange
        value = torch.arange(24).view(2, 3, 4)
        for step in steps:
            value = _layout_step(value, step, pick)
        return value

    module, evaluator, found = element_of(program, (torch.zeros(1),), "fake")
    assert not found.has(Load)
    assert_elements(module, evaluator, found, (torch.zeros(1),))


def _layout_step(value: torch.Tensor, step: int, pick: Callable[[int], int]) -> torch.Tensor:
    dim = pick(value.ndim)
    size = value.shape[dim]
    if step == 0:
        return value.transpose(dim, pick(value.ndim))
    if step == 1:
        return value.flip(dim)
    if step == 2 and value.ndim < 4:
        return value.unsqueeze(dim)
    if step == 3 and size > 1:
        return value.narrow(dim, 1, size - 1)
    if step == 4 and value.ndim > 1:
        return value.flatten(-2)
    if step == 5 and value.numel() <= 48:
        return value.repeat_interleave(2, dim)
    if step == 6 and size % 2 == 0 and value.ndim < 4:
        return value.unflatten(dim, (2, size // 2))
    if step == 7 and value.numel() <= 48:
        return torch.cat([value, value.roll(1, dim)], dim)
    return value.reshape(value.shape[::-1])
