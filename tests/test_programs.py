"""What happens between Q K^T and V: every step, in its order, and rows without any key."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.testing import rewritten_alike

B, H, T, S, D = 2, 3, 4, 5, 6
INF = float("inf")
MIN = torch.finfo(torch.float32).min
KEEP = torch.arange(S) <= torch.arange(T)[:, None]
SOME_EMPTY = torch.arange(S) < torch.arange(T)[:, None]  # the first query has no key

Scores = Callable[[Tensor], Tensor]


def qkv(dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    shapes = (B, H, T, D), (B, H, S, D), (B, H, S, D)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def attention(change: Scores) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: change(q @ k.mT).softmax(-1) @ v


def distance() -> Tensor:
    return torch.arange(S) - torch.arange(T)[:, None]


def slopes() -> Tensor:
    return 2.0 ** -torch.arange(1, H + 1, dtype=torch.float64)[:, None, None]


def keep() -> Tensor:
    return distance() <= 0


TRANSFORMS: dict[str, tuple[Scores, tuple[str, ...]]] = {
    "nothing": (lambda x: x, ()),
    "scale": (lambda x: x * 0.5, ("scale(0.5)",)),
    "division": (lambda x: x / 4, ("scale(0.25)",)),
    "two-scales": (lambda x: x * 0.5 / 4, ("scale(0.125)",)),
    "scale-by-a-tensor-of-one": (lambda x: x / torch.sqrt(torch.tensor(4.0)), None),
    "scale-then-mask": (
        lambda x: (x * 0.5).masked_fill(~keep(), -INF), ("scale(0.5)", "mask")
    ),
    "mask-then-scale": (
        lambda x: x.masked_fill(~keep(), -INF) * 0.5, ("mask", "scale(0.5)")
    ),
    "soft-cap": (lambda x: torch.tanh(x / 3) * 3, ("soft_cap(3)",)),
    "scale-soft-cap-mask": (
        lambda x: (torch.tanh(x * 0.5 / 3) * 3).masked_fill(~keep(), -INF),
        ("scale(0.5)", "soft_cap(3)", "mask"),
    ),
    "mask-then-soft-cap": (
        lambda x: torch.tanh(x.masked_fill(~keep(), -1e9) / 3) * 3, ("mask", "soft_cap(3)")
    ),
    "tanh-alone": (torch.tanh, ("map(tanh(x))",)),
    "alibi": (lambda x: x * 0.5 + slopes() * distance(), None),
    "alibi-subtracted": (lambda x: x - slopes() * distance().abs(), None),
    "bias-then-scale": (lambda x: (x + distance()) * 0.5, None),
    "bias-with-alpha": (lambda x: torch.add(x, distance(), alpha=3), None),
    "mask-as-bias": (lambda x: x + torch.where(keep(), 0.0, -INF), ("mask",)),
    "mask-as-float-triu": (lambda x: x + torch.full((T, S), -INF).triu(1), ("mask",)),
    "mask-by-where": (lambda x: torch.where(keep(), x, -1e9), ("mask",)),
    "mask-by-where-not": (lambda x: torch.where(~keep(), MIN, x), ("mask",)),
    "mask-times-big": (lambda x: x + (1.0 - keep().double()) * -1e9, ("mask",)),
    "two-masks": (
        lambda x: x.masked_fill(~keep(), -INF).masked_fill(distance() < -1, -INF),
        ("mask", "mask"),
    ),
    "mild-fill": (lambda x: x.masked_fill(~keep(), -2.0), None),
    "mask-times-scores": (lambda x: x * keep(), None),
    "lower-bound": (lambda x: x.clamp(min=-0.5), None),
    "both-bounds": (lambda x: x.clamp(-0.5, 0.25), None),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.25), None),
    "hardtanh-defaults": (lambda x: F.hardtanh(x), None),
    "maximum-with-the-least": (
        lambda x: torch.max(x.masked_fill(~keep(), MIN), torch.tensor(MIN)), None
    ),
    "square": (torch.square, None),
    "negated": (torch.neg, None),
    "abs": (torch.abs, None),
    "sigmoid": (torch.sigmoid, None),
    "relu": (torch.relu, None),
    "softplus": (F.softplus, None),
    "softplus-with-beta": (lambda x: F.softplus(x, beta=2.0), None),
    "softplus-with-threshold": (lambda x: F.softplus(x, threshold=0.5), None),
    "number-before-soft-cap": (lambda x: torch.tanh(x + 1.0), None),
    "number-before-bound": (lambda x: (x - 1.0).clamp(min=0), None),
    "number-before-product": (lambda x: (x + 1.0) * distance(), None),
    "number-before-mild-fill": (lambda x: (x + 1.0).masked_fill(~keep(), -2.0), None),
    "number-minus-scores": (lambda x: 1.0 - x, None),
    "number-over-scores": (lambda x: 1.0 / (x.abs() + 1), None),
    "row-maximum": (lambda x: x - x.amax(-1, keepdim=True), None),
    "row-maximum-then-soft-cap": (lambda x: torch.tanh(x - x.amax(-1, keepdim=True)), None),
    "row-maximum-of-one-row": (lambda x: x - x[0, 0, 0].amax(-1), None),
    "bias-from-values": (lambda x: x + x.sum(-2, keepdim=True), None),
    "temperature-per-head": (lambda x: x * slopes(), None),
    "temperature-per-head-after-bias": (lambda x: (x + distance()) * slopes(), None),
    "divided-per-key": (lambda x: x / (torch.arange(S) + 1.0), None),
    "rounded-down": (lambda x: torch.div(x, 0.5, rounding_mode="floor"), None),
    "maximum-with-a-tensor": (lambda x: torch.maximum(x, x.new_full((), 0.25)), None),
    "minimum-with-a-tensor-per-key": (lambda x: torch.minimum(x, torch.arange(S) * 0.125), None),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_scores_change_as_the_model_says(name: str) -> None:
    change, transforms = TRANSFORMS[name]
    for site in rewritten_alike(attention(change), *qkv()):
        if transforms is not None:
            assert site.status == "rewritten", site.reason
            assert site.score_transforms == transforms


GRADIENTS = (
    "scale-soft-cap-mask alibi bias-then-scale mask-then-soft-cap both-bounds softplus-with-beta "
    "temperature-per-head mask-as-bias number-before-soft-cap bias-from-values"
)


@pytest.mark.parametrize("name", GRADIENTS.split())
def test_gradients_follow_the_same_steps(name: str) -> None:
    (site,) = rewritten_alike(attention(TRANSFORMS[name][0]), *qkv(grad=True))
    left = {"number-before-soft-cap": "score-op", "bias-from-values": "not-convex"}
    assert site.reason_code == left.get(name)


def test_a_maximum_that_varies_with_the_key_does_not_cancel() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT  # [S, S]
        return (scores - scores.amax(-1)).softmax(-1) @ v

    inputs = (torch.randn(S, D, dtype=torch.float64) for _ in range(3))
    (site,) = rewritten_alike(function, *inputs)
    assert site.reason_code == "not-convex"


def with_sink(change: Scores, after: Scores = lambda x: x) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        scores = change(q @ k.mT)
        wide = torch.cat([scores, logits.view(1, H, 1, 1).expand(B, H, T, 1)], -1)
        return after(wide).softmax(-1)[..., :-1] @ v

    return function


SINKS: dict[str, tuple[Scores, Scores]] = {
    "plain": (lambda x: x * 0.5, lambda x: x),
    "masked": (lambda x: x.masked_fill(~keep(), -INF), lambda x: x),
    "number-before": (lambda x: x + 1.0, lambda x: x),
    "maximum-before": (lambda x: x - x.amax(-1, keepdim=True), lambda x: x),
    "maximum-after": (lambda x: x, lambda x: x - x.amax(-1, keepdim=True)),
    "scaled-after": (lambda x: x, lambda x: x * 0.5),
    "empty-rows": (lambda x: x.masked_fill(distance() >= 0, -INF), lambda x: x),
    "finite-empty-rows": (lambda x: x.masked_fill(distance() >= 0, -1e9), lambda x: x),
}


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_takes_its_share(name: str) -> None:
    (site,) = rewritten_alike(with_sink(*SINKS[name]), *qkv(), torch.randn(H, dtype=torch.float64))
    if name in ("plain", "masked", "maximum-after", "empty-rows"):
        assert site.status == "rewritten", site.reason
        assert site.score_transforms[-1].startswith("sink(")


def test_a_sink_has_a_gradient() -> None:
    logits = torch.randn(H, dtype=torch.float64, requires_grad=True)
    (site,) = rewritten_alike(with_sink(*SINKS["masked"]), *qkv(grad=True), logits)
    assert site.score_transforms == ("mask", "sink(Load(0, h))")


def test_an_addend_in_the_denominator_sees_the_scores_as_they_are() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        powers = torch.exp(q @ k.mT + 1.0)
        return powers / (1 + powers.sum(-1, keepdim=True)) @ v

    (site,) = rewritten_alike(function, *qkv())
    assert site.reason_code == "score-op"


def filled(value: float, rows: Tensor = SOME_EMPTY) -> Callable[..., Tensor]:
    return lambda q, k, v: (q @ k.mT).masked_fill(~rows, value).softmax(-1) @ v


def safe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._safe_softmax((q @ k.mT).masked_fill(~SOME_EMPTY, -INF), -1) @ v


def zeroed_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~SOME_EMPTY, -INF).softmax(-1)
    return weights.masked_fill(~SOME_EMPTY, 0.0) @ v


def zeroed_by_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~SOME_EMPTY, -1e9).softmax(-1)
    return (weights * SOME_EMPTY) @ v


def masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT) * SOME_EMPTY
    return powers / (powers.sum(-1, keepdim=True) + 1e-9) @ v


def masked_by_hand_bounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT) * SOME_EMPTY
    return powers / powers.sum(-1, keepdim=True).clamp(min=1e-9) @ v


EMPTY_ROWS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "minus-infinity": (filled(-INF), "nan"),
    "least-number": (filled(MIN), "mean"),
    "large-number": (filled(-1e9), "mean"),
    "added-minus-infinity": (lambda q, k, v: (q @ k.mT + torch.where(SOME_EMPTY, 0.0, -INF)).softmax(-1) @ v, "nan"),
    "added-large-number": (lambda q, k, v: (q @ k.mT + torch.where(SOME_EMPTY, 0.0, -1e9)).softmax(-1) @ v, "own"),
    "added-small-number": (lambda q, k, v: (q @ k.mT + torch.where(SOME_EMPTY, 0.0, -1e4)).softmax(-1) @ v, "own"),
    "safe-softmax": (safe, "zero"),
    "nan-to-num": (lambda q, k, v: (q @ k.mT).masked_fill(~SOME_EMPTY, -INF).softmax(-1).nan_to_num() @ v, "zero"),
    "nan-to-num-of-finite": (lambda q, k, v: (q @ k.mT).masked_fill(~SOME_EMPTY, MIN).softmax(-1).nan_to_num() @ v, "mean"),
    "sdpa-bool": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SOME_EMPTY), "own"),
    "sdpa-float": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.where(SOME_EMPTY, 0.0, MIN).double()), "mean"),
    "zeroed-weights": (zeroed_weights, "zero"),
    "zeroed-by-product": (zeroed_by_product, "zero"),
    "masked-by-hand": (masked_by_hand, "zero"),
    "masked-by-hand-bounded": (masked_by_hand_bounded, "zero"),
    "fill-then-bias": (lambda q, k, v: ((q @ k.mT).masked_fill(~SOME_EMPTY, -1e9) + distance()).softmax(-1) @ v, "own"),
    "two-fills": (lambda q, k, v: (q @ k.mT).masked_fill(~SOME_EMPTY, -1e9).masked_fill(distance() < -1, -INF).softmax(-1) @ v, "own"),
    "two-finite-fills": (lambda q, k, v: (q @ k.mT).masked_fill(~SOME_EMPTY, -1e9).masked_fill(distance() > 2, -2e9).softmax(-1) @ v, "own"),
    "fill-then-floor": (lambda q, k, v: torch.max((q @ k.mT).masked_fill(~SOME_EMPTY, -INF), torch.tensor(MIN)).softmax(-1) @ v, "mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY_ROWS)
def test_rows_without_a_key_give_what_eager_gives(name: str) -> None:
    function, first = EMPTY_ROWS[name]
    q, k, v = qkv()
    row = function(q, k, v)[:, :, 0]
    wanted = {"nan": v.mean(2) * math.nan, "mean": v.mean(2), "zero": v.mean(2) * 0, "own": row}
    torch.testing.assert_close(row, wanted[first], equal_nan=True)  # the case is what it says
    rewritten_alike(function, q, k, v)


def test_two_least_numbers_overflow_as_in_eager() -> None:
    once, twice = torch.where(KEEP, 0.0, MIN), torch.where(distance() >= -1, 0.0, MIN)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + once + twice).softmax(-1) @ v

    # float32, since that is what MIN overflows in: 1e-5 is a hundred of its steps
    (site,) = rewritten_alike(function, *qkv(torch.float32), tolerance=1e-5)
    assert site.status == "rewritten", site.reason


def test_padding_of_a_whole_sequence() -> None:
    padding = torch.tensor([[True] * S, [False] * S])

    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~padding[:, None, None], -1e9).softmax(-1) @ v

    (site,) = rewritten_alike(function, *qkv(), padding)
    assert site.status == "rewritten"


@pytest.mark.parametrize("tokens", [(4, 4), (3, 5), (5, 3)], ids=["square", "wide", "tall"])
def test_is_causal_aligns_the_first_tokens(tokens: tuple[int, int]) -> None:
    q, k = (torch.randn(B, H, size, D, dtype=torch.float64) for size in tokens)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    (site,) = rewritten_alike(function, q, k, k.sin())
    assert (site.mask, site.scale, site.kernel) == ("causal", 0.3, "sdpa")


def test_no_proven_mask_is_a_tensor() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return filled(-INF, (distance() <= 0) & (distance() > -2))(q, k, v)

    (site,) = rewritten_alike(function, *qkv())
    assert site.kernel == "program_attention"
    shapes = [tuple(operand.shape) for operand in site.site.operands] if site.site else None
    assert shapes == []


def test_a_bias_that_is_not_provable_stays_a_tensor() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + bias).softmax(-1) @ v

    bias = torch.randn(H, T, S, dtype=torch.float64, requires_grad=True)
    (site,) = rewritten_alike(function, *qkv(grad=True), bias)
    assert site.kernel == "sdpa"
    assert site.score_transforms[0] == "scale(0.5)"


def test_a_lookup_by_a_lookup_reads_both_tables() -> None:
    """An index that is loaded itself: both loads keep their own operand."""
    weight, which = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 7, (2, 6))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        other = torch.nn.functional.embedding(which, weight).permute(0, 2, 1)[:, :, None]
        return (q @ k.mT + other.sin() + other).softmax(-1) @ v

    def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = torch.log1p(torch.arange(6.0)).long()[None]
        return (q @ k.mT + weight[far].permute(2, 0, 1)).softmax(-1) @ v

    for one in (function, decode):
        torch._dynamo.reset()
        tokens = (1 if one is decode else 4, 6, 6)
        q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in tokens)
        (site,) = rewritten_alike(one, q, k, v)
        assert site.status == "rewritten", site.reason
