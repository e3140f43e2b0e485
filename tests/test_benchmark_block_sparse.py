"""The benchmark of block-sparse attention runs, refuses wrong results, and names winners."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import block_sparse, common


def records(path: Path, *cases: str) -> list[common.Record]:
    assert block_sparse.main(["--tiny", "--cases", *cases, "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_kind_of_case_is_measured(tmp_path: Path) -> None:
    found = records(tmp_path / "one.json", "causal", "document", "soft_cap", "sink")
    assert all(record["status"] == "ok" for record in found)
    by_case = {
        case: [r["kernel"] for r in found if r["case"] == case] for case in ("causal", "sink")
    }
    assert by_case["causal"] == ["flex_attention", "block_sparse_attention", "sdpa"]
    assert by_case["sink"] == ["flex_attention", "block_sparse_attention"]
    names = {record["winner_case"] for record in found}
    assert names == {"causal", "causal+document", "causal+soft_cap", "causal+sink"}
    causal = found[0]
    assert causal["kept_share"] == pytest.approx(131 / 260)
    ours = next(record for record in found if record["kernel"] == block_sparse.OURS)
    assert len(ours["errors"]) == 4
    assert ours["backward_median_ms"] > 0


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return right(*args, **kwargs) * 1.001  # type: ignore[arg-type]

    right = block_sparse.block_sparse_attention
    monkeypatch.setattr(block_sparse, "block_sparse_attention", wrong)
    path = tmp_path / "one.json"
    assert block_sparse.main(["--tiny", "--cases", "window", "--output", str(path)]) == 1
    theirs, ours = json.loads(path.read_text())
    assert (theirs["status"], ours["status"]) == ("ok", "wrong")
    assert "forward_median_ms" not in ours


def test_the_faster_kernel_of_each_way_wins() -> None:
    def record(kernel: str, forward: float, backward: float) -> common.Record:
        return {
            "kernel": kernel, "status": "ok", "winner_case": "causal", "tokens": 64,
            "forward_median_ms": forward, "backward_median_ms": backward,
        }  # fmt: skip

    given = [record("flex_attention", 2.0, 3.0), record("block_sparse_attention", 1.0, 5.0)]
    wrong = {"kernel": "block_sparse_attention", "status": "wrong", "winner_case": "dense",
             "tokens": 64}  # fmt: skip
    (winner,) = block_sparse.table_of([*given, record("sdpa", 0.1, 0.1), wrong], "card")
    assert (winner.case, winner.device, winner.tokens) == ("causal", "card", 64)
    assert winner.inference == "block_sparse_attention"
    assert winner.training == "flex_attention"
