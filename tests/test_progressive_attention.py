"""Progressive attention reads as many pages as its promise takes, and attends to them rightly."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile import OperatorError, ops
from sparse_compile.kernels import paged_attention, progressive_attention, progressive_cpu
from sparse_compile.kernels.paged_cache import sketch_ref
from tests.progressive_cases import (
    CASES,
    KINDS,
    Case,
    Found,
    Inputs,
    check_attention,
    check_lists,
    logits,
    true_mass,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
WAYS = ["cpu", pytest.param("kernel", marks=interpreted)]
# interpreted; compiled kernels run all cases
BY_KERNEL = {"plain", "group-1", "group-7-D80", "D256-page-32", "page-64", "many-pages",
             "large-logits", "nothing-first", "at-least", "at-most", "window", "alibi"}  # fmt: skip
HALVES = {"group-4-D128"}
RUNS = [
    pytest.param(
        name, way, dtype, id=f"{name}-{way}-{dtype}", marks=interpreted if way == "kernel" else []
    )
    for name in CASES
    for way in ("cpu", "kernel")
    for dtype in (torch.float32, torch.float16)
    if way == "cpu" or name in (BY_KERNEL if dtype == torch.float32 else HALVES)
]


def made(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Inputs, list[Tensor]]:
    torch.manual_seed(0)
    return case.inputs(dtype), [torch.randn(shape) for shape in case.operands]


@pytest.mark.parametrize(("name", "way", "dtype"), RUNS)
def test_it_attends_to_what_it_lists(name: str, way: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs, operands = made(case, dtype)
    found = case.run(way, inputs, operands)
    check_lists(case, inputs, found)
    check_attention(case, inputs, operands, found)
    if not case.max_pages:
        assert bool((found.mass >= case.p - 1e-5).all())  # by its own account
    by_cpu = case.run("cpu", inputs, operands)
    # ends of lists may differ by a page where a sum is at the edge
    assert bool(((found.n_pages - by_cpu.n_pages).abs() <= 1).all())
    torch.testing.assert_close(found.mass, by_cpu.mass, atol=0.02, rtol=0)


def shortest(case: Case, inputs: Inputs) -> Tensor:
    """Pages that the oracle reads: it knows the real shares, and orders by the largest of a group."""
    weights = logits(case, inputs, []).softmax(-1).nan_to_num(0.0)
    shares = weights.unflatten(-1, (-1, case.page)).sum(-1)  # [B, Hkv, G, L]
    key = shares.amax(2)
    n_live = -(-inputs.lengths // case.page)
    entry = torch.arange(key.shape[-1])
    first = (entry < case.sinks) | (entry >= n_live[:, None] - case.local)
    first &= entry < n_live[:, None]
    key = key.masked_fill(first[:, None], 2.0)
    at = key.argsort(dim=-1, descending=True)[:, :, None].expand_as(shares)
    enough = (shares.gather(-1, at).cumsum(-1) >= case.p).all(2)
    return enough.long().argmax(-1) + 1


LARGE = Case(lengths=(4096, 3001), heads=4, group=4, dim=64, entries=256, p=0.95)


@pytest.mark.parametrize(
    ("kind", "std", "times"),
    [
        ("random", 1.0, 1.05),
        ("random", 3.0, 1.05),
        ("peaked", 0.6, 1.05),
        ("peaked", 2.0, 1.05),
        ("outlier", 4.0, 1.4),  # the sketch is so noisy that more is read
    ],
)
def test_the_promise_is_kept_at_about_the_cost_of_the_oracle(
    kind: str, std: float, times: float
) -> None:
    case = dataclasses.replace(LARGE, kind=kind, std=std)
    inputs, _ = made(case)
    found = case.run("cpu", inputs, [])
    mass = true_mass(case, inputs, [], found)
    assert float((mass < case.p - 0.01).double().mean()) <= 0.01
    oracle = shortest(case, inputs)
    assert float(found.n_pages.double().sum() / oracle.double().sum()) <= times


@pytest.mark.parametrize("way", WAYS)
def test_all_of_the_mass_is_dense_attention(way: str) -> None:
    case = dataclasses.replace(CASES["plain"], p=1.0, heads=1)
    inputs, _ = made(case)
    found = case.run(way, inputs, [])
    n_live = -(-inputs.lengths // case.page)
    assert torch.equal(found.n_pages, n_live[:, None].expand_as(found.n_pages))
    assert torch.equal(found.mass, torch.ones_like(found.mass))
    out, lse = paged_attention.forward_cpu(
        inputs.q, inputs.pool, inputs.table, inputs.lengths, None, [], case.program.encode(), True, 0
    )  # fmt: skip
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.lse, lse)


@pytest.mark.parametrize(
    ("kind", "way"),
    [*((kind, "cpu") for kind in KINDS), pytest.param("peaked", "kernel", marks=interpreted)],
)
def test_more_is_read_for_more_of_the_mass(kind: str, way: str) -> None:
    case = dataclasses.replace(CASES["random"], kind=kind)
    inputs, _ = made(case)
    before: Found | None = None
    shares = (0.05, 0.3, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)
    for p in shares if way == "cpu" else (0.5, 0.9, 0.99):
        found = case.run(way, inputs, [], p=p)
        if before is not None:
            assert bool((found.n_pages >= before.n_pages).all())
            for ours, less in zip(
                found.pages.flatten(0, 1), before.pages.flatten(0, 1), strict=True
            ):
                assert set(less.tolist()) <= set(ours.tolist()) | {-1}
        before = found


@pytest.mark.parametrize("way", WAYS)
def test_neither_pages_nor_neighbours_change_anything(way: str) -> None:
    case = dataclasses.replace(CASES["plain"], lengths=(150, 0, 40))
    inputs, _ = made(case)
    found = case.run(way, inputs, [])
    order = torch.randperm(inputs.pool.shape[0])
    back = order.argsort()
    places = torch.where(inputs.table >= 0, order[inputs.table.clamp(min=0)].int(), inputs.table)
    moved = Inputs(
        inputs.q, inputs.pool[back], inputs.codes[back], inputs.scales[back], places, inputs.lengths
    )
    for ours, theirs in zip(case.run(way, moved, []), found, strict=True):
        assert torch.equal(ours, theirs)
    for row in (0, 2):
        some = slice(row, row + 1)
        alone = Inputs(inputs.q[some], *inputs[1:4], inputs.table[some], inputs.lengths[some])
        for ours, theirs in zip(case.run(way, alone, []), found, strict=True):
            torch.testing.assert_close(ours, theirs[some])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["q", "key", "value"])
def test_nan_in_one_sequence_stays_there(where: str, way: str) -> None:
    case = dataclasses.replace(CASES["plain"], lengths=(150, 40))
    inputs, _ = made(case)
    good = case.run(way, inputs, [])
    last = int(inputs.table[0, 150 // 16])  # a page that is always read
    q, pool, scales = inputs.q.clone(), inputs.pool.clone(), inputs.scales.clone()
    if where == "q":
        q[0, 1] = math.nan
    else:
        pool[last, 0, int(where == "value"), 3] = math.nan
    if where == "key":
        scales[last, 0, 3] = math.nan
    bad = case.run(way, Inputs(q, pool, inputs.codes, scales, *inputs[4:]), [])
    assert bool(bad.out[0, : case.group].isnan().any())
    for ours, theirs in zip(bad, good, strict=True):
        assert torch.equal(ours[1:], theirs[1:])
    if where != "value":  # nothing can be said of the mass: all is read
        assert int(bad.n_pages[0, 0]) == -(-150 // 16)


@pytest.mark.parametrize("way", WAYS)
def test_a_sketch_that_lies_is_found_out(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that it takes for heavy come first; that they are light is seen, and more are read."""
    case = Case(lengths=(1600,), entries=100, heads=1, group=2, kind="random", dim=32, p=0.9)
    inputs, _ = made(case)
    decoys = inputs.table[0, 20:30].long()
    near = inputs.q[0, :, 0].mean(0) * 6
    codes, scales = inputs.codes.clone(), inputs.scales.clone()
    codes[decoys], scales[decoys] = sketch_ref(near.expand(10, 1, 16, 32))
    lying = Inputs(*inputs[:2], codes, scales, *inputs[4:])
    found = case.run(way, lying, [])
    assert bool((true_mass(case, inputs, [], found) >= case.p - 0.01).all())
    monkeypatch.setattr(progressive_cpu, "ROUNDS", 1)  # to believe the sketch
    believing = case.run("cpu", lying, [])
    assert bool((true_mass(case, inputs, [], believing) < 0.5).all())


