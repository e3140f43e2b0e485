"""Loop orders of selected attention, interpreted: they agree, however they are tuned."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.kernels import selected_attention as selected
from sparse_compile.kernels import selected_query_major as query_major
from sparse_compile.kernels import selected_tile_union as tile_union
from sparse_compile.kernels.merge_splits import n_splits
from sparse_compile.kernels.selected_lists import geometry
from sparse_compile.testing import assert_close_derived, in_dtype
from tests.selected_cases import CASES, Case, natural_lse, natural_outputs, reference, worst_outputs

CPU = torch.device("cpu")
# interpreted kernels are too slow to search for the smallest failing case
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")

CASE = st.builds(
    Case,
    heads=st.integers(1, 2),
    group=st.integers(1, 5),
    queries=st.integers(1, 18),
    keys=st.integers(1, 70),
    dim=st.sampled_from([8, 16, 24]),
    value_dim=st.sampled_from([8, 16]),
    slots=st.integers(1, 5),
    block=st.sampled_from([16, 32]),
    causal=st.booleans(),
    neighbours=st.sampled_from([1, 8]),
)
PACKED_CASE = st.lists(st.integers(1, 20), min_size=1, max_size=3).flatmap(
    lambda lengths: st.builds(
        Case,
        lengths=st.just(tuple(lengths)),
        queries=st.just(sum(lengths)),
        keys=st.just(sum(lengths)),
        group=st.integers(1, 3),
        slots=st.integers(1, 3),
        causal=st.booleans(),
        neighbours=st.sampled_from([1, 8]),
    )
)


def launch(order: str, case: Case, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    return selected.launch(*inputs, *case.arguments(CPU), order)


def check_worst(case: Case, inputs: list[Tensor], found: tuple[Tensor, Tensor], name: str) -> None:
    """As `check`, for any inputs: what rounding may do at worst, not what it does to some."""
    truths = reference(case, in_dtype(inputs, torch.float64))
    pairs = zip(found, truths, worst_outputs(case, inputs), strict=True)
    for what, (ours, truth, worst) in zip(("out", "lse"), pairs, strict=True):
        # infinities must be equal
        torch.testing.assert_close(
            ours.double(),
            truth,
            rtol=0,
            atol=worst,
            msg=lambda text, what=what: f"{name} {what}: {text}",
        )


def check(case: Case, inputs: list[Tensor], found: tuple[Tensor, Tensor], name: str) -> None:
    truth, true_lse = reference(case, in_dtype(inputs, torch.float64))
    assert_close_derived(found[0], truth, natural_outputs(case, inputs, truth), name=name)
    rough = natural_lse(reference(case, inputs)[1], true_lse, case.dim)
    assert_close_derived(found[1], true_lse, rough, name=f"{name} lse")


@settings(deadline=None, phases=PHASES, max_examples=8)
@given(st.one_of(CASE, PACKED_CASE), st.integers(0, 2**30))
def test_every_loop_order_computes_the_same(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = case.inputs()
    for order in selected.LOOP_ORDERS:
        check_worst(case, inputs, launch(order, case, inputs), order)


@settings(deadline=None, phases=PHASES, max_examples=4)
@given(CASE, st.integers(1, 4), st.integers(0, 2**30))
def test_padding_changes_nothing(case: Case, more: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v, lists = case.inputs()
    padded = torch.nn.functional.pad(lists, (0, more), value=-1)
    for order in selected.LOOP_ORDERS:
        found = launch(order, case, [q, k, v, padded])
        check_worst(case, [q, k, v, lists], found, order)


@settings(deadline=None, phases=PHASES, max_examples=4)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**30))
def test_a_sequence_twice_in_a_pack_gives_its_output_twice(
    first: int, second: int, seed: int
) -> None:
    torch.manual_seed(seed)
    one = Case(lengths=(first, second), queries=first + second, keys=first + second, slots=2)
    inputs = one.inputs()
    lengths = (first, second, first)
    twice = Case(lengths=lengths, queries=sum(lengths), keys=sum(lengths), slots=2)
    repeated = [torch.cat([x, x[:, :, :first]], dim=2) for x in inputs]
    for order in selected.LOOP_ORDERS:
        out, lse = launch(order, twice, repeated)
        end = first + second
        check_worst(one, inputs, (out[:, :, :end], lse[:, :, :end]), order)
        again = torch.cat([out[:, :, end:], out[:, :, first:end]], dim=2)
        again_lse = torch.cat([lse[:, :, end:], lse[:, :, first:end]], dim=2)
        check_worst(one, inputs, (again, again_lse), order)


@pytest.mark.parametrize("order", selected.LOOP_ORDERS)
def test_all_blocks_are_dense_attention(order: str) -> None:
    case = Case(queries=20, keys=53, slots=4, group=3)
    q, k, v, _ = case.inputs()
    lists = torch.arange(4, dtype=torch.int32).expand(1, 1, 20, 4)
    mask = torch.ones(20, 53, dtype=torch.bool).tril(33)

    def dense(*inputs: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *inputs, attn_mask=mask, scale=case.scale, enable_gqa=True
        )

    truth = dense(*in_dtype([q, k, v], torch.float64))
    found = launch(order, case, [q, k, v, lists])[0]
    natural = natural_outputs(case, [q, k, v, lists], truth)
    assert_close_derived(found, truth, [dense(q, k, v), *natural])


@pytest.mark.parametrize("order", selected.LOOP_ORDERS)
def test_one_token_and_many_keys(order: str) -> None:
    case = Case(batch=2, queries=1, keys=1500, slots=32, group=5)
    inputs = case.inputs()
    check(case, inputs, launch(order, case, inputs), order)


@pytest.mark.parametrize("order", selected.LOOP_ORDERS)
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive(scale: float, order: str) -> None:
    case = Case(queries=12, keys=30, slots=2, scale=scale, neighbours=4)
    inputs = case.inputs()
    check_worst(case, inputs, launch(order, case, inputs), order)


@pytest.mark.parametrize("order", ["query_major", "tile_union"])
def test_more_heads_in_a_group_than_a_program_takes(order: str) -> None:
    case = Case(queries=1, keys=40, group=70)
    inputs = case.inputs()
    check(case, inputs, launch(order, case, inputs), order)


@pytest.mark.parametrize("order", selected.LOOP_ORDERS)
def test_a_token_without_keys(order: str) -> None:
    case = Case(queries=5, keys=40)
    inputs = case.inputs()
    inputs[3][0, 0, 2] = -1
    inputs[3][0, 0, 0] = torch.tensor([-1, -1, -1])
    out, lse = launch(order, case, inputs)
    check(case, inputs, (out, lse), order)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -torch.inf).all()


@pytest.mark.parametrize("programs", [1, 3, 10_000])
def test_programs_may_share_a_token(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = query_major.Tiles(16, 8, programs, 4, 2)
    monkeypatch.setattr(query_major, "default_tiles", lambda *_sizes: tiles)
    case = Case(queries=1, keys=130, slots=6, block=32, group=11)
    inputs = case.inputs()
    check(case, inputs, launch("query_major", case, inputs), f"{programs} programs")


def test_how_many_programs_share_a_token() -> None:
    assert n_splits(1000, 16, 500) == 1
    assert n_splits(100, 16, 500) == 5
    assert n_splits(1, 16, 500) == 16
    assert n_splits(0, 16, 500) == 1


TILES = {
    "all": tile_union.Tiles(16, 1, 16, 1, 4, 1, 255),
    "two-share": tile_union.Tiles(16, 2, 16, 2, 4, 1, 255),
    "4-tokens": tile_union.Tiles(4, 4, 16, 1, 4, 1, 255),
    "64-tokens": tile_union.Tiles(64, 4, 16, 9, 4, 1, 255),
    "nobody-shares": tile_union.Tiles(16, 1, 16, 17, 4, 1, 255),
}


@pytest.mark.parametrize("name", ["neighbours-agree", "packed-neighbours", "block-32"])
@pytest.mark.parametrize("tiles", TILES)
def test_any_tiles_compute_the_same(tiles: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_union, "default_tiles", lambda *_sizes: TILES[tiles])
    case = CASES[name]
    inputs = case.inputs()
    check(case, inputs, launch("tile_union", case, inputs), tiles)


@settings(deadline=None, phases=PHASES, max_examples=25)
@given(
    st.one_of(CASE, PACKED_CASE), st.sampled_from([1, 4, 16, 64]), st.integers(1, 9),
    st.integers(0, 2**30),
)  # fmt: skip
def test_tiles_and_the_rest_hold_the_selection(
    case: Case, block_t: int, shared: int, seed: int
) -> None:
    torch.manual_seed(seed)
    lists = case.selection()
    place = geometry(case.queries, case.keys, case.block, case.cu_seqlens(CPU), CPU)
    unions = tile_union.build_unions(
        lists, place, case.keys, block_size=case.block, causal=case.causal, block_t=block_t,
        shared=shared,
    )  # fmt: skip
    token = torch.arange(case.queries)
    if case.lengths:
        first_key, end = place.rows[0].long(), place.rows[1].long()
    else:
        first_key, end = torch.zeros_like(token), torch.full_like(token, case.keys)
    position = token - first_key if case.lengths else token + case.keys - case.queries
    begins = first_key[:, None] + lists.long() * case.block  # [1, H, T, K]
    reads = (lists >= 0) & (begins < end[:, None])
    if case.causal:
        reads &= lists * case.block <= position[:, None]
    wanted = {(h, t, int(begins[0, h, t, slot])) for _, h, t, slot in reads.nonzero().tolist()}
    found: list[tuple[int, int, int]] = []
    before = tile_union.pad_before(place.shift, block_t)
    n_tiles = unions.counts.numel() // case.heads
    blocks = unions.blocks.unflatten(0, (-1, unions.capacity))
    for tile, count in enumerate(unions.counts.tolist()):
        for begin, stop, low, high in blocks[tile, :count].tolist():
            tokens = [i for i in range(64) if (low, high)[i // 32] >> (i % 32) & 1]
            tokens = [tile % n_tiles * block_t - before + i for i in tokens]
            assert len(tokens) >= shared
            assert all(stop == min(begin + case.block, int(end[t])) for t in tokens)
            found += [(tile // n_tiles, t, begin) for t in tokens]
    if unions.rest is None:
        assert shared == 1
    else:
        for _, h, t, slot in (unions.rest >= 0).nonzero().tolist():
            begin = int(first_key[t]) + int(unions.rest[0, h, t, slot]) * case.block
            found.append((h, t, begin))
    assert len(found) == len(set(found))
    assert set(found) == wanted
    n_read, n_left = tile_union.count(
        lists, place, case.keys, block_size=case.block, causal=case.causal, block_t=block_t,
        shared=shared,
    ).tolist()  # fmt: skip
    assert n_read == int(unions.counts.sum())
    assert n_left == (0 if unions.rest is None else int((unions.rest >= 0).sum()))


def test_what_neighbours_share_is_read_once() -> None:
    lists = torch.tensor([0, 3, 5], dtype=torch.int32).expand(1, 1, 64, 3)
    place = geometry(64, 96, 16, None, CPU)
    unions = tile_union.build_unions(
        lists, place, 96, block_size=16, causal=False, block_t=64, shared=16
    )
    # the first query sits at key 32, in the middle of a tile
    assert unions.counts.tolist() == [3, 3]
    assert unions.rest is not None
    assert (unions.rest == -1).all()
