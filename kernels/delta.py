"""What the gradient of a softmax subtracts from every row: the sum of dO * O."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.launching import padded

ROWS = 32  # of a program


@triton.jit(do_not_specialize=["T", "n_rows"])
def _delta_kernel(
    out_ptr, grad_ptr, grad_lse_ptr, delta_ptr,
    stride_o_b, stride_o_h, stride_o_t, stride_o_d,
    stride_g_b, stride_g_h, stride_g_t, stride_g_d, T, n_rows,
    HEADS: tl.constexpr, DV: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_M rows of [B, Hq, T]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    live = at < n_rows
    dv = tl.arange(0, BLOCK_DV)
    there = live[:, None] & (dv[None, :] < DV)
    b, h, t = at // T // HEADS, at // T % HEADS, at % T
    o_at = out_ptr + (b * stride_o_b + h * stride_o_h + t * stride_o_t)[:, None]
    out = tl.load(o_at + dv[None, :] * stride_o_d, mask=there, other=0.0)
    g_at = grad_ptr + (b * stride_g_b + h * stride_g_h + t * stride_g_t)[:, None]
    grad = tl.load(g_at + dv[None, :] * stride_g_d, mask=there, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=live, other=0.0)
    tl.store(delta_ptr + at, delta, mask=live)


def delta_ref(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """What the kernel must compute, in plain PyTorch."""
    acc = torch.promote_types(out.dtype, torch.float32)
    delta = (out.to(acc) * grad_out.to(acc)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse


def delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """The sum of dO * O over every row, less the gradient of its log-sum-exp: [B, Hq, T] float32.

    Args:
        out: The output, [B, Hq, T, Dv].
        grad_out: Its gradient, of the same shape.
        grad_lse: The gradient of the log-sum-exp, [B, Hq, T], if there is one.
    """
    _, heads, n_tokens, value_dim = out.shape
    found = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    has_lse = grad_lse is not None
    _delta_kernel[(triton.cdiv(found.numel(), ROWS),)](
        out, grad_out, grad_lse.contiguous() if has_lse else found, found,
        *out.stride(), *grad_out.stride(), n_tokens, found.numel(),
        heads, value_dim, has_lse, padded(value_dim), ROWS,
    )  # fmt: skip
    return found