@pytest.mark.parametrize("way", WAYS)
def test_each_sequence_may_have_its_own_share(way: str) -> None:
    case = dataclasses.replace(CASES["plain"], lengths=(150, 150), heads=1)
    inputs, _ = made(case)
    shares = torch.tensor([0.5, 1.0])
    options = list(case.options())
    options[1] = shares
    run = progressive_attention.forward_cpu if way == "cpu" else progressive_attention.launch
    found = Found(*run(*inputs, [], case.program.encode(), *options))
    for row, p in enumerate(shares.tolist()):
        alone = case.run(way, inputs, [], p=p)
        assert torch.equal(found.pages[row], alone.pages[row])


def test_written_pages_are_attended_to_and_what_was_read_is_told() -> None:
    torch.manual_seed(0)
    pool = torch.full((8, 2, 2, 16, 16), torch.nan)
    sketch = ops.Sketch.empty(pool)
    table = torch.tensor([[5, 1, 7, 0, 3, 2]], dtype=torch.int32)
    lengths = torch.tensor([90], dtype=torch.int32)
    q, k, v = torch.randn(1, 4, 1, 16) * 3, *torch.randn(2, 1, 2, 90, 16)
    ops.paged_append(k, v, pool, table, lengths, sketch=sketch)
    dense = ops.paged_attention(q, pool, table, lengths)
    all_read = ops.progressive_attention(q, pool, table, lengths, sketch, p=1.0)
    torch.testing.assert_close(all_read, dense)
    told = ops.progressive_attention(q, pool, table, lengths, sketch, p=0.7, telemetry=True)
    assert bool((told.n_pages < 6).all())
    assert bool((told.mass >= 0.7).all())
    assert not bool(told.capped.any())
    stopped = ops.progressive_attention(
        q, pool, table, lengths, sketch, p=torch.tensor([0.999]), max_pages=3, telemetry=True
    )
    assert bool((stopped.n_pages == 3).all())
    assert torch.equal(stopped.capped, (stopped.mass < 0.999).view(1, 2, 2).any(-1))
    assert bool(stopped.capped.any())


