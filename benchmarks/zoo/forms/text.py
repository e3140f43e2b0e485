"""Small language models written in the styles that teaching code and old repositories have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.forms.parts import BATCH, HEAD_DIM, HEADS, TOKENS, WIDTH, Forms, sequence

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Built

text = Forms("text")
VOCAB = 50


def _tokens(length: int = TOKENS) -> Tensor:
    return torch.randint(1, VOCAB, (BATCH, length))


class _Block(nn.Module):
    """Pre-norm residual block around some attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Decoder(nn.Module):
    """Token and position embeddings, two blocks, a head."""

    def __init__(self, blocks: list[nn.Module], learned_positions: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(32, WIDTH) if learned_positions else None
        self.h = nn.ModuleList(blocks)
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class _CausalSelfAttention(nn.Module):
    """The nanoGPT way: fused projection, a lower-triangular buffer, masked_fill."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.flash = flash
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        k, q, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (k, q, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
            y = F.dropout(F.softmax(att, dim=-1), 0.1, self.training) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


@text.add("train")
def _nanogpt() -> Built:
    return _Decoder([_Block(_CausalSelfAttention(False)) for _ in range(2)]), (_tokens(),), {}


@text.add()
def _nanogpt_flash() -> Built:
    return _Decoder([_Block(_CausalSelfAttention(True)) for _ in range(2)]), (_tokens(),), {}


class _SeparateProjections(nn.Module):
    """The minGPT way before the fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("mask", torch.tril(torch.ones(32, 32))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        k, q, v = (
            p(x).view(b, t, HEADS, -1).transpose(1, 2) for p in (self.key, self.query, self.value)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :t, :t] == 0, -1e10)
        y = F.softmax(att, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


@text.add()
def _mingpt() -> Built:
    return _Decoder([_Block(_SeparateProjections()) for _ in range(2)]), (_tokens(),), {}


class _SlicedMask(_SeparateProjections):
    """GPT-2's first PyTorch port: the mask cut by ns - nd, `w * b - 1e4 * (1 - b)`."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, v = (p(x).view(b, t, HEADS, -1).permute(0, 2, 1, 3) for p in (self.query, self.value))
        k = self.key(x).view(b, t, HEADS, -1).permute(0, 2, 3, 1)
        w = torch.matmul(q, k) / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        mask = self.mask[:, :, ns - nd : ns, :ns]
        w = nn.Softmax(dim=-1)(w * mask - 1e4 * (1 - mask))
        return self.proj(torch.matmul(w, v).permute(0, 2, 1, 3).contiguous().view(b, t, c))


@text.add("train")
def _gpt2_first_port() -> Built:
    return _Decoder([_Block(_SlicedMask()) for _ in range(2)]), (_tokens(),), {}


def _annotated_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: nn.Module
) -> tuple[Tensor, Tensor]:
    """The annotated transformer's function: returns the weights too, which its module keeps."""
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    weights = dropout(scores.softmax(dim=-1))
    return torch.matmul(weights, value), weights


class _AnnotatedHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = nn.Dropout(0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        n = q.size(0)
        q, k, v = (
            lin(x).view(n, -1, HEADS, HEAD_DIM).transpose(1, 2)
            for lin, x in zip(self.linears, (q, k, v), strict=False)
        )
        x, _ = _annotated_attention(q, k, v, mask, self.dropout)
        return self.linears[-1](x.transpose(1, 2).contiguous().view(n, -1, WIDTH))


class _Annotated(nn.Module):
    """One encoder and one decoder layer with source and target masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB, WIDTH)
        self.encoder_attn, self.self_attn, self.src_attn = (_AnnotatedHeads() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src_mask = (src != 0).unsqueeze(-2).unsqueeze(1)
        ahead = torch.triu(torch.ones(1, tgt.size(-1), tgt.size(-1)), diagonal=1).type(torch.uint8)
        tgt_mask = ((tgt != 0).unsqueeze(-2) & (ahead == 0)).unsqueeze(1)
        memory = self.source(src) * math.sqrt(WIDTH)
        inner = self.norms[0](memory)
        memory = memory + self.encoder_attn(inner, inner, inner, src_mask)
        x = self.target(tgt) * math.sqrt(WIDTH)
        inner = self.norms[1](x)
        x = x + self.self_attn(inner, inner, inner, tgt_mask)
        return self.norms[3](x + self.src_attn(self.norms[2](x), memory, memory, src_mask))


@text.add("train")
def _annotated_transformer() -> Built:
    src, tgt = _tokens(9), _tokens(7)
    src[1, -2:] = 0
    return _Annotated(), (src, tgt), {}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class _Rotary(nn.Module):
    """The Llama way, grouped keys, RMS norm on queries and keys, a device-built mask."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wkv = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, HEADS, HEAD_DIM)
        k, v = self.wkv(x).view(b, t, 2, HEADS // 2, HEAD_DIM).unbind(2)
        place = torch.arange(t, device=x.device)
        angle = place[:, None] * 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = torch.cat([angle, angle], dim=-1)[None, :, None]
        q, k = (_rotate(y, angle.cos(), angle.sin()) for y in (self.q_norm(q), self.k_norm(k)))
        k, v = (
            y[:, :, :, None].expand(b, t, 2, 2, HEAD_DIM).reshape(b, t, HEADS, HEAD_DIM)
            for y in (k, v)
        )
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD_DIM)
        keep = place[:, None] >= place[None, :]
        if self.window:
            keep = keep & (place[:, None] - place[None, :] < self.window)
        scores = scores + torch.where(keep, 0.0, torch.finfo(scores.dtype).min)[None, None]
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        return self.wo(out.transpose(1, 2).contiguous().view(b, t, -1))


@text.add("train")
def _llama_reference() -> Built:
    return _Decoder([_Block(_Rotary()) for _ in range(2)], False), (_tokens(),), {}


@text.add("train")
def _mistral_reference() -> Built:
    return _Decoder([_Block(_Rotary(5)), _Block(_Rotary())], False), (_tokens(),), {}


class _Complex(_Rotary):
    """Rotary embedding by complex multiplication, in the merged-head layout."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, HEADS, HEAD_DIM)
        k, v = self.wkv(x).view(b, t, 2, HEADS // 2, HEAD_DIM).unbind(2)
        angle = torch.outer(
            torch.arange(t).float(), 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        )
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2)) * turn
            ).flatten(3)
            for y in (q, k)
        )
        k, v = (torch.repeat_interleave(y, 2, dim=2) for y in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * HEAD_DIM**-0.5
        mask = torch.full((t, t), float("-inf"), device=x.device)
        scores = scores + torch.triu(mask, diagonal=1)
        return self.wo(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))


@text.add("train")
def _llama_complex_rotary() -> Built:
    return _Decoder([_Block(_Complex()) for _ in range(2)], False), (_tokens(),), {}


class _Cached(_SeparateProjections):
    """Decoding one token over keys of the past."""

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        t, s = q.shape[2], k.shape[2]
        scores = q @ k.mT / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(~torch.ones(t, s, dtype=torch.bool).tril(s - t), float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@text.add()
def _one_token_with_past() -> Built:
    return _Cached(), (sequence(1), torch.randn(2, BATCH, HEADS, 9, HEAD_DIM)), {}


@text.add()
def _chunk_with_past() -> Built:
    return _Cached(), (sequence(4), torch.randn(2, BATCH, HEADS, 9, HEAD_DIM)), {}


class _Written(_SeparateProjections):
    """A cache of fixed size, written in place, with a device-side position."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        keys, values = keys.clone(), values.clone()
        keys[:, :, place] = k
        values[:, :, place] = v
        keep = torch.arange(keys.shape[2])[None, :] <= place[:, None]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=keep)
        return self.proj(out.transpose(1, 2).flatten(2))


@text.add()
def _static_cache() -> Built:
    cache = torch.zeros(BATCH, HEADS, 16, HEAD_DIM)
    return _Written(), (sequence(1), cache, cache.clone(), torch.tensor([3])), {}


class _Shifted(nn.Module):
    """Transformer-XL: memory, content and position biases, the relative shift."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.r = (nn.Linear(WIDTH, n * WIDTH, bias=False) for n in (1, 2, 1))
        self.u, self.w = (
            nn.Parameter(torch.randn(HEADS, HEAD_DIM)),
            nn.Parameter(torch.randn(HEADS, HEAD_DIM)),
        )

    def forward(self, x: Tensor, memory: Tensor, places: Tensor) -> Tensor:
        context = torch.cat([memory, x], dim=0)
        t, s, b = x.shape[0], context.shape[0], x.shape[1]
        q = self.q(x).view(t, b, HEADS, HEAD_DIM)
        k, v = self.kv(context).view(s, b, HEADS, 2 * HEAD_DIM).chunk(2, dim=-1)
        r = self.r(places).view(s, HEADS, HEAD_DIM)
        ac = torch.einsum("ibnd,jbnd->ijbn", q + self.u, k)
        bd = torch.einsum("ibnd,jnd->ijbn", q + self.w, r)
        padded = torch.cat([bd.new_zeros(t, 1, b, HEADS), bd], dim=1)
        bd = padded.view(s + 1, t, b, HEADS)[1:].view_as(bd)
        scores = (ac + bd) * HEAD_DIM**-0.5
        ahead = torch.triu(torch.ones(t, s), diagonal=1 + s - t).bool()[:, :, None, None]
        weights = F.softmax(scores.masked_fill(ahead, -1e30), dim=1)
        return torch.einsum("ijbn,jbnd->ibnd", weights, v).flatten(2)


@text.add("train")
def _transformer_xl() -> Built:
    args = (torch.randn(6, BATCH, WIDTH), torch.randn(5, BATCH, WIDTH), torch.randn(11, WIDTH))
    return _Shifted(), args, {}


@text.add("train")
def _torch_encoder_layer() -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[1, -3:] = True
    return layer, (sequence(),), {"src_key_padding_mask": padding}


@text.add("train")
def _torch_encoder_causal() -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    return (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        (torch.randn(TOKENS, BATCH, WIDTH), mask),
        {"is_causal": True},
    )


@text.add()
def _torch_decoder_layer() -> Built:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    return layer, (sequence(), sequence(7)), {"tgt_mask": mask}


@text.add()
def _torch_transformer() -> Built:
    model = nn.Transformer(WIDTH, HEADS, 1, 1, 64, batch_first=True)
    return model, (sequence(9), sequence(7)), {}


class _Multi(nn.Module):
    """`nn.MultiheadAttention` with the weights asked for or not, and used or not."""

    def __init__(self, need: bool, keep: bool, **options: object) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.need, self.keep = need, keep

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        out, weights = self.mha(x, x, x, need_weights=self.need)
        return (out, weights) if self.keep else out


@text.add("train")
def _mha_without_weights() -> Built:
    return _Multi(False, False), (sequence(),), {}


@text.add()
def _mha_weights_asked_and_dropped() -> Built:
    return _Multi(True, False), (sequence(),), {}


@text.add("declinable")
def _mha_weights_returned() -> Built:
    return _Multi(True, True), (sequence(),), {}


@text.add()
def _mha_bias_kv_and_zero_attention() -> Built:
    return _Multi(False, False, add_bias_kv=True, add_zero_attn=True), (sequence(),), {}
