"""What is an attention, what is none, and what is one that has to be left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compile.passes.detect import Found, find_candidates
from sparse_compile.testing import rewritten_alike, shadow_of

B, H, T, S, D = 2, 3, 4, 5, 6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def qkv(tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(B, H, size, D, dtype=torch.float64) for size in (tokens, S, S))
    return q, k, v


def found_in(function: Callable[..., Tensor], *args: Tensor) -> list[Found]:
    return find_candidates(shadow_of(function, *args))


def codes_of(function: Callable[..., Tensor], *args: Tensor) -> list[str]:
    return [found.reason.code if found.reason else "" for found in found_in(function, *args)]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT)
    return powers / powers.sum(-1, keepdim=True) @ v


def masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT) * torch.ones(T, S).tril(1)
    return powers / powers.sum(-1, keepdim=True) @ v


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT)
    return powers / (1 + powers.sum(-1, keepdim=True)) @ v


def sum_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


def sink_cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sink = q[..., :1] * 0 + 0.5
    scores = torch.cat([q @ k.mT, sink], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def sink_in_front_cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q[..., :1] * 0 + 0.5, q @ k.mT], -1)
    return scores.softmax(-1)[..., 1:] @ v


def sink_in_front_kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q[..., :1] * 0 + 0.5, q @ k.mT], -1)
    return scores.softmax(-1)[..., :-1] @ v


def normalised_weights_of_one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).transpose(1, 2).transpose(1, 2) @ v


SITES: dict[str, Attend] = {
    "plain": lambda q, k, v: (q @ k.mT / D**0.5).softmax(-1) @ v,
    "sdpa": F.scaled_dot_product_attention,
    "transposed": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
    "bmm": lambda q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).view(B, H, T, D),
    "einsum": lambda q, k, v: torch.einsum(
        "bhts,bhsd->bthd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v
    ),
    "by-hand": by_hand,
    "masked-by-hand": masked_by_hand,
    "off-by-one": off_by_one,
    "log-softmax": lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v,
    "sum-of-products": sum_of_products,
    "sink-cut-off": sink_cut_off,
    "sink-in-front-cut-off": sink_in_front_cut_off,
    "views-after-softmax": normalised_weights_of_one_key,
    "head-mask": lambda q, k, v: ((q @ k.mT).softmax(-1) * torch.arange(H)[:, None, None]) @ v,
    "factor": lambda q, k, v: ((q @ k.mT).softmax(-1) / 3) @ v,
    "squared-weights": lambda q, k, v: (lambda p: (p * p) @ v)((q @ k.mT).softmax(-1)),
    "zeroed-weights": lambda q, k, v: (
        (q @ k.mT).softmax(-1).masked_fill(torch.ones(T, S).triu(1) > 0, 0.0) @ v
    ),
    "q-is-k": lambda q, k, v: (k @ k.mT).softmax(-1) @ v,
    "all-the-same": lambda q, k, v: (k @ k.mT).softmax(-1) @ k,
    "weights-divided-by-zero-free-sum": lambda q, k, v: (q @ k.mT).softmax(-1) @ (v / v.norm()),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_attention_is_found_and_replaced(name: str) -> None:
    (site,) = rewritten_alike(SITES[name], *qkv())
    assert site.status == "rewritten", site.reason
    assert site.group == 1


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def normalised_slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-2) + 1e-8
    return (weights / weights.sum(-1, keepdim=True)) @ v


def router(x: Tensor, choice: nn.Parameter, experts: nn.Parameter) -> Tensor:
    weights = (x @ choice).softmax(-1)
    return torch.einsum("te,ted->td", weights, torch.einsum("td,edf->tef", x, experts))


def pooled(x: Tensor, choice: nn.Parameter) -> Tensor:
    return (x @ choice).softmax(-2).mT @ x


def over_channels(x: Tensor, w: nn.Parameter) -> Tensor:
    """XCiT: a softmax over channels, products over tokens."""
    q, k, v = F.linear(x, w).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 4, 1)
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v


X = torch.randn(S, D)
NO_SITES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "slot-attention": (slots, qkv()),
    "normalised-slot-attention": (normalised_slots, qkv()),
    "linear-attention": (lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), qkv()),
    "no-softmax": (lambda q, k, v: (q @ k.mT).relu() @ v, qkv()),
    "over-queries-and-keys": (
        lambda q, k, v: (q @ k.mT).flatten(2).softmax(-1).view(B, H, T, S) @ v, qkv()
    ),
    "over-heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, qkv()),
    "classifier": (lambda x, w: F.linear(x, w).softmax(-1), (X, nn.Parameter(torch.randn(7, D)))),
    "classifier-of-embeddings": (
        lambda x, w: F.linear(x, w).softmax(-1) @ w, (X, nn.Parameter(torch.randn(7, D)))
    ),
    "router": (
        router, (X, nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.randn(3, D, D)))
    ),
    "over-channels": (
        over_channels, (torch.randn(B, S, D), nn.Parameter(torch.randn(3 * H * 3, D)))
    ),
    "weights-only": (lambda q, k, v: (q @ k.mT).softmax(-1) + v.sum(), qkv()),
    "weights-summed-alone": (lambda q, k, v: (q @ k.mT).softmax(-1).sum(-1), qkv()),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_SITES)
def test_look_alikes_are_not_even_reported(name: str) -> None:
    function, args = NO_SITES[name]
    assert codes_of(function, *args) == []


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ k


def also_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum()


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * torch.arange(1, S + 1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def values_from_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ (v + scores.mean())


def sink_with_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q[..., :1]], -1)
    return scores.softmax(-1) @ torch.cat([v, v[:, :, :1] * 0], 2)


MIX = nn.Parameter(torch.randn(H, H, dtype=torch.float64))


def mixed_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Talking heads: a layer over the heads of the scores."""
    return torch.einsum("gh,bhts->bgts", MIX, q @ k.mT).softmax(-1) @ v


