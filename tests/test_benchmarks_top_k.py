"""One small run of each benchmark of the policy `top_k`."""

import json

import pytest

pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_quality(tmp_path, monkeypatch, capsys):
    from benchmarks import top_k_quality

    monkeypatch.delenv("OUT", raising=False)
    output = tmp_path / "quality.json"
    arguments = ["--tiny", "--scores", "bounds", "--device", "cpu", "--output", str(output)]
    assert top_k_quality.main(arguments) == 0
    exact, top_k = json.loads(output.read_text())
    assert exact["kl"] <= 1e-6
    assert top_k["kl"] > 1e-3  # of random weights: every KV block matters
    assert (exact["density"], exact["same_top_token"]) == (1.0, 1.0)
    assert top_k["kernels"] == ["selected_attention"]
    assert {"seed", "device", "torch", "commit", "command", "dtype", "ids_sha256"} <= set(top_k)
    assert "same top token" in capsys.readouterr().out


@pytest.mark.parametrize(("n_tokens", "k"), [(40, 2), (100, 3), (64, 9)])
def test_density_is_the_share_of_pairs(n_tokens, k):
    import torch

    from benchmarks.top_k_quality import density
    from sparse_compile.kernels import top_k_selection

    q, keys = (torch.randn(1, 1, n_tokens, 8) for _ in range(2))
    chosen = top_k_selection.top_k_selection_ref(q, keys, k, 16, 1, 1, 1.0, "mean")
    token = torch.arange(n_tokens)
    reads = (chosen[0, 0, :, :, None] == token // 16).any(1) & (token <= token[:, None])
    assert density(n_tokens, k, 16) == pytest.approx(reads.sum() / (token + 1).sum())


def test_model(tmp_path, monkeypatch):
    from benchmarks import top_k_model

    monkeypatch.delenv("OUT", raising=False)
    output = tmp_path / "model.json"
    arguments = ["--tiny", "--steps", "training_step", "--output", str(output)]
    assert top_k_model.main(arguments) == 0
    records = json.loads(output.read_text())
    kinds = [(record["step"], record["variant"]) for record in records]
    assert kinds == [("training_step", variant) for variant in ("dense", "exact", "top_k")]
    for record in records:
        assert record["status"] == "ok"
        assert record["median_ms"] > 0
        assert record["error"] < 0.1  # bfloat16 through a layer
        assert record["gradient_error"] < 0.1
    ours = [record for record in records if record["variant"] == "top_k"]
    assert all(record["checked_kernels"] == ["selected_attention"] for record in ours)
    assert all("selected_attention" in record["kernels"][0] for record in ours)
