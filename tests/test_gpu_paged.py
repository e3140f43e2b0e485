"""Pages on a GPU: written, read and attended to, by kernels that are compiled."""

import dataclasses

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile.kernels import paged_attention, paged_cache
from sparse_compile.ops import Sketch
from sparse_compile.testing import TANH_STEP, assert_close_derived, in_dtype
from tests.test_paged_attention import ALIBI, CASES, Case

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = CASES | {
    "D64": Case(dim=64, lengths=(900, 17), entries=60, tokens=130, group=7),
    "D96": Case(dim=96, lengths=(500,), entries=33, tokens=3, group=4),
    "D128": Case(dim=128, lengths=(3000, 1, 0, 2047), entries=190, group=8, heads=4),
    "D128-chunk": Case(dim=128, lengths=(1500, 700), entries=100, tokens=512, group=4),
    "D128-alibi": Case(dim=128, lengths=(1500,), entries=100, formulas=ALIBI, operands=((6,),)),
    "D256": Case(dim=256, lengths=(700,), entries=44, tokens=70, page=16),
}


def on_gpu(case: Case, dtype: torch.dtype) -> list:
    q, pool, table, lengths, new, operands = case.arguments()
    moved = [x.cuda() if isinstance(x, Tensor) else x for x in (table, lengths, new)]
    q, pool = (x.to("cuda", dtype) for x in (q, pool))
    return [q, pool, *moved, [x.cuda() for x in operands]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_attention_is_that_of_the_reference(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    case = SIZES[name]
    q, pool, *rest, operands = on_gpu(case, DTYPES[dtype])
    found = paged_attention.launch(q, pool, *rest, operands, case.program.encode(), *case.rest())

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = in_dtype([q, pool, *operands], dtype)
        return paged_attention.paged_attention_ref(
            *wide[:2], *rest, wide[2:], case.program, *case.rest()
        )

    exact, rough = reference(torch.float64), reference(q.dtype)
    step = torch.finfo(q.dtype).eps
    natural = exact[0] + float(pool.abs().max()) * step / 2  # weights have the values' dtype
    assert_close_derived(found[0], exact[0], [rough[0], natural])
    finite = exact[1].isfinite()
    logit = float(exact[1][finite].abs().max()) if bool(finite.any()) else 0.0
    step = torch.finfo(torch.float32).eps
    if q.dtype == torch.bfloat16 and case.program.score.has(sympy.tanh):
        step = TANH_STEP
    natural = exact[1] + (logit + case.dim**0.5) * step
    assert_close_derived(found[1], exact[1], [rough[1], natural], name="lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page", "dim"), [(16, 64), (16, 80), (32, 128), (64, 256)])
def test_what_was_written_is_read(page: int, dim: int, dtype: str) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([130, 3, 0, 64], dtype=torch.int32)
    new = torch.tensor([70, 3, 0, 1], dtype=torch.int32)
    pool = torch.randn(40, 3, 2, page, dim).to(DTYPES[dtype])
    table = torch.randperm(40)[: 4 * 9].int().view(4, 9)
    k, v = torch.randn(2, 4, 70, 3, dim).to(pool.dtype).transpose(2, 3)
    found = []
    for device in ("cpu", "cuda"):
        here = pool.to(device, copy=True)
        sketch = Sketch(*(x.to(device) for x in Sketch.empty(pool)))
        given = [x.to(device) for x in (k, v)]
        places = [x.to(device) for x in (table, lengths)]
        torch.ops.sparse_compile.paged_append(*given, here, *places, new.to(device), *sketch)
        read = torch.ops.sparse_compile.paged_gather(here, *places, 140)
        found.append([x.cpu() for x in (here, *sketch, *read)])
    for name, cpu, gpu in zip(("pool", *Sketch._fields, "k", "v"), *found, strict=True):
        assert torch.equal(cpu, gpu), name


def test_a_cuda_graph_can_hold_a_step_and_nothing_waits() -> None:
    case = dataclasses.replace(SIZES["D128"], lengths=(3000, 16, 0, 2047))
    q, pool, table, lengths, _, _ = on_gpu(case, torch.bfloat16)
    table = torch.arange(4 * 190, device="cuda", dtype=torch.int32).view(4, 190)
    pool = torch.randn(4 * 190, *pool.shape[1:], device="cuda", dtype=torch.bfloat16)
    sketch = Sketch.empty(pool)
    k, v = torch.randn(2, 4, 4, 1, 128, device="cuda", dtype=torch.bfloat16)
    rest = ([], case.program.encode(), True, 0)

    def step() -> Tensor:
        paged_cache.append(k, v, pool, table, lengths, None, *sketch)
        return paged_attention.launch(q, pool, table, lengths, None, *rest)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths += 1  # the next token of all but the empty sequence
    lengths[2] = 0
    k.normal_(), v.normal_(), q.normal_()
    graph.replay()
    assert torch.equal(out, step())  # the same bits


@pytest.mark.usefixtures("much_memory")
def test_offsets_beyond_32_bits() -> None:
    n_pages = 2**31 // (8 * 2 * 16 * 128) + 9
    pool = torch.zeros(n_pages, 8, 2, 16, 128, device="cuda", dtype=torch.bfloat16)
    table = torch.tensor([[n_pages - 1, n_pages - 2]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([20], dtype=torch.int32, device="cuda")
    k, v = torch.randn(2, 1, 8, 20, 128, device="cuda", dtype=torch.bfloat16)
    paged_cache.append(k, v, pool, table, lengths, None, None, None)
    found = paged_cache.gather(pool, table, lengths, 20)
    assert torch.equal(found[0], k)
    assert torch.equal(found[1], v)
    q = torch.randn(1, 16, 20, 128, device="cuda", dtype=torch.bfloat16)
    program = CASES["decode"].program.encode()
    out, _ = paged_attention.launch(q, pool, table, lengths, None, [], program, True, 0)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True, scale=CASES["decode"].dim ** -0.5
    )
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)
