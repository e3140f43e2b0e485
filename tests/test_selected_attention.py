"""Selected attention computes what its reference says: on the CPU and by interpreted kernels."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile import OperatorError
from sparse_compile.kernels import selected_attention as selected
from sparse_compile.ops import selected_attention
from sparse_compile.testing import assert_close_derived, in_dtype
from tests.selected_cases import (
    CASES,
    Case,
    gradients,
    natural_lse,
    natural_outputs,
    recomputed,
    reference,
)

WAYS = ("cpu", *selected.LOOP_ORDERS)
CPU = torch.device("cpu")
# the interpreter's bfloat16 products are wrong
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(way: str, case: Case, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    launch = selected._forward_cpu if way == "cpu" else selected.launch
    return launch(*inputs, *case.arguments(CPU), way)


@interpreted
@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    [
        *((name, way, "fp32") for name in CASES for way in WAYS),
        *(
            (name, way, "fp16")
            for name in ("plain", "packed", "decode", "neighbours-agree", "large-logits")
            for way in WAYS
        ),
    ],
)
def test_forward(name: str, way: str, dtype: str) -> None:
    case = CASES[name]
    inputs = in_dtype(case.inputs(), DTYPES[dtype])
    out, lse = run(way, case, inputs)
    truth, true_lse = reference(case, in_dtype(inputs, torch.float64))
    assert_close_derived(out, truth, natural_outputs(case, inputs, truth))
    rough = reference(case, inputs)[1]
    assert_close_derived(lse, true_lse, natural_lse(rough, true_lse, case.dim), name="lse")


@interpreted
@pytest.mark.parametrize("way", ["cpu", "kv_major"])
@pytest.mark.parametrize("name", CASES)
def test_backward(name: str, way: str) -> None:
    case = CASES[name]
    inputs = case.inputs(grad=True)
    exact = in_dtype(inputs, torch.float64)
    weights = [torch.randn_like(x) for x in reference(case, inputs)]
    truths = gradients(*reference(case, exact), exact, [x.double() for x in weights])
    naturals = gradients(*reference(case, inputs), inputs, weights)
    with torch.no_grad():
        out, lse = run(way, case, inputs)
        launch = selected._backward_cpu if way == "cpu" else selected.launch_backward
        found = launch(weights[0], weights[1], *inputs, out, lse, *case.arguments(CPU))
        others = recomputed(case, inputs, weights)
    for what, ours, truth, *roughs in zip("qkv", found, truths, naturals, others, strict=True):
        assert_close_derived(ours, truth, roughs, name=f"d{what}")


@interpreted
@pytest.mark.parametrize("scratch", [1, 2_500])
def test_a_small_scratch_changes_nothing(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_compile.kernels import selected_backward as gradient
    from sparse_compile.kernels import selected_kv_major as kv_major
    from sparse_compile.kernels import selected_lists as lists

    case = Case(heads=2, batch=2, queries=22, keys=27, slots=2)
    inputs = case.inputs()
    whole = run("kv_major", case, inputs)
    grads = [torch.randn_like(x) for x in whole]
    backward = (*grads, *inputs, *whole, *case.arguments(CPU))
    whole_grads = selected.launch_backward(*backward)
    monkeypatch.setattr(lists, "ROWS_PER_LIST", 8)
    for module in (gradient, kv_major):
        monkeypatch.setattr(module, "SCRATCH_BYTES", scratch)
    launches = lists.cut(22, 4, case.group, case.slots, 2, 16 * 4, scratch)
    assert launches.tokens < 22 or launches.at_once < 4
    cut = (*run("kv_major", case, inputs), *selected.launch_backward(*backward))
    for ours, theirs in zip(cut, (*whole, *whole_grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums in another order


def test_gradients_are_those_of_the_function() -> None:
    case = Case(queries=9, keys=11, group=3)
    q, k, v, selection = in_dtype(case.inputs(grad=True), torch.float64)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = selected_attention(q, k, v, selection, block_size=16, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_the_operators_are_registered_as_they_should_be(name: str) -> None:
    case = CASES[name]
    inputs = in_dtype(case.inputs(grad=True), torch.float64)
    arguments = case.arguments(CPU)
    torch.library.opcheck(
        torch.ops.sparse_compile.selected_attention.default, (*inputs, *arguments, "kv_major")
    )
    detached = [x.detach() for x in inputs]
    out, lse = reference(case, detached)
    backward = (torch.randn_like(out), None, *detached, out, lse, *arguments)
    torch.library.opcheck(torch.ops.sparse_compile.selected_attention_backward.default, backward)


def test_a_compiled_model_keeps_the_operator_whole() -> None:
    case = CASES["plain"]
    inputs = case.inputs(grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, selection: Tensor) -> Tensor:
        return selected_attention(q, k, v, selection, block_size=16).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*inputs), function(*inputs)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(x.sum(), inputs[:3]) for x in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 3), st.data())
def test_all_blocks_are_dense_attention(
    n_queries: int, n_more: int, group: int, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**30)))
    n_keys = n_queries + n_more
    q = torch.randn(1, group, n_queries, 16, dtype=torch.float64)
    k, v = (torch.randn(1, 1, n_keys, 16, dtype=torch.float64) for _ in range(2))
    n_blocks = -(-n_keys // 16)
    lists = torch.arange(n_blocks, dtype=torch.int32).expand(1, 1, n_queries, -1)
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_more)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    found = selected_attention(q, k, v, lists, block_size=16)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 2**30))
def test_packed_sequences_do_not_see_each_other(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    case = Case(lengths=tuple(lengths), queries=sum(lengths), keys=sum(lengths), heads=2)
    q, k, v, selection = in_dtype(case.inputs(), torch.float64)
    bounds = case.cu_seqlens(CPU)
    packed = selected_attention(q, k, v, selection, block_size=16, cu_seqlens=bounds)
    parts = [x.split(lengths, dim=2) for x in (q, k, v, selection)]
    alone = [
        selected_attention(*inputs[:3], inputs[3].where(inputs[3] < -(-n // 16), -1), block_size=16)
        for n, *inputs in zip(lengths, *parts, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2), rtol=1e-12, atol=1e-12)


def test_duplicating_a_head_duplicates_its_output() -> None:
    q, k, v, selection = in_dtype(Case(group=1).inputs(), torch.float64)
    one = selected_attention(q, k, v, selection, block_size=16)
    two = selected_attention(q.repeat(1, 2, 1, 1), k, v, selection, block_size=16)
    torch.testing.assert_close(two, one.repeat(1, 2, 1, 1), rtol=1e-12, atol=1e-12)


def wrong(**changes: object) -> Callable[[dict], dict]:
    return lambda arguments: {**arguments, **changes}


ERRORS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "rank": (lambda a: {**a, "q": a["q"][0]}, "q has shape (2, 37, 16). Expected four axes"),
    "dtype": (lambda a: {**a, "k": a["k"].half()}, "k is torch.float16. Expected"),
    "integers": (lambda a: {**a, "q": a["q"].int()}, "q is torch.int32. Expected"),
    "heads": (lambda a: {**a, "q": a["q"].repeat(1, 2, 1, 1)[:, :3]}, "k has 2 heads. Expected"),
    "values": (lambda a: {**a, "v": a["v"][:, :, 1:]}, "v has shape (1, 2, 36, 16). Expected"),
    "head-size": (
        lambda a: {**a, "v": torch.randn(1, 2, 37, 300)}, "v has head size 300. Expected 1 to 256",
    ),
    "block-size": (wrong(block_size=48), "block_size is 48. Expected one of 16, 32, 64, 128"),
    "long-lists": (
        lambda a: {**a, "block_indices": a["block_indices"].long()},
        "block_indices is torch.int64. Expected torch.int32",
    ),
    "lists-shape": (
        lambda a: {**a, "block_indices": a["block_indices"][:, :1]},
        "block_indices has shape (1, 1, 37, 3). Expected [1, 2, 37, K]",
    ),
    "no-slot": (
        lambda a: {**a, "block_indices": a["block_indices"][..., :0]},
        "block_indices selects 0 KV blocks a token. Expected 1 to 64",
    ),
    "unsorted": (
        lambda a: {**a, "block_indices": a["block_indices"].clone().index_fill_(3, torch.arange(3), 1)},
        "block_indices[0, 0, 0] is [1, 1, 1]. Expected lists that ascend",
    ),
    "negative": (
        lambda a: {**a, "block_indices": torch.full_like(a["block_indices"], -2)},
        "block_indices[0, 0, 0] is [-2, -2, -2]. Expected -1 or a KV block from 0 to 2",
    ),
    "too-far": (
        lambda a: {**a, "block_indices": torch.full_like(a["block_indices"][..., :1], 3)},
        "Expected -1 or a KV block from 0 to 2",
    ),
    "loop-order": (wrong(loop_order="fastest"), 'loop_order is "fastest". Expected query_major'),
    "packed-lengths": (
        wrong(cu_seqlens=torch.tensor([0, 30], dtype=torch.int32)),
        "Expected numbers that ascend from 0 to the 37 tokens of q",
    ),
    "packed-dtype": (wrong(cu_seqlens=torch.tensor([0, 37])), "cu_seqlens is torch.int64"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named(name: str) -> None:
    change, message = ERRORS[name]
    case = Case(heads=2, group=1)
    names = ("q", "k", "v", "block_indices")
    arguments = dict(zip(names, case.inputs(), strict=True), block_size=16)
    with pytest.raises(OperatorError) as caught:
        selected_attention(**change(arguments))
    assert message in str(caught.value)
