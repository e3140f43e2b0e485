"""Pages whose content is known by the tokens before and in them, so that equal prompts share them.

A full page is known by a chain of digests, each of the page's tokens and of the digest before. A
digest only finds a page: its tokens, and those of all pages before, are compared before it is
shared. Tenants with different salts share nothing.

Source: prefix sharing as in PagedAttention (Kwon et al., 2023, section 4.4), by page instead of by
configured prefix.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from sparse_compile.errors import PageError

if TYPE_CHECKING:
    from sparse_compile.runtime.block_pool import BlockPool

DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False, slots=True)
class _Known:
    """A page and what it holds; equal only to itself."""

    page: int
    digest: bytes
    tokens: bytes
    before: _Known | None


class CacheStats(NamedTuple):
    """How often prefixes were found."""

    pages: int  # that are known
    asked: int  # full pages of the prompts that were looked up
    found: int


class PrefixCache:
    """Finds the pages of a pool that hold the beginning of a prompt.

    Args:
        pool: Whose pages; it tells the cache which it takes back.
        page_size: Tokens of a page.
    """

    def __init__(self, pool: BlockPool, page_size: int) -> None:
        """Knows nothing yet.

        Raises:
            PageError: The pool has another cache already.
        """
        if pool.on_evict is not None:
            raise PageError(
                f'the pool of tier "{pool.tier}" has a prefix cache already.\n'
                "  Expected one cache a pool.\n  Share the first one; salts keep tenants apart."
            )
        pool.on_evict = self._forget
        self.page_size = page_size
        self._pool = pool
        self._by_digest: dict[bytes, _Known] = {}
        self._by_page: dict[int, _Known] = {}
        self._asked = self._found = 0

    def match(self, tokens: Sequence[int], *, salt: bytes = b"") -> list[int]:
        """The pages of the longest known beginning of a prompt, with a reference to each.

        The prompt's last token is never part of them: something must be left to compute.
        """
        before: _Known | None = None
        pages: list[int] = []
        chain = self._chain(tokens[: max(0, len(tokens) - 1)], salt)
        self._asked += len(chain)
        for digest, text in chain:
            known = self._by_digest.get(digest)
            if known is None or known.tokens != text or known.before is not before:
                break
            pages.append(known.page)
            before = known
        self._pool.share(pages)
        self._found += len(pages)
        return pages

    def publish(self, tokens: Sequence[int], pages: Sequence[int], *, salt: bytes = b"") -> int:
        """Make the full pages of a sequence known; they must not be written any more.

        Where equal content is known already, that page stays the one that is found.

        Args:
            tokens: Of the sequence from its beginning.
            pages: Where their KV is, held by the caller.
            salt: Whose they are.
        Returns:
            How many became known.
        """
        before: _Known | None = None
        n_new = 0
        for (digest, text), page in zip(self._chain(tokens, salt), pages, strict=False):
            known = self._by_digest.get(digest)
            if known is not None and known.tokens == text and known.before is before:
                before = known
                continue
            if known is not None:
                if self._is_reachable(known):
                    break  # other tokens have this digest: the rest could not be found either
                self._withdraw(known)
            if page in self._by_page:
                break  # known by another beginning
            self._pool.publish(page)
            before = _Known(page, digest, text, before)
            self._by_digest[digest] = self._by_page[page] = before
            n_new += 1
        return n_new

    def stats(self) -> CacheStats:
        """How many pages are known, and how often prompts found some."""
        return CacheStats(len(self._by_page), self._asked, self._found)

    def _chain(self, tokens: Sequence[int], salt: bytes) -> list[tuple[bytes, bytes]]:
        """Digest and tokens of each full page."""
        size, text = self.page_size, array("q", tokens).tobytes()
        digest = self._digest(b"", salt)
        found = []
        for first in range(0, len(tokens) // size * size * 8, size * 8):
            page = text[first : first + size * 8]
            digest = self._digest(digest, page)
            found.append((digest, page))
        return found

    @staticmethod
    def _digest(before: bytes, text: bytes) -> bytes:
        return blake2b(before + text, digest_size=DIGEST_BYTES).digest()

    def _is_reachable(self, known: _Known) -> bool:
        """Whether `match` can find it: the pool took none of the pages before."""
        while known.before is not None:
            known = known.before
            if self._by_page.get(known.page) is not known:
                return False
        return True

    def _withdraw(self, known: _Known) -> None:
        self._forget(known.page)
        self._pool.unpublish(known.page)

    def _forget(self, page: int) -> None:
        """The pool takes the page for something else."""
        known = self._by_page.pop(page)
        if self._by_digest.get(known.digest) is known:
            del self._by_digest[known.digest]
