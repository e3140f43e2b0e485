"""What launchers of Triton kernels say of sizes and dtypes."""

from __future__ import annotations

import torch
import triton


def padded(size: int) -> int:
    """Channels of a tile: a power of two, and as many as a product of tiles takes at least."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How products of tiles treat float32: as it is; for other dtypes it makes no difference."""
    return "ieee" if dtype == torch.float32 else "tf32"
