"""Progressive attention on a GPU, by kernels that are compiled."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sparse_compile.kernels import paged_attention, paged_cache, progressive_attention
from tests.progressive_cases import (
    CASES,
    Case,
    Found,
    Inputs,
    check_attention,
    check_lists,
    true_mass,
)

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = CASES | {
    "D64": Case(dim=64, lengths=(900, 17), entries=60, group=7, heads=2),
    "D96-G16": Case(dim=96, lengths=(5000,), entries=320, group=16, heads=2),
    "D128": Case(dim=128, lengths=(9000, 1, 0, 2047), entries=600, group=4, heads=8, std=0.5),
    "D128-G8": Case(dim=128, lengths=(20000,), entries=1300, group=8, heads=2, std=0.5),
    "D256-page-64": Case(dim=256, lengths=(3000, 64), entries=50, page=64, std=0.5),
}
LARGE = Case(
    lengths=(16000, 3000, 16384, 8191), heads=8, group=4, dim=128, entries=1024, p=0.95, std=0.5
)  # fmt: skip


def on_gpu(case: Case, dtype: torch.dtype) -> tuple[Inputs, list[Tensor]]:
    torch.manual_seed(0)
    operands = [torch.randn(shape) for shape in case.operands]
    return case.inputs(dtype).to("cuda"), [operand.cuda() for operand in operands]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_it_attends_to_what_it_lists(name: str, dtype: str) -> None:
    case = SIZES[name]
    inputs, operands = on_gpu(case, DTYPES[dtype])
    found = case.run("kernel", inputs, operands)
    check_lists(case, inputs, found)
    check_attention(case, inputs, operands, found)
    by_cpu = case.run("cpu", inputs, operands)  # plain PyTorch, on the GPU
    # ends of lists may differ by a little where a sum is at the edge of a level
    apart = (found.n_pages - by_cpu.n_pages).abs()
    assert bool((apart <= 1 + 0.02 * by_cpu.n_pages).all())
    if not case.max_pages:
        assert bool((found.mass >= case.p - 1e-4).all())


@pytest.mark.parametrize("kind", ["random", "peaked", "outlier"])
def test_the_promise_is_kept(kind: str) -> None:
    case = dataclasses.replace(LARGE, kind=kind)
    inputs, _ = on_gpu(case, torch.bfloat16)
    found = case.run("kernel", inputs, [])
    mass = true_mass(case, inputs, [], found)
    assert float((mass < case.p - 0.01).double().mean()) <= 0.01


def test_all_of_the_mass_is_dense_attention() -> None:
    case = dataclasses.replace(LARGE, p=1.0)
    inputs, _ = on_gpu(case, torch.bfloat16)
    q, pool, _, _, table, lengths = inputs
    found = case.run("kernel", inputs, [])
    program = case.program.encode()
    out, lse = paged_attention.launch(q, pool, table, lengths, None, [], program, True, 0)
    n_live = -(-lengths // case.page)
    assert torch.equal(found.n_pages, n_live[:, None].expand_as(found.n_pages))
    torch.testing.assert_close(found.out, out, rtol=2e-2, atol=2e-2)  # a step of bfloat16 or two
    torch.testing.assert_close(found.lse, lse, rtol=1e-5, atol=1e-4)


def test_neither_pages_nor_time_change_a_bit() -> None:
    inputs, _ = on_gpu(LARGE, torch.bfloat16)
    found = LARGE.run("kernel", inputs, [])
    order = torch.randperm(inputs.pool.shape[0], device="cuda")
    back = order.argsort()
    places = torch.where(inputs.table >= 0, order[inputs.table.clamp(min=0)].int(), inputs.table)
    moved = Inputs(
        inputs.q, *(x[back] for x in (inputs.pool, inputs.codes, inputs.scales)), places,
        inputs.lengths,
    )  # fmt: skip
    for again in (LARGE.run("kernel", inputs, []), LARGE.run("kernel", moved, [])):
        for name, ours, theirs in zip(Found._fields, again, found, strict=True):
            assert torch.equal(ours, theirs), name


def test_nan_in_one_sequence_stays_there() -> None:
    inputs, _ = on_gpu(LARGE, torch.bfloat16)
    good = LARGE.run("kernel", inputs, [])
    q = inputs.q.clone()
    q[0, 1] = math.nan
    bad = LARGE.run("kernel", inputs._replace(q=q), [])
    assert bool(bad.out[0, 1].isnan().all())
    assert int(bad.n_pages[0, 0]) == 16000 // LARGE.page  # nothing can be said: all is read
    for ours, theirs in zip(bad, good, strict=True):
        assert torch.equal(ours[1:], theirs[1:])


def test_a_cuda_graph_can_hold_a_step_and_nothing_waits() -> None:
    case = dataclasses.replace(LARGE, lengths=(3000, 16, 0, 2047), entries=190)
    inputs, _ = on_gpu(case, torch.bfloat16)
    # room for the tokens to come
    table = torch.arange(4 * 190, device="cuda", dtype=torch.int32).view(4, 190)
    pool = torch.randn(4 * 190, *inputs.pool.shape[1:], device="cuda", dtype=torch.bfloat16)
    sketch = paged_cache.sketch_ref(pool[:, :, 0])
    q, lengths = inputs.q, inputs.lengths
    k, v = torch.randn(2, 4, 8, 1, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> Found:
        paged_cache.append(k, v, pool, table, lengths, None, *sketch)
        return case.run("kernel", Inputs(q, pool, *sketch, table, lengths), [])

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    lengths += 1  # the next token of all but the empty sequence
    lengths[2] = 0
    k.normal_(), v.normal_(), q.normal_()
    graph.replay()
    for ours, theirs in zip(held, step(), strict=True):
        assert torch.equal(ours, theirs)  # the same bits


@pytest.mark.usefixtures("much_memory")
def test_offsets_beyond_32_bits() -> None:
    n_pages = 2**31 // (8 * 2 * 16 * 128) + 9
    pool = torch.zeros(n_pages, 8, 2, 16, 128, device="cuda", dtype=torch.bfloat16)
    sketch = paged_cache.Sketch.empty(pool)
    table = torch.tensor([[n_pages - 1, n_pages - 2]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([20], dtype=torch.int32, device="cuda")
    k, v = torch.randn(2, 1, 8, 20, 128, device="cuda", dtype=torch.bfloat16)
    paged_cache.append(k, v, pool, table, lengths, None, *sketch)
    q = torch.randn(1, 16, 1, 128, device="cuda", dtype=torch.bfloat16)
    case = dataclasses.replace(LARGE, p=1.0)
    out = progressive_attention.launch(
        q, pool, *sketch, table, lengths, [], case.program.encode(), *case.options()
    )[0]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
