"""The benchmark of the planner: a tiny run, its verdicts, and the fit of efficiencies."""

import json
import math
import random

import msgspec
import pytest
import torch

from benchmarks import planner_fit, planner_regret, selections
from benchmarks.planner_truth import Inputs, Sampled
from sparse_compile import costs, rates
from sparse_compile.cost_formulas import BACKWARD, DENSE, DENSE_BACKWARD, LOOP_ORDERS
from sparse_compile.kernels import selected_attention as operator
from sparse_compile.kernels.selected_attention import selected_attention_ref

H100 = "NVIDIA H100 80GB HBM3"


def made_up(device: rates.Device, noise: float = 0.0, every: int = 1) -> list[dict]:
    """Records of the default cases, as a device would give that the model describes."""
    cases = planner_regret.cases(
        planner_regret.SHAPES, [1, 512, 8192, 65536], list(selections.PATTERNS)
    )
    records = []
    for case in list(cases)[::every]:
        shared, left = (12.0, 5.0) if case.pattern == "clustered" else (3.0, 13.0)
        about = {
            **case.fields(), "dtype": "bfloat16", "status": "ok", "rates_device": H100,
            "device": H100, "commit": "x", "shared": shared, "left": left,
        }  # fmt: skip
        problem = planner_fit.problem_of(about)
        parts = [*LOOP_ORDERS, DENSE]
        parts += [BACKWARD, DENSE_BACKWARD] if case.n_queries > 1 else []
        for part in parts:
            ms = 1e3 * costs.part_s(part, problem.values(), device, problem)
            ms *= math.exp(random.gauss(0, noise))
            records.append({**about, "part": part, "median_ms": ms})
    return records


def device(**stages: float) -> rates.Device:
    known = rates.lookup(H100)
    shares = {name.replace("__", "."): share for name, share in stages.items()}
    efficiency = msgspec.structs.replace(known.efficiency, stages=shares)
    return rates.Device(rates=known.rates, efficiency=efficiency)


TRUE = {
    "query_major__attend": 0.9, "kv_major__attend": 0.7, "kv_major__merge": 0.3,
    "kv_major__local": 0.4, "kv_major__lists": 0.2, "kv_major__launch": 0.5,
    "tile_union__tiles": 0.6, "tile_union__attend": 0.7, "tile_union__merge": 0.3,
    "backward__attend": 0.4, "dense__attend": 0.75, "dense_backward__attend": 0.6,
}  # fmt: skip


