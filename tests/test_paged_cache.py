"""Pages hold what was written: on the CPU and by interpreted kernels; sketches hold keys nearly."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile import OperatorError, ops
from sparse_compile.kernels import paged_cache
from sparse_compile.ops import Sketch
from sparse_compile.runtime.block_pool import BlockPool
from sparse_compile.runtime.block_table import BlockTable

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
WAYS = ["cpu", pytest.param("kernel", marks=interpreted)]


def append(way: str) -> Callable[..., None]:
    return paged_cache.paged_append_ref if way == "cpu" else paged_cache.append


def gather(way: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return paged_cache.paged_gather_ref if way == "cpu" else paged_cache.gather


def table_of(tables: list[BlockTable], width: int) -> Tensor:
    rows = [[*table.pages, *[-1] * (width - len(table))] for table in tables]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(tables), width)


def numbers(values: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("page_size", "head_dim", "dtype"),
    [
        (16, 16, torch.float16),
        (16, 80, torch.bfloat16),
        (32, 96, torch.float32),
        (64, 128, torch.bfloat16),
        (16, 192, torch.float32),
        (32, 256, torch.float16),
    ],
    ids=str,
)
def test_what_was_written_is_read(
    page_size: int, head_dim: int, dtype: torch.dtype, way: str
) -> None:
    torch.manual_seed(0)
    heads, lengths = 2, [page_size + 3, 0, 2 * page_size, 5]
    pool = torch.full((11, heads, 2, page_size, head_dim), torch.nan, dtype=dtype)
    sketch = Sketch.empty(pool)
    accounts = BlockPool(11)
    tables = [BlockTable(accounts, page_size) for _ in lengths]
    history = [torch.empty(2, heads, 0, head_dim, dtype=dtype) for _ in lengths]
    steps = [lengths, [1, 1, 1, 1], [0, 7, 2, 1]]
    for step in steps:
        for table, n in zip(tables, step, strict=True):
            table.append(n)
        width = max(step)
        # tokens before heads, as projections make them
        k, v = torch.randn(2, len(lengths), width, heads, head_dim).to(dtype).transpose(2, 3)
        seq_lens = numbers([table.n_tokens for table in tables])
        block_table = table_of(tables, 4)
        append(way)(k, v, pool, block_table, seq_lens, numbers(step), *sketch)
        for i, n in enumerate(step):
            history[i] = torch.cat([history[i], torch.stack([k, v])[:, i, :, :n]], dim=2)
        n_keys = 3 * page_size + 1
        found = gather(way)(pool, block_table, seq_lens, n_keys)
        for both, past in zip(torch.stack(found).unbind(1), history, strict=True):
            wanted = torch.nn.functional.pad(past, (0, 0, 0, n_keys - past.shape[2]))
            assert torch.equal(both, wanted)  # every byte
        for table, past in zip(tables, history, strict=True):
            places = [table.place(at) for at in range(table.n_tokens)]
            for name, ours, wanted in zip(
                Sketch._fields, sketch, paged_cache.sketch_ref(past[0]), strict=True
            ):
                there = [ours[page, :, slot] for page, slot in places]
                if there:
                    assert torch.equal(torch.stack(there, dim=1), wanted), name
    untouched = accounts.available
    assert untouched > 0
    assert int(pool.flatten(1).isnan().all(1).sum()) == untouched  # nothing else was written


@given(
    st.sampled_from([4, 16, 64]), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 2**30)
)
@settings(deadline=None)
def test_a_sketch_is_off_by_half_a_step(
    head_dim: int, spread: float, centre: float, seed: int
) -> None:
    torch.manual_seed(seed)
    k = torch.randn(1, 1, 16, head_dim) * spread + centre
    codes, scales = paged_cache.sketch_ref(k)
    step = scales[..., :1].float()
    # the lowest channel and the range are rounded to float16 too
    rounding = 2.0**-10 * (k.amin(-1, keepdim=True).abs() + 15 * step) + 2.0**-24
    error = (Sketch(codes, scales).keys() - k).abs()
    assert bool((error <= step / 2 + rounding).all())


@pytest.mark.parametrize("way", WAYS)
def test_keys_of_one_value_and_keys_that_are_no_numbers(way: str) -> None:
    pool = torch.zeros(1, 1, 2, 16, 16)
    sketch = Sketch.empty(pool)
    k = torch.randn(1, 1, 5, 16)
    k[0, 0, 0] = 0.75
    k[0, 0, 1, 3] = torch.nan
    k[0, 0, 2, 9] = -torch.inf
    k[0, 0, 3] *= 1e30  # more than float16 holds
    append(way)(k, k, pool, numbers([[0]]), numbers([5]), None, *sketch)
    kept = sketch.keys()[0, 0]
    assert bool((kept[0] == 0.75).all())
    assert bool(kept[1:3].isnan().all())  # whoever reads them sees it; their neighbours are fine
    assert bool(kept[3:5].isfinite().all())
    assert torch.equal(sketch.codes[0, 0, :5], paged_cache.sketch_ref(k[0, 0])[0])


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_page_is_not_written_and_reads_as_zero(way: str) -> None:
    pool = torch.ones(3, 1, 2, 16, 8)
    before = pool.clone()
    k = torch.randn(4, 1, 20, 8)
    table = numbers([[-1, 1], [3, 2], [0, -5], [2**30, 0]])  # some pages there are not
    seq_lens = numbers([20, 20, 20, -3])
    append(way)(k, k, pool, table, seq_lens, None, None, None)
    assert torch.equal(pool[1, 0, 0, :4], k[0, 0, 16:])
    assert torch.equal(pool[2, 0, 0, :4], k[1, 0, 16:])
    assert torch.equal(pool[0, 0, 0], k[2, 0, :16])
    assert torch.equal(pool[1:, :, :, 4:], before[1:, :, :, 4:])
    found, _ = gather(way)(pool, table, seq_lens, 40)
    assert torch.equal(
        found[0, 0], torch.cat([torch.zeros(16, 8), k[0, 0, 16:], torch.zeros(20, 8)])
    )
    assert not found[3].any()


def test_a_fork_copies_before_it_writes() -> None:
    torch.manual_seed(0)
    pool = torch.randn(6, 2, 2, 16, 8)
    sketch = Sketch.empty(pool)
    accounts = BlockPool(6)
    parent = BlockTable(accounts, 16)
    parent.append(21)
    k, v = torch.randn(2, 1, 2, 21, 8)
    ops.paged_append(k, v, pool, table_of([parent], 3), numbers([21]), sketch=sketch)
    child = parent.fork()
    before = ops.paged_gather(pool, table_of([parent], 3), numbers([21]), n_keys=21)
    (copy,) = child.append(1)
    ops.cow_copy([pool, *sketch], numbers([copy.source]), numbers([copy.target]))
    new = torch.randn(2, 1, 2, 1, 8)
    ops.paged_append(*new, pool, table_of([child], 3), numbers([22]), sketch=sketch)
    after = ops.paged_gather(pool, table_of([parent], 3), numbers([21]), n_keys=21)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    forked = ops.paged_gather(pool, table_of([child], 3), numbers([22]), n_keys=22)
    for ours, past, last in zip(forked, (k, v), new, strict=True):
        assert torch.equal(ours, torch.cat([past, last], dim=2))
    assert torch.equal(sketch.codes[copy.source, :, :5], sketch.codes[copy.target, :, :5])


@pytest.mark.parametrize("name", ["paged_append", "paged_gather", "cow_copy"])
def test_the_operators_are_registered_as_they_should_be(name: str) -> None:
    pool = torch.randn(4, 2, 2, 16, 8)
    k, v = torch.randn(2, 2, 2, 3, 8)
    table, seq_lens = numbers([[2, -1], [0, 1]]), numbers([3, 18])
    arguments = {
        "paged_append": (k, v, pool, table, seq_lens, numbers([3, 1]), *Sketch.empty(pool)),
        "paged_gather": (pool, table, seq_lens, 20),
        "cow_copy": ([pool, *Sketch.empty(pool)], numbers([0, 1]), numbers([3, 2])),
    }
    torch.library.opcheck(getattr(torch.ops.sparse_compile, name).default, arguments[name])


POOL = torch.zeros(4, 2, 2, 16, 8)
K = torch.zeros(1, 2, 3, 8)
TABLE, LENGTH = numbers([[0, 1]]), numbers([3])
APPENDED = {"k": K, "v": K, "pool": POOL, "block_table": TABLE, "seq_lens": LENGTH}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"pool": POOL[:, :, 0]}, r"pool has shape .* Expected \[P, Hkv, 2, N, D\]"),
        ({"pool": torch.zeros(4, 2, 2, 24, 8)}, "pages of 24 tokens. Expected one of 16, 32, 64"),
        ({"pool": torch.zeros(4, 2, 2, 16, 300)}, "pool has head size 300. Expected 1 to 256"),
        ({"pool": POOL.long()}, "pool is torch.int64. Expected float16"),
        ({"pool": POOL.mT.contiguous().mT}, "pool has strides"),
        ({"k": torch.zeros(1, 1, 3, 8)}, r"k has shape .* Expected \[1, 2, T, 8\]"),
        ({"v": K[:, :, :2]}, "v has shape .* the same T for k and v"),
        ({"k": K.half()}, "k is torch.float16 on cpu. Expected torch.float32"),
        ({"block_table": TABLE[0]}, r"block_table has shape \(2,\). Expected \[B, L\]"),
        ({"block_table": TABLE.long()}, "block_table is torch.int64. Expected torch.int32"),
        ({"block_table": numbers([[4, 1]])}, r"block_table\[0, 0\] is 4. Expected a page from 0 to 3"),
        ({"block_table": numbers([[-1, 1]])}, r"block_table\[0, 0\] is -1. Expected a page"),
        ({"seq_lens": LENGTH[None]}, r"seq_lens has shape \(1, 1\). Expected \[1\]"),
        ({"seq_lens": numbers([2])}, r"seq_lens\[0\] is 2. Expected 0, or at least the 3 tokens"),
        ({"seq_lens": numbers([33])}, r"seq_lens\[0\] is 33. Expected at most 32"),
        ({"n_new": numbers([4])}, r"n_new\[0\] is 4. Expected 0 to 3, the tokens of this call"),
        ({"n_new": numbers([-1])}, r"n_new\[0\] is -1. Expected 0 to 3"),
        ({"n_new": numbers([1, 1])}, r"n_new has shape \(2,\). Expected \[1\]"),
        ({"sketch": Sketch.empty(POOL[:2])}, "sketch.codes is .* `Sketch.empty"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changed: dict[str, object], says: str) -> None:
    with pytest.raises(OperatorError, match=says):
        ops.paged_append(**(APPENDED | changed))


def test_wrong_arguments_of_reads_and_copies_are_named() -> None:
    with pytest.raises(OperatorError, match=r"n_keys is -1\. Expected 0 or more"):
        ops.paged_gather(POOL, TABLE, LENGTH, n_keys=-1)
    with pytest.raises(OperatorError, match=r"pool requires grad\. Expected none"):
        ops.paged_gather(POOL.clone().requires_grad_(), TABLE, LENGTH, n_keys=1)
    with pytest.raises(OperatorError, match=r"targets has 2 pages\. Expected 1, as sources"):
        ops.cow_copy([POOL], numbers([0]), numbers([1, 2]))
    with pytest.raises(OperatorError, match=r"sources is \[7\]. Expected pages from 0 to 3"):
        ops.cow_copy([POOL], numbers([7]), numbers([1]))
    with pytest.raises(OperatorError, match="Expected every page once"):
        ops.cow_copy([POOL], numbers([0, 1]), numbers([2, 2]))
