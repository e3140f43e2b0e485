"""Measures what a device reaches: the rates that the cost model divides by.

Copies through memory, tiles that are read again and again, float32 additions, matrix products, one
program alone, and launches. Each number is the median of some runs after a warm-up.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator

import msgspec
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile import rates
from sparse_compile.rates import Level, Rates

TILE = 4096  # int32 numbers of a tile: 64 rows of 128 numbers of two bytes
STEP = 7919  # from a program's tile to its next: a prime, so that neighbours are far apart
MIB = 2**20


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure. What is here takes a GPU a few seconds."""

    copy_bytes: int = 1024 * MIB
    reread_footprints: tuple[int, ...] = tuple(
        n * MIB for n in (4, 8, 16, 24, 32, 48, 64, 128, 256, 1024)
    )
    atomic_footprints: tuple[int, ...] = tuple(n * MIB for n in (4, 16, 32, 64, 256))
    traffic_bytes: int = 8192 * MIB  # of a run that reads again and again
    product_size: int = 8192  # of square matrices
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    n_launches: int = 200
    n_runs: int = 9
    warm_up_s: float = 0.1  # before each number


@triton.jit(do_not_specialize=["n_tiles", "n_reads"])
def _reread_kernel(x_ptr, out_ptr, n_tiles, n_reads, STEP: tl.constexpr, TILE: tl.constexpr):
    """A program adds up `n_reads` tiles."""
    program = tl.program_id(0)
    at = tl.arange(0, TILE)  # [TILE]
    tile = (program.to(tl.int64) * n_reads * STEP) % n_tiles
    acc = tl.zeros([TILE], tl.int32)
    for _ in range(n_reads):
        acc += tl.load(x_ptr + tile * TILE + at)
        tile = (tile + STEP) % n_tiles
    tl.store(out_ptr + program, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["n_tiles", "n_adds"])
def _add_kernel(x_ptr, n_tiles, n_adds, STEP: tl.constexpr, TILE: tl.constexpr):
    """A program adds 1 to every number of `n_adds` tiles."""
    at = tl.arange(0, TILE)  # [TILE]
    tile = (tl.program_id(0).to(tl.int64) * n_adds * STEP) % n_tiles
    one = tl.full([TILE], 1.0, tl.float32)
    for _ in range(n_adds):
        tl.atomic_add(x_ptr + tile * TILE + at, one, sem="relaxed")
        tile = (tile + STEP) % n_tiles


@triton.jit
def _nothing_kernel(x_ptr):
    """Writes one number."""
    tl.store(x_ptr, 0)


def reread_sums(x: Tensor, n_programs: int, n_reads: int) -> Tensor:
    """The sums of the tiles that each program reads, int32 [n_programs].

    Args:
        x: int32, a multiple of `TILE` numbers.
        n_programs: How many programs read at a time.
        n_reads: Tiles of each.
    """
    out = torch.empty(n_programs, dtype=torch.int32, device=x.device)
    _reread_kernel[(n_programs,)](x, out, x.numel() // TILE, n_reads, STEP, TILE, num_warps=4)
    return out


def reread_sums_ref(x: Tensor, n_programs: int, n_reads: int) -> Tensor:
    """What `reread_sums` must compute."""
    sums = x.view(-1, TILE).long().sum(1)
    read = torch.arange(n_programs * n_reads, device=x.device) * STEP % sums.numel()
    return sums[read].view(n_programs, n_reads).sum(1).int()


def add_ones(x: Tensor, n_programs: int, n_adds: int) -> None:
    """Add 1 to the numbers of `n_adds` tiles per program, by atomics, float32 [n * TILE]."""
    _add_kernel[(n_programs,)](x, x.numel() // TILE, n_adds, STEP, TILE, num_warps=4)


def measure(device: torch.device, plan: Plan | None = None) -> Iterator[tuple[str, Rates | None]]:
    """Measure a device.

    Args:
        device: On a CPU the clock is read instead of events; for tests.
        plan: How much to measure.
    Yields:
        What comes next, in words; at last the rates.
    """
    plan = plan or Plan()
    n_programs = 2
    if device.type == "cuda":
        n_programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    yield "copies through memory", None
    copied = _copied_per_s(device, plan)
    yield "tiles read again", None
    reread = [Level(f, _reread_per_s(device, plan, f, n_programs)) for f in plan.reread_footprints]
    yield "one program alone", None
    alone = _alone_per_s(device, plan)
    yield "float32 additions", None
    added = [Level(f, _added_per_s(device, plan, f, n_programs)) for f in plan.atomic_footprints]
    yield "matrix products", None
    products = {name: _products_per_s(device, plan, name) for name in plan.dtypes}
    yield "launches", None
    launch_s = _launch_s(device, plan)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    yield "done", Rates(
        version=rates.VERSION, device=name, **rates.installed(),
        origin=f"sparse-compile doctor --measure, {day}",
        copy_bytes_per_s=copied, reread_bytes_per_s=tuple(reread), atomic_bytes_per_s=tuple(added),
        program_bytes_per_s=alone, flops_per_s=products, launch_s=launch_s,
    )  # fmt: skip


def _copied_per_s(device: torch.device, plan: Plan) -> float:
    source = torch.zeros(plan.copy_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * plan.copy_bytes / _median_s(lambda: target.copy_(source), device, plan)


def _reread_per_s(device: torch.device, plan: Plan, footprint_bytes: int, n_programs: int) -> float:
    x = torch.zeros(footprint_bytes // 4, dtype=torch.int32, device=device)
    n_reads = max(1, plan.traffic_bytes // (n_programs * TILE * 4))
    took = _median_s(lambda: reread_sums(x, n_programs, n_reads), device, plan)
    return n_programs * n_reads * TILE * 4 / took


def _alone_per_s(device: torch.device, plan: Plan) -> float:
    x = torch.zeros(plan.reread_footprints[0] // 4, dtype=torch.int32, device=device)
    took = _median_s(lambda: reread_sums(x, 1, x.numel() // TILE), device, plan)
    return x.numel() * 4 / took


def _added_per_s(device: torch.device, plan: Plan, footprint_bytes: int, n_programs: int) -> float:
    x = torch.zeros(footprint_bytes // 4, device=device)
    n_adds = max(1, plan.traffic_bytes // 8 // (n_programs * TILE * 4))
    took = _median_s(lambda: add_ones(x, n_programs, n_adds), device, plan)
    return n_programs * n_adds * TILE * 4 / took


def _products_per_s(device: torch.device, plan: Plan, name: str) -> float:
    dtype = getattr(torch, name)
    size = plan.product_size // 2 if dtype == torch.float32 else plan.product_size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # our kernels multiply float32 as it is
    try:
        return 2 * size**3 / _median_s(lambda: a @ b, device, plan)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _launch_s(device: torch.device, plan: Plan) -> float:
    x = torch.zeros(1, dtype=torch.int32, device=device)
    times = []
    for _ in range(plan.n_runs + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(plan.n_launches):
            _nothing_kernel[(1,)](x)
        _wait(device)
        times.append((time.perf_counter() - start) / plan.n_launches)
    return statistics.median(times[1:])


def _median_s(call: Callable[[], object], device: torch.device, plan: Plan) -> float:
    begin = time.perf_counter()
    for _ in range(2):
        call()
    while time.perf_counter() - begin < plan.warm_up_s:  # until the clocks are up
        call()
        _wait(device)
    return statistics.median(_once_s(call, device) for _ in range(plan.n_runs))


def _once_s(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
