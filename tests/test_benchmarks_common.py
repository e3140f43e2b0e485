"""What the benchmarks share, and one small run of each."""

import json
import time

import pytest

from benchmarks import common
from benchmarks.common import Timing


def test_percentiles_are_of_the_single_calls():
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    assert (timing.p10_ms, timing.median_ms, timing.p90_ms) == (2.0, 6.0, 10.0)
    assert timing.n_calls == 11
    assert timing.host_ms is None
    assert Timing.of([5.0], [2.0, 1.0, 9.0]).host_ms == 2.0


def test_a_call_takes_at_least_as_long_as_it_sleeps():
    timing = common.time_calls(lambda: time.sleep(0.01), device="cpu", n_calls=5, warm_up=0)
    assert timing.n_calls == 5
    assert 10 <= timing.p10_ms <= timing.median_ms <= timing.p90_ms


def test_warm_up_is_not_timed_and_slow_calls_stop_early():
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.2 if len(calls) <= 2 else 0.02)

    timing = common.time_calls(call, device="cpu", n_calls=50, warm_up=2, limit_s=0.0)
    assert timing.n_calls == 3
    assert len(calls) == 5
    assert timing.p90_ms < 200


def test_a_list_is_written_with_one_line_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    records = [{"a": 1}, {"a": None}]
    written = common.write_json("x.json", records, tmp_path / "deep" / "y.json")
    assert written == [tmp_path / "deep" / "y.json", tmp_path / "out" / "x.json"]
    for path in written:
        assert json.loads(path.read_text()) == records
        assert path.read_text().splitlines() == ["[", '{"a": 1},', '{"a": null}', "]"]


def test_nothing_is_half_written(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    target = tmp_path / "x.json"
    common.write_json("x.json", {"a": 1}, target)
    with pytest.raises(TypeError):
        common.write_json("x.json", {"a": object()}, target)
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_as_output_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit):
        common.parser("").parse_args(["--output", str(tmp_path)])
    assert "is a folder; give the name of a file in it" in capsys.readouterr().err


def test_the_environment_names_versions_and_sources():
    import torch

    found = common.environment("cpu")
    assert found["torch"] == torch.__version__
    assert "CPU" in found["device"]
    assert len(found["source_sha256"]) == 64
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "masks"),
    [("causal", {"causal"}), ("masks", {"window", "chunk", "soft_cap"})],
    ids=["causal", "masks"],
)
def test_exact_prefill_checks_then_times(tmp_path, monkeypatch, capsys, section, masks):
    from benchmarks import exact_prefill

    monkeypatch.delenv("OUT", raising=False)
    output = tmp_path / "prefill.json"
    code = exact_prefill.main(["--tiny", "--sections", section, "--output", str(output)])
    records = json.loads(output.read_text())
    assert code == 0, [r for r in records if r["status"] != "ok"]
    assert {record["mask"] for record in records} == masks
    for record in records:
        assert record["status"] == "ok"
        assert record["median_ms"] > 0
        assert record["error"] < 0.1  # bfloat16 through two layers
        assert {"seed", "device", "torch", "commit", "command", "dtype"} <= set(record)
    ours = [record for record in records if record["variant"] == "sparse_compile"]
    assert all(record["sites"] == record["rewritten"] == 2 for record in ours)
    if section == "causal":
        assert {r["variant"] for r in records} == {"floor", "sparse_compile", "inductor", "eager"}
    assert "error" in capsys.readouterr().out


@pytest.mark.slow
def test_exact_prefill_refuses_to_time_a_wrong_result(tmp_path, monkeypatch):
    import torch

    from benchmarks import exact_prefill

    monkeypatch.delenv("OUT", raising=False)
    right = exact_prefill.run

    def wrong(model: object, ids: torch.Tensor) -> torch.Tensor:
        out = right(model, ids)
        is_ours = type(model).__name__ == "OptimizedModule"
        return out.roll(1, dims=1) if is_ours else out

    monkeypatch.setattr(exact_prefill, "run", wrong)
    output = tmp_path / "prefill.json"
    assert exact_prefill.main(["--tiny", "--sections", "masks", "--output", str(output)]) == 1
    records = json.loads(output.read_text())
    assert {record["status"] for record in records} == {"wrong"}
    assert not any("median_ms" in record for record in records)


def test_exact_prefill_without_a_gpu_refuses(monkeypatch, capsys):
    import torch

    from benchmarks import exact_prefill

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exact_prefill.main([]) == 1
    assert "UnsupportedEnvironmentError" in capsys.readouterr().err


def test_the_least_work_is_counted_right():
    """Against a count of every product of a tiny decoder, one by one."""
    from benchmarks.models import Sizes

    sizes = Sizes(layers=3, hidden=8, intermediate=20, query_heads=4, kv_heads=2, head_dim=6)
    tokens, count = 5, 0
    for _ in range(3):
        for _ in range(tokens):
            count += 2 * 8 * (4 + 2 + 2) * 6  # q, k and v
            count += 2 * 4 * 6 * 8  # output
            count += 3 * 2 * 8 * 20  # gate, up and down
        for query in range(tokens):
            count += 4 * (query + 1) * 2 * 2 * 6  # q . k and weights . v
    assert sizes.flops(tokens) == count


@pytest.mark.slow
def test_compile_overhead_compares_both(tmp_path, monkeypatch):
    from benchmarks import compile_overhead

    monkeypatch.delenv("OUT", raising=False)
    output = tmp_path / "overhead.json"
    arguments = ["--layers", "2", "--no-codegen", "--repeats", "1", "--output", str(output)]
    # The goal speaks of 32 layers and generated code: with two and none, the share may miss it.
    assert compile_overhead.main(arguments) in (0, 1)
    *runs, summary = json.loads(output.read_text())
    assert [run["backend"] for run in runs] == ["inductor", "sparse_compile"]
    assert runs[1]["sites"] == runs[1]["rewritten"] == 2
    assert runs[1]["passes_s"] == pytest.approx(sum(runs[1]["passes_ms"].values()) / 1e3)
    assert summary["passes_share"] == pytest.approx(runs[1]["passes_s"] / runs[0]["wall_s"])
