"""Slow forms of PyTorch's fused inference layers, so that the attention inside can be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def decomposition(target: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The slow form of a fused layer's function, or None for any other function."""
    return _SLOW.get(target)


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    out_weight: Tensor, out_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm1_weight: Tensor, norm1_bias: Tensor, norm2_weight: Tensor, norm2_bias: Tensor,
    ffn1_weight: Tensor, ffn1_bias: Tensor, ffn2_weight: Tensor, ffn2_bias: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """`torch._transformer_encoder_layer_fwd` in plain operators; src [B, T, E]."""

    def attend(y: Tensor) -> Tensor:
        return _attend(y, num_heads, qkv_weight, qkv_bias, out_weight, out_bias, mask, mask_type)

    def feed_forward(y: Tensor) -> Tensor:
        y = F.linear(y, ffn1_weight, ffn1_bias)
        return F.linear(F.gelu(y) if use_gelu else F.relu(y), ffn2_weight, ffn2_bias)

    def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), weight, bias, eps)

    if norm_first:
        src = src + attend(norm(src, norm1_weight, norm1_bias))
        return src + feed_forward(norm(src, norm2_weight, norm2_bias))
    src = norm(src + attend(src), norm1_weight, norm1_bias)
    return norm(src + feed_forward(src), norm2_weight, norm2_bias)


def _attend(
    y: Tensor, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor,
    out_bias: Tensor, mask: Tensor | None, mask_type: int | None,
) -> Tensor:  # fmt: skip
    if mask is not None and mask_type not in (0, 1):
        raise ValueError(f"mask_type {mask_type} of a fused encoder layer is not known")
    batch, tokens, width = y.shape
    qkv = F.linear(y, qkv_weight, qkv_bias).view(batch, tokens, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = torch.matmul(q * (width // num_heads) ** -0.5, k.transpose(-2, -1))
    if mask is not None:
        wide = mask[None, None] if mask_type == 0 else mask[:, None, None]
        scores = scores.masked_fill(wide.to(torch.bool), float("-inf"))
    out = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(batch, tokens, width)
    return F.linear(out, out_weight, out_bias)


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor,
    qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None,
    need_weights: bool = True, average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`torch._native_multi_head_attention` for self-attention without weights; query [B, T, E]."""
    if need_weights or query is not key or key is not value:
        raise ValueError("only self-attention whose weights are not returned is opened")
    out = _attend(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    return out, None


_SLOW: dict[Any, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch._native_multi_head_attention: multi_head_attention,
}