@pytest.mark.parametrize("name", ["plain", "alibi"])
def test_the_operator_is_registered_as_it_should_be(name: str) -> None:
    case = CASES[name]
    inputs, operands = made(case)
    torch.library.opcheck(
        torch.ops.sparse_compile.progressive_attention_v1.default,
        (*inputs, operands, case.program.encode(), *case.options()),
    )


POOL, TABLE = torch.zeros(4, 2, 2, 16, 8), torch.tensor([[0, 1]], dtype=torch.int32)
GIVEN = {
    "q": torch.zeros(1, 4, 1, 8), "pool": POOL, "block_table": TABLE,
    "seq_lens": torch.tensor([20], dtype=torch.int32), "sketch": ops.Sketch.empty(POOL),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": torch.zeros(1, 4, 3, 8)}, "q has 3 tokens. Expected 1: .* `paged_attention` takes"),
        ({"q": torch.zeros(1, 3, 1, 8)}, "q has 3 heads. Expected a multiple of the 2 KV heads"),
        ({"q": torch.zeros(1, 4, 1, 8, requires_grad=True)}, "q requires grad"),
        ({"sketch": ops.Sketch.empty(POOL[:3])}, r"sketch.codes is torch.uint8 of shape \(3,"),
        ({"block_table": TABLE + 3}, r"block_table\[0, 1\] is 4. Expected a page from 0 to 3"),
        ({"p": 0.0}, "p is 0.0. Expected a share above 0"),
        ({"p": math.nan}, "p is nan. Expected a share above 0"),
        ({"p": torch.tensor([0.5, 0.5])}, r"p is torch.float32 of shape \(2,\)"),
        ({"p": torch.tensor([-0.5])}, r"p is \[-0.5\]. Expected shares above 0"),
        ({"max_pages": 2}, "max_pages is 2. Expected 3 or more"),
        ({"sinks": -1}, "sinks is -1. Expected 0 or more"),
        ({"window": 0}, "window is 0. Expected 1 or more"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(OperatorError, match=says):
        ops.progressive_attention(**(GIVEN | changed))
