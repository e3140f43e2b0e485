"""Compile candidates in processes of their own, before or without a GPU.

Compiling takes about a second each and needs no device; a process that times candidates then finds
them in Triton's cache, and those that cannot run are known beforehand.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from sparse_compile.kernels import compile_only

if TYPE_CHECKING:
    from sparse_compile.kernels.compile_only import Needs
    from sparse_compile.tuner.shapes import Shape


class Task(NamedTuple):
    """One candidate of one problem."""

    kernel: str
    shape: Shape
    dtype: str
    values: tuple[tuple[str, int], ...]


class Compiled(NamedTuple):
    """What came of a task."""

    needs: tuple[Needs, ...]  # of the kernels that it launches
    new: tuple[str, ...]  # those that the process had not compiled yet
    error: str  # empty if it compiled

    @property
    def stack_bytes(self) -> int:
        """Of the kernel that spills most."""
        return max((one.stack_bytes for one in self.needs), default=0)


def small(kernel: str, shape: Shape, dtype: str, values: dict[str, int]) -> Task:
    """The task of a candidate at the size that is compared with the reference.

    The same code serves all sizes: tokens are no constant of a kernel, and here as there they are
    divisible by 16.
    """
    from sparse_compile.tuner.workloads import WORKLOADS

    tokens = WORKLOADS[kernel].check_tokens
    return Task(kernel, shape.shortened(tokens), dtype, tuple(sorted(values.items())))


class Precompiler:
    """A pool of processes that compile; a context manager.

    Args:
        capability: For which GPUs, as 90.
        workers: Processes; all cores but one if left out.
        niceness: How far they stand back behind others: 19 where one times launches meanwhile.
    """

    def __init__(
        self, capability: int = compile_only.SM90, workers: int | None = None, niceness: int = 0
    ) -> None:
        """Starts no process before the first task."""
        workers = workers or max(1, (os.cpu_count() or 2) - 1)
        self._pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start,
            initargs=(niceness,),
        )  # fmt: skip
        self._capability = capability
        self._futures: dict[Task, Future[Compiled]] = {}

    def submit(self, tasks: Iterable[Task]) -> None:
        """Begin with tasks, in this order."""
        for task in tasks:
            if task not in self._futures:
                self._futures[task] = self._pool.submit(_compile, task, self._capability)

    def result(self, task: Task) -> Compiled:
        """Wait for a task."""
        self.submit([task])
        return self._futures[task].result()

    def __enter__(self) -> Precompiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start(niceness: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the pool
    os.nice(niceness)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


_install = functools.cache(compile_only.install)  # once in a process


@functools.cache
def _compile(task: Task, capability: int) -> Compiled:
    record = _install(capability)
    import torch

    from sparse_compile.tuner.workloads import WORKLOADS

    torch.set_num_threads(1)
    workload = WORKLOADS[task.kernel]
    dtype = getattr(torch, task.dtype)
    try:
        problem = workload.make(task.shape, dtype, torch.device("cpu"))
        record.clear()
        with workload.tuned().pinned(**dict(task.values)):
            problem.run()
    except Exception as error:  # whatever the compiler raises
        return Compiled((), (), f"{type(error).__name__}: {str(error).strip()[:500]}")
    needs = tuple(dict.fromkeys(record.launched))
    return Compiled(needs, tuple(one.kernel for one in record.compiled), "")
