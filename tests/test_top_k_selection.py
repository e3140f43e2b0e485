"""The choice of KV blocks from pooled keys does what its reference says, on the CPU and in Triton."""

import pytest
import torch
from torch import Tensor

from sparse_compile.kernels import top_k_selection as selection
from sparse_compile.testing import in_dtype, random_heads

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")

# name: (B, Hkv, G, T, S, D, block size, k, sinks, local)
SIZES = {
    "plain": (1, 1, 2, 90, 90, 16, 16, 4, 1, 2),
    "small": (1, 1, 1, 60, 60, 16, 16, 2, 0, 1),
    "groups-of-3": (2, 1, 3, 50, 50, 16, 16, 3, 1, 1),
    "chunked-prefill": (1, 1, 4, 21, 150, 16, 16, 5, 1, 2),
    "one-query": (1, 2, 1, 1, 99, 16, 16, 3, 1, 2),
    "no-sinks": (1, 1, 2, 80, 80, 24, 16, 2, 0, 1),
    "nothing-to-choose": (1, 1, 2, 80, 80, 16, 16, 3, 1, 2),
    "block-32": (1, 1, 1, 100, 100, 16, 32, 2, 0, 1),
    "less-than-a-block": (1, 1, 2, 9, 9, 16, 16, 2, 1, 1),
    "more-than-there-are": (1, 1, 2, 40, 40, 16, 16, 7, 1, 2),
}
SLOW = ("groups-of-3", "chunked-prefill", "less-than-a-block")  # the interpreter is


def inputs(name: str) -> tuple[list[Tensor], tuple[int, int, int, int, float]]:
    """q, k and what follows them but for `scores`."""
    batch, heads, group, n_tokens, n_keys, dim, size, k, sinks, local = SIZES[name]
    q = random_heads(batch, heads * group, n_tokens, dim, layout="token_major")
    key = random_heads(batch, heads, n_keys, dim, layout="padded")
    return [q, key], (k, size, sinks, local, dim**-0.5)


@pytest.mark.parametrize(
    ("way", "name", "scores"),
    [
        *(("cpu", name, scores) for name in SIZES for scores in selection.SCORES),
        pytest.param("triton", "plain", "mean", marks=interpreted),
        *(pytest.param("triton", name, "bounds", marks=interpreted) for name in SLOW),
    ],
)
def test_the_reference_is_met(way: str, name: str, scores: str) -> None:
    """Random scores are nowhere equal, and nowhere so near that rounding would swap them."""
    tensors, options = inputs(name)
    select = selection._select_cpu if way == "cpu" else selection.launch
    found = select(*tensors, *options, scores)
    truth = selection.top_k_selection_ref(*in_dtype(tensors, torch.float64), *options, scores)
    assert found.dtype == torch.int32
    assert torch.equal(found, truth)


@pytest.mark.parametrize("name", ["plain", "chunked-prefill"])
def test_a_few_tokens_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = inputs(name)
    whole = selection._select_cpu(*tensors, *options, "bounds")
    monkeypatch.setattr(selection, "TILE_NUMBERS", 50)
    assert torch.equal(selection._select_cpu(*tensors, *options, "bounds"), whole)


@interpreted
def test_a_few_tokens_at_a_time_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = inputs("plain")
    whole = selection._select_cpu(*tensors, *options, "bounds")
    monkeypatch.setattr(selection, "CHUNK_BYTES", 1)
    assert torch.equal(selection.launch(*tensors, *options, "bounds"), whole)


@pytest.mark.parametrize("way", ["cpu", pytest.param("triton", marks=interpreted)])
def test_a_negative_scale_turns_the_bounds_round(way: str) -> None:
    tensors, (*options, scale) = inputs("small")
    select = selection._select_cpu if way == "cpu" else selection.launch
    found = select(*tensors, *options, -scale, "bounds")
    exact = in_dtype(tensors, torch.float64)
    assert torch.equal(found, selection.top_k_selection_ref(*exact, *options, -scale, "bounds"))
    other = selection.top_k_selection_ref(*exact, *options, scale, "bounds")
    assert not torch.equal(found, other)


@pytest.mark.parametrize("scores", selection.SCORES)
def test_a_key_that_is_asked_for_is_found(scores: str) -> None:
    """A KV block between the sinks and the local ones holds the last query's direction."""
    (q, k), (_, size, *_) = inputs("plain")
    at = 2  # the KV block
    k[:, :, at * size : (at + 1) * size] = 4 * q[:, ::2, -1:]
    found = selection._select_cpu(q, k, 4, size, 1, 2, 1.0, scores)
    assert (found[:, :, -1] == at).any(-1).all()


@pytest.mark.parametrize("scores", selection.SCORES)
def test_operator(scores: str) -> None:
    tensors, options = inputs("groups-of-3")
    op = torch.ops.sparse_compile.top_k_selection.default
    torch.library.opcheck(op, (*tensors, *options, scores))
    assert not op(tensors[0].requires_grad_(), tensors[1], *options, scores).requires_grad
