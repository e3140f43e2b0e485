"""Results of tuning: one JSON file per kernel and device, shipped or in the user's cache.

A file is stamped with what its results depend on. Stale or unreadable ones are reported, once, and
not used; within a file an entry that does not fit its table is skipped alone.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import os
import re
import tempfile
import tokenize
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sparse_compile import settings
from sparse_compile._support import release, version_text
from sparse_compile.errors import ConfigError
from sparse_compile.kernels import tuning_tables
from sparse_compile.kernels.tuning_tables import Table, Values

if TYPE_CHECKING:
    from importlib.abc import Traversable

VERSION = 1
PACKAGE = "sparse_compile.kernels."


class Stamp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What results depend on."""

    torch: str  # 2.13
    triton: str  # 3.6
    source: str  # hash of the Triton functions

    def differences(self, now: Stamp, *, shipped: bool) -> list[str]:
        """What is another by now, in words.

        PyTorch compiles no kernel: shipped results are not given up for another version of it.
        """
        names = ("triton", "source") if shipped else ("torch", "triton", "source")
        return [
            "another source of the kernel"
            if name == "source"
            else f"{name} {getattr(self, name)} ({getattr(now, name)} is here)"
            for name in names
            if getattr(self, name) != getattr(now, name)
        ]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The best values found for one key."""

    dtype: str
    key: dict[str, int]  # bucketed
    values: Values
    ms: float
    default_ms: float
    tried: int  # candidates timed
    dropped: int = 0  # that failed or were wrong


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds."""

    kernel: str
    device: str
    stamp: Stamp
    entries: tuple[Entry, ...] = ()
    version: int = VERSION


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    version: int
    kernel: str
    device: str
    stamp: Stamp
    entries: list[Any]


def current_stamp(table: Table) -> Stamp:
    """The stamp of what is tuned now."""
    torch, triton = (version_text(release(metadata.version(p))[:2]) for p in ("torch", "triton"))
    return Stamp(torch=torch, triton=triton, source=source_hash(table.module))


@functools.cache
def source_hash(module: str) -> str:
    """A hash of all Triton functions and default tiles that a module of kernels may use.

    Comments, docstrings and layout do not count, nor does anything outside Triton functions.
    """
    digest = hashlib.sha256()
    for name in _imported(module, set()):
        digest.update(name.encode())
        for token in _kernel_tokens(_source(name)):
            digest.update(token.encode() + b"\0")
    return digest.hexdigest()[:16]


def _source(module: str) -> str:
    return tuning_tables.kernels_folder().joinpath(f"{module}.py").read_text(encoding="utf-8")


def _imported(module: str, seen: set[str]) -> list[str]:
    """A module and those of our kernels that it imports, directly or not, sorted."""
    seen.add(module)
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = f"{node.module}."
            inner = (
                [named + alias.name for alias in node.names] if named == PACKAGE else [node.module]
            )
            for name in inner:
                if name.startswith(PACKAGE) and name.removeprefix(PACKAGE) not in seen:
                    _imported(name.removeprefix(PACKAGE), seen)
    return sorted(seen)


def _kernel_tokens(source: str) -> list[str]:
    lines = source.splitlines(keepends=True)
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    found: list[str] = []
    for node in ast.parse(source).body:
        if not _is_of_kernels(node):
            continue
        docstring = None
        first = node.lineno
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
        text = "".join(lines[first - 1 : node.end_lineno])
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            is_docstring = docstring and token.type == tokenize.STRING and docstring in token.string
            if token.type == tokenize.INDENT:
                found.append(">")
            elif token.type == tokenize.DEDENT:
                found.append("<")
            elif token.type not in layout and not is_docstring:
                found.append(token.string)
    return found


def _is_of_kernels(node: ast.stmt) -> bool:
    """Whether it is a Triton function, or a constant that they may read."""
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_tiles"):
        return True  # results are put on top of these defaults
    if isinstance(node, ast.FunctionDef):
        return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return isinstance(node, (ast.Assign, ast.AnnAssign)) and "tl.constexpr" in ast.unparse(node)


def slug(device: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def file_name(kernel: str, device: str) -> str:
    """The name of the file of a kernel's results on a device."""
    return f"{kernel}.{slug(device)}.json"


def user_folder() -> Path:
    """Where the user's results are; it may not exist yet."""
    return settings.read().cache_dir / "tuning"


def read(file: Traversable, table: Table) -> tuple[Results | None, list[str]]:
    """What a file holds, and what is wrong with it; None for a file that cannot be used at all."""
    if not file.is_file():
        return None, []
    try:
        raw = msgspec.json.decode(file.read_bytes())
        held: _File = tuning_tables.convert(raw, _File, file.name)
        if held.version != VERSION or held.kernel != table.kernel:
            return None, [
                f"{file.name}: holds version {held.version} of {held.kernel}.\n"
                f"  Expected version {VERSION} of {table.kernel}.\n  Delete the file and tune again."
            ]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
        text = str(error) if isinstance(error, ConfigError) else f"{file.name}: {error}"
        return None, [text]
    entries, problems = [], []
    for number, one in enumerate(held.entries):
        try:
            entries.append(_entry(one, table, f"{file.name}: entries[{number}]"))
        except ConfigError as error:
            problems.append(str(error))
    results = Results(
        kernel=held.kernel, device=held.device, stamp=held.stamp, entries=tuple(entries)
    )
    return results, problems


def _entry(raw: Any, table: Table, at: str) -> Entry:
    entry: Entry = tuning_tables.convert(raw, Entry, at)
    table.check_values(entry.values, f"{at}.values")
    if set(entry.key) != {fact.name for fact in table.key}:
        raise ConfigError(
            f"{at}.key has the facts {', '.join(sorted(entry.key))}.\n"
            f"  Expected {', '.join(sorted(fact.name for fact in table.key))}.\n"
            f"  {tuning_tables.ADVICE}"
        )
    return entry


def write(path: Path, results: Results) -> None:
    """Write a file so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text + b"\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def merged(old: Sequence[Entry], new: Sequence[Entry]) -> tuple[Entry, ...]:
    """Both, the new entry where a key has two, in a fixed order."""
    found = {identity(entry.dtype, entry.key): entry for entry in (*old, *new)}
    return tuple(found[name] for name in sorted(found))


def identity(dtype: str, key: Mapping[str, int]) -> tuple[str, tuple[tuple[str, int], ...]]:
    """What tells one entry from another."""
    return dtype, tuple(sorted(key.items()))
