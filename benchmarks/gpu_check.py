"""Run every test marked `gpu` on a real GPU and record what ran; CI has none.

python -m benchmarks.gpu_check            # on a machine with a GPU
python -m benchmarks.gpu_check --check    # anywhere: is the record about today's sources?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import common
from sparse_compile._support import check_gpu
from sparse_compile.errors import SparseCompileError

NAME = "gpu_check.json"
VERSION = 1
MESSAGE_LINES = 12
ALL_TESTS = ["tests"]
# Options of the project file may need plugins that a GPU machine lacks.
PYTEST = ("-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-m", "gpu", "-rfE")


def run_tests(
    selection: Sequence[str], jobs: int
) -> tuple[dict[str, int], list[dict[str, str]], float]:
    """Run the tests marked `gpu` in processes of their own.

    Args:
        selection: Files or folders of tests.
        jobs: Processes at a time; most of the time goes into compiling.
    Returns:
        Counts by outcome, the failures, and the seconds that the tests took together.
    Raises:
        SparseCompileError: pytest wrote no results.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "junit.xml"
        parallel = [] if jobs == 1 else ["-n", str(jobs)]
        command = [
            *(sys.executable, *PYTEST, f"--junit-xml={results}", *parallel),
            *marked_files(selection),
        ]
        done = subprocess.run(command, cwd=common.ROOT)
        if not results.is_file():
            raise SparseCompileError(
                f"pytest ended with exit code {done.returncode} and wrote no results.\n"
                "  Expected a JUnit file; what pytest said is above.\n"
                "  Install it with: pip install pytest"
            )
        return read_junit(results.read_text(encoding="utf-8"))


def marked_files(selection: Sequence[str]) -> list[str]:
    """The test files that speak of the marker; others may need packages a GPU machine lacks."""
    paths = [common.ROOT / name for name in selection]
    files = [f for p in paths for f in (sorted(p.rglob("test_*.py")) if p.is_dir() else [p])]
    return [
        path.relative_to(common.ROOT).as_posix()
        for path in files
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]


def read_junit(text: str) -> tuple[dict[str, int], list[dict[str, str]], float]:
    """Counts by outcome, failures with their messages, and seconds, from JUnit XML."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[dict[str, str]] = []
    seconds = 0.0
    for case in ElementTree.fromstring(text).iter("testcase"):
        seconds += float(case.get("time", 0))
        trouble = [part for part in case if part.tag in ("failure", "error")]
        if trouble:
            counts["failed"] += 1
            failures.append({"name": _name(case), "message": _last_lines(trouble[0])})
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts, failures, seconds


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _last_lines(trouble: ElementTree.Element) -> str:
    lines = (trouble.text or trouble.get("message") or "").strip().splitlines()
    return "\n".join(lines[-MESSAGE_LINES:])


def record(selection: Sequence[str], jobs: int, output: Path | None) -> int:
    """Run the tests and write the record.

    Raises:
        UnsupportedEnvironmentError: There is no GPU.
    """
    check_gpu()
    # before the run: what is tested is what was there when it began
    hashes = common.source_hashes()
    where = common.environment("cuda")
    counts, failures, seconds = run_tests(selection, jobs)
    data = {
        "version": VERSION,
        **where,
        "counts": counts,
        "failures": failures,
        "seconds": round(seconds, 1),
        "selection": list(selection),
        "sources": {"total_sha256": common.total_hash(hashes), "files": hashes},
    }
    for path in common.write_json(NAME, data, output):
        print(f"wrote {path}")
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return 0 if counts["passed"] and not counts["failed"] else 1


def differences(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """What changed since a record was made, one line a file."""
    lines = [f"added    {path}" for path in present if path not in recorded]
    lines += [f"removed  {path}" for path in recorded if path not in present]
    lines += [
        f"changed  {path}"
        for path, digest in present.items()
        if path in recorded and recorded[path] != digest
    ]
    return sorted(lines, key=lambda line: line.split()[1])


def check(path: Path) -> int:
    """Say whether the record at `path` was made from the sources that are here now."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        recorded, counts = data["sources"]["files"], data["counts"]
        selection = data["selection"]
    except FileNotFoundError:
        print(f"{path} does not exist: nothing shows that the tests ran on a GPU.")
        return 1
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path} is no record of this program: {type(error).__name__}: {error}")
        return 1
    print(f"{path.name}: {counts['passed']} passed, {counts['failed']} failed on {data['device']}")
    changed = differences(recorded, common.source_hashes())
    if changed:
        print(f"stale: {len(changed)} source files differ from those that ran on the GPU:")
        print("\n".join(f"  {line}" for line in changed))
        print("Run `python -m benchmarks.gpu_check` on a machine with a GPU.")
    elif selection != ALL_TESTS:
        print(f"Only {' '.join(selection)} ran: the record is partial.")
    elif counts["failed"] or not counts["passed"]:
        print("The sources are those that ran, and they did not pass.")
    else:
        print("The sources are those that ran.")
        return 0
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, help=f"file to write or, with --check, to read; {NAME}"
    )
    parser.add_argument("--check", action="store_true", help="compare the record with the sources")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (pytest-xdist)")
    parser.add_argument(
        "tests", nargs="*", default=ALL_TESTS, help="files of tests; all by default"
    )
    options = parser.parse_args(arguments)
    if options.check:
        return check(options.output or common.RESULTS / NAME)
    try:
        return record(options.tests, options.jobs, options.output)
    except SparseCompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
