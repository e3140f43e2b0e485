"""Heads, groups and tokens, however a model arranges and repeats them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.testing import rewritten_alike

if TYPE_CHECKING:
    from sparse_compile.inspect.report import SiteReport

B, HQ, HKV, T, S, D, DV = 2, 6, 2, 4, 5, 8, 3
G = HQ // HKV

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def qkv(kv_heads: int = HKV) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, HQ, T, D), (B, kv_heads, S, D), (B, kv_heads, S, DV)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def expanded(x: Tensor) -> Tensor:
    return x[:, :, None].expand(B, HKV, G, S, x.shape[-1]).reshape(B, HQ, S, x.shape[-1])


def with_repeated(repeat: Callable[[Tensor], Tensor]) -> Attend:
    return lambda q, k, v: attend(q, repeat(k), repeat(v))


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bkgtd,bksd->bkgts", q.view(B, HKV, G, T, D), k)
    return torch.einsum("bkgts,bksv->btkgv", scores.softmax(-1), v).reshape(B, T, HQ * DV)


def grouped_5d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q.view(B, HKV, G, T, D), k[:, :, None], v[:, :, None])
    return out.view(B, HQ, T, DV)


def merged_group_and_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q.view(B, HKV, G * T, D), k, v).view(B, HQ, T, DV)


def masked_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.view(B, HKV, G * T, D) @ k.mT).view(B, HKV, G, T, S)
    keep = torch.arange(S) <= torch.arange(T)[:, None]
    scores = scores.masked_fill(~keep, float("-inf")).view(B, HKV, G * T, S)
    return (scores.softmax(-1) @ v).view(B, HQ, T, DV)


GROUPED: dict[str, tuple[Attend, str]] = {
    "repeat_interleave": (with_repeated(lambda x: x.repeat_interleave(G, 1)), "q[b, h, t, d]"),
    "expand-reshape": (with_repeated(expanded), "q[b, h, t, d]"),
    "stack": (
        with_repeated(lambda x: torch.stack([x] * G, 2).flatten(1, 2)), "q[b, h, t, d]"
    ),
    "repeat": (
        with_repeated(lambda x: x.repeat(1, G, 1, 1)), "q[b, 2*(Mod(h, 3)) + floor(h/3), t, d]"
    ),
    "cat": (
        with_repeated(lambda x: torch.cat([x] * G, 1)), "q[b, 2*(Mod(h, 3)) + floor(h/3), t, d]"
    ),
    "einsum": (grouped_einsum, "q[b, h, t, d]"),
    "broadcast-5d": (grouped_5d, "q[b, h, t, d]"),
    "sdpa": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), "q[b, h, t, d]"
    ),
    "merged-rows-with-mask": (masked_merged, "q[b, h, t, d]"),
}  # fmt: skip


def heads(site: SiteReport) -> tuple[object, object, object]:
    assert site.status == "rewritten", site.reason
    return site.query_heads, site.kv_heads, site.group


@pytest.mark.parametrize("name", GROUPED)
def test_the_group_is_found_however_heads_are_repeated(name: str) -> None:
    function, q_map = GROUPED[name]
    (site,) = rewritten_alike(function, *qkv())
    assert heads(site) == (HQ, HKV, G)
    assert site.site is not None
    assert site.site.q_map == q_map
    assert site.site.k_map == "k[b, floor(h/3), s, d]"
    assert site.site.v_map == "v[b, floor(h/3), s, d]"
    assert (site.head_dim, int(site.site.value_dim)) == (D, DV)


def test_merged_rows_without_a_mask_are_all_tokens() -> None:
    (site,) = rewritten_alike(merged_group_and_tokens, *qkv())
    assert site.status == "rewritten"
    assert site.kv_heads == HKV
    assert site.query_heads * site.query_tokens == HQ * T


def mqa_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.expand(B, HQ, S, D), v.expand(B, HQ, S, DV))


def mqa_merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = q.transpose(1, 2).reshape(B, T * HQ, D)
    scores = torch.bmm(rows, k[:, 0].mT).view(B, T, HQ, S)
    keep = torch.arange(S) <= torch.arange(T)[:, None]
    scores = scores.masked_fill(~keep[:, None], float("-inf"))
    return torch.bmm(scores.softmax(-1).view(B, T * HQ, S), v[:, 0]).view(B, T, HQ, DV)


MULTI_QUERY: dict[str, Attend] = {
    "broadcast": attend,
    "expand": mqa_expand,
    "einsum": lambda q, k, v: torch.einsum(
        "bhts,bsd->bthd", torch.einsum("bhtd,bsd->bhts", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
    "merged-heads": mqa_merged_heads,
}


@pytest.mark.parametrize("name", MULTI_QUERY)
def test_one_kv_head_serves_all_query_heads(name: str) -> None:
    (site,) = rewritten_alike(MULTI_QUERY[name], *qkv(kv_heads=1))
    assert heads(site) == (HQ, 1, HQ)


def fused_qkv(x: Tensor) -> Tensor:
    q, k, v = x.view(B, T, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v).transpose(1, 2).reshape(B, T, 8)


def chunked_qkv(x: Tensor) -> Tensor:
    q, k, v = (part.view(B, T, 2, 4).transpose(1, 2) for part in x.chunk(3, -1))
    return attend(q, k, v).transpose(1, 2).flatten(2)


def merged_batch(x: Tensor) -> Tensor:
    q, k, v = (
        part.reshape(B, T, 2, 4).transpose(1, 2).reshape(2 * B, T, 4) for part in x.split(8, -1)
    )
    return attend(q, k, v).view(B, 2, T, 4).transpose(1, 2).reshape(B, T, 8)


def windows(x: Tensor) -> Tensor:
    q, k, v = (part.reshape(B * 2, T // 2, 2, 4).transpose(1, 2) for part in x.split(8, -1))
    return attend(q, k, v).transpose(1, 2).reshape(B, T, 8)


FUSED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int]]] = {
    "permute-unbind": (fused_qkv, (B, 2)),
    "chunk": (chunked_qkv, (B, 2)),
    "batch-times-heads": (merged_batch, (B, 2)),
    "windows": (windows, (2 * B, 2)),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name: str) -> None:
    function, (batch, n_heads) = FUSED[name]
    (site,) = rewritten_alike(function, torch.randn(B, T, 24, dtype=torch.float64))
    assert heads(site) == (n_heads, n_heads, 1)
    assert site.site is not None
    assert site.site.batch == batch


BARE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one-matrix": ((T, D), (S, D)),
    "one-head": ((B, T, D), (B, S, D)),
    "one-query": ((B, HQ, 1, D), (B, HQ, S, D)),
    "one-query-matrix": ((1, D), (S, D)),
    "shared-queries": ((T, D), (B, S, D)),
    "shared-keys": ((B, T, D), (S, D)),
    "five-dimensions": ((2, B, 3, T, D), (2, B, 3, S, D)),
    "head-size-one": ((B, HQ, T, 1), (B, HQ, S, 1)),
}


@pytest.mark.parametrize("name", BARE)
def test_fewer_and_more_dimensions(name: str) -> None:
    q, k = (torch.randn(shape, dtype=torch.float64) for shape in BARE[name])
    (site,) = rewritten_alike(attend, q, k, k.sin())
    assert site.status == "rewritten", site.reason
    assert site.key_tokens == S


def test_rows_of_different_heads_attend_to_each_other() -> None:
    def across(x: Tensor) -> Tensor:
        return attend(x, x.cos(), x.sin())  # [B, T, H, D]: heads are the tokens here

    (site,) = rewritten_alike(across, torch.randn(B, T, HQ, D, dtype=torch.float64))
    assert (site.query_tokens, site.key_tokens) == (HQ, HQ)


def test_gradients_of_repeated_heads_are_summed() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    (site,) = rewritten_alike(GROUPED["repeat"][0], q, k, v)
    assert heads(site) == (HQ, HKV, G)
    assert site.site is not None
    assert site.site.training


def test_factors_on_q_and_k_meet_in_the_scale() -> None:
    (site,) = rewritten_alike(lambda q, k, v: attend(q * 0.5, k / 4, v), *qkv(kv_heads=HQ))
    assert site.scale == 0.125
    assert site.site is not None
    assert site.site.q_map == "q[b, h, t, d]"


def test_free_sizes_stay_symbols() -> None:
    (site,) = rewritten_alike(GROUPED["repeat_interleave"][0], *qkv(), dynamic=True)
    assert site.status == "rewritten", site.reason
    assert isinstance(site.key_tokens, str)
