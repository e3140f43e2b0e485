"""Block-sparse attention on a GPU: dtypes and head sizes against the reference, twice the same."""

from collections.abc import Callable

import pytest
import sympy
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile import backend, winners
from sparse_compile.expressions import s, t
from sparse_compile.kernels import block_sparse_list_kernel, triton_math
from sparse_compile.kernels.block_sparse_lists import list_blocks_cpu
from sparse_compile.ops import block_sparse_attention, list_blocks
from sparse_compile.testing import TANH_STEP, assert_close_derived, in_dtype
from tests.block_sparse_cases import PROGRAMS, Case, naturals, reference, results

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {
    "D16": Case(queries=333, keys=333, dim=16, value_dim=16, tile=64, block=32, group=3),
    "D64": Case(queries=400, keys=400, dim=64, value_dim=64, tile=128, block=128, group=12),
    "D80": Case(queries=200, keys=263, dim=80, value_dim=80, tile=128, block=64),
    "D96": Case(queries=150, keys=150, dim=96, value_dim=96, tile=32, block=128, group=7),
    "D128": Case(queries=700, keys=700, dim=128, value_dim=128, tile=128, block=128, group=4),
    "D128-even": Case(queries=512, keys=512, dim=128, value_dim=128, tile=128, block=128),
    "D192-128": Case(queries=270, keys=270, dim=192, value_dim=128, tile=128, block=128),
    "D256": Case(queries=130, keys=130, dim=256, value_dim=256, tile=128, block=128, group=1),
    "D24": Case(queries=130, keys=130, dim=24, value_dim=40, tile=16, block=16, batch=2),
    "decode": Case(queries=1, keys=900, dim=128, value_dim=128, tile=16, block=64, group=8),
    "random-lists": Case(
        queries=300, keys=500, dim=64, value_dim=64, tile=64, block=64, batch=2, heads=2,
        lists="random", list_heads="query",
    ),
}  # fmt: skip


def with_program(case: Case, program: str) -> Case:
    formulas, makers = PROGRAMS[program]
    return type(case)(**{**vars(case), "formulas": formulas, "makers": makers})


def check(case: Case, dtype: torch.dtype) -> None:
    inputs = [one.detach().cuda() for one in case.inputs()]
    given = in_dtype(inputs, dtype)
    given = [one.requires_grad_(one.is_floating_point()) for one in given]
    lists = case.listed(given)
    exact = in_dtype(given, torch.float64)
    outputs = reference(case, exact, lists)
    weights = [torch.randn_like(one).to(dtype).double() for one in outputs]
    truths = results(outputs, exact, weights)
    is_rough = dtype == torch.bfloat16 and case.program.score.has(sympy.tanh)
    roughs = naturals(case, given, lists, weights, TANH_STEP if is_rough else 0.0)
    q, k, v, *operands = given
    ours = torch.ops.sparse_compile.block_sparse_attention_v1(
        q, k, v, *lists, operands, case.program.encode(), case.tile, case.block
    )
    found = results(ours, given, [weights[0].to(dtype), weights[1].float()])
    names = ["out", "lse", "dq", "dk", "dv", *(f"d operand {i}" for i in range(3))]
    rows = zip(names, found, truths, *roughs, strict=False)
    for what, one, truth, *rough in rows:
        assert_close_derived(one, truth, rough, name=what)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, dtype) for size in SIZES for dtype in ("bf16", "fp16")),
        *((size, "fp32") for size in ("D24", "D64", "D128", "D256")),
    ],
)
def test_sizes(size: str, dtype: str) -> None:
    check(with_program(SIZES[size], "causal"), DTYPES[dtype])


@pytest.mark.parametrize(
    ("program", "dtype"),
    [
        *((program, "bf16") for program in PROGRAMS),
        *(("soft-cap-then-alibi", dtype) for dtype in ("fp16", "fp32")),
    ],
)
def test_programs(program: str, dtype: str) -> None:
    case = Case(queries=270, keys=270, dim=64, value_dim=64, tile=64, block=64, batch=2)
    check(with_program(case, program), DTYPES[dtype])


@pytest.mark.parametrize("program", PROGRAMS)
def test_lists_are_those_of_the_cpu(program: str) -> None:
    case = with_program(Case(queries=700, keys=900, tile=64, block=32, batch=2, heads=2), program)
    q, k, _, *operands = case.inputs()
    text = case.program.encode()
    wanted = list_blocks_cpu(q, k, operands, text, case.tile, case.block, None)
    onto = [one.cuda() for one in operands]
    found = block_sparse_list_kernel.launch(
        q.cuda(), k.cuda(), onto, text, case.tile, case.block, None
    )
    indices, counts, full = (one.cpu() for one in found)
    assert torch.equal(counts, wanted[1])
    assert torch.equal(full, wanted[2])
    listed = torch.arange(indices.shape[3]) < counts[..., None]
    assert torch.equal(indices[listed], wanted[0][listed])


