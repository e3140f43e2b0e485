"""Finds the best values for each key: candidates are checked, then timed, the winners written."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels import timing, tuning, tuning_results, tuning_tables
from sparse_compile.kernels.tuning_results import Entry, Results
from sparse_compile.kernels.tuning_tables import Space, Table, Values
from sparse_compile.tuner import precompile
from sparse_compile.tuner.precompile import Precompiler
from sparse_compile.tuner.shapes import Shape
from sparse_compile.tuner.workloads import WORKLOADS, Problem

log = logging.getLogger(__name__)

QUICK_MS, FINAL_MS = 20, 100  # of measuring a candidate, and one of the best
FINALISTS = 3
MARGIN = 0.99  # a winner takes at most this share of the default's time, else the default stays
MAX_STACK_BYTES = 1024  # of a thread; candidates that spill more are not timed
LOOSE = 32  # roundings that the default may be off the reference; its own tests are stricter
SEED = 0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One key of one kernel to tune."""

    kernel: str
    dtype: str
    shape: Shape  # what is timed
    key: dict[str, int]

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.key.items())
        return f"{self.kernel} {self.dtype} {facts}"


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that was not timed."""

    values: Values
    why: Literal["does not compile", "spills", "fails", "wrong"]
    detail: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a job."""

    job: Job
    status: Literal["tuned", "kept", "failed"]  # kept: there was a result
    values: Values = {}
    ms: float = 0.0
    default_ms: float = 0.0
    tried: int = 0
    dropped: tuple[Dropped, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        if self.status != "tuned":
            return f"{self.job}: {self.status} {self.detail}"
        values = ", ".join(f"{name} {value}" for name, value in self.values.items()) or "default"
        return (
            f"{self.job}: {values}: {self.ms:.4g} ms (default {self.default_ms:.4g}; "
            f"{self.tried} timed, {len(self.dropped)} dropped)"
        )


def jobs(kernels: Sequence[str], problems: Sequence[tuple[Shape, str]]) -> list[Job]:
    """Every key that the problems need, once; of several shapes the first stands for it.

    Those of the first problem come first, so that a budget serves it whole.
    """
    found: dict[object, Job] = {}
    for shape, dtype in problems:
        for kernel in kernels:
            key = tuning_tables.load(kernel).bucketed(WORKLOADS[kernel].facts(shape))
            job = Job(kernel=kernel, dtype=dtype, shape=shape, key=key)
            found.setdefault((kernel, tuning_results.identity(dtype, key)), job)
    return list(found.values())


class Tuner:
    """Tunes jobs on a device, and writes the result of each as soon as it is there.

    Args:
        device: Where to time.
        folder: Where results are written.
        spaces: Search spaces by kernel, instead of those of the tables.
        again: Tune keys that have a fresh result in `folder` too.
    """

    def __init__(
        self, device: torch.device, folder: Path, *,
        spaces: dict[str, tuple[Space, ...]] | None = None, again: bool = False,
    ) -> None:  # fmt: skip
        """Reads nothing yet."""
        self.device = device
        self.folder = folder
        self.device_name = tuning.device_name(device)
        self._spaces = spaces or {}
        self._again = again

    def run(
        self, jobs: Sequence[Job], *, deadline: float = float("inf"), workers: int | None = None
    ) -> Iterator[Outcome]:
        """Tune the jobs in their order; stop before the first that begins after the deadline.

        Args:
            jobs: What to tune.
            deadline: As `time.monotonic()` counts.
            workers: Processes that compile ahead; none without a GPU.
        """
        waiting = [job for job in jobs if self._again or self._kept(job) is None]
        with self._precompiler(workers) as ahead:
            if ahead is not None:
                ahead.submit(self._task(job, values) for job in waiting
                             for values in self.candidates(job))  # fmt: skip
            for job in jobs:
                if job not in waiting:
                    yield Outcome(job=job, status="kept", detail=f"in {self._path(job.kernel)}")
                elif time.monotonic() < deadline:
                    outcome = self.tune(job, ahead)
                    self._write(outcome)
                    yield outcome

    def candidates(self, job: Job) -> list[Values]:
        """What is tried for a job, the default first."""
        table = tuning_tables.load(job.kernel)
        if job.kernel in self._spaces:
            table = msgspec.structs.replace(table, spaces=self._spaces[job.kernel])
        return table.candidates(_facts(job))

    def tune(self, job: Job, ahead: Precompiler | None = None) -> Outcome:
        """Check and time the candidates of a job."""
        candidates, dropped = self._compiled(job, self.candidates(job), ahead)
        default = tuning_tables.load(job.kernel).default
        if not candidates or candidates[0] != default:
            why = dropped[0].detail if dropped else "no candidate"
            return Outcome(job=job, status="failed", dropped=dropped,
                           detail=f"the default cannot run: {why}")  # fmt: skip
        try:
            check = Check(job, self.device)
        except SparseCompileError as error:
            return Outcome(job=job, status="failed", dropped=dropped, detail=str(error))
        times: list[tuple[float, int]] = []
        for number, values in enumerate(candidates):
            problem = check.problem
            with check.tuned.pinned(**values):
                refused = check.refuses(values)
                if refused is None:
                    times.append((timing.median_ms(problem.run, self.device, QUICK_MS), number))
            if refused is not None:
                dropped = (*dropped, refused)
                if number == 0:
                    why = f"the default, run again, {refused.why}: {refused.detail}"
                    return Outcome(job=job, status="failed", dropped=dropped, detail=why)
        finalists = {number for _, number in sorted(times)[:FINALISTS]} | {0}
        final = {}
        for number in sorted(finalists):
            with check.tuned.pinned(**candidates[number]):
                final[number] = timing.median_ms(check.problem.run, self.device, FINAL_MS)
        best = min(final, key=lambda number: final[number])
        best = best if final[best] < MARGIN * final[0] else 0
        return Outcome(
            job=job, status="tuned", values=candidates[best], ms=final[best], default_ms=final[0],
            tried=len(times), dropped=dropped,
        )  # fmt: skip

    def _compiled(
        self, job: Job, candidates: list[Values], ahead: Precompiler | None
    ) -> tuple[list[Values], tuple[Dropped, ...]]:
        """The candidates that can run, and the others."""
        if ahead is None:
            return candidates, ()
        fit: list[Values] = []
        dropped: list[Dropped] = []
        for values in candidates:
            compiled = ahead.result(self._task(job, values))
            if compiled.error:
                dropped.append(
                    Dropped(values=values, why="does not compile", detail=compiled.error)
                )
            elif compiled.stack_bytes > MAX_STACK_BYTES and values != candidates[0]:
                detail = f"{compiled.stack_bytes} bytes of stack"
                dropped.append(Dropped(values=values, why="spills", detail=detail))
            else:
                fit.append(values)
        return fit, tuple(dropped)

    def _task(self, job: Job, values: Values) -> precompile.Task:
        return precompile.small(job.kernel, job.shape, job.dtype, values)

    def _precompiler(self, workers: int | None) -> _Nothing | Precompiler:
        if self.device.type != "cuda":
            return _Nothing()
        major, minor = torch.cuda.get_device_capability(self.device)
        return Precompiler(10 * major + minor, workers, niceness=19)

    def _path(self, kernel: str) -> Path:
        return self.folder / tuning_results.file_name(kernel, self.device_name)

    def _fresh(self, table: Table) -> tuple[Entry, ...]:
        """The entries of the folder's file, unless it is stale."""
        results, _ = tuning_results.read(self._path(table.kernel), table)
        stamp = tuning_results.current_stamp(table)
        return results.entries if results is not None and results.stamp == stamp else ()

    def _kept(self, job: Job) -> Entry | None:
        wanted = tuning_results.identity(job.dtype, job.key)
        for entry in self._fresh(tuning_tables.load(job.kernel)):
            if tuning_results.identity(entry.dtype, entry.key) == wanted:
                return entry
        return None

    def _write(self, outcome: Outcome) -> None:
        if outcome.status != "tuned":
            return
        job, table = outcome.job, tuning_tables.load(outcome.job.kernel)
        entry = Entry(
            dtype=job.dtype, key=job.key, values=outcome.values, ms=round(outcome.ms, 5),
            default_ms=round(outcome.default_ms, 5), tried=outcome.tried,
            dropped=len(outcome.dropped),
        )  # fmt: skip
        results = Results(
            kernel=job.kernel, device=self.device_name,
            stamp=tuning_results.current_stamp(table),
            entries=tuning_results.merged(self._fresh(table), [entry]),
        )  # fmt: skip
        tuning_results.write(self._path(job.kernel), results)
        WORKLOADS[job.kernel].tuned().forget()


class Check:
    """A job's problem, its results by default values, and how far they are off the reference.

    Raises:
        SparseCompileError: Those by default are wrong themselves.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        """Run the reference on the small problem and the default on both."""
        workload, dtype = WORKLOADS[job.kernel], getattr(torch, job.dtype)
        self.tuned = workload.tuned()
        self._step = torch.finfo(dtype).eps
        default = tuning_tables.load(job.kernel).default
        torch.manual_seed(SEED)
        self._small = workload.make(job.shape.shortened(workload.check_tokens), dtype, device)
        self._truth = self._small.view(self._small.truth())
        torch.manual_seed(SEED)
        self.problem: Problem = workload.make(job.shape, dtype, device)
        with self.tuned.pinned(**default):
            error = _distance(self._small.view(self._small.run()), self._truth)
            self._expected = self.problem.run()
        if not error <= LOOSE * self._step:
            raise SparseCompileError(
                f"{job}: the default values give results that are off by {error:.3g}.\n"
                f"  Expected at most {LOOSE * self._step:.3g}.\n"
                "  This is a bug of the kernel or of the compiler; nothing was timed."
            )
        self._allowed = 2 * error + self._step

    def refuses(self, values: Values) -> Dropped | None:
        """Why a candidate, pinned at present, must not be timed."""
        try:
            error = _distance(self._small.view(self._small.run()), self._truth)
            if error <= self._allowed:  # both err against the truth, so they differ by twice that
                found = self.problem.run()
                error = _distance(found, self._expected) / 2 if _floats(found) else error
        except Exception as error:  # resources, a failed compilation
            if "CUDA error" in str(error):  # after which nothing runs in this process
                raise SparseCompileError(
                    f"the candidate {values} broke the CUDA context: {error}\n"
                    "  Expected a kernel that stays in its memory.\n"
                    "  What was tuned before is kept. Remove the values from the search space."
                ) from error
            log.info("candidate %s fails: %s", values, error)
            return Dropped(values=values, why="fails", detail=f"{type(error).__name__}: {error}")
        if error <= self._allowed:
            return None
        detail = f"off by {error:.3g}, allowed is {self._allowed:.3g}"
        return Dropped(values=values, why="wrong", detail=detail)


def _floats(results: tuple[Tensor, ...]) -> bool:
    return all(result.is_floating_point() for result in results)


def _distance(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """How far the worst row is off, as a share of it or of the mean row; inf for NaN."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        one, other = one.double(), other.double()
        infinite = other.isinf()
        if one.shape != other.shape or not torch.equal(
            one.masked_select(infinite), other[infinite]
        ):
            return float("inf")
        one, other = (x.masked_fill(infinite, 0.0) for x in (one, other))
        if one.dim() == 3:  # a log-sum-exp has rows of one number
            one, other = one[..., None], other[..., None]
        rows = other.norm(dim=-1)
        scale = rows.clamp(min=float(rows.square().mean().sqrt().clamp(min=1e-30)))
        off = ((one - other).norm(dim=-1) / scale).max()
        worst = max(worst, float(off)) if bool(off.isfinite()) else float("inf")
    return worst


def _facts(job: Job) -> dict[str, int]:
    return {**job.key, "itemsize": getattr(torch, job.dtype).itemsize}


class _Nothing:
    """Stands for a pool where nothing is compiled ahead."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        pass
