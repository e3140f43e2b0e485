"""What launchers of Triton kernels say of sizes, dtypes and devices."""

from __future__ import annotations

import torch
import triton


def padded(size: int) -> int:
    """Channels of a tile: a power of two, and as many as a product of tiles takes at least."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How products of tiles treat float32: as it is; for other dtypes it makes no difference."""
    return "ieee" if dtype == torch.float32 else "tf32"


def n_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 on the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
