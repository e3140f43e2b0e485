"""Selected attention on a GPU: every dtype and head size against the reference, twice the same."""

import pytest
import torch

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

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = {
    "D16": Case(queries=333, keys=333, dim=16, value_dim=16, slots=5, group=3),
    "D64": Case(queries=400, keys=400, dim=64, value_dim=64, block=64, heads=2, group=12),
    "D80": Case(queries=200, keys=263, dim=80, value_dim=80, slots=5, block=32),
    "D96": Case(queries=150, keys=150, dim=96, value_dim=96, slots=4, group=7),
    "D128": Case(queries=700, keys=700, dim=128, value_dim=128, slots=6, block=64, group=4),
    "D192-128": Case(queries=270, keys=270, dim=192, value_dim=128, slots=3, block=64, group=6),
    "D256": Case(queries=130, keys=130, dim=256, value_dim=256, slots=2, block=64, group=1),
    "block-128": Case(queries=300, keys=700, dim=32, value_dim=32, slots=4, block=128, group=64),
    "packed": Case(
        lengths=(130, 1, 64, 205), queries=400, keys=400, dim=64, value_dim=64, block=64
    ),
}


def on_gpu(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [x.detach().cuda() for x in case.inputs()]
    return [x.requires_grad_(x.is_floating_point()) for x in in_dtype(inputs, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SIZES, *CASES])
def test_both_loop_orders_and_the_gradients(name: str, dtype: str) -> None:
    case = {**SIZES, **CASES}[name]
    inputs = on_gpu(case, DTYPES[dtype])
    exact = in_dtype(inputs, torch.float64)
    truth, true_lse = reference(case, exact)
    weights = [torch.randn_like(truth).to(inputs[0].dtype), torch.randn_like(true_lse).float()]
    wide = [x.float() for x in weights]
    truths = gradients(truth, true_lse, exact, [x.double() for x in weights])
    roughs = [gradients(*reference(case, inputs), inputs, wide)]
    with torch.no_grad():
        roughs.append(recomputed(case, inputs, wide))
    block, scale, causal, bounds = case.arguments(inputs[0].device)
    for order in ("query_major", "kv_major"):
        out, lse = selected_attention(
            *inputs, block_size=block, scale=scale, causal=causal, cu_seqlens=bounds,
            loop_order=order, return_lse=True,
        )  # fmt: skip
        assert_close_derived(out, truth, natural_outputs(case, inputs, truth.detach()), name=order)
        rough = reference(case, inputs)[1]
        naturals = natural_lse(rough, true_lse.detach(), case.dim)
        assert_close_derived(lse, true_lse, naturals, name=f"{order} lse")
    found = gradients(out, lse, inputs, wide)
    for what, ours, exactly, *rough in zip("qkv", found, truths, *roughs, strict=True):
        assert_close_derived(ours, exactly, rough, name=f"d{what}")


@pytest.mark.parametrize("order", ["query_major", "kv_major"])
def test_the_same_bits_every_time_and_no_wait_for_the_device(order: str) -> None:
    inputs = [x.detach() for x in on_gpu(SIZES["D128"], torch.bfloat16)]

    def call() -> torch.Tensor:
        return selected_attention(*inputs, loop_order=order)

    first = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [call() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in others)


def test_a_cuda_graph_can_hold_it() -> None:
    inputs = on_gpu(SIZES["D128"], torch.bfloat16)
    grads = torch.randn_like(selected_attention(*inputs))

    def step() -> list[torch.Tensor]:
        out = selected_attention(*inputs, loop_order="kv_major")
        return [out, *torch.autograd.grad(out, inputs[:3], grads)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs[:3]:
            x.copy_(torch.randn_like(x))
    graph.replay()
    wanted = step()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], wanted[0])
    for ours, theirs in zip(captured[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # sums in any order, bf16
