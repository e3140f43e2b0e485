"""One attention under many masks and biases, each made the way people make it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.zoo.forms.parts import (
    BATCH,
    HEAD_DIM,
    HEADS,
    TOKENS,
    Forms,
    Projected,
    causal,
    sequence,
)

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Built

masks = Forms("masks")
SCALE = HEAD_DIM**-0.5
INF = float("inf")


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


def _fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, value: float = -INF) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~keep, value).softmax(-1) @ v


def _positions() -> tuple[Tensor, Tensor]:
    places = torch.arange(TOKENS)
    return places[:, None], places[None, :]


@masks.attend("train")
def _masked_fill_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fill(q, k, v, torch.tril(torch.ones(TOKENS, TOKENS)) != 0)


@masks.attend()
def _masked_fill_triu_finfo(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    banned = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(diagonal=1)
    return _fill(q, k, v, ~banned, torch.finfo(q.dtype).min)


@masks.attend()
def _where_scalar(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(causal(), scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


@masks.attend()
def _where_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(causal(), scores, torch.full_like(scores, -1e4)).softmax(-1) @ v


@masks.attend("train")
def _added_triu_of_inf(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, torch.full((TOKENS, TOKENS), -INF).triu(1))


@masks.attend()
def _added_triu_built_by_mul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, torch.triu(torch.ones(TOKENS, TOKENS), diagonal=1) * -1e9)


@masks.attend()
def _one_minus_mask_times_large(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(q, k, v, (1.0 - causal().float()) * -10000.0)


@masks.attend()
def _multiplied_then_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = causal().float()
    scores = q @ k.mT * SCALE
    return (scores * keep - 1e10 * (1 - keep)).softmax(-1) @ v


@masks.attend()
def _mask_before_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -1e9)
    return (scores / math.sqrt(HEAD_DIM)).softmax(-1) @ v


@masks.attend()
def _setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    scores[:, :, torch.triu(torch.ones(TOKENS, TOKENS), 1).bool()] = -INF
    return scores.softmax(-1) @ v


@masks.attend()
def _mask_by_setitem_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    keep[: TOKENS // 2, : TOKENS // 2] = True
    keep[TOKENS // 2 :, TOKENS // 2 :] = True
    return _fill(q, k, v, keep)


@masks.attend()
def _arange_comparison(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, t >= s)


@masks.attend("train")
def _sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, (t >= s) & (t - s < 4))


@masks.attend()
def _sliding_window_by_tril_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fill(q, k, v, causal().triu(-3))


@masks.attend()
def _symmetric_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, (t - s).abs() <= 3)


@masks.attend()
def _chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, (t // 4 == s // 4) & (t >= s))


@masks.attend()
def _prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, (t >= s) | (s < 5))


@masks.attend()
def _dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, ((t - s) % 3 == 0) & (t >= s))


@masks.attend()
def _sink_and_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _fill(q, k, v, (t >= s) & ((t - s < 4) | (s < 2)))


@masks.attend()
def _block_diagonal_by_kron(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.kron(torch.eye(3), torch.ones(4, 4)).bool()
    return _fill(q, k, v, keep)


@masks.attend()
def _all_true(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fill(q, k, v, torch.ones(TOKENS, TOKENS, dtype=torch.bool))


@masks.attend()
def _diagonal_banned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return scores.masked_fill(torch.eye(TOKENS, dtype=torch.bool), -5e4).softmax(-1) @ v


@masks.attend("train")
def _fully_masked_rows_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = causal().clone()
    keep[:3] = False
    return _fill(q, k, v, keep, torch.finfo(q.dtype).min)


@masks.attend("train")
def _alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    slopes = 2.0 ** -torch.arange(1, HEADS + 1).view(1, HEADS, 1, 1)
    bias = (slopes * (s - t)).masked_fill(s > t, -INF)
    return _attend(q, k, v, bias)


@masks.attend()
def _gaussian_locality(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _attend(q, k, v, -((t - s).float() ** 2) / 8.0)


@masks.attend()
def _log_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t, s = _positions()
    return _attend(q, k, v, -torch.log1p((t - s).abs().float()))


class _WithMask(nn.Module):
    """Attention that takes a second input."""

    def __init__(self, attend: object) -> None:
        super().__init__()
        self.inner = Projected(lambda q, k, v: v)
        self.attend = attend

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.inner.attend = lambda q, k, v: self.attend(q, k, v, mask)
        return self.inner(x)


def _padding() -> Tensor:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, -3:] = False
    return mask


@masks.add("train")
def _key_padding_bool() -> Built:
    attend = lambda q, k, v, m: _fill(q, k, v, m[:, None, None, :])  # noqa: E731
    return _WithMask(attend), (sequence(), _padding()), {}


@masks.add()
def _key_padding_additive() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return _attend(q, k, v, (1.0 - m[:, None, None, :].float()) * torch.finfo(q.dtype).min)

    return _WithMask(attend), (sequence(), _padding()), {}


@masks.add()
def _key_padding_and_causal() -> Built:
    attend = lambda q, k, v, m: _fill(q, k, v, m[:, None, None] & causal())  # noqa: E731
    return _WithMask(attend), (sequence(), _padding()), {}


@masks.add()
def _left_padding_and_causal_finite() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        keep = m.flip(1)[:, None, None] & causal()
        return _fill(q, k, v, keep, torch.finfo(q.dtype).min)

    return _WithMask(attend), (sequence(), _padding()), {}


@masks.add()
def _query_and_key_padding() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        both = m[:, None, :, None] * m[:, None, None, :]
        return _fill(q, k, v, both, -1e9)

    return _WithMask(attend), (sequence(), _padding()), {}


@masks.add()
def _lengths() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(TOKENS)[None, :] < lengths[:, None]
        return _fill(q, k, v, keep[:, None, None])

    return _WithMask(attend), (sequence(), torch.tensor([TOKENS, 7])), {}


@masks.add()
def _documents() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        same = ids[:, None, :, None] == ids[:, None, None, :]
        return _fill(q, k, v, same & causal())

    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
    return _WithMask(attend), (sequence(), ids), {}


@masks.add()
def _documents_from_restarts() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        ids = torch.cumsum(starts, dim=1)
        same = ids[:, None, :, None].eq(ids[:, None, None, :])
        return torch.where(same.logical_and(causal()), q @ k.mT * SCALE, -INF).softmax(-1) @ v

    starts = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    starts[0, 5] = starts[1, 4] = starts[1, 9] = 1
    return _WithMask(attend), (sequence(), starts), {}


@masks.add("train")
def _dense_bias_input() -> Built:
    return _WithMask(_attend), (sequence(), torch.randn(BATCH, HEADS, TOKENS, TOKENS)), {}


@masks.add()
def _dense_bool_input() -> Built:
    keep = torch.rand(BATCH, 1, TOKENS, TOKENS) > 0.4
    keep[..., 0] = True
    return _WithMask(_fill), (sequence(), keep), {}


class _Buffered(nn.Module):
    """Attention whose mask is a registered buffer, cut to the length in use."""

    def __init__(self, attend: object, name: str, value: Tensor) -> None:
        super().__init__()
        self.register_buffer(name, value, persistent=False)
        self.inner = Projected(lambda q, k, v: v)
        self.attend, self.name = attend, name

    def forward(self, x: Tensor) -> Tensor:
        mask = getattr(self, self.name)[:, :, : x.shape[1], : x.shape[1]]
        self.inner.attend = lambda q, k, v: self.attend(q, k, v, mask)
        return self.inner(x)


@masks.add("train")
def _buffer_tril_bool() -> Built:
    return _Buffered(_fill, "bias", causal(32)[None, None]), (sequence(),), {}


@masks.add()
def _buffer_tril_float_equals_zero() -> Built:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).masked_fill(mask == 0, -INF).softmax(-1) @ v

    return _Buffered(attend, "mask", torch.ones(32, 32).tril()[None, None]), (sequence(),), {}


@masks.add()
def _buffer_additive() -> Built:
    value = torch.full((32, 32), -INF).triu(1)[None, None]
    return _Buffered(_attend, "attn_mask", value), (sequence(),), {}


@masks.add()
def _buffer_relative_bias() -> Built:
    value = torch.randn(1, HEADS, 32, 32)
    return _Buffered(_attend, "relative", value), (sequence(),), {}


class _LearnedBias(nn.Module):
    """A bias looked up from a table by the distance of query and key."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * TOKENS - 1, HEADS)
        self.inner = Projected(lambda q, k, v: _attend(q, k, v, self.bias()))

    def bias(self) -> Tensor:
        t, s = _positions()
        return self.table(s - t + TOKENS - 1).permute(2, 0, 1)[None]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@masks.add("train")
def _relative_table() -> Built:
    return _LearnedBias(), (sequence(),), {}


class _Bucketed(_LearnedBias):
    """T5's buckets: exact near the query, logarithmic far from it."""

    def bias(self) -> Tensor:
        t, s = _positions()
        gap = (t - s).clamp(min=0)
        near = TOKENS // 2
        far = near + (torch.log(gap.clamp(min=1) / near) / math.log(4) * near).long()
        bucket = torch.where(gap < near, gap, far.clamp(max=2 * TOKENS - 2))
        return self.table(bucket).permute(2, 0, 1)[None] + torch.where(t >= s, 0.0, -INF)


@masks.add("train")
def _relative_buckets() -> Built:
    return _Bucketed(), (sequence(),), {}
