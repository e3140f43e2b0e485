"""Models of other people's packages, tiny, with random weights; each package is optional."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.zoo.third_party import diffusion, lucidrains, others, timm_models

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry


def entries() -> Iterator[Entry]:
    """Every entry; one whose package is missing raises `UnavailableError` when it is built."""
    yield from lucidrains.entries()
    yield from timm_models.entries()
    yield from diffusion.entries()
    yield from others.entries()
