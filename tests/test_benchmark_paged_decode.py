"""The benchmark of decoding from pages runs, says what was read, and refuses wrong results."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import common, paged_decode


@pytest.fixture(autouse=True)
def _no_other_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)


def records(path: Path, *options: str) -> list[common.Record]:
    assert paged_decode.main(["--tiny", "--output", str(path), *options]) == 0
    return json.loads(path.read_text())


def test_every_kernel_is_measured_on_every_pattern(tmp_path: Path) -> None:
    found = records(tmp_path / "one.json", "--p", "0.5", "1")
    assert [record["variant"] for record in found] == [
        *("sdpa", "paged_attention", *["progressive_attention"] * 2) * 2
    ]
    assert all(record["status"] == "ok" and record["median_ms"] > 0 for record in found)
    planted, half, full = found[1], found[2], found[3]
    assert planted["floor_bytes"] == 2 * 2 * 700 * 2 * 32 * 4 + 2 * 2 * 4 * 32 * 4
    assert full["read_share"] == full["mass_mean"] == pytest.approx(1.0)
    assert half["read_share"] < 0.5 < half["mass_least"]
    assert half["rows_short"] == 0.0
    assert half["floor_bytes"] < planted["floor_bytes"] < full["floor_bytes"]


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return right(*args, **kwargs) * 1.001  # type: ignore[arg-type]

    right = paged_decode.ops.paged_attention
    monkeypatch.setattr(paged_decode.ops, "paged_attention", wrong)
    path = tmp_path / "one.json"
    assert paged_decode.main(["--tiny", "--patterns", "random", "--output", str(path)]) == 1
    by_name = {record["variant"]: record for record in json.loads(path.read_text())}
    assert by_name["sdpa"]["status"] == by_name["progressive_attention"]["status"] == "ok"
    assert by_name["paged_attention"]["status"] == "wrong"
    assert "median_ms" not in by_name["paged_attention"]
