"""The cost model: its units and formulas, what it must know, its words, and plans made by it."""

import itertools
import math

import msgspec
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import selections
from sparse_compile import cost_formulas, costs, rates
from sparse_compile.cost_formulas import (
    DENSE,
    LOOP_ORDERS,
    PARTS,
    SYMBOLS,
    cost,
    padded,
    padded_size,
    seen,
)
from sparse_compile.cost_formulas import selections as selections_of
from sparse_compile.costs import Overlap, Problem
from sparse_compile.ops import selected_attention
from sparse_compile.planner import measure_overlap, plan_selected
from tests.selected_cases import Case

H100 = rates.lookup("NVIDIA H100 80GB HBM3")
LONG = Problem(n_queries=32768, n_keys=32768, query_heads=32, kv_heads=8)
EVERY = [*LOOP_ORDERS, DENSE]


def changed(problem: Problem = LONG, **fields) -> Problem:
    return msgspec.structs.replace(problem, **fields)


def predicted(problem: Problem, device: rates.Device = H100) -> dict[str, float]:
    return costs.predict(problem, device).ms


def ideal(**fields) -> rates.Device:
    """The H100 with other rates, on which every stage reaches the roof."""
    efficiency = msgspec.structs.replace(H100.efficiency, stages={})
    return rates.Device(rates=msgspec.structs.replace(H100.rates, **fields), efficiency=efficiency)


def problems() -> st.SearchStrategy[Problem]:
    """Problems whose sizes fit each other."""

    def build(group, kv_heads, tokens, before, dim, slots, block, causal, backward):
        return Problem(
            n_queries=tokens, n_keys=max(1, tokens + before), query_heads=group * kv_heads,
            kv_heads=kv_heads, head_dim=dim, n_slots=slots, block_size=block, causal=causal,
            backward=backward,
        )  # fmt: skip

    return st.builds(
        build, st.integers(1, 32), st.integers(1, 16), st.integers(1, 10**5),
        st.integers(-(10**4), 10**5), st.sampled_from([16, 64, 80, 128, 256]), st.integers(1, 64),
        st.sampled_from([16, 32, 64, 128]), st.booleans(), st.booleans(),
    )  # fmt: skip


