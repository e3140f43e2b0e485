"""The policy `top_k` on a GPU: the choice by its scores, models through Inductor, no host sync."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_compile
from sparse_compile import backend
from sparse_compile.kernels import top_k_selection as selection
from sparse_compile.testing import in_dtype, random_heads
from tests.test_top_k_policy import ALL, TOP_K, WIDTH, Attention

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# name: (B, Hkv, G, T, S, D, block size, k)
SIZES = {
    "D64-groups-of-3": (2, 3, 3, 700, 700, 64, 64, 5),
    "D128-groups-of-4": (1, 2, 4, 1500, 1500, 128, 64, 8),
    "D80-block-32": (1, 2, 1, 333, 600, 80, 32, 7),
    "D16-groups-of-12": (1, 1, 12, 400, 400, 16, 16, 16),
    "block-128": (1, 1, 5, 130, 1000, 32, 128, 4),
    "one-query": (3, 2, 2, 1, 500, 64, 16, 6),
    "many": (1, 1, 2, 1200, 1200, 64, 16, 64),
}


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, group, n_tokens, n_keys, dim, *_ = SIZES[name]
    q = random_heads(batch, heads * group, n_tokens, dim, layout="token_major")
    k = random_heads(batch, heads, n_keys, dim, layout="padded")
    return [x.cuda().to(dtype) for x in (q, k)]


def natural_scores(q: Tensor, k: Tensor, size: int, scale: float, scores: str) -> Tensor:
    """The scores as rounding pooled keys to the working dtype gives them, and no other rounding."""
    n_complete = k.shape[2] // size
    rounded = selection.pooled(k, size, scores)[:, :, :, None].expand(-1, -1, -1, size, -1)
    keys = rounded.flatten(2, 3).double()
    rest = torch.zeros_like(keys[:, :, :1]).expand(-1, -1, k.shape[2] - n_complete * size, -1)
    query = selection.spread(q, scores).double()
    return selection.block_scores(query, torch.cat([keys, rest], 2), size, scale, "mean")


@pytest.mark.parametrize("scores", selection.SCORES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bf16") for name in SIZES),
        *((name, dtype) for name in ("D64-groups-of-3", "one-query") for dtype in ("fp16", "fp32")),
    ],
)
def test_the_best_blocks_are_chosen(name: str, dtype: str, scores: str) -> None:
    """What is chosen weighs as much as the best choice does, but for rounding."""
    q, k = inputs(name, DTYPES[dtype])
    size, n_selected = SIZES[name][6:]
    scale = q.shape[3] ** -0.5
    found = selection.launch(q, k, n_selected, size, 1, 2, scale, scores)
    exact = in_dtype([q, k], torch.float64)
    total = selection.block_scores(*exact, size, scale, scores)
    truth = selection.top_k_selection_ref(*exact, n_selected, size, 1, 2, scale, scores)
    assert torch.equal((found >= 0).sum(-1), (truth >= 0).sum(-1))
    ascending = found.masked_fill(found < 0, 2**30)
    assert torch.equal(ascending, ascending.sort(-1).values)
    weights = [
        total.gather(3, lists.long().clamp(min=0)).masked_fill(lists < 0, 0.0).sum(-1)
        for lists in (found, truth)
    ]
    natural = (natural_scores(q, k, size, scale, scores) - total).abs().max()
    # a score of n compressed keys is off by the rounding of its exponent, in float32 or tf32
    step = torch.finfo(torch.float32).eps if dtype == "fp32" else torch.finfo(DTYPES[dtype]).eps
    allowed = n_selected * 2 * (natural + step * total.max())
    assert (weights[1] - weights[0]).max() <= allowed


def test_the_same_choice_every_time_and_no_wait_for_the_device() -> None:
    q, k = inputs("D128-groups-of-4", torch.bfloat16)
    op = torch.ops.sparse_compile.top_k_selection
    first = op(q, k, 8, 64, 1, 2, 0.1, "bounds")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [op(q, k, 8, 64, 1, 2, 0.1, "bounds") for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("much_memory")
def test_memory_is_bounded() -> None:
    """At 32768 tokens no tensor over tokens and KV blocks of all heads, and no widened queries."""
    q = torch.randn(1, 32, 32768, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 8, 32768, 128, device="cuda", dtype=torch.bfloat16)
    op = torch.ops.sparse_compile.top_k_selection
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    op(q, k, 16, 64, 1, 2, 128**-0.5, "bounds")
    assert torch.cuda.max_memory_allocated() - before <= 2 * selection.CHUNK_BYTES + 2**26


@pytest.mark.parametrize("way", ["eager", "sdpa"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_training_through_inductor(heads: int, kv_heads: int, way: str) -> None:
    """With all KV blocks selected, outputs and gradients are those of dense attention."""
    model = Attention(heads, kv_heads, way).cuda().bfloat16()
    x = torch.randn(2, 200, WIDTH, device="cuda", dtype=torch.bfloat16)
    exact = Attention(heads, kv_heads, way).cuda().double()
    exact.load_state_dict(model.state_dict())
    run = torch.compile(model, backend=backend.sparse_compile, dynamic=True, options=ALL)
    results = []
    for function, given in ((exact, x.double()), (model, x), (run, x)):
        function.zero_grad()
        out = function(given)
        out.square().sum().backward()
        grads = [p.grad.double().flatten() for p in function.parameters()]
        results.append((out.detach().double(), torch.cat(grads)))
    (site,) = sparse_compile.last_report().sites
    assert site.kernel == "selected_attention"
    truth, natural, found = results
    for ours, rough, right in zip(found, natural, truth, strict=True):
        assert (ours - right).norm() <= 2 * (rough - right).norm() + 2**-9 * right.norm()


def test_cuda_graphs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "options.toml"
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in TOP_K.items()))
    monkeypatch.setenv("SPARSE_COMPILE_CONFIG", str(path))
    model = Attention().cuda().bfloat16()
    x = torch.randn(2, 200, WIDTH, device="cuda", dtype=torch.bfloat16)
    plain = torch.compile(model, backend=backend.sparse_compile, dynamic=False)
    graphed = torch.compile(
        model, backend=backend.sparse_compile, mode="reduce-overhead", dynamic=False
    )
    with torch.no_grad():
        wanted = plain(x).clone()
        assert sparse_compile.last_report().sites[0].kernel == "selected_attention"
        torch._dynamo.reset()
        for _ in range(4):
            torch.testing.assert_close(graphed(x).clone(), wanted, rtol=0, atol=2**-6)
