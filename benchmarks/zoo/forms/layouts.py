"""Whole attention layers that differ in how they lay out heads, share keys and project."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.forms.parts import (
    BATCH,
    HEAD_DIM,
    HEADS,
    TOKENS,
    WIDTH,
    Forms,
    causal,
    sequence,
)

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Built

layouts = Forms("layouts")
SCALE = HEAD_DIM**-0.5


@layouts.attend("train", kv_heads=2)
def _grouped_repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    return (q @ k.mT * SCALE).masked_fill(~causal(), float("-inf")).softmax(-1) @ v


@layouts.attend("train", kv_heads=2)
def _grouped_expand_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = (q.shape[0], 2, 2, TOKENS, HEAD_DIM)
    k, v = (t[:, :, None].expand(shape).reshape(q.shape) for t in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@layouts.attend(kv_heads=2)
def _grouped_repeat_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat(1, 2, 1, 1) for t in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@layouts.attend("train", kv_heads=2)
def _grouped_five_dimensional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (2, 2))
    weights = (grouped @ k[:, :, None].mT * SCALE).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


@layouts.attend(kv_heads=2)
def _grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (2, 2))
    weights = torch.einsum("bhgtd,bhsd->bhgts", grouped, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhgts,bhsd->bhgtd", weights, v).flatten(1, 2)


@layouts.attend(kv_heads=2)
def _grouped_tokens_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    merged = q.unflatten(1, (2, 2)).flatten(2, 3)
    weights = (merged @ k.mT * SCALE).softmax(-1)
    return (weights @ v).unflatten(2, (2, TOKENS)).flatten(1, 2)


@layouts.attend(kv_heads=2)
def _grouped_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@layouts.attend("train", kv_heads=1)
def _single_key_head_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1) @ v


@layouts.attend(kv_heads=1)
def _single_key_head_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = q.transpose(1, 2).reshape(q.shape[0], TOKENS * HEADS, HEAD_DIM)
    weights = torch.bmm(rows, k[:, 0].mT).mul(SCALE).softmax(-1)
    return torch.bmm(weights, v[:, 0]).view(-1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)


@layouts.attend("train")
def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@layouts.attend()
def _sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(), scale=0.3)


@layouts.attend()
def _sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(~causal(), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, mask)


class _Fused(nn.Module):
    """One projection for Q, K and V; heads split by a subclass."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)


class _ThreeFirst(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


@layouts.add("train")
def _fused_three_first() -> Built:
    return _ThreeFirst(), (sequence(),), {}


class _PerHead(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        mixed = self.qkv(x).view(*x.shape[:2], HEADS, 3 * HEAD_DIM).transpose(1, 2)
        q, k, v = mixed.split(HEAD_DIM, dim=-1)
        weights = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~causal(), -1e9).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@layouts.add()
def _fused_per_head() -> Built:
    return _PerHead(), (sequence(),), {}


class _TokensFirst(_Fused):
    """[B, T, H, D] all the way, by einsum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bthd,bshd->bhts", q * SCALE, k)
        return self.proj(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))


@layouts.add("train")
def _tokens_first_einsum() -> Built:
    return _TokensFirst(), (sequence(),), {}


class _HeadsLast(_Fused):
    """Scores [B, T, S, H], softmax over the third of four axes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in self.qkv(x).chunk(3, dim=-1))
        weights = torch.einsum("bthd,bshd->btsh", q, k).mul(SCALE).softmax(dim=2)
        return self.proj(torch.einsum("btsh,bshd->bthd", weights, v).flatten(2))


@layouts.add()
def _heads_last_softmax_in_the_middle() -> Built:
    return _HeadsLast(), (sequence(),), {}


class _SequenceFirst(_Fused):
    """[T, B, C] inputs and [B * H, T, D] heads, as fairseq has them."""

    def forward(self, x: Tensor) -> Tensor:
        t, b, c = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = (q * SCALE).contiguous().view(t, b * HEADS, HEAD_DIM).transpose(0, 1)
        k, v = (y.contiguous().view(t, b * HEADS, HEAD_DIM).transpose(0, 1) for y in (k, v))
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)).float(), dim=-1).type_as(q)
        return self.proj(torch.bmm(weights, v).transpose(0, 1).contiguous().view(t, b, c))


@layouts.add("train")
def _sequence_first_merged_heads() -> Built:
    return _SequenceFirst(), (torch.randn(TOKENS, BATCH, WIDTH),), {}


class _SingleHead(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q @ k.mT * WIDTH**-0.5).softmax(-1) @ v)


@layouts.add("train")
def _three_dimensional_single_head() -> Built:
    return _SingleHead(), (sequence(),), {}


@layouts.add()
def _two_dimensional_unbatched() -> Built:
    return _SingleHead(), (torch.randn(TOKENS, WIDTH),), {}


