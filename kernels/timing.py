"""How long a launch takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

INTERPRETED_RUNS = 1  # each takes seconds


def device() -> torch.device | None:
    """Where kernels can run in this process: a GPU, or the CPU by Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    from triton import knobs

    return torch.device("cpu") if knobs.runtime.interpret else None


def median_ms(run: Callable[[], object], device: torch.device, measure_ms: int) -> float:
    """The median time of a call, with a cold L2 cache on a GPU.

    Args:
        run: What is called; it must not wait for the device.
        device: Where it runs. Without a GPU the kernels are interpreted, and the wall clock is all
            that can be read.
        measure_ms: About how long to measure on a GPU, after a warm-up of a quarter.
    """
    if device.type == "cuda":
        from triton import testing

        return float(
            testing.do_bench(run, warmup=measure_ms // 4, rep=measure_ms, return_mode="median")
        )
    times = []
    for _ in range(INTERPRETED_RUNS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