def mixed_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return F.linear(weights.movedim(1, -1), MIX).movedim(-1, 1) @ v


def copied_together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Longformer: weights of chunks, padded to whole rows."""
    return F.pad((q @ k[:, :, :-2].mT).softmax(-1), (1, 1)) @ v


DECLINED: dict[str, tuple[Callable[..., object], str]] = {
    "weights-returned": (returned, "weights-escape"),
    "weights-used-by-others": (also_summed, "weights-escape"),
    "weights-times-themselves": (
        lambda q, k, v: (lambda p: p @ p.mT)((q @ k.mT).softmax(-1)), "not-convex"
    ),
    "v-from-scores": (values_from_scores, "not-convex"),
    "sink-with-value": (sink_with_value, "sink-kept"),
    "first-key-cut-off": (lambda q, k, v: (q @ k.mT).softmax(-1)[..., 1:] @ v[:, :, 1:], "keys-dropped"),
    "sink-in-front-kept": (sink_in_front_kept, "keys-dropped"),
    "last-key-cut-off": (lambda q, k, v: (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, 1:], "keys-dropped"),
    "two-keys-cut-off": (lambda q, k, v: (q @ k.mT).softmax(-1)[..., :-2] @ v[:, :, 2:], "weights-cut"),
    "heads-mixed-before": (mixed_before, "heads-mixed"),
    "heads-mixed-behind": (mixed_behind, "heads-mixed"),
    "copied-together": (copied_together, "weights-copied"),
    "shifted-weights": (lambda q, k, v: ((q @ k.mT).softmax(-1) + 0.1) @ v, "weights-op"),
    "filled-weights": (
        lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(torch.ones(T, S).triu(1) > 0, 0.5) @ v,
        "weights-op",
    ),
    "dropped-twice": (
        lambda q, k, v: F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.5), 0.5) @ v, "dropout-twice"
    ),
    "scores-flipped": (lambda q, k, v: (q.sin() @ k.cos().mT).flip(-1).softmax(-1) @ v, "scores-unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_cannot_be_replaced_is_declined_with_a_reason(name: str) -> None:
    function, code = DECLINED[name]
    (found,) = found_in(function, *qkv())  # type: ignore[arg-type]
    assert found.candidate is None
    assert found.reason is not None
    assert found.reason.code == code
    assert found.reason.message


def test_a_declined_attention_still_computes_the_same() -> None:
    (site,) = rewritten_alike(also_summed, *qkv())
    assert (site.status, site.reason_code, site.kernel) == ("declined", "weights-escape", None)


@pytest.mark.parametrize(
    ("function", "code"), [(used_twice, None), (renormalised, "weights-factor")]
)
def test_weights_with_several_users_are_never_wrong(function: Attend, code: str | None) -> None:
    (site,) = rewritten_alike(function, *qkv())
    assert site.reason_code == code


def test_nan_to_num_with_another_number_is_not_taken_for_zero() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(T, S).tril(-1) > 0  # the first query has no key
        weights = (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1)
        return weights.nan_to_num(nan=0.5) @ v

    (site,) = rewritten_alike(function, *qkv())
    assert site.reason_code == "weights-op"


def test_a_factor_rounded_down_is_no_division() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return torch.div(weights, 0.25, rounding_mode="floor") @ v

    (site,) = rewritten_alike(function, *qkv())
    assert site.reason_code == "weights-op"


def test_two_sites_share_k_and_v() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + (-q @ k.mT).softmax(-1) @ v

    sites = rewritten_alike(function, *qkv())
    assert [site.status for site in sites] == ["rewritten"] * 2
    assert len({site.name for site in sites}) == 2


def test_the_output_of_one_attention_feeds_the_next() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT).softmax(-1) @ v
        return (first @ k.mT).softmax(-1) @ v

    assert [site.status for site in rewritten_alike(function, *qkv())] == ["rewritten"] * 2


def test_attention_pooling_with_a_learned_query_is_a_site() -> None:
    query = nn.Parameter(torch.randn(3, D, dtype=torch.float64))
    x = torch.randn(B, S, D, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        keys, values = x.sin(), x.cos()
        return (query @ keys.mT).softmax(-1) @ values

    (site,) = rewritten_alike(function, x)
    assert site.status == "rewritten"


ROWS, COLUMNS = torch.randn(2, B, H, 2, 2, 2, dtype=torch.float64)


def assigned_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MViT: a bias for all but the class token."""
    scores = q @ k.mT
    grid = scores[:, :, 1:, 1:].view(B, H, 2, 2, 2, 2)
    both = grid + ROWS.unsqueeze(-1) + COLUMNS.unsqueeze(-2)
    scores[:, :, 1:, 1:] = both.view(B, H, 4, 4)
    return scores.softmax(-1) @ v


