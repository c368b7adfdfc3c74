from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from evermini.engine.kv import BlockManager, PrefixChain, blocks_for
from evermini.models.batch import BLOCK_SIZE


def chain_of(token_ids: list[int], salt: bytes = b"") -> PrefixChain:
    chain = PrefixChain(salt)
    chain.extend(token_ids)
    return chain


def tokens(num_blocks: int, first: int = 0, extra: int = 0) -> list[int]:
    return list(range(first, first + num_blocks * BLOCK_SIZE + extra))


def compute(manager: BlockManager, owner: str, token_ids: list[int]) -> int | None:
    """Open an account for a prompt, as the engine does, and publish it as if computed."""
    chain = chain_of(token_ids)
    cached = manager.open(owner, len(token_ids), chain.keys[: (len(token_ids) - 1) // BLOCK_SIZE])
    if cached is not None:
        manager.publish(owner, chain.keys)
    manager.check_integrity()
    return cached


def test_blocks_for():
    assert [blocks_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]


def test_keys_grow_with_the_tokens_and_cover_full_blocks_only():
    chain = PrefixChain()
    token_ids = tokens(3, extra=5)
    for end in range(len(token_ids) + 1):
        chain.extend(token_ids[:end])
        assert len(chain.keys) == end // BLOCK_SIZE
    assert chain.keys == chain_of(token_ids).keys
    assert len(set(chain.keys)) == 3
    assert all(len(key) * 8 >= 128 for key in chain.keys)


short_runs = st.lists(st.integers(0, 1), max_size=4 * BLOCK_SIZE)


@settings(deadline=None)
@given(
    short_runs,
    short_runs,
    st.integers(0, 4 * BLOCK_SIZE),
    st.binary(max_size=2),
    st.binary(max_size=2),
)
def test_keys_are_equal_exactly_where_the_whole_prefix_is(a, b, common, salt_a, salt_b):
    b = a[:common] + b
    keys_a, keys_b = chain_of(a, salt_a).keys, chain_of(b, salt_b).keys
    for i in range(min(len(keys_a), len(keys_b))):
        end = (i + 1) * BLOCK_SIZE
        same = salt_a == salt_b and a[:end] == b[:end]
        assert (keys_a[i] == keys_b[i]) == same


def test_the_same_block_after_another_prefix_has_another_key():
    assert not set(chain_of(tokens(1) + tokens(1)).keys[1:]) & set(chain_of(tokens(1)).keys)


def test_ids_beyond_a_byte_do_not_run_together():
    assert chain_of([1, 256] * 16).keys != chain_of([256, 1] * 16).keys


def test_a_second_owner_shares_the_prefix_and_leaves_the_last_token():
    manager = BlockManager(8)
    assert compute(manager, "a", tokens(3)) == 0
    assert compute(manager, "b", tokens(3)) == 2 * BLOCK_SIZE
    assert manager.table("a")[:2] == manager.table("b")[:2]
    assert manager.table("a")[2] != manager.table("b")[2]
    assert manager.num_used == 4


def test_freed_blocks_are_found_again_until_they_are_needed():
    manager = BlockManager(4)
    compute(manager, "a", tokens(3))
    manager.free("a")
    assert (manager.num_used, manager.num_cached, manager.num_free) == (0, 3, 4)
    assert compute(manager, "b", tokens(3, extra=1)) == 3 * BLOCK_SIZE
    manager.free("b")
    assert compute(manager, "c", tokens(4, first=1000)) == 0
    manager.free("c")
    assert compute(manager, "d", tokens(3, extra=1)) == 0


def test_the_tail_of_the_least_recently_used_prefix_goes_first():
    manager = BlockManager(6)
    for owner, first in (("old", 0), ("new", 1000)):
        compute(manager, owner, tokens(3, first))
        manager.free(owner)
    compute(manager, "other", tokens(2, first=2000))
    assert len(manager.match(chain_of(tokens(3)).keys)) == 1
    assert len(manager.match(chain_of(tokens(3, first=1000)).keys)) == 3


def test_use_makes_a_prefix_young():
    manager = BlockManager(6)
    for owner, first in (("a", 0), ("b", 1000), ("a", 0)):
        compute(manager, owner, tokens(3, first))
        manager.free(owner)
    compute(manager, "other", tokens(3, first=2000))
    assert len(manager.match(chain_of(tokens(3)).keys)) == 3
    assert len(manager.match(chain_of(tokens(3, first=1000)).keys)) == 0


def test_refusal_changes_nothing():
    manager = BlockManager(4)
    compute(manager, "a", tokens(2))
    manager.free("a")
    compute(manager, "b", tokens(2, first=1000))
    before = (manager.num_free, manager.num_cached)
    assert manager.open("c", 3 * BLOCK_SIZE + 1, chain_of(tokens(2)).keys) is None
    assert manager.open("c", 2 * BLOCK_SIZE, reserve=1) is None
    assert not manager.grow("b", 5 * BLOCK_SIZE)
    assert len(manager.table("b")) == 2
    manager.check_integrity()
    assert (manager.num_free, manager.num_cached) == before
    assert manager.owners == {"b"}
    assert manager.open("c", 2 * BLOCK_SIZE, chain_of(tokens(2)).keys) == 2 * BLOCK_SIZE


def test_without_prefix_caching_nothing_is_shared():
    manager = BlockManager(8, prefix_caching=False)
    compute(manager, "a", tokens(3))
    manager.free("a")
    assert compute(manager, "b", tokens(3)) == 0
    assert manager.num_cached == 0


def test_a_manager_without_blocks_is_refused():
    with pytest.raises(ValueError, match="num_blocks"):
        BlockManager(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m._refs.__setitem__(0, 2), "references"),
        (lambda m: m._blank.append(m.table("a")[0]), "states"),
        (lambda m: m._blank.pop(), "states"),
        (lambda m: m._cached.popitem(), "states"),
        (lambda m: m._accounts["a"].blocks.append(m.table("a")[0]), "twice"),
        (lambda m: m._accounts.pop("a"), "references"),
        (lambda m: m._key_of.pop(next(iter(m._cached))), "without a key"),
        (lambda m: m._block_of.popitem(), "paired|another block"),
        (lambda m: m._block_of.update(dict.fromkeys(m._block_of, 0)), "another block"),
    ],
)
def test_integrity_check_finds_damage(damage, message):
    manager = BlockManager(8)
    compute(manager, "gone", tokens(2))
    manager.free("gone")
    compute(manager, "a", tokens(2, first=1000))
    damage(manager)
    with pytest.raises(AssertionError, match=message):
        manager.check_integrity()


