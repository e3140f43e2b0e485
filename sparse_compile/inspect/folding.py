"""Identical layers shown once: sites that differ only in their layer number become one fold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from sparse_compile.inspect.report import SiteReport

_DIGITS = re.compile(r"(\d+)")
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*")
_REPEATED = re.compile(r"#\d+$")  # of a second site in the same module


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Sites that are the same but for the numbers in their names."""

    name: str  # e.g. "model.layers.[0-29].self_attn"
    sites: tuple[SiteReport, ...]

    @property
    def site(self) -> SiteReport:
        """The first of the sites, which speaks for all."""
        return self.sites[0]

    @property
    def label(self) -> str:
        """The name, and how many sites it stands for."""
        return f"{self.name}  x{len(self.sites)}" if len(self.sites) > 1 else self.name

    @property
    def layer(self) -> str:
        """The part of the name up to its first number: where the layers live."""
        prefix, *numbered = re.split(r"\.?[\[\d]", _REPEATED.sub("", self.site.name), maxsplit=1)
        return prefix if numbered else prefix.rpartition(".")[0]

    def __str__(self) -> str:
        return self.label


def fold(sites: Iterable[SiteReport], *, expand: bool = False) -> tuple[Fold, ...]:
    """Group sites that are the same but for the numbers in their names.

    Args:
        sites: In the order to show.
        expand: One fold a site.
    """
    if expand:
        return tuple(Fold(name=site.name, sites=(site,)) for site in sites)
    alike: dict[Hashable, list[SiteReport]] = {}
    for site in sites:
        alike.setdefault(_likeness(site), []).append(site)
    return tuple(piece for group in alike.values() for piece in _name(group))


def _likeness(site: SiteReport) -> Hashable:
    """Equal for sites that may share a row."""
    record = site.site
    return (
        tuple(_numbered(site)[::2]),
        (site.status, site.reason_code, _plain(site.reason), site.failed_validation),
        (_plain(site.mask), site.score_transforms, site.scale),
        (site.query_heads, site.kv_heads, site.group, site.kv_source),
        (site.kernel, site.loop_order, site.why, site.source),
        record
        and (
            (record.batch, record.query_tokens, record.key_tokens),
            (record.head_dim, record.value_dim, record.dtype, record.training),
            (record.mask, record.transforms, record.empty_rows),
            tuple(_plain(text) for text in (record.q_map, record.k_map, record.v_map)),
        ),
    )


def _numbered(site: SiteReport) -> list[str]:
    """The site's name, split into text, number, text, ..."""
    return _DIGITS.split(_REPEATED.sub("", site.name))


def _plain(text: str | None) -> str | None:
    """`text` without the numbers inside its identifiers; numbers of their own stay."""
    return text and _IDENTIFIER.sub(lambda match: re.sub(r"_?\d+", "", match[0]), text)


def _name(sites: Sequence[SiteReport]) -> list[Fold]:
    """Folds of sites with the same name pattern, each of whose names says exactly its sites."""
    texts = _numbered(sites[0])[::2]
    numbers = [tuple(map(int, _numbered(site)[1::2])) for site in sites]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    n_named = 1
    for column in columns:
        n_named *= len(column)
    if n_named != len(set(numbers)):
        first = next(i for i, column in enumerate(columns) if len(column) > 1)
        parts: dict[int, list[SiteReport]] = {}
        for site, number in zip(sites, numbers, strict=True):
            parts.setdefault(number[first], []).append(site)
        return [piece for part in parts.values() for piece in _name(part)]
    name = texts[0]
    for column, following in zip(columns, texts[1:], strict=True):
        name += _range(column) + following
    return [Fold(name=name, sites=tuple(sites))]


def _range(numbers: Sequence[int]) -> str:
    """`7`, `[0-29]`, `[0,2..24]` or `[0-3,8]`."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"[{numbers[0]},{numbers[1]}..{numbers[-1]}]"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"[{','.join(pieces)}]"