class _SplitHeads(_Fused):
    """Heads stacked on the batch by `torch.cat` of chunks, as in the Tensor2Tensor ports."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.cat(t.chunk(HEADS, dim=2), dim=0) for t in self.qkv(x).chunk(3, dim=-1))
        out = F.softmax(q @ k.mT * SCALE, dim=-1) @ v
        return self.proj(torch.cat(out.chunk(HEADS, dim=0), dim=2))


@layouts.add()
def _heads_stacked_by_cat() -> Built:
    return _SplitHeads(), (sequence(),), {}


class _HeadModules(nn.Module):
    """A list of single-head attentions whose outputs are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 3 * HEAD_DIM) for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for head in self.heads:
            q, k, v = head(x).chunk(3, dim=-1)
            scores = (q @ k.mT * SCALE).masked_fill(~causal(), float("-inf"))
            outs.append(scores.softmax(-1) @ v)
        return torch.cat(outs, dim=-1)


@layouts.add()
def _list_of_heads() -> Built:
    return _HeadModules(), (sequence(),), {}


class _Cross(nn.Module):
    """Queries from one sequence, keys and values from another of another length and width."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(context, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT) * SCALE).softmax(-1).matmul(v).transpose(1, 2).flatten(2)


@layouts.add("train")
def _cross_attention() -> Built:
    return _Cross(24), (sequence(), torch.randn(BATCH, 7, 24)), {}


@layouts.add()
def _cross_attention_one_query() -> Built:
    return _Cross(24), (sequence(1), torch.randn(BATCH, 7, 24)), {}


class _Latent(nn.Module):
    """Multi-head latent attention: low-rank keys and values, D of V differs from D of Q."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * 12)
        self.down = nn.Linear(WIDTH, 16 + 4)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, HEADS * (8 + 6))
        self.out = nn.Linear(HEADS * 6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, 12)).transpose(1, 2)
        latent, shared = self.down(x).split([16, 4], dim=-1)
        k, v = (
            self.up(self.norm(latent)).unflatten(-1, (HEADS, 14)).transpose(1, 2).split([8, 6], -1)
        )
        k = torch.cat([k, shared[:, None].expand(-1, HEADS, -1, -1)], dim=-1)
        scores = (q @ k.mT * 12**-0.5).masked_fill(~causal(), float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@layouts.add("train")
def _latent_keys() -> Built:
    return _Latent(), (sequence(),), {}


class _SplitScores(nn.Module):
    """Scores that are the sum of two products: content and position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.places = nn.Parameter(torch.randn(HEADS, TOKENS, HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        scores = (q @ k.mT + q @ self.places.mT) * SCALE
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@layouts.add("train")
def _content_and_position_scores() -> Built:
    return _SplitScores(), (sequence(),), {}


@layouts.add()
def _content_and_position_split_product() -> Built:
    class Rope(_SplitScores):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
            )
            scores = (q[..., :5] @ k[..., :5].mT + q[..., 5:] @ k[..., 5:].mT) * SCALE
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return Rope(), (sequence(),), {}


class _Normed(_Fused):
    """Cosine attention: unit queries and keys, one learned temperature a head."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(0.5, 2.0, HEADS).view(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * self.log_scale.clamp(max=4.6).exp()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@layouts.add("train")
def _cosine_per_head_temperature() -> Built:
    return _Normed(), (sequence(),), {}


class _Sinks(_Fused):
    """A learned logit a head, concatenated to the scores and dropped after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * SCALE).masked_fill(~causal(), float("-inf"))
        sinks = self.sinks.view(1, HEADS, 1, 1).expand(x.shape[0], -1, TOKENS, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@layouts.add("train")
def _sink_logit() -> Built:
    return _Sinks(), (sequence(),), {}


class _ZeroKey(_Fused):
    """A null key and value of zeros in front of the others (`add_zero_attn`)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        k, v = (F.pad(t, (0, 0, 1, 0)) for t in (k, v))
        scores = (q @ k.mT * SCALE).masked_fill(F.pad(~causal(), (1, 0)), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@layouts.add()
def _null_key() -> Built:
    return _ZeroKey(), (sequence(),), {}


class _Mixed(_Fused):
    """Talking heads: weights mixed over heads before the values."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1 * torch.randn(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * SCALE).softmax(-1)
        weights = torch.einsum("bhts,hg->bgts", weights, self.mix)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@layouts.add("declinable")
def _talking_heads() -> Built:
    return _Mixed(), (sequence(),), {}


class _Returned(_Fused):
    """Attention whose weights the caller gets."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * SCALE).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


@layouts.add("declinable")
def _weights_returned() -> Built:
    return _Returned(), (sequence(),), {}


class _Dropped(_ThreeFirst):
    """Dropout on the weights; compared in eval mode, where it is the identity."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        weights = F.dropout((q @ k.mT * SCALE).softmax(-1), 0.1, self.training)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


@layouts.add()
def _dropout_in_eval() -> Built:
    return _Dropped(), (sequence(),), {}
