"""Hand-written attention in every style we have met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.zoo.forms.layouts import layouts
from benchmarks.zoo.forms.masks import masks
from benchmarks.zoo.forms.spellings import spellings
from benchmarks.zoo.forms.text import text
from benchmarks.zoo.forms.vision import vision

if TYPE_CHECKING:
    from benchmarks.zoo.entry import Entry


def entries() -> Iterator[Entry]:
    """Every hand-written form."""
    for catalogue in (spellings, masks, layouts, text, vision):
        yield from catalogue.entries
