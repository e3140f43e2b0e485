"""The sequences of a batch in pages: tables on the host, mirrored to one static tensor of the device.

All layers share a table: a page number stands for one page in the pool of every layer. What the
host decides reaches the device as small copies that nothing waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile import ops
from sparse_compile.errors import TooLongError
from sparse_compile.runtime.block_table import BlockTable, Copy

if TYPE_CHECKING:
    from sparse_compile.runtime.block_pool import BlockPool


class PagedRows:
    """Rows of a batch, each a sequence with a table of its own.

    Args:
        block_pool: Accounts of the pages; as many as every layer's pool has.
        n_rows: How many sequences.
        page_size: Tokens of a page.
        max_length: Most tokens of a sequence.
        device: Where the pools are.
    """

    def __init__(
        self, block_pool: BlockPool, *, n_rows: int, page_size: int, max_length: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Rows without tokens, and no layer's pool yet."""
        self.block_pool = block_pool
        self.page_size = page_size
        self.max_length = max_length
        self.pools: list[Tensor] = []  # of the layers, [P, Hkv, 2, N, D]
        self.tables = [BlockTable(block_pool, page_size) for _ in range(n_rows)]
        self._host = torch.full((n_rows, -(-max_length // page_size)), -1, dtype=torch.int32)
        self.block_table = self._host.to(device, copy=True)

    @property
    def n_keys(self) -> int:
        """Positions that a row of the block table has room for."""
        return self._host.shape[1] * self.page_size

    def reserve(self, counts: Mapping[int, int], block_table: Tensor | None = None) -> None:
        """Make room for tokens at the end of rows: for all of them, or for none.

        Args:
            counts: How many tokens, by row.
            block_table: Where to write the new pages; `self.block_table` if left out. A compiler
                may hand in a copy that it is going to copy back.
        Raises:
            TooLongError: A row would get longer than the table, or than the pool could ever hold.
            OutOfPagesError: The pool has too few pages left. In both cases nothing was changed.
        """
        for row, count in counts.items():
            self._check_length(row, self.tables[row].n_tokens + count)
        self.block_pool.require(sum(self.tables[row].needed(n) for row, n in counts.items()))
        before = {row: len(self.tables[row]) for row in counts}
        copies = {row: self.tables[row].append(count) for row, count in counts.items()}
        self._copy([copy for found in copies.values() for copy in found])
        first = {row: before[row] - len(copies[row]) for row in counts}
        changed = [row for row in counts if first[row] < len(self.tables[row])]
        if changed:
            self._mirror(changed, min(first[row] for row in changed), block_table)

    def arrange(self, order: Sequence[int], n_tokens: int | None = None) -> None:
        """Make new rows out of the old ones; those that come from one share its pages.

        A last page that several would write is copied at once, so that a later `reserve` copies
        nothing.

        Args:
            order: The old row that each new one continues.
            n_tokens: How many tokens of it; all if left out.
        Raises:
            OutOfPagesError: The pool has too few pages for these copies; nothing was changed.
        """
        lengths = [self.tables[row].n_tokens if n_tokens is None else n_tokens for row in order]
        self._check_arrangement(order, lengths)
        old, self.tables = self.tables, [self.tables[row].fork() for row in order]
        for table, length in zip(self.tables, lengths, strict=True):
            table.truncate(length)
        for table in old:
            table.release()
        self._copy([copy for table in self.tables for copy in table.separate()])
        if len(order) != len(old):
            self._host = self._host.new_full((len(order), self._host.shape[1]), -1)
            self.block_table = self._host.to(self.block_table.device, copy=True)
        self._mirror(range(len(order)), 0)

    def truncate(self, row: int, n_tokens: int) -> None:
        """Keep only so many tokens of a row; pages that nobody else holds are free then.

        Raises:
            PageError: There are fewer.
        """
        self.tables[row].truncate(n_tokens)
        self._mirror([row], len(self.tables[row]))

    def fork(self, row: int, target: int) -> None:
        """Let `target`, which has no tokens, continue what `row` has, in the same pages."""
        self.place(target, self.tables[row].fork())

    def place(self, row: int, table: BlockTable) -> None:
        """Let a row, which has no tokens, be a sequence that has some."""
        self.tables[row] = table
        self._mirror([row], 0)

    def _check_length(self, row: int, length: int) -> None:
        most = min(self.max_length, self.block_pool.n_pages * self.page_size)
        if length > most:
            what = "max_length" if most == self.max_length else "the size of the pool"
            raise TooLongError(
                f"row {row} would have {length} tokens.\n"
                f"  Expected at most {most}, which is {what}; nothing was changed.\n"
                f"  Shorten the sequence, or make a larger one."
            )

    def _check_arrangement(self, order: Sequence[int], lengths: Sequence[int]) -> None:
        """Refuse more copies than pages are left, counting those that are given back."""
        held = Counter(page for table in self.tables for page in table.pages)
        kept: Counter[int] = Counter()
        written: Counter[int] = Counter()  # last pages with room
        for row, length in zip(order, lengths, strict=True):
            pages = self.tables[row].pages[: -(-length // self.page_size)]
            kept.update(pages)
            if length % self.page_size:
                written[pages[-1]] += 1
        references = self.block_pool.references
        ended = sum(page not in kept and references(page) == n for page, n in held.items())
        copies = 0
        for page, writers in written.items():
            others = references(page) - held[page] + kept[page] - writers
            copies += writers if others else writers - 1
        self.block_pool.require(copies - ended)

    def _copy(self, copies: Sequence[Copy]) -> None:
        if copies and self.pools:
            device = self.block_table.device
            sources, targets = torch.tensor(copies).T.contiguous().to(device, non_blocking=True)
            ops.cow_copy(self.pools, sources, targets)

    def _mirror(self, rows: Sequence[int], first: int, block_table: Tensor | None = None) -> None:
        """Bring the table's columns from `first` on to the device."""
        end = first
        for row in rows:
            pages = self.tables[row].pages[first:]
            self._host[row, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self._host[row, first + len(pages) :] = -1
            end = max(end, first + len(pages))
        given = self.block_table if block_table is None else block_table
        if block_table is None:
            end = self._host.shape[1]
        part = self._host[:, first:end].contiguous()
        given[:, first:end].copy_(part.to(given.device, non_blocking=True))
