"""Any order of operations on pages, against lists of tokens: a Hypothesis state machine."""

from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparse_compile.errors import OutOfPagesError
from sparse_compile.runtime.block_pool import BlockPool
from sparse_compile.runtime.block_table import BlockTable, Copy, waste
from sparse_compile.runtime.prefix_cache import PrefixCache

N = 3
PAGES = {"gpu": 9, "host": 4}
SALTS = (b"", b"another tenant")
tokens = st.lists(st.sampled_from([1, 2]), max_size=11)  # so few that prefixes are often equal


@dataclass
class Sequence:
    """A table and what it must hold."""

    table: BlockTable
    salt: bytes
    tokens: list[int] = field(default_factory=list)


class Pages(RuleBasedStateMachine):
    """Tables, a prefix cache and two tiers; memory is a list of tokens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = {tier: BlockPool(n, tier=tier) for tier, n in PAGES.items()}
        self.memory = {tier: [[0] * N for _ in range(n)] for tier, n in PAGES.items()}
        self.cache = PrefixCache(self.pools["gpu"], N)
        self.sequences: list[Sequence] = []

    def state(self) -> object:
        """All that a failed operation must leave as it was."""
        pools = [
            (pool.stats(), [(pool.references(p), pool.generation(p)) for p in range(pool.n_pages)])
            for pool in self.pools.values()
        ]
        return pools, [(one.table.pages, one.table.n_tokens) for one in self.sequences]

    def do_copies(self, copies: list[Copy], source: str, target: str) -> None:
        for copy in copies:
            self.memory[target][copy.target] = list(self.memory[source][copy.source])

    def write(self, one: Sequence, new: list[int]) -> None:
        """Append to a sequence, or see that a failure changes nothing."""
        table, before = one.table, self.state()
        needed, tier = table.needed(len(new)), table.pool.tier
        if needed > table.pool.available:
            with pytest.raises(OutOfPagesError):
                table.append(len(new))
            assert self.state() == before
            return
        available = table.pool.available
        self.do_copies(table.append(len(new)), tier, tier)
        assert available - table.pool.available <= needed  # a shared page may have become free
        for token in new:
            page, slot = table.place(len(one.tokens))
            assert table.pool.is_writable(page)
            self.memory[tier][page][slot] = token
            one.tokens.append(token)

    @rule(prompt=tokens, salt=st.sampled_from(SALTS))
    def start(self, prompt: list[int], salt: bytes) -> None:
        found = self.cache.match(prompt, salt=salt)
        table = BlockTable(self.pools["gpu"], N, found)
        assert table.n_tokens < max(1, len(prompt))
        one = Sequence(table, salt, prompt[: table.n_tokens])
        self.sequences.append(one)
        self.write(one, prompt[table.n_tokens :])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), new=tokens)
    def extend(self, data: st.DataObject, new: list[int]) -> None:
        self.write(data.draw(st.sampled_from(self.sequences)), new)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        self.sequences.append(Sequence(one.table.fork(), one.salt, list(one.tokens)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        keep = data.draw(st.integers(0, len(one.tokens)))
        one.table.truncate(keep)
        del one.tokens[keep:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), new=tokens)
    def rewrite(self, data: st.DataObject, new: list[int]) -> None:
        """As after speculation: the last tokens were wrong."""
        one = data.draw(st.sampled_from(self.sequences))
        if one.table.pool.tier == "gpu":
            self.cache.publish(one.tokens, one.table.pages, salt=one.salt)
        keep = data.draw(st.integers(0, len(one.tokens)))
        one.table.truncate(keep)
        del one.tokens[keep:]
        self.write(one, new)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        if one.table.pool.tier == "gpu":
            self.cache.publish(one.tokens, one.table.pages, salt=one.salt)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        source = one.table.pool.tier
        target = "host" if source == "gpu" else "gpu"
        before = self.state()
        if len(one.table) > self.pools[target].available:
            with pytest.raises(OutOfPagesError):
                one.table.swap(self.pools[target])
            assert self.state() == before
        else:
            self.do_copies(one.table.swap(self.pools[target]), source, target)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        one.table.release()
        self.sequences.remove(one)

    @invariant()
    def every_sequence_reads_its_tokens(self) -> None:
        for one in self.sequences:
            memory = self.memory[one.table.pool.tier]
            held = [token for page in one.table.pages for token in memory[page]]
            assert held[: one.table.n_tokens] == one.tokens
            assert len(held) - one.table.n_tokens < N

    @invariant()
    def references_are_those_of_the_tables(self) -> None:
        for tier, pool in self.pools.items():
            held = Counter(
                page
                for one in self.sequences
                if one.table.pool.tier == tier
                for page in one.table.pages
            )
            assert [pool.references(page) for page in range(pool.n_pages)] == [
                held[page] for page in range(pool.n_pages)
            ]
            stats = pool.stats()
            assert stats.held + stats.cached + stats.free == pool.n_pages
            assert stats.held == len(held)
            assert stats.shared == sum(count > 1 for count in held.values())
            assert pool.available == stats.cached + stats.free

    @invariant()
    def what_is_known_is_in_the_memory(self) -> None:
        for known in self.cache._by_page.values():
            assert self.memory["gpu"][known.page] == list(memoryview(known.tokens).cast("q"))

    @invariant()
    def waste_is_a_share(self) -> None:
        assert 0 <= waste(one.table for one in self.sequences) < 1

    def teardown(self) -> None:
        for one in self.sequences:
            one.table.release()
        for pool in self.pools.values():
            assert pool.stats().held == 0
            assert len(pool.allocate(pool.n_pages)) == pool.n_pages
        assert not self.cache._by_page
        assert not self.cache._by_digest


Pages.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestPages = Pages.TestCase
