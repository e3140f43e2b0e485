"""Oracles, generators and asserts that the tests of kernels and passes share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "token_major", "padded"]


def in_dtype(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Detached copies of tensors, the floating ones in `dtype`, that require grad as before."""
    return [
        tensor.detach()
        .to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        .requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def assert_close_derived(
    actual: Tensor, truth: Tensor, natural: Tensor, *, name: str = "the result"
) -> None:
    """Assert that a kernel errs at most twice as much as the reference does by rounding.

    Args:
        actual: What the kernel gave.
        truth: The reference's result for float64 inputs.
        natural: The reference's result in the working dtype, whose largest distance from `truth`
            is the natural error. For a kernel in float64, the reference's result in float32: the
            error then scales with the dtypes' steps.
        name: What is compared, for the message.

    Raises:
        AssertionError: Shapes differ, an element is too far off, or infinities and NaN are not
            where `truth` has them.
    """
    assert actual.shape == truth.shape, f"{name} has shape {actual.shape}, not {truth.shape}"
    found, wanted = actual.detach().double(), truth.detach().double()
    finite = wanted.isfinite()
    torch.testing.assert_close(
        found[~finite],
        wanted[~finite],
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda text: f"{name} differs where the truth is not finite: {text}",
    )
    error = (natural.detach().double() - wanted)[finite]
    largest = error.abs().max().item() if error.numel() else 0.0
    step = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        largest *= step / torch.finfo(torch.float32).eps
    # rounding to the nearest errs by half a step at most; 2e-45 is the same for subnormal floats
    allowed = 2 * largest + step / 2 * wanted.abs() + 2e-45
    wrong = finite & ~((found - wanted).abs() <= allowed)
    if wrong.any():
        worst = (found - wanted).abs().masked_fill(~wrong, -1.0).argmax()
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off by more than twice the "
            f"natural error {largest:.3g}; worst {found.flatten()[worst].item():.9g}, truth "
            f"{wanted.flatten()[worst].item():.9g} at flat index {int(worst)}"
        )


def random_heads(
    batch: int,
    heads: int,
    tokens: int,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    requires_grad: bool = False,
) -> Tensor:
    """Normal random queries, keys or values [B, H, T, D] in one of the layouts that models make.

    `token_major` is a transposed view of [B, T, H, D]; `padded` is a view into a larger tensor
    that holds NaN around it.
    """
    if layout == "token_major":
        value = torch.randn(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    elif layout == "padded":
        room = torch.full((batch, heads + 1, tokens + 3, size + 5), float("nan"), dtype=dtype)
        value = room[:, 1:, 2:-1, 3:-2]
        value.copy_(torch.randn(batch, heads, tokens, size, dtype=dtype))
    else:
        value = torch.randn(batch, heads, tokens, size, dtype=dtype)
    return value.requires_grad_(requires_grad)
