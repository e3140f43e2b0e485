"""Which pages hold the KV of a sequence, in its order.

A table decides what must be copied and tells its caller, who copies in the order of the calls and
before anything is written: `append` and `swap` return these copies, and nothing here touches memory.

Source: block tables and copy on write as in PagedAttention (Kwon et al., 2023, sections 4.2 to 4.5).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from sparse_compile.errors import PageError

if TYPE_CHECKING:
    from sparse_compile.runtime.block_pool import BlockPool


class Copy(NamedTuple):
    """Content that moves to another page."""

    source: int
    target: int


class BlockTable:
    """The pages of one sequence.

    Args:
        pool: Where its pages are.
        page_size: Tokens of a page.
        pages: Pages that hold its beginning, as `PrefixCache.match` gives them: all full, and the
            table owns their references from now on.
    """

    def __init__(self, pool: BlockPool, page_size: int, pages: Iterable[int] = ()) -> None:
        """An empty sequence, or one that begins with `pages`."""
        self.pool = pool
        self.page_size = page_size
        self._pages = list(pages)
        self._n_tokens = len(self._pages) * page_size

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages in the order of the tokens."""
        return tuple(self._pages)

    @property
    def n_tokens(self) -> int:
        """Tokens whose KV is in the pages, or is about to be written."""
        return self._n_tokens

    def __len__(self) -> int:
        """How many pages it has."""
        return len(self._pages)

    def needed(self, n_tokens: int) -> int:
        """How many pages `append` would allocate."""
        n_pages = -(-(self._n_tokens + n_tokens) // self.page_size)
        return n_pages - len(self._pages) + int(self._copies_last(n_tokens))

    def append(self, n_tokens: int) -> list[Copy]:
        """Make room for tokens at the end.

        A last page that is not full is copied if it may not be written: others hold it, or a
        prefix cache knows what is in it.

        Returns:
            What must be copied before the tokens are written: nothing, or that page.
        Raises:
            OutOfPagesError: The pool cannot give what is needed; nothing was changed.
            PageError: `n_tokens` is negative.
        """
        if n_tokens < 0:
            raise PageError(
                f"n_tokens is {n_tokens}.\n  Expected 0 or more.\n  `truncate` takes tokens away."
            )
        taken = self.pool.allocate(self.needed(n_tokens))
        found = []
        if self._copies_last(n_tokens):
            found = [self._replace_last(taken.pop(0))]
        self._pages += taken
        self._n_tokens += n_tokens
        return found

    def separate(self) -> list[Copy]:
        """Do now what the next `append` would do to the last page, so that it copies nothing.

        Returns:
            What must be copied: nothing, or that page.
        Raises:
            OutOfPagesError: The pool has no page for the copy; nothing was changed.
        """
        if not self._copies_last(1):
            return []
        return [self._replace_last(*self.pool.allocate(1))]

    def fork(self) -> BlockTable:
        """A second sequence with the same tokens in the same pages; each copies before it writes."""
        self.pool.share(self._pages)
        other = BlockTable(self.pool, self.page_size, self._pages)
        other._n_tokens = self._n_tokens
        return other

    def truncate(self, n_tokens: int) -> None:
        """Keep only so many tokens from the beginning.

        Raises:
            PageError: There are fewer.
        """
        if not 0 <= n_tokens <= self._n_tokens:
            raise PageError(
                f"n_tokens is {n_tokens}, of a sequence of {self._n_tokens}.\n"
                "  Expected at most what there is.\n  `append` makes room for more."
            )
        n_pages = -(-n_tokens // self.page_size)
        self.pool.release(self._pages[n_pages:])
        del self._pages[n_pages:]
        self._n_tokens = n_tokens

    def release(self) -> None:
        """Give all pages back; the sequence is empty then."""
        self.truncate(0)

    def swap(self, pool: BlockPool) -> list[Copy]:
        """Move to another tier's pool.

        Pages that others hold too stay with them; this sequence has copies of its own then.

        Returns:
            All of its pages, from the tier that it leaves to the other.
        Raises:
            OutOfPagesError: That pool has too few; nothing was changed.
        """
        taken = pool.allocate(len(self._pages))
        found = [Copy(*pair) for pair in zip(self._pages, taken, strict=True)]
        self.pool.release(self._pages)
        self.pool, self._pages = pool, taken
        return found

    def place(self, position: int) -> tuple[int, int]:
        """Page and slot of a token.

        Raises:
            PageError: There is no such token.
        """
        if not 0 <= position < self._n_tokens:
            raise PageError(
                f"position is {position}, in a sequence of {self._n_tokens} tokens.\n"
                "  Expected one of them.\n  `append` makes room for more."
            )
        return self._pages[position // self.page_size], position % self.page_size

    def _replace_last(self, page: int) -> Copy:
        shared, self._pages[-1] = self._pages[-1], page
        self.pool.release([shared])
        return Copy(shared, page)

    def _copies_last(self, n_tokens: int) -> bool:
        """Whether the last page has room that must not be written where it is."""
        partial = bool(self._n_tokens % self.page_size)
        return partial and n_tokens > 0 and not self.pool.is_writable(self._pages[-1])


def waste(tables: Iterable[BlockTable]) -> float:
    """Share of the slots in the tables' pages that hold no token; shared pages count once."""
    slots: dict[tuple[int, int], tuple[int, int]] = {}
    for table in tables:
        for number, page in enumerate(table.pages):
            used = min(table.page_size, table.n_tokens - number * table.page_size)
            key = (id(table.pool), page)
            slots[key] = (max(used, slots.get(key, (0, 0))[0]), table.page_size)
    total = sum(size for _, size in slots.values())
    return 1 - sum(used for used, _ in slots.values()) / total if total else 0.0
