"""Block-sparse attention computes what its reference says, forward and backward, in every way."""

from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sympy import Eq
from torch import Tensor

from sparse_compile import OperatorError
from sparse_compile.expressions import Load, b, h, s, t, x
from sparse_compile.kernels import block_sparse, block_sparse_list_kernel
from sparse_compile.kernels.program_attention import program_attention_ref
from sparse_compile.ops import block_sparse_attention, list_blocks
from sparse_compile.testing import assert_close_derived, in_dtype
from tests.block_sparse_cases import CASES, PROGRAMS, Case, case_of, naturals, reference, results

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
# a program with each kind of printed code; the others differ in formulas only
TRITON_BACKWARD = (
    "window", "document", "soft-cap", "alibi", "sink", "sink-by-row", "bias", "two-reads",
    "no-scores", "empty-uniform", "several", "dims-24-16", "wide-tiles", "decode", "even",
    "random-lists-of-kv-heads", "random-lists-of-query-heads", "random-lists-without-a-mask",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(way: str, case: Case, inputs: list[Tensor], lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, *operands = inputs
    launch = block_sparse._forward_cpu if way == "cpu" else block_sparse.launch
    text = case.program.encode()
    with torch.no_grad():
        return launch(q, k, v, *lists, operands, text, case.tile, case.block)


def run_backward(
    way: str, case: Case, inputs: list[Tensor], lists: list[Tensor], outputs: tuple[Tensor, Tensor],
    weights: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    q, k, v, *operands = inputs
    launch = block_sparse._backward_cpu if way == "cpu" else block_sparse.launch_backward
    wanted = [one.is_floating_point() for one in operands]
    grad_lse = weights[1].masked_fill(outputs[1] == -torch.inf, 0.0)
    with torch.no_grad():
        return launch(
            weights[0], grad_lse, q, k, v, *lists, operands, *outputs, case.program.encode(),
            case.tile, case.block, wanted,
        )  # fmt: skip


def check(name: str, way: str, dtype: torch.dtype, backward: bool) -> None:
    case = case_of(name)
    inputs = in_dtype(case.inputs(grad=True), dtype)
    lists = case.listed(inputs)
    exact = in_dtype(inputs, torch.float64)
    outputs = reference(case, exact, lists)
    weights = [torch.randn_like(one).to(dtype).double() for one in outputs]
    truths = results(outputs, exact, weights)
    roughs = zip(*naturals(case, inputs, lists, weights), strict=True)
    given_ = [one.detach() for one in inputs]
    found = [*(run(way, case, given_, lists))]
    if backward:
        wide = [weights[0].to(dtype), weights[1].to(found[1].dtype)]
        found += run_backward(way, case, given_, lists, (found[0], found[1]), wide)
    names = ["out", "lse", "dq", "dk", "dv", *(f"d operand {i}" for i in range(3))]
    for what, ours, truth, rough in zip(names, found, truths, roughs, strict=False):
        assert_close_derived(ours, truth, list(rough), name=what)


@pytest.mark.parametrize("name", [*PROGRAMS, *CASES])
def test_on_the_cpu(name: str) -> None:
    check(name, "cpu", torch.float32, backward=True)


@interpreted
@pytest.mark.parametrize("name", [*PROGRAMS, *CASES])
def test_interpreted(name: str) -> None:
    check(name, "triton", torch.float32, backward=name in TRITON_BACKWARD)


@interpreted
@pytest.mark.parametrize("name", ["soft-cap-then-alibi", "sink", "large-logits"])
def test_interpreted_in_16_bits(name: str) -> None:
    check(name, "triton", torch.float16, backward=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_lists_by_bounds_lose_nothing(name: str) -> None:
    case = case_of(name)
    inputs = in_dtype(case.inputs(), torch.float64)
    q, k, v, *operands = inputs
    out, _ = reference(case, inputs, case.listed(inputs))
    whole = program_attention_ref(q, k, v, operands, case.program)
    torch.testing.assert_close(out, whole, equal_nan=True)


@interpreted
@pytest.mark.parametrize("name", [*PROGRAMS, "several", "decode", "wide-tiles", "wide-blocks"])
def test_lists_printed_and_in_pytorch_are_the_same(name: str) -> None:
    case = case_of(name)
    q, k, _, *operands = case.inputs()
    ours = block_sparse_list_kernel.launch(
        q, k, operands, case.program.encode(), case.tile, case.block, None
    )
    indices, counts, full = case.listed([q, k, k, *operands])
    assert torch.equal(ours[1], counts)
    assert torch.equal(ours[2], full)
    slot = torch.arange(indices.shape[3])
    listed = slot < counts[..., None]
    assert torch.equal(ours[0][listed], indices[listed])


def test_a_window_lists_few_blocks_and_looks_at_its_edges_only() -> None:
    q, k = torch.zeros(1, 2, 512, 16), torch.zeros(1, 1, 512, 16)
    window = sympy.And(s <= t, t - s < 128)
    indices, counts, full = list_blocks(q, k, window, tile=32, block_size=32, capacity=5)
    assert indices.shape == (1, 1, 16, 5)
    assert counts[0, 0, 4:].eq(5).all()
    assert full[0, 0, 4:].eq(3).all()
    with pytest.raises(OperatorError, match="capacity is 4"):
        list_blocks(q, k, window, tile=32, block_size=32, capacity=4)


def small(*, group: int = 2, rows: int = 33, keys: int = 47) -> list[Tensor]:
    shapes = ((group, rows, 16), (1, keys, 16), (1, keys, 8))
    return [torch.randn(1, *one, dtype=torch.float64, requires_grad=True) for one in shapes]


ALL = {"tile": 16, "block_size": 16}


def every_block(n_tiles: int = 3, n_blocks: int = 3) -> tuple[Tensor, Tensor]:
    indices = torch.arange(n_blocks, dtype=torch.int32).expand(1, 1, n_tiles, -1)
    return indices, torch.full((1, 1, n_tiles), n_blocks, dtype=torch.int32)


def test_gradients_are_those_of_the_function() -> None:
    q, k, v = (one[..., :2].detach().requires_grad_() for one in small(rows=17, keys=4))
    slope, sink = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    indices, counts = every_block(2, 1)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(
            *tensors[:3], indices, counts, **ALL, mask=s <= t + 1, operands=tensors[3:],
            score=2 * sympy.tanh(x / 2) + Load(0, h) * (s - t), sink=Load(1, h), return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, slope, sink))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_all_blocks_in_any_order_are_dense_attention(data: st.DataObject) -> None:
    rows, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    q, k, v = (one.detach() for one in small(rows=rows, keys=keys))
    indices, counts = every_block(-(-rows // 16), -(-keys // 16))
    order = torch.tensor(data.draw(st.permutations(range(indices.shape[3]))))
    full = data.draw(st.integers(0, indices.shape[3]))
    out = block_sparse_attention(
        q, k, v, indices[..., order], counts, **ALL, full_counts=torch.full_like(counts, full)
    )
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, dense)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n_first=st.integers(0, 3), n_second=st.integers(0, 3), ways=st.sampled_from(["cpu", "triton"])
)
def test_a_block_counts_as_often_as_it_is_listed(n_first: int, n_second: int, ways: str) -> None:
    """The same as listing copies of the keys that it holds."""
    if ways == "triton" and torch.cuda.is_available():
        return
    q, k, v = (one.detach().float() for one in small(rows=5, keys=32))
    indices = torch.tensor([0] * n_first + [1] * n_second + [7], dtype=torch.int32)
    counts = torch.tensor([[[n_first + n_second]]], dtype=torch.int32)
    forward = block_sparse._forward_cpu if ways == "cpu" else block_sparse.launch
    text = Case(scale=0.25).program.encode()
    ours = forward(q, k, v, indices.view(1, 1, 1, -1), counts, None, [], text, 16, 16)
    chosen = [slice(0, 16)] * n_first + [slice(16, 32)] * n_second
    if not chosen:
        assert ours[0].eq(0).all()
        assert ours[1].eq(-torch.inf).all()
        return
    k, v = (torch.cat([one[:, :, part] for part in chosen], 2) for one in (k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.25)
    torch.testing.assert_close(ours[0], dense)
    lse = (q @ k.mT * 0.25).logsumexp(-1)
    torch.testing.assert_close(ours[1], lse)


def test_a_query_reads_one_block_or_none() -> None:
    q, k, v = (one.detach() for one in small())
    indices, counts = torch.tensor([2, 0, 1]).int(), torch.tensor([1, 1, 0]).int()
    out, lse = block_sparse_attention(
        q, k, v, indices.view(1, 1, 3, 1), counts.view(1, 1, 3), **ALL, return_lse=True
    )
    first = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, :16], k[:, :, 32:], v[:, :, 32:], enable_gqa=True
    )
    torch.testing.assert_close(out[:, :, :16], first)
    assert out[:, :, 32:].eq(0).all()
    assert lse[:, :, 32:].eq(-torch.inf).all()


def test_the_mask_is_not_computed_in_full_blocks() -> None:
    q, k, v = (one.detach() for one in small())
    indices, counts = every_block()
    masked = {"mask": t < 0 * s, **ALL}
    assert block_sparse_attention(q, k, v, indices, counts, **masked).eq(0).all()
    out = block_sparse_attention(q, k, v, indices, counts, full_counts=counts, **masked)
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, indices, counts, **ALL))


