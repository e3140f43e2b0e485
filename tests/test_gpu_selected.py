"""Selected attention on a GPU: every dtype and head size against the reference, twice the same."""

import pytest
import torch

from benchmarks import selections
from sparse_compile.kernels import selected_query_major as query_major
from sparse_compile.kernels import selected_tile_union as tile_union
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

LOOP_ORDERS = ("query_major", "kv_major", "tile_union")

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
    "G70": Case(queries=40, keys=150, dim=64, value_dim=64, slots=4, block=32, group=70),
    "packed": Case(
        lengths=(130, 1, 64, 205), queries=400, keys=400, dim=64, value_dim=64, block=64
    ),
    "decode": Case(
        batch=2, heads=3, queries=1, keys=5000, dim=128, value_dim=128, slots=16, block=64, group=8
    ),
    "neighbours": Case(
        queries=500, keys=1000, dim=128, value_dim=128, slots=8, block=64, group=4, neighbours=64
    ),
    "packed-neighbours": Case(
        lengths=(130, 1, 64, 205),
        queries=400,
        keys=400,
        dim=64,
        value_dim=64,
        slots=8,
        group=5,
        neighbours=32,
    ),
    "neighbours-of-16": Case(
        queries=300, keys=900, dim=64, value_dim=64, slots=64, group=2, neighbours=16, heads=2
    ),
    # scores of a standard deviation of 36, as 16 bits can make them, and of 5
    "logits-36": Case(
        queries=260, keys=260, dim=128, value_dim=128, slots=4, block=64, std=3.0, scale=0.354
    ),
    "logits-5": Case(
        queries=260, keys=260, dim=128, value_dim=128, slots=4, block=64, std=1.0, scale=0.442
    ),
}


def on_gpu(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [x.detach().cuda() for x in case.inputs()]
    return [x.requires_grad_(x.is_floating_point()) for x in in_dtype(inputs, dtype)]


EVERY_DTYPE = (
    "D16", "D64", "D80", "D96", "D128", "D192-128", "D256", "block-128", "packed", "decode",
)  # fmt: skip
ONE_DTYPE = {
    "bf16": (
        "G70", "neighbours", "packed-neighbours", "neighbours-of-16", "logits-36",
        "more-queries-than-keys", "not-causal", "packed-ragged", "padded-views", "token-major",
        "one-slot", "more-slots-than-blocks",
    ),
    "fp16": ("logits-5",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in EVERY_DTYPE for dtype in DTYPES),
        *((name, dtype) for dtype, names in ONE_DTYPE.items() for name in names),
    ],
)
def test_every_loop_order_and_the_gradients(name: str, dtype: str) -> None:
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
    for order in LOOP_ORDERS:
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


TILES = {
    "tile_union": (
        tile_union.Tiles(4, 4, 64, 1, 4, 2, 255),
        tile_union.Tiles(16, 4, 32, 2, 4, 3, 255),
        tile_union.Tiles(64, 1, 64, 1, 4, 2, 255),
        tile_union.Tiles(64, 2, 64, 16, 8, 3, 255),
        tile_union.Tiles(64, 4, 64, 65, 8, 2, 255),
    ),
    "query_major": (
        query_major.Tiles(64, 8, 1, 4, 2),
        query_major.Tiles(32, 16, 100, 4, 4),
        query_major.Tiles(64, 64, 4, 8, 3),
        query_major.Tiles(16, 8, 4, 2, 3),
    ),
}


@pytest.mark.parametrize(
    ("order", "number", "name"),
    [
        (order, number, name)
        for order, names in {
            "tile_union": ("D128", "neighbours"), "query_major": ("D128", "decode")
        }.items()
        for number in range(len(TILES[order]))
        for name in names
    ],
)  # fmt: skip
def test_any_tiles(order: str, number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"tile_union": tile_union, "query_major": query_major}[order]
    monkeypatch.setattr(module, "default_tiles", lambda *_sizes: TILES[order][number])
    case = SIZES[name]
    inputs = [x.detach() for x in on_gpu(case, torch.bfloat16)]
    truth, true_lse = reference(case, in_dtype(inputs, torch.float64))
    block, scale, causal, _ = case.arguments(inputs[0].device)
    out, lse = selected_attention(
        *inputs, block_size=block, scale=scale, causal=causal, loop_order=order, return_lse=True
    )
    assert_close_derived(out, truth, natural_outputs(case, inputs, truth))
    rough = reference(case, inputs)[1]
    assert_close_derived(lse, true_lse, natural_lse(rough, true_lse, case.dim), name="lse")