def big() -> tuple[list[Tensor], list[Tensor]]:
    q, k, v = (
        torch.randn(1, heads, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    lists = list_blocks(q, k, WINDOW, tile=128, block_size=128)
    return [q, k, v], list(lists)


WINDOW = sympy.And(s <= t, t - s < 300)


def step(inputs: list[Tensor], lists: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    out = block_sparse_attention(
        *inputs, *lists[:2], full_counts=lists[2], mask=WINDOW, tile=128, block_size=128
    )
    return [out] if grad is None else [out, *torch.autograd.grad(out, inputs, grad)]


def test_the_same_bits_every_time_and_no_wait_for_the_device() -> None:
    inputs, lists = big()
    grad = torch.randn_like(inputs[0])
    first = step(inputs, lists, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(inputs, lists, grad)
        relisted = list_blocks(*inputs[:2], WINDOW, tile=128, block_size=128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(relisted[1], lists[1])


def test_a_cuda_graph_can_hold_it() -> None:
    inputs, lists = big()
    grad = torch.randn_like(inputs[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(inputs, lists, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, lists, grad)
    with torch.no_grad():
        for one in inputs:
            one.copy_(torch.randn_like(one))
    graph.replay()
    wanted = step(inputs, lists, grad)
    torch.cuda.synchronize()
    for one, other in zip(captured, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("much_memory")
def test_positions_past_32_bits() -> None:
    """Strides so long that elements lie 2 ** 31 apart and more."""
    room = torch.zeros(70000, 2**15 + 8, device="cuda", dtype=torch.float16)
    parts = [room[:1000, :64], room[69000:, :64]]
    for one in parts:
        one.normal_()
    q = torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.float16)
    k = room[:, :64].as_strided((1, 1, 70000, 64), (0, 0, room.stride(0), 1))
    indices = torch.tensor([0, 69900 // 64], device="cuda", dtype=torch.int32).view(1, 1, 1, 2)
    counts = torch.full((1, 1, 1), 2, device="cuda", dtype=torch.int32)
    out = block_sparse_attention(q, k, k, indices, counts, tile=64, block_size=64)
    keys = torch.cat([k[:, :, first * 64 : first * 64 + 64] for first in (0, 69900 // 64)], 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.float(), keys.float(), keys.float())
    torch.testing.assert_close(out.float(), wanted, rtol=2e-3, atol=2e-3)  # 10 bits, few sums


def test_a_compiled_model_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: the second time from Inductor's cache of graphs."""
    monkeypatch.setattr(
        winners, "kernel_for", lambda case, **_: ("block_sparse_attention", "asked for")
    )

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(300, device=q.device)[:, None] - torch.arange(300, device=q.device)
        scores = 20 * torch.tanh(q @ k.mT * 0.125 / 20)
        scores = scores.masked_fill((distance < 0) | (distance > 90), -torch.inf)
        return scores.softmax(-1) @ v

    inputs = [
        torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    grad = torch.randn_like(inputs[0])

    def step_of(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    truth, eager = step_of(model, in_dtype(inputs, torch.float64)), step_of(model, inputs)
    for _ in range(2):
        torch._dynamo.reset()
        found = step_of(torch.compile(model, backend=backend.sparse_compile), inputs)
        (site,) = backend.last_report().rewritten
        assert site.kernel == "block_sparse_attention"
        for one, right, rough in zip(found, truth, eager, strict=True):
            errors = [(x.double() - right).square().mean().sqrt() for x in (one, rough)]
            step = torch.finfo(torch.bfloat16).eps * right.square().mean().sqrt()
            assert errors[0] <= 2 * errors[1] + step / 2


@triton.jit
def _apply_kernel(x_ptr, out_ptr, FUNCTION: tl.constexpr, N: tl.constexpr):
    """Each program computes N values of a function."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + i, FUNCTION(tl.load(x_ptr + i)))


@pytest.mark.parametrize(
    ("name", "allowed"), [("accurate", 1e-6), ("fast", 3e-7), ("approximate", 2.0**-11)]
)
def test_tanh_is_as_close_as_said(name: str, allowed: float) -> None:
    """Relative errors; of `fast`, absolute ones."""
    function = getattr(triton_math, f"tanh_{name}")
    x = torch.linspace(-12, 12, 2**20, device="cuda")
    out = torch.empty_like(x)
    _apply_kernel[(2**10,)](x, out, function, 2**10)
    truth = x.double().tanh()
    error = (out.double() - truth).abs()
    error = error if name == "fast" else error / truth.abs()
    assert error.max() <= allowed