def test_no_keys_and_no_queries() -> None:
    q, k, v = small(keys=0)
    indices, counts = torch.zeros(1, 1, 3, 1).int(), torch.zeros(1, 1, 3).int()
    assert block_sparse_attention(q, k, v, indices, counts, **ALL).eq(0).all()
    q, k, v = small(rows=0)
    indices, counts = torch.zeros(1, 1, 0, 1).int(), torch.zeros(1, 1, 0).int()
    assert block_sparse_attention(q, k, v, indices, counts, **ALL).shape == (1, 2, 0, 8)


@pytest.mark.parametrize("name", ["several", "sink", "alibi"])
def test_the_operators_are_registered_as_they_should_be(name: str) -> None:
    case = case_of(name)
    q, k, v, *operands = in_dtype(case.inputs(grad=True), torch.float64)
    lists, ops = case.listed([q, k, v, *operands]), torch.ops.sparse_compile
    rest = (operands, case.program.encode(), case.tile, case.block)
    torch.library.opcheck(ops.block_sparse_attention_v1.default, (q, k, v, *lists, *rest))
    q, k, v, *operands = (one.detach() for one in (q, k, v, *operands))
    rest = (operands, *rest[1:])
    out, lse = ops.block_sparse_attention_v1(q, k, v, *lists, *rest)
    backward = (torch.randn_like(out), None, q, k, v, *lists, operands, out, lse, *rest[1:],
                [one.is_floating_point() for one in operands])  # fmt: skip
    torch.library.opcheck(ops.block_sparse_attention_backward_v1.default, backward)
    torch.library.opcheck(ops.list_blocks_v1.default, (q, k, *rest, None))


