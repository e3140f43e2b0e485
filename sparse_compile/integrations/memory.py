"""How much memory a piece of work needed at its peak."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class PeakMemory:
    """A block's peak of memory above what was in use when it began.

    On a GPU: of PyTorch's allocator. On a CPU: of the process's resident pages, by the kernel's
    own high-water mark, which is reset when the block begins and so misses no short peak.

        with PeakMemory("cpu") as peak:
            work()
        peak.n_bytes  # None where the kernel does not let us reset the mark
    """

    def __init__(self, device: str) -> None:
        """Measure on `device`, `"cpu"` or `"cuda"`."""
        self.device = device
        self.n_bytes: int | None = None
        self._before: int | None = None

    @property
    def method(self) -> str:
        """What is measured, in words."""
        if self.device == "cuda":
            return "torch.cuda.max_memory_allocated, above its value before the run"
        return "high-water mark of resident memory, above its value before the run"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _reset_high_water_mark()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            return
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        self.n_bytes = None if peak is None else max(0, peak - self._before)


def _reset_high_water_mark() -> int | None:
    """Give freed memory back to the system, start a new mark; the bytes now in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        RESET.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    """A field of the process's status in bytes; None where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024
