"""Windows, compressed keys and the choice of KV blocks compute what their references say."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sparse_compile import OperatorError, ops
from sparse_compile.kernels import key_ranges, select_top_k
from sparse_compile.kernels import range_attention as ranged
from sparse_compile.testing import assert_close_derived, in_dtype, random_heads
from tests.selected_cases import from_lse, gradients, natural_lse

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")

# name: (sizes B, Hkv, G, T, D, Dv; keys; packed lengths)
SIZES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]] = {
    "plain": ((1, 2, 3, 130, 16, 16), 130, ()),
    "other-values": ((2, 1, 2, 80, 16, 40), 80, ()),
    "chunked-prefill": ((1, 1, 1, 33, 80, 16), 300, ()),
    "decode": ((2, 2, 4, 1, 16, 16), 200, ()),
    "packed": ((1, 1, 2, 170, 16, 16), 170, (70, 3, 97)),
    "too-short-to-compress": ((1, 1, 2, 20, 16, 16), 20, ()),
}


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def bounds(lengths: tuple[int, ...]) -> Tensor | None:
    if not lengths:
        return None
    return torch.tensor([0, *lengths]).cumsum(0).int()


def made(name: str, kind: str) -> tuple[list[Tensor], tuple[Tensor, Tensor], float]:
    """q, k, v that require grad, the ranges of their kind, and a scale."""
    (batch, heads, group, n_tokens, dim, value_dim), n_keys, lengths = SIZES[name]
    where = key_ranges.tokens(n_tokens, n_keys, bounds(lengths), CPU)
    if kind == "window":
        ranges, number = key_ranges.window(where, 21), n_keys
    else:
        ranges = key_ranges.compressed(where, 32, 16)
        number = int(key_ranges.n_compressed(where.n_keys, 32, 16).sum())
    layout = "token_major"
    inputs = [
        random_heads(batch, h, t, d, layout=layout, requires_grad=True)
        for h, t, d in (
            (heads * group, n_tokens, dim), (heads, number, dim), (heads, number, value_dim)
        )
    ]  # fmt: skip
    first, end = ranges
    return inputs, (first.int(), end.int()), dim**-0.5


@interpreted
@pytest.mark.parametrize("way", ["cpu", "triton"])
@pytest.mark.parametrize("kind", ["window", "compressed"])
@pytest.mark.parametrize("name", SIZES)
def test_ranges(name: str, kind: str, way: str) -> None:
    inputs, ranges, scale = made(name, kind)
    exact = in_dtype(inputs, torch.float64)
    truths = ranged.range_attention_ref(*exact, *ranges, scale)
    naturals = ranged.range_attention_ref(*inputs, *ranges, scale)
    by = [torch.randn_like(x) for x in naturals]
    forward = ranged._forward_cpu if way == "cpu" else ranged.launch
    backward = ranged._backward_cpu if way == "cpu" else ranged.launch_backward
    with torch.no_grad():
        found = forward(*inputs, *ranges, scale)
        grads = backward(*by, *inputs, *found, *ranges, scale)
        key = torch.arange(inputs[1].shape[2])
        reads = (key >= ranges[0][:, None]) & (key < ranges[1][:, None])
        others = from_lse(inputs, reads, scale, naturals, by)
    largest = max((x.abs().max().item() for x in (inputs[2],) if x.numel()), default=0.0)
    one_step = torch.finfo(torch.float32).eps * largest  # of the weights
    assert_close_derived(found[0], truths[0], [naturals[0], truths[0] + one_step])
    assert_close_derived(
        found[1], truths[1], natural_lse(naturals[1], truths[1].detach(), inputs[0].shape[3])
    )
    exactly = gradients(*truths, exact, [x.double() for x in by])
    roughly = gradients(*naturals, inputs, by)
    for what, ours, truth, *roughs in zip("qkv", grads, exactly, roughly, others, strict=True):
        assert_close_derived(ours, truth, roughs, name=f"d{what}")


@interpreted
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    inputs, ranges, _ = made("other-values", "window")
    inputs = [x.detach() for x in inputs]
    truths = ranged.range_attention_ref(*in_dtype(inputs, torch.float64), *ranges, scale)
    naturals = ranged.range_attention_ref(*inputs, *ranges, scale)
    for found, truth, natural in zip(
        ranged.launch(*inputs, *ranges, scale), truths, naturals, strict=True
    ):
        assert_close_derived(found, truth, natural)


def wrong_order(scores: Tensor, chosen: Tensor, own: Tensor, sinks: int, local: int) -> Tensor:
    """How much better the best KV block left out is than the worst chosen one, [B, Hkv, T]."""
    number = torch.arange(scores.shape[3])
    taken = (chosen[..., None] == number).any(-2)
    free = (number >= sinks) & (number <= own[:, None] - local)
    worst = scores.masked_fill(~(taken & free), torch.inf).amin(-1)
    best = scores.masked_fill(taken | ~free, -torch.inf).amax(-1)
    return (best - worst).nan_to_num(neginf=0.0)


CHOICES: dict[str, dict[str, int]] = {
    "usual": {"k": 4, "block_size": 64, "sinks": 1, "local": 2},
    "few": {"k": 1, "block_size": 32, "sinks": 0, "local": 1},
    "many": {"k": 20, "block_size": 16, "sinks": 2, "local": 3},
    "by-score-only": {"k": 3, "block_size": 32, "sinks": 0, "local": 0},
}


@interpreted
@pytest.mark.parametrize(
    ("name", "choice", "way"),
    [
        *((name, choice, "cpu") for name in SIZES for choice in CHOICES),
        *((name, "usual", "triton") for name in SIZES),
        *(("packed", choice, "triton") for choice in CHOICES if choice != "usual"),
    ],
)
def test_the_best_blocks_are_chosen(name: str, choice: str, way: str) -> None:
    """Compared by their scores: where these tie but for rounding, either choice is right."""
    _, n_keys, lengths = SIZES[name]
    options = CHOICES[choice]
    (q, k_cmp, v_cmp), _, scale = made(name, "compressed")
    packed = bounds(lengths)
    _, lse = ops.compressed_attention(q, k_cmp, v_cmp, n_keys=n_keys, cu_seqlens=packed)
    sizes = (options["k"], options["block_size"], 32, 16, options["sinks"], options["local"])
    select = select_top_k._select_cpu if way == "cpu" else select_top_k.launch
    with torch.no_grad():
        chosen = select(q, k_cmp, lse, *sizes, scale, n_keys, packed)
        exact = in_dtype([q, k_cmp, lse], torch.float64)
        scores = select_top_k.block_scores(*exact, *sizes[1:4], scale, n_keys, packed)
    where = key_ranges.tokens(q.shape[2], n_keys, packed, CPU)
    own = where.position.div(options["block_size"], rounding_mode="floor")
    n_candidates = (own + 1).clamp(min=0)
    assert chosen.dtype == torch.int32
    assert torch.equal(
        (chosen >= 0).sum(-1), n_candidates.clamp(max=options["k"]).expand(chosen.shape[:3])
    )
    ascending = chosen.masked_fill(chosen < 0, 2**30)
    assert torch.equal(ascending, ascending.sort(-1).values)
    assert (chosen <= own[:, None]).all()
    for block in (*range(options["sinks"]), *(own - i for i in range(options["local"]))):
        wanted = torch.as_tensor(block).expand(own.shape)
        there = (chosen == wanted[:, None]).any(-1) | (wanted > own) | (wanted < 0)
        assert there.all()
    assert wrong_order(scores, chosen, own, options["sinks"], options["local"]).max() < 1e-5


POOLINGS = {"mean": (64, 64, 64), "shorter-than-compressed": (16, 64, 16), "few-runs": (32, 32, 16)}


@interpreted
@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_compression_is_pooled(pooling: str) -> None:
    block_size, block, stride = POOLINGS[pooling]
    q, k_cmp = torch.randn(1, 3, 400, 16), torch.randn(1, 1, (400 - block) // stride + 1, 16)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, block=block, stride=stride)
    sizes = (3, block_size, block, stride, 0, 1)
    chosen = select_top_k.launch(q, k_cmp, lse, *sizes, 0.25, 400, None)
    exact = in_dtype([q, k_cmp, lse], torch.float64)
    scores = select_top_k.block_scores(*exact, *sizes[1:4], 0.25, 400)
    own = torch.arange(400) // block_size
    assert torch.equal((chosen[0, 0] >= 0).sum(-1), (own + 1).clamp(max=3))
    assert wrong_order(scores, chosen, own, 0, 1).max() < 1e-5


@interpreted
def test_equal_scores_go_to_the_first_kv_blocks() -> None:
    q, k_cmp = torch.zeros(1, 2, 330, 16), torch.randn(1, 1, 19, 16)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp)
    arguments = (q, k_cmp, lse, 3, 32, 32, 16, 0, 1, 0.25, 330)
    assert torch.equal(
        select_top_k.launch(*arguments, None), select_top_k.select_top_k_ref(*arguments)
    )


TILES = {
    "few-tokens": (16, 16, 2, 2, False, 4, 2),
    "a-run-at-a-time": (32, 8, 1, 4, True, 4, 1),
    "one-list": (64, 64, 4, 1, False, 8, 2),
    "more-candidates-than-kept": (32, 64, 4, 4, False, 4, 2),
}


@interpreted
@pytest.mark.parametrize("name", TILES)
def test_tiles_do_not_change_the_choice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_compile.kernels import select_kernels

    (q, k_cmp, v_cmp), _, scale = made("packed", "compressed")
    packed = bounds(SIZES["packed"][2])
    _, lse = ops.compressed_attention(q, k_cmp, v_cmp, n_keys=170, cu_seqlens=packed)
    with torch.no_grad():
        arguments = (q, k_cmp, lse, 5, 64, 32, 16, 1, 2, scale, 170, packed)
        wanted = select_top_k.launch(*arguments)
        tiles = select_kernels.Tiles(*TILES[name])
        monkeypatch.setattr(select_kernels, "default_tiles", lambda **_: tiles)
        assert torch.equal(select_top_k.launch(*arguments), wanted)


def test_native_sparse_attention_is_the_sum_of_its_branches() -> None:
    q, k, v = (
        random_heads(1, h, 150, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)
    )
    k_cmp, v_cmp = (x.unfold(2, 32, 16).mean(-1) for x in (k, v))
    gates = torch.rand(1, 4, 150, 3, dtype=torch.float64, requires_grad=True)
    options = {"n_selected": 3, "window": 20, "block_size": 32}

    def function(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return ops.native_sparse_attention(q, k, v, k_cmp, v_cmp, gates, **options)

    found = function(q, k, v, gates)
    compressed, lse = ops.compressed_attention(q, k_cmp, v_cmp)
    chosen = ops.select_top_k(q, k_cmp, lse, k=3, block_size=32)
    selected = ops.selected_attention(q, k, v, chosen, block_size=32)
    near, _ = ops.window_attention(q, k, v, window=20)
    wanted = sum(gates[..., i, None] * x for i, x in enumerate((compressed, selected, near)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(found.square().sum(), (q, k, v, gates))
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in grads)


@pytest.mark.parametrize("kind", ["window", "compressed"])
def test_the_operators_are_registered_as_they_should_be(kind: str) -> None:
    inputs, ranges, scale = made("packed", kind)
    op = torch.ops.sparse_compile
    torch.library.opcheck(op.range_attention.default, (*inputs, *ranges, scale))
    plain = [x.detach() for x in inputs]
    outputs = ranged.range_attention_ref(*plain, *ranges, scale)
    backward = (torch.randn_like(outputs[0]), None, *plain, *outputs, *ranges, scale)
    torch.library.opcheck(op.range_attention_backward.default, backward)
    if kind == "compressed":
        arguments = (*plain[:2], outputs[1], 3, 64, 32, 16, 1, 2, scale, 170, bounds((70, 3, 97)))
        torch.library.opcheck(op.select_top_k.default, arguments)


def test_gradients_are_those_of_the_function() -> None:
    q, k, v = (torch.randn(1, h, 40, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ops.window_attention(q, k, v, window=7)
        return torch.cat([out, lse[..., None]], -1)

    assert torch.autograd.gradcheck(function, (q, k, v))


def call_window(**changes: object) -> object:
    q, k = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
    return ops.window_attention(**{"q": q, "k": k, "v": k, "window": 8, **changes})


def call_compressed(**changes: object) -> object:
    q, k = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 5, 16)
    return ops.compressed_attention(**{"q": q, "k_cmp": k, "v_cmp": k, **changes})


def call_select(**changes: object) -> object:
    q, k, lse = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 4, 100)
    return ops.select_top_k(**{"q": q, "k_cmp": k, "lse": lse, **changes})


def call_native(**changes: object) -> object:
    q, k, c = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 5, 16)
    given = {"q": q, "k": k, "v": k, "k_cmp": c, "v_cmp": c, "gates": torch.rand(1, 4, 100, 3)}
    return ops.native_sparse_attention(**{**given, **changes})


ERRORS: list[tuple[Callable[..., object], dict[str, object], str]] = [
    (call_window, {"window": 0}, "window is 0. Expected at least 1"),
    (call_window, {"k": torch.randn(1, 2, 100, 8)}, "k has shape (1, 2, 100, 8). Expected [1, Hkv, S, 16]"),
    (call_compressed, {"k_cmp": torch.randn(1, 2, 6, 16)}, "v_cmp has shape (1, 2, 5, 16). Expected [1, 2, 6, Dv]"),
    (call_compressed, {"n_keys": 200}, "k_cmp has 5 compressed keys. Expected 11"),
    (call_compressed, {"n_keys": 90}, "n_keys is 90. Expected at least the 100 tokens of q"),
    (call_compressed, {"block": 40}, "block is 40 and stride 16. Expected a block that is a multiple"),
    (call_select, {"k": 65}, "k is 65. Expected 1 to 64"),
    (call_select, {"k": 2}, "sinks is 1 and local 2. Expected at most k together"),
    (call_select, {"block_size": 16, "stride": 32, "n_keys": 160}, "block_size is 16. Expected a multiple of the stride, 32"),
    (call_select, {"lse": torch.randn(1, 2, 100)}, "lse has shape (1, 2, 100)"),
    (call_native, {"gates": torch.rand(1, 4, 100, 2)}, "gates has shape (1, 4, 100, 2). Expected (1, 4, 100, 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "changes", "message"), ERRORS)
def test_wrong_arguments_are_named(
    call: Callable[..., object], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(OperatorError) as caught:
        call(**changes)
    assert message in str(caught.value)