@pytest.mark.parametrize("order", LOOP_ORDERS)
@pytest.mark.parametrize("name", ["D128", "decode", "neighbours", "packed"])
def test_the_same_bits_every_time_and_no_wait_for_the_device(name: str, order: str) -> None:
    case = SIZES[name]
    inputs = [x.detach() for x in on_gpu(case, torch.bfloat16)]
    bounds = case.cu_seqlens(inputs[0].device)

    def call() -> torch.Tensor:
        return selected_attention(
            *inputs, block_size=case.block, cu_seqlens=bounds, loop_order=order
        )

    first = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [call() for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dim", [64, 128])
def test_of_many_rows_none_is_wrong_at_times(dim: int) -> None:
    """A race between threads shows in one row of a hundred thousand, and not every time."""
    q, k, v = (
        torch.randn(1, heads, 8192, dim, device="cuda", dtype=torch.bfloat16)
        for heads in (32, 2, 2)
    )
    lists = selections.make("random", 1, 2, 8192, 16, 64, "cuda")
    found = {}
    for order in LOOP_ORDERS:
        first, lse = selected_attention(q, k, v, lists, loop_order=order, return_lse=True)
        for _ in range(20):
            again = selected_attention(q, k, v, lists, loop_order=order, return_lse=True)
            assert torch.equal(again[0], first)
            assert torch.equal(again[1], lse)
        found[order] = first.float()
    one, *others = found.values()
    for other in others:
        off = (one - other).norm(dim=-1) / one.norm(dim=-1)
        assert off.max() < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("pattern", selections.PATTERNS)
def test_gradients_of_many_rows_are_the_same_every_time(pattern: str) -> None:
    q, k, v, grad = (
        torch.randn(1, heads, 8192, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2, 8)
    )
    out = selected_attention(q, k, v, selections.make(pattern, 1, 2, 8192, 16, 64, "cuda"))
    first = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    for _ in range(20):
        again = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        assert torch.equal(again[0], first[0])
        for one, other in zip(again[1:], first[1:], strict=True):  # summed in any order
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("order", LOOP_ORDERS)
@pytest.mark.parametrize("name", ["D128", "decode"])
def test_a_cuda_graph_can_hold_it(name: str, order: str) -> None:
    inputs = on_gpu(SIZES[name], torch.bfloat16)
    grads = torch.randn_like(selected_attention(*inputs))

    def step() -> list[torch.Tensor]:
        out = selected_attention(*inputs, loop_order=order)
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


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("order", LOOP_ORDERS)
def test_offsets_beyond_32_bits(order: str) -> None:
    tokens, heads, dim, last = 2**20, 17, 128, 64
    assert tokens * heads * dim > 2**31
    q, k, v = (
        torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    position = torch.arange(tokens, device="cuda")[:, None]
    share = torch.rand(1, heads, tokens, 2, device="cuda")
    lists = (share * (position // 64 + 1)).int().sort(-1).values
    lists[..., 1].masked_fill_(lists[..., 0] == lists[..., 1], -1)
    out, lse = selected_attention(q, k, v, lists, loop_order=order, return_lse=True)
    end = [x[:, -1:, -last:].contiguous() for x in (q, lists, out, lse)]
    case = Case(queries=last, keys=tokens, dim=dim, group=1, block=64, scale=dim**-0.5)
    inputs = [end[0], k[:, -1:], v[:, -1:], end[1]]
    truth, true_lse = reference(case, in_dtype(inputs, torch.float64))
    assert_close_derived(end[2], truth, natural_outputs(case, inputs, truth))
    rough = reference(case, inputs)[1]
    assert_close_derived(end[3], true_lse, natural_lse(rough, true_lse, dim), name="lse")