def added_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, 1:] += ROWS.flatten(2)[..., None, :5]
    scores[..., 2:].add_(COLUMNS.flatten(2)[:, :, None, :3])
    return scores.softmax(-1) @ v


def multiplied_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :, 1:] *= 2.0
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("function", [assigned_part, added_parts])
def test_additions_to_a_part_of_the_scores_in_place(function: Attend) -> None:
    (site,) = rewritten_alike(function, *qkv(5))
    assert site.status == "rewritten", site.reason


def some_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, 1:] += ROWS[:, 1:].flatten(2)[..., None, :5]
    return scores.softmax(-1) @ v


def written_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores that are weighed are those from before."""
    scores = q @ k.mT
    weights = scores.softmax(-1)
    scores[:, :, 1:] += ROWS.flatten(2)[..., None, :5]
    return weights @ v + scores.sum(-1, keepdim=True)


def written_within_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    scores[:, :, 1:] += ROWS.flatten(2)[..., None, :5]
    return (powers / powers.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (multiplied_part, "overwritten"),
        (some_heads, "layout"),
        (written_after_softmax, "overwritten"),
        (written_within_softmax, "overwritten"),
    ],
)
def test_other_writes_into_a_part_of_the_scores_decline(function: Attend, code: str) -> None:
    (site,) = rewritten_alike(function, *qkv(5))
    assert site.reason_code == code


def test_a_layer_over_tokens_leaves_an_attention_a_site() -> None:
    """Linformer: K and V are projected to fewer tokens."""
    fewer = nn.Parameter(torch.randn(3, S))
    q, k, v = nn.Parameter(torch.randn(3, D, D))
    x = torch.randn(B, S, D)

    def function(x: Tensor) -> Tensor:
        keys, values = (fewer @ F.linear(x, w) for w in (k, v))
        return (F.linear(x, q) @ keys.mT).softmax(-1) @ values

    (found,) = found_in(function, x)
    assert found.candidate is not None


def test_a_tensor_that_lends_the_mask_its_shape_is_no_input_of_it() -> None:
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).repeat(1, 2)[:, :S]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        mask = (padding == 0)[:, None, None].expand_as(scores)
        return scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1) @ v

    (site,) = rewritten_alike(function, *qkv())
    assert site.status == "rewritten"
    assert "key_padding" in site.mask
