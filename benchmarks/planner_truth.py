"""What selected attention must give at some tokens, by a formula in more than the dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

N_SAMPLED = 16  # tokens that are looked at, evenly spread, the last among them


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an attention is given, and the gradient of its output."""

    q: Tensor  # [B, Hq, T, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]
    grad: Tensor  # [B, Hq, T, D]
    lists: Tensor  # [B, Hkv, T, K] int32
    block_size: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The truth at some tokens, and the error that PyTorch's own operators make in the dtype."""

    tokens: Tensor
    out: tuple[Tensor, float]
    dq: tuple[Tensor, float]

    @classmethod
    def of(cls, inputs: Inputs, *, dense: bool = False) -> Sampled:
        """Compute it, of selected or of dense causal attention."""
        n_queries = inputs.q.shape[2]
        step = max(1, n_queries // N_SAMPLED)
        tokens = torch.arange(n_queries - 1, -1, -step, device=inputs.q.device)[:N_SAMPLED]
        wide = torch.float64 if inputs.q.dtype == torch.float32 else torch.float32
        truths = _attend(inputs, tokens, dense, wide)
        natural = _attend(inputs, tokens, dense, inputs.q.dtype)
        out, dq = (
            (truth, relative_error(rough, truth))
            for truth, rough in zip(truths, natural, strict=True)
        )
        return cls(tokens=tokens, out=out, dq=dq)

    def error(self, found: Tensor, truth: Tensor) -> float:
        """The relative error of a result [B, Hq, T, D] at the sampled tokens."""
        return relative_error(found[:, :, self.tokens], truth)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference, over that of the truth."""
    return float(
        (actual.to(truth.dtype) - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    )


def _attend(
    inputs: Inputs, tokens: Tensor, dense: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the queries at some tokens, [B, Hq, n, D] each."""
    n_keys, heads = inputs.k.shape[2], inputs.k.shape[1]
    position = tokens + n_keys - inputs.q.shape[2]
    if dense:
        key = torch.arange(n_keys, device=tokens.device).expand(1, 1, 1, -1)
        keep = key <= position[:, None]
    else:
        blocks = inputs.lists[:, :, tokens].long()  # [B, Hkv, n, K]
        offset = torch.arange(inputs.block_size, device=tokens.device)
        key = (blocks[..., None] * inputs.block_size + offset).flatten(-2)  # [B, Hkv, n, X]
        keep = (blocks >= 0).repeat_interleave(inputs.block_size, -1)
        keep = keep & (key <= position[:, None]) & (key < n_keys)
    q = inputs.q[:, :, tokens].to(dtype).unflatten(1, (heads, -1))  # [B, Hkv, G, n, D]
    grad = inputs.grad[:, :, tokens].to(dtype).unflatten(1, (heads, -1))
    q = q.detach().requires_grad_()
    if dense:
        k, v = inputs.k.to(dtype), inputs.v.to(dtype)
        scores = torch.einsum("bhgnd,bhxd->bhgnx", q, k)
    else:
        at = key.clamp(0, n_keys - 1)
        b = torch.arange(at.shape[0], device=at.device)[:, None, None, None]
        h = torch.arange(heads, device=at.device)[None, :, None, None]
        k, v = inputs.k[b, h, at].to(dtype), inputs.v[b, h, at].to(dtype)  # [B, Hkv, n, X, D]
        scores = torch.einsum("bhgnd,bhnxd->bhgnx", q, k)
    scores = (scores * inputs.scale).masked_fill(~keep[:, :, None], float("-inf"))
    weights = scores.softmax(-1)
    form = "bhgnx,bhxd->bhgnd" if dense else "bhgnx,bhnxd->bhgnd"
    out = torch.einsum(form, weights, v)
    (dq,) = torch.autograd.grad(out, q, grad)
    return out.detach().flatten(1, 2), dq.flatten(1, 2)
