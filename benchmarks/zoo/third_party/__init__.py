"""Models of other people's packages, tiny, with random weights; each package is optional."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.zoo.entry import Entry


def entries() -> Iterator[Entry]:
    """The entries of the packages that are installed."""
    return iter(())
