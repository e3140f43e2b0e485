"""A proven mask sampled on a coarse grid, for drawing: which keys each query reads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import sympy
import torch
from sympy.logic.boolalg import BooleanAtom, to_nnf

from sparse_compile.evaluation import evaluate
from sparse_compile.expressions import INDICES, Load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparse_compile import ir

CELLS = 32  # most cells on a side
_PER_CELL = 4  # samples on each side of a cell that holds more than one element
_LONGEST = 1 << 20  # larger constants are no lengths but "no limit"
_T, _S = INDICES[2:]


@dataclass(frozen=True, kw_only=True)
class MaskGrid:
    """Shares of the score elements of each cell, by what is known of them."""

    queries: range
    keys: range
    read: torch.Tensor  # [rows, columns]: read whatever the data
    maybe: torch.Tensor  # [rows, columns]: read or not, by the data
    sizes: tuple[tuple[str, int], ...]  # what was assumed for symbolic sizes

    @property
    def share(self) -> tuple[float, float]:
        """Share of all scores that is read at least, and at most."""
        read = float(self.read.mean())
        return read, read + float(self.maybe.mean())

    @property
    def is_uniform(self) -> bool:
        """All cells look the same."""
        return bool((self.read == self.read[0, 0]).all() and (self.maybe == self.maybe[0, 0]).all())


def grids(site: ir.AttentionSite) -> tuple[MaskGrid, ...]:
    """The mask as a whole and, where its structure is finer than a cell, a detail of it.

    Raises:
        NotImplementedError: The predicate or a size holds a function without a numeric meaning.
    """
    constants = _constants(site.mask.predicate)
    symbols = site.query_tokens.free_symbols | site.key_tokens.free_symbols
    symbols |= site.mask.predicate.free_symbols - set(INDICES)
    assumed = max(CELLS, 2 * max(constants, default=0))
    sizes = dict.fromkeys(sorted(symbols, key=str), assumed)
    n_queries, n_keys = (_number(size, sizes) for size in (site.query_tokens, site.key_tokens))
    whole = _grid(site, range(n_queries), range(n_keys), sizes)
    cell = max(n_queries, n_keys) / CELLS
    fine = [constant for constant in constants if constant < 2 * cell]
    if cell <= 1 or not fine:
        return (whole,)
    side = max(CELLS, 2 * max(fine))
    rows, columns = min(side, n_queries), min(side, n_keys)
    corners = (  # where a band, chunk or prefix begins; where an offset one ends
        (range(rows), range(columns)),
        (range(n_queries - rows, n_queries), range(n_keys - columns, n_keys)),
    )
    for queries, keys in corners:
        detail = _grid(site, queries, keys, sizes)
        if not detail.is_uniform:
            return whole, detail
    return (whole,)


def _grid(
    site: ir.AttentionSite, queries: range, keys: range, sizes: Mapping[sympy.Symbol, int]
) -> MaskGrid:
    rows, columns = min(len(queries), CELLS), min(len(keys), CELLS)
    t, s = _positions(queries, rows), _positions(keys, columns)
    values: dict[sympy.Basic, torch.Tensor | int] = {**dict.fromkeys(INDICES, 0), **sizes}
    values |= {_T: t[:, None], _S: s[None, :]}
    predicate = to_nnf(site.mask.predicate, simplify=False)
    least, most = (
        torch.as_tensor(evaluate(_decide(predicate, answer), values))
        .expand(len(t), len(s))
        .double()
        for answer in (sympy.false, sympy.true)
    )
    if site.mask.opaque:
        least = torch.zeros_like(most)
    shape = (rows, len(t) // rows, columns, len(s) // columns)
    read, upper = (values.reshape(shape).mean((1, 3)) for values in (least, most))
    named = tuple((str(symbol), size) for symbol, size in sizes.items())
    return MaskGrid(queries=queries, keys=keys, read=read, maybe=upper - read, sizes=named)


def _decide(predicate: sympy.Basic, answer: BooleanAtom) -> sympy.Basic:
    """`predicate`, in negation normal form, with `answer` for every part that reads data."""
    if isinstance(predicate, (sympy.And, sympy.Or)):
        return predicate.func(*(_decide(part, answer) for part in predicate.args))
    return answer if predicate.has(Load) else predicate


def _positions(span: range, n_cells: int) -> torch.Tensor:
    """The same number of positions for each of `n_cells` equal parts of `span`."""
    if len(span) == n_cells:
        return torch.arange(span.start, span.stop)
    edges = [span.start + len(span) * i // n_cells for i in range(n_cells + 1)]
    return torch.tensor(
        [
            start + (stop - 1 - start) * i // (_PER_CELL - 1)
            for start, stop in pairwise(edges)
            for i in range(_PER_CELL)
        ]
    )


def _constants(predicate: sympy.Basic) -> list[int]:
    """The whole numbers above 1 in a predicate: window widths, chunk sizes, offsets."""
    numbers = predicate.atoms(sympy.Rational)
    parts = {abs(part) for number in numbers for part in (number.p, number.q)}
    return sorted(part for part in parts if 1 < part <= _LONGEST)


def _number(size: sympy.Basic, sizes: Mapping[sympy.Symbol, int]) -> int:
    value = size.subs(sizes)
    if not value.is_number:
        raise NotImplementedError(f"{size} is not known as a number")
    return max(1, int(value))
