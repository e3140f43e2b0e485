"""Pages, tables and prefixes: single rules, each with the case that breaks a simpler way."""

import pytest

from sparse_compile.errors import OutOfPagesError, PageError
from sparse_compile.runtime.block_pool import BlockPool
from sparse_compile.runtime.block_table import BlockTable, Copy, waste
from sparse_compile.runtime.prefix_cache import PrefixCache

N = 4


def table_of(pool: BlockPool, n_tokens: int) -> BlockTable:
    table = BlockTable(pool, N)
    assert not table.append(n_tokens)
    return table


def test_pages_are_taken_all_or_none() -> None:
    pool = BlockPool(3)
    held = pool.allocate(2)
    before = pool.stats()
    with pytest.raises(OutOfPagesError, match=r"2 pages were asked for, and 1 of 3.*\n.*\n.*swap"):
        pool.allocate(2)
    assert pool.stats() == before
    assert pool.allocate() == [2]
    pool.release(held)
    assert pool.available == 2


@pytest.mark.parametrize("pages", [[0, 1], [0, 0], [7], [-1]])
def test_what_is_not_held_cannot_be_given_back(pages: list[int]) -> None:
    pool = BlockPool(3)
    pool.allocate()
    with pytest.raises(PageError, match="was released, and is"):
        pool.release(pages)
    assert pool.references(0) == 1
    assert pool.available == 2


def test_a_page_released_twice_at_once_is_free_once() -> None:
    pool = BlockPool(2)
    (page,) = pool.allocate()
    pool.share([page])
    pool.release([page, page])
    assert sorted(pool.allocate(2)) == [0, 1]
    with pytest.raises(OutOfPagesError):
        pool.allocate()


def test_free_pages_cannot_be_shared() -> None:
    pool = BlockPool(2)
    (page,) = pool.allocate()
    with pytest.raises(PageError, match=r"page 1 .* was shared, and is free"):
        pool.share([page, 1])
    assert pool.references(page) == 1


def test_generations_tell_contents_apart() -> None:
    pool = BlockPool(1)
    (page,) = pool.allocate()
    first = pool.generation(page)
    pool.release([page])
    pool.allocate()
    assert pool.generation(page) != first


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, N)
    prompts = [[1] * 2 * N, [2] * 2 * N]
    for prompt in prompts:
        table = table_of(pool, len(prompt))
        assert cache.publish(prompt, table.pages) == 2
        table.release()
    again = cache.match([*prompts[0], 0])  # the older one is used once more
    assert again == [0, 1]
    pool.release(again)
    assert pool.allocate() == [3]
    assert cache.match([*prompts[1], 0]) == [2]
    pool.release([2])
    assert pool.allocate() == [1]
    assert cache.match([*prompts[0], 0]) == [0]


def test_something_is_left_to_compute() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, N)
    table = table_of(pool, 2 * N)
    cache.publish([1] * 2 * N, table.pages)
    assert cache.match([1] * 2 * N) == [0]
    assert cache.match([1] * (2 * N + 1)) == [0, 1]
    assert cache.match([]) == []


def test_equal_digests_of_other_tokens_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "_digest", staticmethod(lambda *_: b"all the same"))
    pool = BlockPool(8)
    cache = PrefixCache(pool, N)
    table = table_of(pool, 2 * N)
    assert cache.publish([1] * 2 * N, table.pages) == 1  # the second has the digest of the first
    other = table_of(pool, N)
    assert cache.publish([2] * N, other.pages) == 0
    assert cache.match([2] * 2 * N) == []
    assert cache.match([1] * 2 * N) == [0]


def test_a_page_behind_another_beginning_is_not_found() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, N)
    table = table_of(pool, 2 * N)
    cache.publish([1] * N + [5] * N, table.pages)
    assert cache.match([2] * N + [5] * N + [0]) == []
    assert cache.match([1] * N + [5] * N + [0], salt=b"another tenant") == []


def test_what_lost_its_beginning_can_be_known_again() -> None:
    pool = BlockPool(3)
    cache = PrefixCache(pool, N)
    first = table_of(pool, N)
    cache.publish([1] * N, first.pages)
    # another sequence computed the same beginning itself, so its second page hangs on the first's
    second = table_of(pool, 2 * N)
    assert cache.publish([1] * 2 * N, second.pages) == 1
    first.release()
    assert pool.allocate() == [0]  # takes the beginning away
    assert cache.match([1] * 2 * N + [0]) == []
    assert cache.publish([1] * 2 * N, second.pages) == 2
    assert cache.match([1] * 2 * N + [0]) == [1, 2]


def test_a_fork_copies_only_the_page_that_it_writes() -> None:
    pool = BlockPool(8)
    table = table_of(pool, 2 * N + 1)
    child = table.fork()
    assert child.pages == table.pages
    assert child.append(1) == [Copy(2, 3)]
    assert child.pages == (0, 1, 3)
    assert not table.append(1)  # it holds its last page alone now
    assert table.pages == (0, 1, 2)
    full = table_of(pool, N)
    assert not full.fork().append(1)  # no page is written by both


def test_a_fork_that_finds_no_page_changes_nothing() -> None:
    pool = BlockPool(1)
    table = table_of(pool, 1)
    child = table.fork()
    before = pool.stats()
    with pytest.raises(OutOfPagesError):
        child.append(1)
    assert (child.pages, child.n_tokens, pool.stats()) == (table.pages, 1, before)


def test_a_published_page_is_copied_before_it_is_written_again() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool, N)
    table = table_of(pool, N)
    cache.publish([1] * N, table.pages)
    table.truncate(N - 1)
    assert table.needed(1) == 1
    assert table.append(1) == [Copy(0, 1)]
    assert cache.match([1] * (N + 1)) == [0]


def test_a_swap_leaves_shared_pages_to_the_others() -> None:
    pool, host = BlockPool(4), BlockPool(2, tier="host")
    table = table_of(pool, N + 1)
    child = table.fork()
    assert child.swap(host) == [Copy(0, 0), Copy(1, 1)]
    assert table.pages == (0, 1)
    assert pool.stats().shared == 0
    with pytest.raises(OutOfPagesError, match='tier "host"'):
        table.swap(host)
    assert table.pool is pool
    assert child.swap(pool) == [Copy(0, 2), Copy(1, 3)]
    assert host.available == 2


def test_waste_counts_shared_pages_once() -> None:
    pool = BlockPool(8)
    table = table_of(pool, N + 1)
    assert waste([table]) == pytest.approx(3 / 8)
    assert waste([table, table.fork()]) == pytest.approx(3 / 8)
    assert waste([]) == 0


def test_wrong_numbers_are_refused() -> None:
    pool = BlockPool(1)
    table = table_of(pool, 2)
    with pytest.raises(PageError, match="n_tokens is -1"):
        table.append(-1)
    with pytest.raises(PageError, match="n_tokens is 3, of a sequence of 2"):
        table.truncate(3)
    with pytest.raises(PageError, match="position is 2"):
        table.place(2)
    with pytest.raises(PageError, match="n_pages is 0"):
        BlockPool(0)
    PrefixCache(pool, N)
    with pytest.raises(PageError, match="one cache a pool"):
        PrefixCache(pool, N)
