"""What launchers of Triton kernels say of sizes, dtypes and devices."""

from __future__ import annotations

from typing import Any

import torch
import triton


class Repeated:
    """A Triton kernel that is launched again and again with arguments of the same kinds.

    Triton looks at every argument of a launch to find the compiled kernel: tens of microseconds for
    sixty of them, as long as a small launch runs. Here only the first launch does.

    All arguments are given by position, constants too. Between launches only those may change that
    no code depends on: numbers that the kernel declares as `do_not_specialize`, and tensors of the
    same dtype whose memory is as aligned.

    Args:
        kernel: The Triton function.
        options: Of its launches, as `num_warps`.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        """Launches nothing yet."""
        self._kernel = kernel
        self._options = options
        self._compiled: Any = None  # stays None where kernels are interpreted

    def __call__(self, programs: int, *args: Any) -> None:
        """Launch so many programs."""
        if self._compiled is None:
            self._compiled = self._kernel[(programs,)](*args, **self._options)
        else:
            self._compiled[(programs, 1, 1)](*args)


def padded(size: int) -> int:
    """Channels of a tile: a power of two, and as many as a product of tiles takes at least."""
    return max(16, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How products of tiles treat float32: as it is; for other dtypes it makes no difference."""
    return "ieee" if dtype == torch.float32 else "tf32"


def are_compiled() -> bool:
    """Whether kernels are compiled, not interpreted."""
    return not triton.knobs.runtime.interpret


def n_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 on the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_copy_engine(device: torch.device) -> bool:
    """Whether tiles can be read through tensor descriptors, as Hopper's copy engine (TMA) does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
