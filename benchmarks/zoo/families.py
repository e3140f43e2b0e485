"""All entries of the zoo, by package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from benchmarks.zoo import forms, hf, third_party
from benchmarks.zoo.negatives import negatives

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry


def entries(packages: Iterable[str] = (), pattern: str = "") -> Iterator[Entry]:
    """The entries of some packages (all, for none) whose id contains `pattern`."""
    wanted = set(packages)
    for entry in _all():
        if (not wanted or entry.package in wanted) and pattern in entry.id:
            yield entry


def find(entry_id: str) -> Entry:
    """The entry of an id.

    Raises:
        KeyError: There is none.
    """
    for entry in _all():
        if entry.id == entry_id:
            return entry
    raise KeyError(entry_id)


def _all() -> Iterator[Entry]:
    yield from forms.entries()
    yield from negatives.entries
    yield from third_party.entries()
    yield from hf.entries()
