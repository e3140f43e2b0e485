"""What is in force and from where, and whether every table is right; none of it needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from sparse_compile.errors import ConfigError
from sparse_compile.kernels import tuning_results, tuning_tables
from sparse_compile.kernels.tuning_tables import Table, Values

if TYPE_CHECKING:
    from importlib.abc import Traversable

    from sparse_compile.kernels.tuning_results import Entry, Results

Source = Literal["user cache", "shipped table", "default"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something about a file that should be known."""

    file: str
    status: Literal["wrong", "stale"]  # stale results are not used, nor is what is wrong
    message: str

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Values in force for one key."""

    kernel: str
    device: str  # "any" for defaults
    dtype: str
    key: dict[str, int]
    values: Values  # on top of what the kernel computes from the sizes
    source: Source
    ms: float | None = None
    default_ms: float | None = None


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """All tables and results."""

    kernels: tuple[str, ...]
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]

    @property
    def is_right(self) -> bool:
        """Nothing is wrong; stale results may be there."""
        return all(finding.status == "stale" for finding in self.findings)


def survey() -> Overview:
    """Read every table and every file of results, of all devices."""
    rows: list[Row] = []
    findings: list[Finding] = []
    names = tuning_tables.names()
    tables: dict[str, Table] = {}
    for name in names:
        try:
            tables[name] = tuning_tables.load(name)
        except ConfigError as error:
            findings.append(Finding(file=f"{name}.toml", status="wrong", message=str(error)))
    seen = set()
    for source, file in _files():
        kernel = file.name.partition(".")[0]
        if kernel not in tables:
            if kernel not in names:
                message = f"{file.name}: there is no table of the kernel {kernel}"
                findings.append(Finding(file=file.name, status="wrong", message=message))
            continue
        results, found = _read(file, tables[kernel], source)
        findings.extend(found)
        if results is None:
            continue
        for entry in results.entries:
            identity = (kernel, results.device, *tuning_results.identity(entry.dtype, entry.key))
            if identity not in seen:  # the user's own come first
                seen.add(identity)
                rows.append(_row(kernel, results.device, entry, source))
    for name, table in tables.items():
        rows.append(
            Row(kernel=name, device="any", dtype="any", key={}, values=table.default,
                source="default")
        )  # fmt: skip
    return Overview(kernels=tuple(names), rows=tuple(rows), findings=tuple(findings))


def _files() -> Iterator[tuple[Source, Traversable]]:
    user = tuning_results.user_folder()
    own = sorted(user.glob("*.json")) if user.is_dir() else []
    yield from (("user cache", path) for path in own)
    shipped = sorted(tuning_tables.folder().iterdir(), key=lambda file: file.name)
    yield from (("shipped table", file) for file in shipped if file.name.endswith(".json"))


def _read(file: Traversable, table: Table, source: Source) -> tuple[Results | None, list[Finding]]:
    results, problems = tuning_results.read(file, table)
    found = [Finding(file=file.name, status="wrong", message=problem) for problem in problems]
    if results is not None:
        if file.name != tuning_results.file_name(table.kernel, results.device):
            message = f'{file.name}: device is "{results.device}", which has another file'
            found.append(Finding(file=file.name, status="wrong", message=message))
        now = tuning_results.current_stamp(table)
        stale = results.stamp.differences(now, shipped=source == "shipped table")
        if stale:
            message = f"{file.name} ({source}) was made for {' and '.join(stale)}"
            found.append(Finding(file=file.name, status="stale", message=message))
            return None, found
    return results, found


def _row(kernel: str, device: str, entry: Entry, source: Source) -> Row:
    return Row(
        kernel=kernel, device=device, dtype=entry.dtype, key=entry.key, values=entry.values,
        source=source, ms=entry.ms, default_ms=entry.default_ms,
    )  # fmt: skip
