"""Pages of one tier by number: which are held, which hold something worth keeping, which are free.

A page is *held* while something refers to it. When the last reference goes, it is *cached* if its
content was published (`prefix_cache.py`), and *free* otherwise. Cached pages are taken when no free
one is left, the least recently used first. Nothing here touches memory: a page is a number.

Source: reference counts, copy on write and sharing as in PagedAttention (Kwon et al., 2023, section
4); different here: calls change everything or nothing, pages have generations, and eviction is by
true recency.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sparse_compile.errors import OutOfPagesError, PageError


class PoolStats(NamedTuple):
    """How the pages of a pool are used."""

    n_pages: int
    held: int
    shared: int  # held, by more than one
    cached: int
    free: int
    evictions: int  # cached pages that were taken, since the pool exists


class BlockPool:
    """The pages of one tier.

    Args:
        n_pages: How many there are; they are numbered from 0.
        tier: Its name, for messages: `"gpu"` or `"host"`.
    """

    def __init__(self, n_pages: int, *, tier: str = "gpu") -> None:
        """All pages are free."""
        if n_pages < 1:
            raise PageError(f"n_pages is {n_pages}.\n  Expected at least one page.\n  Enlarge it.")
        self.n_pages = n_pages
        self.tier = tier
        self.on_evict: Callable[[int], None] | None = None  # told each cached page that is taken
        self._references = [0] * n_pages
        self._generations = [0] * n_pages
        self._published = bytearray(n_pages)
        self._free = list(range(n_pages - 1, -1, -1))  # taken from the end: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._evictions = 0

    @property
    def available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def require(self, n: int) -> None:
        """Refuse what `allocate` could not give.

        Raises:
            OutOfPagesError: Fewer pages are free or cached.
        """
        if n > len(self._free) + len(self._cached):
            raise OutOfPagesError(
                f"{n} pages were asked for, and {self.available} of {self.n_pages} in the pool of "
                f'tier "{self.tier}" are free or cached.\n'
                "  Expected that many to be left; nothing was changed.\n"
                "  Release, swap out or preempt a request, or make the pool larger."
            )

    def allocate(self, n: int = 1) -> list[int]:
        """Take pages for writing, each with one reference.

        Raises:
            OutOfPagesError: Fewer are free or cached; none was taken.
        """
        self.require(n)
        split = max(0, len(self._free) - n)
        taken = self._free[split:]
        del self._free[split:]
        taken.reverse()
        while len(taken) < n:
            page, _ = self._cached.popitem(last=False)
            self._published[page] = 0
            self._evictions += 1
            if self.on_evict is not None:
                self.on_evict(page)
            taken.append(page)
        for page in taken:
            self._references[page] = 1
            self._generations[page] += 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page, held or cached.

        Raises:
            PageError: One is free, or no page.
        """
        references = self._references
        for page in pages:
            if not 0 <= page < self.n_pages or not (references[page] or page in self._cached):
                raise self._refusal(page, "shared", "a page that is held or cached")
        for page in pages:
            if not references[page]:
                self._cached.pop(page, None)
            references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference to each page of a sequence, given in its order.

        The last pages become the least recently used: whoever needs a prefix again still finds it.

        Raises:
            PageError: One has fewer references than are dropped: nothing was changed.
        """
        references = self._references
        ended = []
        for number, page in enumerate(pages):
            if not 0 <= page < self.n_pages or references[page] <= 0:
                for before in pages[:number]:
                    references[before] += 1
                raise self._refusal(page, "released", "a page that is held")
            references[page] -= 1
            if not references[page]:
                ended.append(page)
        for page in reversed(ended):
            if self._published[page]:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int) -> None:
        """Keep a held page's content when it is released: it is not written any more.

        Raises:
            PageError: Nobody holds it.
        """
        if not 0 <= page < self.n_pages or not self._references[page]:
            raise self._refusal(page, "published", "a page that is held")
        self._published[page] = 1

    def unpublish(self, page: int) -> None:
        """Forget that a page's content is worth keeping."""
        self._published[page] = 0
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def is_writable(self, page: int) -> bool:
        """Whether one holder may write it: nobody shares it, and its content is not published."""
        return self._references[page] == 1 and not self._published[page]

    def references(self, page: int) -> int:
        """How many hold it."""
        return self._references[page]

    def generation(self, page: int) -> int:
        """How often the page was allocated: another number means another content."""
        return self._generations[page]

    def stats(self) -> PoolStats:
        """Counts of pages; a walk over all of them."""
        held = self.n_pages - self.available
        shared = sum(count > 1 for count in self._references)
        return PoolStats(
            self.n_pages, held, shared, len(self._cached), len(self._free), self._evictions
        )

    def _refusal(self, page: int, what: str, expected: str) -> PageError:
        known = 0 <= page < self.n_pages
        state = "no page" if not known else "cached" if page in self._cached else "free"
        if known and self._references[page]:
            state = f"held {self._references[page]} times"
        return PageError(
            f'page {page} of tier "{self.tier}" was {what}, and is {state}.\n'
            f"  Expected {expected}; nothing was changed.\n"
            "  A table that was released, forked or truncated must not be used with old pages."
        )