class TestFit:
    def test_it_finds_the_times_of_a_device_that_the_model_describes(self):
        truth = device(**TRUE)
        found = planner_fit.fit(made_up(truth, noise=0.02, every=3))
        fitted = rates.Device(rates=truth.rates, efficiency=found)
        ratios = []
        for record in made_up(truth, every=2):
            problem = planner_fit.problem_of(record)
            ms = 1e3 * costs.part_s(record["part"], problem.values(), fitted, problem)
            ratios.append(abs(math.log(ms / record["median_ms"])))
        assert sorted(ratios)[len(ratios) // 2] < 0.05
        assert max(ratios) < 0.5
        assert found.stages["query_major.attend"] == pytest.approx(0.9, rel=0.1)
        assert found.stages["dense.attend"] == pytest.approx(0.75, rel=0.1)

    def test_it_beats_the_shares_that_it_starts_from(self):
        records = made_up(device(**TRUE), every=3)

        def regret(choices):
            return sum(choice.regret for choice in choices) / len(choices)

        guessed = device(kv_major__attend=0.2, tile_union__attend=0.9, query_major__attend=0.3)
        before = regret(planner_fit.judge(records, guessed))
        assert regret(planner_fit.held_out(records)) < before / 2

    def test_parts_without_records_keep_their_shares(self):
        records = [r for r in made_up(device(**TRUE), every=20) if r["part"] != "tile_union"]
        found = planner_fit.fit(records).stages
        known = rates.lookup(H100).efficiency.stages
        assert found["tile_union.tiles"] == known["tile_union.tiles"]
        assert found["dense.attend"] != known["dense.attend"]

    def test_what_is_written_can_be_read(self, tmp_path):
        found = planner_fit.fit(made_up(device(**TRUE), every=20))
        rates.write(found, tmp_path / "x.json")
        read = msgspec.json.decode((tmp_path / "x.json").read_bytes(), type=rates.Efficiency)
        assert read == found
        assert "median error query_major" in read.origin

    def test_the_file_is_the_shipped_one(self):
        assert planner_fit.shipped_path(H100).is_file()


class TestJudge:
    def records(self, **ms: float) -> list[dict]:
        about = made_up(device(), every=10**6)[0]
        about |= {"n_queries": 32768, "batch": 1, "group": 1}
        return [{**about, "part": part, "median_ms": value} for part, value in ms.items()]

    def test_regret_is_what_the_pick_loses(self):
        records = self.records(query_major=2.0, kv_major=3.0, dense=1.0)
        by = {c.knows: c for c in planner_fit.judge(records, rates.lookup(H100))}
        blind = by["sizes"]
        assert (blind.picked, blind.fastest) == ("kv_major", "query_major")
        assert blind.regret == pytest.approx(0.5)
        allowed = by["sizes, dense allowed"]
        assert (allowed.picked, allowed.fastest) == ("kv_major", DENSE)
        assert allowed.regret == pytest.approx(2.0)

    def test_gradients_are_added(self):
        records = self.records(query_major=5, kv_major=4, dense=1, backward=6, dense_backward=20)
        by = {
            c.knows: c
            for c in planner_fit.judge(records, rates.lookup(H100))
            if c.direction == "forward + backward"
        }
        assert (by["sizes"].picked_ms, by["sizes"].fastest_ms) == (10, 10)
        assert by["sizes, dense allowed"].fastest == "kv_major"

    def test_cases_that_could_not_be_timed_are_left_out(self):
        records = self.records(query_major=2.0, kv_major=3.0, dense=1.0)
        records[1]["status"] = "wrong"
        assert planner_fit.judge(records, rates.lookup(H100)) == []

    def test_summary_counts(self):
        base = {
            "case": "x", "direction": "forward", "knows": "sizes", "picked": "a",
            "predicted_ms": 1.0, "fastest": "b", "fastest_ms": 10.0,
        }  # fmt: skip
        choices = [planner_fit.Choice(**base, picked_ms=ms) for ms in (10.0, 10.5, 10.0, 30.0)]
        (row,) = planner_fit.summary(choices)
        assert row[:4] == ("forward, sizes", 4, 50.0, 75.0)
        assert row[-1] == pytest.approx(2.0)


@pytest.mark.parametrize("dense", [False, True])
def test_sampled_truth_is_the_reference(dense):
    torch.manual_seed(0)
    q, grad = (torch.randn(1, 4, 70, 16) for _ in range(2))
    k, v = (torch.randn(1, 2, 100, 16) for _ in range(2))
    lists = selections.make("random", 1, 2, 100, 4, 16, "cpu")[:, :, 30:]
    inputs = Inputs(q=q, k=k, v=v, grad=grad, lists=lists, block_size=16, scale=0.25)
    sampled = Sampled.of(inputs, dense=dense)
    every = torch.arange(7, dtype=torch.int32).expand(1, 2, 70, 7)
    q = q.double().requires_grad_()
    out, _ = selected_attention_ref(
        q, k.double(), v.double(), every if dense else lists, 16, 0.25, True
    )
    (dq,) = torch.autograd.grad(out, q, grad.double())
    assert int(sampled.tokens[0]) == 69
    assert sampled.error(out.detach(), sampled.out[0]) < 1e-12
    assert sampled.error(dq, sampled.dq[0]) < 1e-12
    assert 0 < sampled.out[1] < 1e-6


def test_the_command_line_leaves_the_shapes_asked_for():
    chosen = planner_regret.options(["--groups", "4", "--dims", "128", "--blocks", "64"])
    assert {shape.n_slots for shape in planner_regret.chosen_shapes(chosen)} == {4, 8, 16, 32}
    every = planner_regret.chosen_shapes(planner_regret.options([]))
    assert every == list(planner_regret.SHAPES)
    assert len(set(every)) == len(every)
    with pytest.raises(SystemExit):
        planner_regret.options(["--patterns", "none"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted")
class TestRun:
    def test_a_tiny_run_checks_times_and_judges(self, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("OUT", raising=False)
        output = tmp_path / "regret.json"
        arguments = ["--tiny", "--patterns", "random", "--output", str(output)]
        assert planner_regret.main(arguments) == 0
        records = json.loads(output.read_text())
        assert {record["status"] for record in records} == {"ok"}
        parts = {record["part"] for record in records}
        assert parts == {*operator.LOOP_ORDERS, BACKWARD, DENSE, DENSE_BACKWARD}
        assert {record["n_queries"] for record in records} == set(planner_regret.TINY_TOKENS)
        for record in records:
            assert record["median_ms"] > 0
            assert {"seed", "device", "torch", "commit", "command", "dtype"} <= set(record)
        assert "planner's picks" in capsys.readouterr().out
        fitted = tmp_path / "x.efficiency.json"
        again = ["--from", str(output), "--fit", "--fit-output", str(fitted)]
        assert planner_regret.main(again) == 0
        assert msgspec.json.decode(fitted.read_bytes(), type=rates.Efficiency).device == "cpu"

    def test_a_wrong_result_is_not_timed(self, tmp_path, monkeypatch):
        monkeypatch.delenv("OUT", raising=False)
        right = planner_regret.forward

        def wrong(inputs, loop_order):
            out, lse = right(inputs, loop_order)
            return (out.roll(1, dims=1), lse) if loop_order == "kv_major" else (out, lse)

        monkeypatch.setattr(planner_regret, "forward", wrong)
        monkeypatch.setattr(planner_regret, "TINY_TOKENS", (1,))
        output = tmp_path / "regret.json"
        arguments = ["--tiny", "--patterns", "random", "--output", str(output)]
        assert planner_regret.main(arguments) == 1
        found = [r for r in json.loads(output.read_text()) if r["part"] == "kv_major"]
        assert found
        for record in found:
            assert record["status"] == "wrong"
            assert "median_ms" not in record

    def test_a_kernel_that_fails_is_recorded_and_ends_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("OUT", raising=False)
        right = planner_regret.forward

        def failing(inputs, loop_order):
            if loop_order == "kv_major":
                raise RuntimeError("out of resource\nat length")
            return right(inputs, loop_order)

        monkeypatch.setattr(planner_regret, "forward", failing)
        monkeypatch.setattr(planner_regret, "TINY_TOKENS", (1,))
        output = tmp_path / "regret.json"
        arguments = ["--tiny", "--patterns", "random", "--output", str(output)]
        assert planner_regret.main(arguments) == 1
        by_part = {record["part"]: record for record in json.loads(output.read_text())}
        assert by_part["kv_major"]["status"] == "failed"
        assert by_part["query_major"]["status"] == by_part[DENSE]["status"] == "ok"
        assert "failed: kv_major" in capsys.readouterr().out

    def test_without_a_gpu_it_refuses(self, capsys):
        assert planner_regret.main([]) == 1
        assert "UnsupportedEnvironmentError" in capsys.readouterr().err

    def test_a_file_that_is_not_there(self, tmp_path, capsys):
        assert planner_regret.main(["--from", str(tmp_path / "none.json")]) == 1
        assert "FileNotFoundError" in capsys.readouterr().err
