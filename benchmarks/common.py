"""Timing, the record of where a measurement was made, and files of records."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCE_FOLDERS = ("sparse_compile", "passes", "kernels", "tests")
PACKAGES = ("torch", "triton", "transformers", "sympy")
FLUSH_BYTES = 256 << 20  # larger than any GPU's L2 cache
CYCLES_PER_MS = 2_000_000  # of a GPU, at most: it waits a little too long at lower clocks
MOST_AHEAD_MS = 50.0  # a call that waits for the device never gets ahead of it

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a call takes."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    n_calls: int
    host_ms: float | None = None  # until the call returned to the host, which may be before its end

    @classmethod
    def of(cls, times_ms: Sequence[float], host_ms: Sequence[float] = ()) -> Timing:
        """Summarise single calls."""
        ordered = sorted(times_ms)
        last = len(ordered) - 1
        return cls(
            median_ms=statistics.median(ordered),
            p10_ms=ordered[round(0.1 * last)],
            p90_ms=ordered[round(0.9 * last)],
            n_calls=len(ordered),
            host_ms=statistics.median(host_ms) if host_ms else None,
        )

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms ({self.p10_ms:.3f} to {self.p90_ms:.3f})"


def time_calls(
    call: Callable[[], object],
    *,
    device: str,
    n_calls: int = 20,
    warm_up: int = 3,
    cold_l2: bool = True,
    host_ahead: bool = True,
    limit_s: float = 20.0,
) -> Timing:
    """Time a call: by events on a GPU, by the clock on a CPU.

    Args:
        call: What to time.
        device: `"cuda"` or `"cpu"`.
        n_calls: How many calls to time.
        warm_up: Calls before that.
        cold_l2: On a GPU, overwrite the L2 cache before each call.
        host_ahead: Keep a GPU waiting until the host has launched the call, as a model's other
            work does: the time is the device's alone. What the host takes is `Timing.host_ms`.
        limit_s: Stop early, after at least three calls, when they took longer than this together.
    """
    for _ in range(warm_up):
        call()
    once = _gpu_timer(call, cold_l2, host_ahead) if device == "cuda" else _cpu_timer(call)
    times: list[tuple[float, float | None]] = []
    deadline = time.perf_counter() + limit_s
    while len(times) < n_calls and (len(times) < 3 or time.perf_counter() < deadline):
        times.append(once())
    return Timing.of(
        [device_ms for device_ms, _ in times], [host for _, host in times if host is not None]
    )


def _gpu_timer(
    call: Callable[[], object], cold_l2: bool, host_ahead: bool
) -> Callable[[], tuple[float, float | None]]:
    import torch

    buffer = torch.empty(FLUSH_BYTES if cold_l2 else 0, dtype=torch.int8, device="cuda")
    host_ms = 0.0 if host_ahead else None  # of the slowest call so far

    def once() -> tuple[float, float | None]:
        nonlocal host_ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        if host_ms:
            torch.cuda._sleep(round(min(1.5 * host_ms, MOST_AHEAD_MS) * CYCLES_PER_MS))
        start.record()
        begun = time.perf_counter()
        call()
        took = (time.perf_counter() - begun) * 1e3
        end.record()
        end.synchronize()
        if host_ms is not None:
            host_ms = max(host_ms, took)
        return start.elapsed_time(end), took

    if host_ahead:
        once()  # to know what the host takes
    return once


def _cpu_timer(call: Callable[[], object]) -> Callable[[], tuple[float, None]]:
    def once() -> tuple[float, None]:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3, None

    return once


def environment(device: str) -> Record:
    """Where and with what a measurement is made.

    Args:
        device: `"cuda"` or `"cpu"`.
    """
    return {
        "device": _device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _output("git", "rev-parse", "HEAD"),
        "source_sha256": total_hash(source_hashes()),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
    }


def command_line() -> str:
    """The command that runs, as it would be typed in the repository's root."""
    main = sys.modules["__main__"].__spec__
    script = Path(sys.argv[0]).resolve()
    if main:
        name = f"-m {main.name}"
    else:
        name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", name, *sys.argv[1:]])


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


def source_hashes(root: Path = ROOT, folders: Sequence[str] = SOURCE_FOLDERS) -> dict[str, str]:
    """Path -> sha256 of every source file, links left out, in the order of the paths."""
    found: dict[str, str] = {}
    for folder in folders:
        for parent, names, files in os.walk(root / folder):
            here = Path(parent)
            names[:] = [n for n in names if n[0] != "." and n != "__pycache__"]
            names[:] = [n for n in names if not (here / n).is_symlink()]
            for path in (here / name for name in files):
                if path.is_symlink() or path.name[0] == "." or path.suffix == ".pyc":
                    continue
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(root).as_posix()] = digest
    return dict(sorted(found.items()))


def total_hash(hashes: Mapping[str, str]) -> str:
    """One sha256 for a whole tree: of the lines `sha256  path`."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def record_all(
    name: str, found: Iterable[Record], where: Record, output: Path | None,
    say: Callable[[Record], str],
) -> list[Record]:  # fmt: skip
    """Write measurements as they come; a run that is cut off keeps what it has.

    Args:
        name: The file's name in `benchmarks/results`.
        found: The measurements.
        where: Where they were made; it goes into each record.
        output: A file to write instead.
        say: A line about a measurement, for stderr.
    """
    records: list[Record] = []
    for record in found:
        records.append({**record, **where})
        print(say(record), file=sys.stderr)
        write_json(name, records, output)
    return records


def exit_code(records: Iterable[Record]) -> int:
    """1 if a measured result was wrong, else 0."""
    return 1 if any(record["status"] == "wrong" for record in records) else 0


def write_json(name: str, data: object, output: Path | None = None) -> list[Path]:
    """Write `data` as `name`, also to the folder that `$OUT` names where that is set.

    Args:
        name: A file name.
        data: A mapping, or a list of records, which gets one line a record.
        output: Where to write instead of `benchmarks/results/`.
    Returns:
        The files that were written.
    """
    if isinstance(data, list):
        text = "[\n" + ",\n".join(json.dumps(record) for record in data) + "\n]\n"
    else:
        text = json.dumps(data, indent=1) + "\n"
    targets = [output or RESULTS / name]
    if os.environ.get("OUT"):
        targets.append(Path(os.environ["OUT"]) / name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    return targets


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; numbers with three decimals, None as a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def timing_fields(timing: Timing) -> Record:
    """A timing as fields of a record."""
    return asdict(timing)


def _file(text: str) -> Path:
    """A path that can be written as a file: said before, not after, what takes minutes."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give the name of a file in it")
    return Path(text)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--output", type=_file, help="file to write instead of benchmarks/results/")
    made.add_argument("--seed", type=int, default=0)
    return made
