"""The sums of dO * O over rows, which gradients of a softmax subtract."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.kernels.delta import delta, delta_ref
from sparse_compile.testing import assert_close_derived


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1, 1, 16), (2, 3, 37, 80), (1, 2, 64, 192)])
@pytest.mark.parametrize("has_lse", [False, True])
def test_rows_are_summed(
    size: tuple[int, int, int, int], has_lse: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    out, grad = (torch.randn(size).to(dtype) for _ in range(2))
    grad = grad.transpose(1, 2).contiguous().transpose(1, 2)  # as a model's layout may be
    grad_lse = torch.randn(size[:3]) if has_lse else None
    exact = delta_ref(out.double(), grad.double(), None if grad_lse is None else grad_lse.double())
    assert_close_derived(delta(out, grad, grad_lse), exact, delta_ref(out, grad, grad_lse))