class TestFormulas:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(("n", "before", "slots"), [(256, 0, 3), (64, 192, 2), (256, 64, 6)])
    def test_selections_are_those_that_can_be_counted(self, n, before, slots, causal):
        block = 16
        n_keys = n + before
        counted = sum(
            min(slots, (t + before) // block + 1 if causal else n_keys // block) for t in range(n)
        )
        values = {
            cost_formulas.T: n,
            cost_formulas.S: n_keys,
            cost_formulas.K: slots,
            cost_formulas.N: block,
        }
        assert selections_of(causal).subs(values) == counted

    @pytest.mark.parametrize(("n", "before"), [(5, 0), (1, 9), (4, 3)])
    def test_pairs_of_dense_attention(self, n, before):
        counted = sum(t + before + 1 for t in range(n))
        assert seen(True).subs({cost_formulas.T: n, cost_formulas.S: n + before}) == counted
        assert seen(False).subs({cost_formulas.T: n, cost_formulas.S: n + before}) == n * (
            n + before
        )

    @pytest.mark.parametrize(
        ("size", "lowest", "wanted"),
        [(0.5, 16, 16), (1, 8, 8), (16, 16, 16), (17, 16, 32), (80, 16, 128), (128, 8, 128)],
    )
    def test_padding(self, size, lowest, wanted):
        assert padded_size(size, lowest) == wanted
        assert padded(sympy.Rational(size), lowest) == wanted

    @pytest.mark.parametrize("name", PARTS)
    def test_compiled_numbers_are_those_of_the_formulas(self, name):
        problem = changed(head_dim=80, value_dim=64)
        found, launches = costs.evaluate(name, problem.values(), causal=True)
        formulas = cost(name)
        values = dict(zip(SYMBOLS, problem.values(), strict=True))
        for stage in formulas.stages:
            exact = [float(part.subs(values).doit()) for part in stage.expressions()]
            assert found[stage.name] == pytest.approx(exact)
        assert launches == pytest.approx(float(formulas.launches.subs(values).doit()))

    def test_query_major_moves_the_bytes_of_the_notes(self):
        """`K,V bytes a query-major order moves from L2 at 32K`: 542, 135 and 34 GB."""
        for kv_heads, gigabytes in ((32, 542), (8, 135), (2, 34)):
            values = changed(kv_heads=kv_heads).values()
            stages, _ = costs.evaluate("query_major", values, causal=True)
            (numbers,) = stages.values()
            assert numbers[2] / 1e9 == pytest.approx(gigabytes, rel=0.03)

    def test_stages_have_names_of_their_own_and_the_shipped_shares_name_them(self):
        names = []
        for part in PARTS:
            names += [stage.name for stage in cost(part).stages]
            names.append(f"{part}.launch")
        assert len(names) == len(set(names))
        assert set(H100.efficiency.stages) <= set(names)


class TestPredictions:
    @settings(max_examples=40, deadline=None)
    @given(problem=problems())
    def test_more_work_takes_no_less_time(self, problem):
        before = predicted(problem)
        assert all(math.isfinite(ms) and ms > 0 for ms in before.values())
        more = [
            {"batch": 2},
            {"n_queries": problem.n_queries + 64, "n_keys": problem.n_keys + 64},
            {"query_heads": 2 * problem.query_heads, "kv_heads": 2 * problem.kv_heads},
            {"backward": True},
        ]
        for fields in more:
            overlap = costs.assumed_overlap(problem)
            base = predicted(changed(problem, overlap=overlap))
            after = predicted(changed(problem, overlap=overlap, **fields))
            for name in EVERY:
                assert after[name] >= base[name] * (1 - 1e-9), (fields, name)

    @settings(max_examples=40, deadline=None)
    @given(problem=problems(), factor=st.sampled_from([2.0, 4.0]))
    def test_a_device_of_twice_the_rates_takes_half_the_time(self, problem, factor):
        now = H100.rates

        def faster(levels):
            return tuple(rates.Level(f, factor * x) for f, x in rates.pairs(levels))

        fast = ideal(
            copy_bytes_per_s=factor * now.copy_bytes_per_s,
            reread_bytes_per_s=faster(now.reread_bytes_per_s),
            atomic_bytes_per_s=faster(now.atomic_bytes_per_s),
            program_bytes_per_s=factor * now.program_bytes_per_s,
            flops_per_s={name: factor * x for name, x in now.flops_per_s.items()},
            launch_s=now.launch_s / factor,
        )
        slow, quick = predicted(problem, ideal()), predicted(problem, fast)
        for name in EVERY:
            assert slow[name] == pytest.approx(factor * quick[name])

    def test_dense_attention_is_bound_by_its_products(self):
        flops = 4 * 32 * 128 * (32768 * 32769 / 2)
        assert predicted(LONG, ideal())[DENSE] == pytest.approx(
            1e3 * flops / H100.rates.flops_per_s["bfloat16"]
        )

    def test_an_efficiency_of_a_half_doubles_the_time(self):
        half = msgspec.structs.replace(H100.efficiency, stages={"dense.attend": 0.5})
        device = rates.Device(rates=H100.rates, efficiency=half)
        assert predicted(LONG, device)[DENSE] == pytest.approx(2 * predicted(LONG, ideal())[DENSE])

    def test_small_problems_cost_their_launches(self):
        tiny = Problem(n_queries=16, n_keys=16, query_heads=1, kv_heads=1, n_slots=1, block_size=16)
        launches = cost("query_major").launches
        launch_ms = 1e3 * H100.rates.launch_s
        found = predicted(tiny, ideal())["query_major"]
        assert found == pytest.approx(float(launches) * launch_ms)

    def test_query_major_loses_to_the_l2_cache_without_a_group(self):
        found = predicted(changed(kv_heads=32))
        assert found["query_major"] > 5 * found["kv_major"]
        assert found["query_major"] > found[DENSE]
        assert costs.predict(changed(kv_heads=32), H100).fastest != "query_major"

    def test_query_major_wins_in_decoding(self):
        decode = Problem(n_queries=1, n_keys=32768, query_heads=32, kv_heads=8)
        assert costs.predict(decode, H100).fastest == "query_major"

    def test_short_sequences_are_for_dense_attention(self):
        assert costs.predict(changed(n_queries=2048, n_keys=2048), H100).is_dense_faster
        assert not costs.predict(LONG, H100).is_dense_faster

    @pytest.mark.parametrize(("kv_heads", "measured_ms"), [(32, 72.1), (8, 18.6), (2, 4.9)])
    def test_query_major_as_it_was_measured(self, kv_heads, measured_ms):
        found = predicted(changed(kv_heads=kv_heads))["query_major"]
        assert found == pytest.approx(measured_ms, rel=0.15)

    def test_neighbours_that_agree_are_for_tile_union(self):
        agreed = changed(overlap=Overlap(shared=16.0, left=0.0))
        assert costs.predict(agreed, H100).fastest == "tile_union"
        assert predicted(agreed)["tile_union"] < 0.7 * predicted(LONG)["tile_union"]

    def test_words(self):
        ms = {"query_major": 18.04, "kv_major": 3.06, "tile_union": 0.123, DENSE: 14.4}
        found = costs.Prediction(ms=ms)
        assert str(found) == (
            "tile_union: 0.12 ms predicted, kv_major 3.1, query_major 18, dense 14"
        )
        assert str(costs.Prediction(ms={"kv_major": 9.96}, note="rates of X")) == (
            "kv_major: 10 ms predicted (rates of X)"
        )

    def test_unknown_dtypes_take_the_slowest_products(self):
        wide = predicted(changed(dtype="float64"))[DENSE]
        assert wide == pytest.approx(predicted(changed(dtype="float32"))[DENSE])


class TestCrossovers:
    @pytest.mark.parametrize("symbol", ["group", "tokens"])
    def test_the_choice_flips_there_and_not_before(self, symbol):
        orders = ("query_major", "kv_major")
        found = costs.crossovers(LONG, H100, symbol, loop_orders=orders, dense=True)
        assert found

        def best(value):
            fields = {"n_queries": value, "n_keys": value}
            if symbol == "group":
                fields = {"kv_heads": 32 / value}
            prediction = costs.predict(changed(**fields), H100, orders)
            return DENSE if prediction.is_dense_faster else prediction.fastest

        for flip in found:
            assert (best(flip.at - 1), best(flip.at)) == (flip.before, flip.after)
        for one, two in itertools.pairwise(found):
            assert one.at < two.at
            assert one.after == two.before

    def test_words(self):
        flip = costs.Crossover(symbol="group", at=27, before="kv_major", after="query_major")
        assert str(flip) == "query_major from a group of 27 on"
        flip = costs.Crossover(symbol="tokens", at=9000, before=DENSE, after="kv_major")
        assert str(flip) == "kv_major from tokens = 9000 on"


class TestOverlap:
    def counted(self, lists: torch.Tensor) -> Overlap:
        """Every tile of every head, in plain Python."""
        shared = left = n_tiles = 0
        for head in lists.flatten(0, 1).tolist():
            for start in range(0, len(head), 64):
                tile = [block for row in head[start : start + 64] for block in row if block >= 0]
                counts = {block: tile.count(block) for block in tile}
                shared += sum(n >= 16 for n in counts.values())
                left += sum(n for n in counts.values() if n < 16)
                n_tiles += 1
        return Overlap(shared=shared / n_tiles, left=left / lists[..., 0].numel())

    @pytest.mark.parametrize("pattern", selections.PATTERNS)
    @pytest.mark.parametrize("tokens", [1, 64, 300])
    def test_measured_is_counted(self, pattern, tokens):
        lists = torch.cat([selections.make(pattern, 1, 2, tokens, 8, 16, "cpu") for _ in "ab"])
        assert measure_overlap(lists) == self.counted(lists)

    def test_a_sample_is_near(self):
        lists = selections.make("clustered", 1, 1, 4096, 8, 16, "cpu")
        few, every = measure_overlap(lists, n_tiles=16), measure_overlap(lists)
        assert few.shared == pytest.approx(every.shared, rel=0.2)
        assert few.left == pytest.approx(every.left, rel=0.3)

    @pytest.mark.parametrize(("tokens", "slots", "block"), [(8192, 8, 16), (2048, 16, 16)])
    def test_what_is_assumed_is_what_random_lists_have(self, tokens, slots, block):
        lists = selections.make("random", 1, 1, tokens, slots, block, "cpu")
        found = measure_overlap(lists, n_tiles=256)
        problem = Problem(
            n_queries=tokens, n_keys=tokens, query_heads=1, kv_heads=1, n_slots=slots,
            block_size=block,
        )  # fmt: skip
        assumed = costs.assumed_overlap(problem)
        # a step at 16 of 64 tokens stands for a smooth fall of the binomial distribution
        assert assumed.left == pytest.approx(found.left, rel=0.2)
        assert assumed.shared == pytest.approx(found.shared, rel=0.4)


SIZES = {
    "n_queries": 32768, "n_keys": 32768, "query_heads": 32, "kv_heads": 8, "head_dim": 128,
    "n_slots": 16, "dtype": torch.bfloat16, "device": torch.device("cpu"),
}  # fmt: skip


class TestPlans:
    def test_words_and_loop_order(self):
        plan = plan_selected(**SIZES)
        assert plan.kernel == "selected_attention"
        assert plan.why.startswith(f"{plan.loop_order}: ")
        assert "ms predicted" in plan.why
        assert "query_major from a group of" in plan.why
        assert "rates of NVIDIA H100 80GB HBM3, since nobody measured cpu" in plan.why

    def test_dense_only_where_it_is_allowed_and_the_same_flags_say_it(self):
        short = {**SIZES, "n_queries": 2048, "n_keys": 2048}
        assert plan_selected(**short).kernel == "selected_attention"
        plan = plan_selected(**short, allow_dense=True)
        assert (plan.kernel, plan.flags) == ("sdpa", {"enable_gqa": False, "is_causal": True})
        assert plan.why.startswith("dense attention is the fastest: ")
        chunk = {**SIZES, "n_queries": 1024, "n_keys": 2048}  # is_causal would align it otherwise
        assert plan_selected(**chunk, allow_dense=True).kernel == "selected_attention"
        assert plan_selected(**SIZES, allow_dense=True).kernel == "selected_attention"

    def test_where_dense_attention_ends_is_said_if_it_is_allowed(self):
        assert "tokens" not in plan_selected(**SIZES).why
        assert "kv_major from tokens = " in plan_selected(**SIZES, allow_dense=True).why

    def test_training_counts_the_gradients(self):
        forward, both = (plan_selected(**SIZES, training=x).why for x in (False, True))
        assert forward != both

    def test_symbolic_sizes_get_no_guard(self):
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        env = ShapeEnv()
        hinted = env.create_symintnode(sympy.Symbol("s0", positive=True, integer=True), hint=32768)
        plan = plan_selected(**{**SIZES, "n_queries": hinted, "n_keys": hinted})
        assert plan.loop_order == ""
        assert plan.why.startswith("chosen at each call; at 32768 tokens kv_major: ")
        unknown = env.create_unbacked_symint()
        plan = plan_selected(**{**SIZES, "n_queries": unknown})
        assert (plan.loop_order, plan.why) == ("", "sizes are not known yet: chosen at each call")
        assert env.guards == []

    def test_sizes_of_sympy(self):
        whole = {**SIZES, "n_queries": sympy.Integer(32768), "kv_heads": sympy.Integer(8)}
        assert plan_selected(**whole) == plan_selected(**SIZES)
        symbol = {**SIZES, "n_queries": sympy.Symbol("s0")}
        assert plan_selected(**symbol).loop_order == ""

    def test_a_compiled_graph_of_symbolic_sizes_is_one_graph(self):
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        compiled = torch.compile(
            lambda *x: selected_attention(*x, block_size=16),
            backend=counter, dynamic=True, fullgraph=True,
        )  # fmt: skip
        for tokens in (37, 53, 200):
            inputs = Case(queries=tokens, keys=tokens).inputs()
            torch.testing.assert_close(
                compiled(*inputs), selected_attention(*inputs, block_size=16)
            )
        assert counter.frame_count == 1


class TestChoiceOfTheOperator:
    def test_every_loop_order_of_the_operator_has_a_model(self):
        from sparse_compile.kernels import selected_attention as operator

        assert set(operator.LOOP_ORDERS) <= set(LOOP_ORDERS)

    def test_the_operator_runs_in_the_order_it_chose(self, monkeypatch):
        from sparse_compile.kernels import selected_attention as operator

        asked = []
        real = operator._loop_order
        monkeypatch.setattr(operator, "_loop_order", lambda name: asked.append(name) or real(name))
        q, k, v, lists = [
            x.to("cuda" if torch.cuda.is_available() else "cpu") for x in Case().inputs()
        ]
        chosen = operator.choose_loop_order(q, k, v, lists, 16, True)
        out, _ = operator.launch(q, k, v, lists, 16, 0.25, True, None, None)
        wanted, _ = operator.launch(q, k, v, lists, 16, 0.25, True, None, chosen)
        assert asked == [chosen, chosen]
        assert torch.equal(out, wanted)

    @pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 0, 0)], ids=str)
    def test_nothing_to_compute_is_no_problem(self, shape):
        from sparse_compile.kernels import selected_attention as operator

        batch, queries, keys = shape
        q, k = torch.zeros(batch, 2, queries, 16), torch.zeros(batch, 1, keys, 16)
        lists = torch.zeros(batch, 1, queries, 4, dtype=torch.int32)
        assert operator.choose_loop_order(q, k, k, lists, 16, True) in operator.LOOP_ORDERS

    @pytest.mark.gpu
    def test_choosing_does_not_wait_for_the_device(self):
        inputs = [x.cuda() for x in Case(queries=200, keys=200).inputs()]
        wanted = selected_attention(*inputs, block_size=16)  # compiles, and reads the rates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # waiting raises an error
        try:
            found = selected_attention(*inputs, block_size=16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, wanted)

    def test_steps_of_a_decoding_loop_share_an_answer(self):
        from sparse_compile.kernels import selected_attention as operator

        operator._fastest.cache_clear()
        lists = torch.zeros(1, 1, 1, 4, dtype=torch.int32)
        for n_keys in range(1000, 1100):
            x = torch.zeros(1, 1, n_keys, 16)
            operator.choose_loop_order(x[:, :, :1], x, x, lists, 16, True)
        assert operator._fastest.cache_info().misses <= 3

    @pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 33, 1000, 32768, 32769, 10**6])
    def test_rounding_adds_little(self, size):
        from sparse_compile.kernels.selected_attention import _rounded

        assert size <= _rounded(size) <= 1.125 * size + 1
        assert _rounded(_rounded(size)) == _rounded(size)
