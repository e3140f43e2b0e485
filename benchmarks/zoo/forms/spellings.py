"""The same attention with its softmax, its scale and its products spelled in many ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.forms.parts import HEAD_DIM, HEADS, TOKENS, Forms, Projected, causal, sequence

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Built

spellings = Forms("forms")
ROOT = math.sqrt(HEAD_DIM)


@spellings.attend("train")
def _softmax_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / ROOT).softmax(-1) @ v


@spellings.attend()
def _softmax_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.mT) * ROOT**-1, dim=3), v)


@spellings.attend()
def _softmax_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q / ROOT) @ k.transpose(2, 3)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spellings.add()
def _softmax_module() -> Built:
    layer = nn.Softmax(dim=-1)
    return Projected(lambda q, k, v: layer(q @ k.mT / ROOT) @ v), (sequence(),), {}


@spellings.attend("train")
def _exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = torch.exp(q @ k.mT / ROOT)
    return powers / powers.sum(dim=-1, keepdim=True) @ v


@spellings.attend("train")
def _stable_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    scores = scores - scores.amax(dim=-1, keepdim=True)
    powers = scores.exp()
    return (powers / powers.sum(-1, keepdim=True)) @ v


@spellings.attend()
def _stable_with_max_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    powers = torch.exp(scores - scores.max(-1, keepdim=True).values.detach())
    return torch.mul(powers, torch.reciprocal(powers.sum(-1, keepdim=True))) @ v


@spellings.attend()
def _log_softmax_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT / ROOT, dim=-1).exp() @ v


@spellings.attend()
def _logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


@spellings.attend("train")
def _divide_after_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return (powers @ v) / powers.sum(-1, keepdim=True)


@spellings.attend("train")
def _softmax_off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    top = scores.amax(-1, keepdim=True).clamp(min=0)
    powers = (scores - top).exp()
    return powers / (torch.exp(-top) + powers.sum(-1, keepdim=True)) @ v


@spellings.attend()
def _softmax_off_by_one_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = (q @ k.mT / ROOT).exp()
    return powers / (1 + powers.sum(-1, keepdim=True)) @ v


@spellings.attend()
def _safe_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT / ROOT).masked_fill(~causal(), float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v


@spellings.attend()
def _empty_rows_set_to_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = causal().tril(-1)
    weights = (q @ k.mT / ROOT).masked_fill(~keep, float("-inf")).softmax(-1)
    return torch.where(keep.any(-1, keepdim=True), weights, 0.0) @ v


@spellings.attend("train")
def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(1 / ROOT).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@spellings.attend()
def _einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("...id,...jd->...ij", q, k) / ROOT).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@spellings.attend()
def _einsum_transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhid,bhjd->bhji", q, k) / ROOT).softmax(2)
    return torch.einsum("bhji,bhjd->bhid", weights, v)


@spellings.attend()
def _scores_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (k @ q.mT / ROOT).softmax(dim=-2)
    return weights.transpose(-1, -2) @ v


@spellings.attend()
def _values_on_the_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / ROOT).softmax(-1)
    return (v.mT @ weights.mT).mT


@spellings.attend()
def _products_and_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / ROOT
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


@spellings.attend("train")
def _scale_on_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * HEAD_DIM**-0.5
    return (q @ k.mT).softmax(-1) @ v


@spellings.attend()
def _scale_split_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    quarter = HEAD_DIM**-0.25
    return ((q * quarter) @ (k * quarter).mT).softmax(-1) @ v


@spellings.attend()
def _scale_on_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k.mT / ROOT)).softmax(-1) @ v


@spellings.attend()
def _scale_after_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), float("-inf"))
    return (scores / ROOT).softmax(-1) @ v


@spellings.attend()
def _scale_as_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.sqrt(torch.tensor(HEAD_DIM, dtype=torch.float32))).softmax(-1) @ v


@spellings.attend()
def _scale_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q * 0.5) @ k.mT) * 1.7 / ROOT).softmax(-1) @ v


@spellings.attend()
def _scale_zero_dimensional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = q.new_full((), HEAD_DIM**-0.5)
    return ((q @ k.mT) * scale).softmax(-1) @ v


@spellings.attend()
def _no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spellings.attend()
def _in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= ROOT
    scores.masked_fill_(~causal(), float("-inf"))
    return scores.softmax(-1) @ v


@spellings.attend()
def _in_place_add(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).mul_(1 / ROOT)
    scores.add_(torch.zeros(TOKENS, TOKENS).masked_fill_(~causal(), -1e9))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(q)


@spellings.attend("train")
def _bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat_q, flat_k, flat_v = (t.reshape(-1, TOKENS, HEAD_DIM) for t in (q, k, v))
    weights = F.softmax(torch.bmm(flat_q, flat_k.transpose(1, 2)) / ROOT, dim=-1)
    return torch.bmm(weights, flat_v).view(-1, HEADS, TOKENS, HEAD_DIM)


@spellings.attend("train")
def _baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, TOKENS).expand(q.shape[0] * HEADS, 1, TOKENS)
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(bias, flat_q, flat_k.mT, beta=1.0, alpha=1 / ROOT)
    return torch.bmm(scores.softmax(-1), flat_v).unflatten(0, (-1, HEADS))


@spellings.attend()
def _baddbmm_beta_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    empty = torch.empty(flat_q.shape[0], TOKENS, TOKENS)
    scores = torch.baddbmm(empty, flat_q, flat_k.mT, beta=0, alpha=1 / ROOT)
    return torch.bmm(scores.softmax(-1), flat_v).unflatten(0, (-1, HEADS))


@spellings.attend()
def _one_head_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outs = []
    for head in range(HEADS):
        weights = (q[:, head] @ k[:, head].transpose(1, 2) / ROOT).softmax(-1)
        outs.append(weights @ v[:, head])
    return torch.stack(outs, dim=1)


@spellings.attend()
def _one_sequence_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack(
        [((a @ b.mT) / ROOT).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
    )


@spellings.attend()
def _unbatched_two_dimensional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        for head in range(HEADS):
            scores = torch.mm(q[row, head], k[row, head].t()) / ROOT
            out[row, head] = torch.mm(scores.softmax(1), v[row, head])
    return out


@spellings.attend("train")
def _soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5.0 * torch.tanh(q @ k.mT / ROOT / 5.0)
    return scores.masked_fill(~causal(), torch.finfo(q.dtype).min).softmax(-1) @ v


@spellings.attend()
def _clamped_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / ROOT).clamp(-2.0, 2.0).softmax(-1) @ v


@spellings.attend()
def _temperature_schedule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    growth = torch.log1p(torch.arange(1, TOKENS + 1, dtype=q.dtype)).view(1, 1, TOKENS, 1)
    return ((q * growth) @ k.mT / ROOT).softmax(-1) @ v


@spellings.attend()
def _weights_used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / ROOT).softmax(-1)
    return weights @ v + weights @ v.tanh()


@spellings.attend()
def _shared_keys_and_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = (q @ k.mT / ROOT).softmax(-1) @ v
    return first + (q.flip(2) @ k.mT / ROOT).softmax(-1) @ v


@spellings.attend()
def _keys_are_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / ROOT).softmax(-1) @ k + v


@spellings.attend()
def _weights_renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / ROOT).softmax(-1) * causal()
    return weights / weights.sum(-1, keepdim=True) @ v


@spellings.attend("declinable")
def _weights_smoothed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / ROOT).softmax(-1)
    return (0.9 * weights + 0.1 / TOKENS) @ v


@spellings.attend("declinable")
def _differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    return ((q1 @ k1.mT).softmax(-1) - 0.3 * (q2 @ k2.mT).softmax(-1)) @ v


@spellings.attend("declinable")
def _top_k_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / ROOT
    least = scores.topk(4, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ v
