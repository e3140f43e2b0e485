"""Selected attention on the CPU: gathers the selected keys of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_NUMBERS = 2**20  # of gathered keys or values at a time: they stay in the cache


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [B, Hq, T, Dv] and the natural log-sum-exp [B, Hq, T]."""
    batch, query_heads, n_tokens, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty((batch, query_heads, n_tokens, v.shape[3]))
    lse = q.new_empty((batch, query_heads, n_tokens), dtype=acc)
    by_group = q.unflatten(1, (k.shape[1], -1)).to(acc)  # [B, Hkv, G, T, D]
    k, v = k.to(acc), v.to(acc)
    for tokens, keys, keep in _tiles(q, k, v, block_indices, cu_seqlens, block_size, causal):
        scores = _scores(by_group[:, :, :, tokens], _gathered(k, keys), keep, scale)
        row_lse = scores.logsumexp(-1)
        weights = (scores - _finite(row_lse)[..., None]).exp()
        part = torch.einsum("bhgcn,bhcnd->bhgcd", weights, _gathered(v, keys))
        out[:, :, tokens] = part.flatten(1, 2).to(q.dtype)
        lse[:, :, tokens] = row_lse.flatten(1, 2)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
    *, block_size: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    acc, heads = lse.dtype, k.shape[1]
    delta = (grad_out.to(acc) * out.to(acc)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    by_group, grads, lse, delta = (
        x.unflatten(1, (heads, -1)).to(acc) for x in (q, grad_out, lse, delta)
    )
    dtypes = k.dtype, v.dtype
    k, v = k.to(acc), v.to(acc)
    dq = torch.empty(by_group.shape, dtype=acc)
    dk, dv = (torch.zeros(x.shape, dtype=acc) for x in (k, v))
    for tokens, keys, keep in _tiles(q, k, v, block_indices, cu_seqlens, block_size, causal):
        some_q, some_k, grad = (
            by_group[:, :, :, tokens],
            _gathered(k, keys),
            grads[:, :, :, tokens],
        )
        scores = _scores(some_q, some_k, keep, scale)
        weights = (scores - _finite(lse[:, :, :, tokens])[..., None]).exp()
        above = torch.einsum("bhgcd,bhcnd->bhgcn", grad, _gathered(v, keys))
        inner = weights * (above - delta[:, :, :, tokens, None]) * scale
        dq[:, :, :, tokens] = torch.einsum("bhgcn,bhcnd->bhgcd", inner, some_k)
        _add(dk, keys, torch.einsum("bhgcn,bhgcd->bhcnd", inner, some_q))
        _add(dv, keys, torch.einsum("bhgcn,bhgcd->bhcnd", weights, grad))
    return dq.flatten(1, 2).to(q.dtype), dk.to(dtypes[0]), dv.to(dtypes[1])


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None,
    block_size: int, causal: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:  # fmt: skip
    """Some tokens at a time, the keys they selected and which of these they read [B, Hkv, C, n]."""
    batch, heads, n_tokens, n_slots = block_indices.shape
    token = torch.arange(n_tokens)
    if cu_seqlens is None:
        start, end = torch.zeros_like(token), torch.full_like(token, k.shape[2])
        position = token + (k.shape[2] - n_tokens)
    else:
        of = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        start, end, position = cu_seqlens.long()[of], cu_seqlens.long()[of + 1], token
    per_token = batch * heads * n_slots * block_size * max(k.shape[3], v.shape[3])
    step = max(1, TILE_NUMBERS // per_token)
    for first in range(0, n_tokens, step):
        tokens = slice(first, first + step)
        block = block_indices[:, :, tokens].long()[..., None]  # [B, Hkv, C, K, 1]
        some = (x[tokens][:, None, None] for x in (start, end, position))
        begin, stop, own = some  # [C, 1, 1]
        key = begin + block * block_size + torch.arange(block_size)
        keep = (block >= 0) & (key < stop)
        if causal:
            keep &= key <= own
        yield tokens, key.masked_fill(~keep, 0).flatten(3), keep.flatten(3)


def _gathered(x: Tensor, keys: Tensor) -> Tensor:
    """Rows of K or V [B, Hkv, S, D] at `keys` [B, Hkv, C, n]: [B, Hkv, C, n, D]."""
    return x.flatten(0, 2).index_select(0, _rows(x, keys)).view(*keys.shape, x.shape[3])


def _add(total: Tensor, keys: Tensor, part: Tensor) -> None:
    total.view(-1, total.shape[3]).index_add_(0, _rows(total, keys), part.flatten(0, 3))


def _rows(x: Tensor, keys: Tensor) -> Tensor:
    """Keys of all sequences and heads, counted through: an index of whole rows is read at once."""
    heads = torch.arange(keys.shape[0] * keys.shape[1]) * x.shape[2]
    return (keys.flatten(0, 1) + heads[:, None, None]).flatten()


def _scores(q: Tensor, k: Tensor, keep: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("bhgcd,bhcnd->bhgcn", q, k) * scale
    return scores.masked_fill(~keep[:, :, None], float("-inf"))


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == float("-inf"), 0.0)