def test_a_compiled_function_keeps_the_operator_whole() -> None:
    case = case_of("alibi")
    q, k, v, slope = case.inputs(grad=True)
    lists, text = case.listed([q, k, v, slope]), case.program.encode()

    def function(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        out, _ = torch.ops.sparse_compile.block_sparse_attention_v1(
            q, k, v, *lists, [slope], text, case.tile, case.block
        )
        return out.square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted, found = function(q, k, v, slope), compiled(q, k, v, slope)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(one.sum(), [q, k, v, slope]) for one in (found, wanted)]
    torch.testing.assert_close(*grads)


WINDOW = sympy.And(s <= t, t - s < 20)


def test_whole_functions_compile_in_one_graph() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        indices, counts, full = list_blocks(q, k, WINDOW, **ALL)
        out = block_sparse_attention(q, k, v, indices, counts, full_counts=full, mask=WINDOW, **ALL)
        return out * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (33, 41, 50):
        inputs = small(rows=rows, keys=rows)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tile": ({"tile": 48}, "tile is 48. Expected one of 16, 32, 64, 128"),
    "block size": ({"block_size": 8}, "block_size is 8. Expected one of"),
    "index dtype": ({"block_indices": torch.zeros(1, 1, 3, 3)}, "block_indices is torch.float32"),
    "index shape": ({"block_indices": torch.zeros(1, 1, 4, 3).int()}, "block_indices has shape"),
    "index heads": ({"block_indices": torch.zeros(1, 3, 3, 3).int()}, "block_indices has shape"),
    "index value": ({"block_indices": torch.full((1, 1, 3, 3), 3).int()}, r"\[0, 0, 0, 0\] is 3"),
    "index sign": ({"block_indices": torch.full((1, 1, 3, 3), -1).int()}, "from 0 to 2"),
    "no slots": ({"block_indices": torch.zeros(1, 1, 3, 0).int()}, "block_indices has shape"),
    "counts": ({"block_counts": torch.full((1, 1, 3), 4).int()}, r"is 4. Expected 0 to 3"),
    "count shape": ({"block_counts": torch.zeros(1, 3).int()}, "block_counts has shape"),
    "count dtype": ({"block_counts": torch.zeros(1, 1, 3).long()}, "block_counts is torch.int64"),
    "full": ({"full_counts": torch.full((1, 1, 3), 4).int()}, "full_counts"),
    "mask": ({"mask": t + s}, "mask is s \\+ t. Expected a Boolean"),
    "mask of x": ({"mask": x > 0}, "none of the score"),
    "score": ({"score": s < t}, "score is .* Expected a number"),
    "sink": ({"sink": s + 1}, "sink is s \\+ 1"),
    "empty rows": ({"empty_rows": "one"}, 'empty_rows is "one"'),
    "operand": ({"mask": Eq(Load(0, b, s), 1)}, "operands holds 0 tensors"),
    "rank": ({"mask": Eq(Load(0, b, s), 1), "operands": [torch.zeros(3)]}, "2 positions"),
    "symbol": ({"score": x + sympy.Symbol("u")}, "speaks of u"),
    "function": ({"score": sympy.gamma(x)}, "cannot be computed.*gamma"),
    "heads": ({"k": torch.zeros(1, 3, 47, 16, dtype=torch.float64)}, "k has"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    q, k, v = (one.detach() for one in small())
    indices, counts = every_block()
    given_ = {"q": q, "k": k, "v": v, "block_indices": indices, "block_counts": counts, **ALL}
    changes, message = BAD[name]
    with pytest.raises(OperatorError, match=message):
        block_sparse_attention(**{**given_, **changes})