class KVMachine(RuleBasedStateMachine):
    """Random life of a small memory, against a model that knows what every block really holds."""

    owners = Bundle("owners")

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(7)
        self.count = 0
        self.tokens: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.content: dict[int, tuple[int, ...]] = {}  # block → the whole prefix up to its end

    @rule(
        target=owners,
        runs=st.lists(st.sampled_from([(0, 32), (1, 32), (0, 7), (1, 1)]), min_size=1, max_size=5),
        reserve=st.integers(0, 2),
    )
    def open(self, runs, reserve):
        token_ids = [token for token, length in runs for _ in range(length)]
        chain = chain_of(token_ids)
        shareable = chain.keys[: (len(token_ids) - 1) // BLOCK_SIZE]
        owner = f"r{self.count}"
        self.count += 1
        num_free = self.manager.num_free
        cached = self.manager.open(owner, len(token_ids), shareable, reserve=reserve)
        if cached is None:
            assert self.manager.num_free == num_free < blocks_for(len(token_ids)) + reserve
            return multiple()
        table = self.manager.table(owner)
        assert len(table) == blocks_for(len(token_ids))
        assert cached < len(token_ids)
        for i in range(cached // BLOCK_SIZE):
            assert self.content[table[i]] == tuple(token_ids[: (i + 1) * BLOCK_SIZE])
        self.tokens[owner], self.computed[owner] = token_ids, cached
        return owner

    @rule(owner=owners, step=st.integers(1, 80))
    def compute(self, owner, step):
        start = self.computed[owner]
        end = self.computed[owner] = min(start + step, len(self.tokens[owner]))
        table = self.manager.table(owner)
        for i in range(start // BLOCK_SIZE, blocks_for(end)):
            written = tuple(self.tokens[owner][: min(end, (i + 1) * BLOCK_SIZE)])
            users = [o for o in self.tokens if table[i] in self.manager.table(o)]
            assert users == [owner], "a shared block is written"
            self.content[table[i]] = written
        chain = chain_of(self.tokens[owner])
        self.manager.publish(owner, chain.keys[: end // BLOCK_SIZE])

    @rule(owner=owners, new=st.lists(st.integers(0, 1), min_size=1, max_size=40))
    def grow(self, owner, new):
        num_free, had = self.manager.num_free, len(self.manager.table(owner))
        need = blocks_for(len(self.tokens[owner]) + len(new)) - had
        assert self.manager.grow(owner, len(self.tokens[owner]) + len(new)) == (need <= num_free)
        if need <= num_free:
            self.tokens[owner] += new

    @rule(owner=consumes(owners))
    def free(self, owner):
        self.manager.free(owner)
        del self.tokens[owner], self.computed[owner]

    @invariant()
    def is_consistent(self):
        self.manager.check_integrity()
        assert self.manager.owners == self.tokens.keys()
        assert self.manager.num_used == len({b for o in self.tokens for b in self.manager.table(o)})


TestKVMachine = KVMachine.TestCase
TestKVMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
