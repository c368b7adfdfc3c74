"""Who owns which block of KV memory, and which blocks can be shared.

`evermini.models.batch.KVCache` is the bytes; this module only counts. The invariants, checked by
`BlockManager.check_integrity`:

- every block is in exactly one of three states: *owned* (in the tables of ``refs`` owners), *cached* (no owner,
  but its content can still be shared), or *blank*;
- only full blocks whose every token is computed are published under a key, and a key names at most one block;
- a published block is never written again, so sharing needs no copy.

A key is the hash of the parent's key and the block's token ids, and the first parent is the adapter's: equal keys mean
equal token prefixes under the same adapter, and the keys and values of a token depend on nothing else. Where tokens
stand for an image, the hash of what they stand for goes in, too: the same image is shared, and no other of its size;
where tokens are emphasised, by how much.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b

from evermini.engine.request import EmbeddedRun, Emphasis
from evermini.models.batch import BLOCK_SIZE

Owner = str
BlockKey = bytes

_KEY_BYTES = 32  # 256 bits: no prefix can be crafted to collide with another user's


class PrefixChain:
    """Keys of the full blocks of a growing run of tokens.

    Args:
        salt: Who may share the keys and values.
        adapter: Key (at most 64 bytes) of the adapter that they are computed with. Chains that differ in one of the
            two have no key in common.
        runs: What tokens stand for that have no embedding of their own.
        emphasis: Tokens that weigh more, in what is computed after them.
    """

    def __init__(
        self,
        salt: bytes = b"",
        adapter: bytes = b"",
        runs: Sequence[EmbeddedRun] = (),
        emphasis: Emphasis | None = None,
    ) -> None:
        self._parent = blake2b(salt, key=adapter, digest_size=_KEY_BYTES).digest()
        self._runs = runs
        self._emphasis = emphasis
        self.keys: list[BlockKey] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add the keys of blocks that ``token_ids`` (all tokens so far, not only new ones) newly fills."""
        for start in range(
            len(self.keys) * BLOCK_SIZE, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE
        ):
            digest = blake2b(self._parent, digest_size=_KEY_BYTES)
            digest.update(array("q", token_ids[start : start + BLOCK_SIZE]))
            for run in self._runs:
                if run.start < start + BLOCK_SIZE and run.end > start:
                    digest.update(run.key + (run.start - start).to_bytes(8, signed=True))
            if self._emphasis is not None:
                bias = self._emphasis.key_bias[start : start + BLOCK_SIZE]
                if bias.any():
                    digest.update(b"emphasis" + bias.numpy().tobytes())
            self._parent = digest.digest()
            self.keys.append(self._parent)


@dataclass
class _Account:
    """What one owner holds: its blocks in order, of which the first ``num_published`` have been published."""

    blocks: list[int] = field(default_factory=list)
    num_published: int = 0


class BlockManager:
    """Hands out blocks of ``BLOCK_SIZE`` tokens, with reference counts and prefix sharing.

    Blank blocks are handed out first; then cached ones, least recently used first, forgetting their content.

    Args:
        num_blocks: Blocks in the KV cache.
        prefix_caching: Publish and share blocks at all.
    """

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._accounts: dict[Owner, _Account] = {}
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()  # no owner, published; oldest first
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def owners(self) -> Set[Owner]:
        """Who has an account."""
        return self._accounts.keys()

    @property
    def num_free(self) -> int:
        """Blocks without an owner (blank and cached)."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without an owner whose content can still be shared."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self.num_free

    def table(self, owner: Owner) -> Sequence[int]:
        """Return the owner's blocks in order (a view that lives until the owner's next change)."""
        return self._accounts[owner].blocks

    def match(self, keys: Iterable[BlockKey]) -> list[int]:
        """Return the blocks of the longest published prefix of ``keys``. Changes nothing."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def open(
        self, owner: Owner, num_tokens: int, shareable: Sequence[BlockKey] = (), *, reserve: int = 0
    ) -> int | None:
        """Open an account with blocks for ``num_tokens`` tokens, sharing what is already computed.

            table    [ b7 ][ b2 ][ b9 ]                [ b4 ][ b1 ]
                     |<- published prefix: refs + 1 ->||<- taken: refs = 1 ->|
            tokens   0                                 returned       num_tokens

        Args:
            owner: A name without an account.
            num_tokens: Tokens the table must have room for.
            shareable: Keys of the leading blocks the owner would like to share.
            reserve: Blocks that must stay free for others, or the account is refused.

        Returns:
            Tokens (a multiple of ``BLOCK_SIZE``) whose keys and values are already in memory; ``None``, with
            nothing changed, if too few blocks are free.
        """
        assert owner not in self._accounts, f"{owner} already has an account"
        shared = self.match(shareable)
        num_fresh = blocks_for(num_tokens) - len(shared)
        assert num_fresh >= 0, "more blocks to share than the owner needs"
        revived = sum(self._refs[block] == 0 for block in shared)
        if num_fresh + revived + reserve > self.num_free:
            return None
        for block in shared:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
        blocks = shared + [self._take() for _ in range(num_fresh)]
        self._accounts[owner] = _Account(blocks, num_published=len(shared))
        return len(shared) * BLOCK_SIZE

    def grow(self, owner: Owner, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens in all; ``False``, with nothing changed, if no block is free."""
        blocks = self._accounts[owner].blocks
        num_fresh = blocks_for(num_tokens) - len(blocks)
        if num_fresh > self.num_free:
            return False
        blocks.extend(self._take() for _ in range(num_fresh))
        return True

    def shrink(self, owner: Owner, num_tokens: int) -> None:
        """Give back the owner's last blocks, all past ``num_tokens`` tokens; none of them is published."""
        account = self._accounts[owner]
        keep = blocks_for(num_tokens)
        assert keep >= account.num_published, (
            "a published block is never given back by its owner alone"
        )
        while len(account.blocks) > keep:
            block = account.blocks.pop()
            self._refs[block] = 0
            self._blank.append(block)

    def publish(self, owner: Owner, keys: Sequence[BlockKey]) -> None:
        """Let others share the owner's leading ``len(keys)`` blocks, which must be full and computed.

        A block whose content another block already holds stays private: tables are never rewritten.
        """
        if not self.prefix_caching:
            return
        account = self._accounts[owner]
        for index in range(account.num_published, len(keys)):
            block, key = account.blocks[index], keys[index]
            if key not in self._block_of:
                self._block_of[key] = block
                self._key_of[block] = key
        account.num_published = max(account.num_published, len(keys))

    def free(self, owner: Owner) -> None:
        """Close the account; blocks that no one else owns become cached if published, else blank."""
        # Tail first: a prefix is worth more than what follows it, so it is to be forgotten last.
        for block in reversed(self._accounts.pop(owner).blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def check_integrity(self) -> None:
        """Check every invariant of the module docstring from scratch.

        Raises:
            AssertionError: One is broken; names the block.
        """
        owned = Counter(block for account in self._accounts.values() for block in account.blocks)
        for owner, account in self._accounts.items():
            assert len(set(account.blocks)) == len(account.blocks), f"{owner} has a block twice"
            assert 0 <= account.num_published <= len(account.blocks), f"{owner} published too much"
        blank = Counter(self._blank)
        for block in range(self.num_blocks):
            assert self._refs[block] == owned[block], (
                f"block {block}: {self._refs[block]} references, {owned[block]} owners"
            )
            places = (owned[block] > 0) + blank[block] + (block in self._cached)
            assert places == 1, f"block {block} is in {places} states"
            if block in self._cached:
                assert block in self._key_of, f"block {block} is cached without a key"
            if blank[block]:
                assert block not in self._key_of, f"block {block} is blank with a key"
        assert len(owned.keys() | blank.keys() | self._cached.keys()) == self.num_blocks
        assert len(self._key_of) == len(self._block_of), "keys and blocks are not paired"
        for block, key in self._key_of.items():
            assert self._block_of.get(key) == block, f"block {block}: its key names another block"

    def _take(self) -> int:
        block = self._blank.pop() if self._blank else self._evict()
        self._refs[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block


def blocks_for(num_tokens: int) -> int:
    """Return how many blocks ``num_tokens`` tokens take."""
    return -(-num_tokens // BLOCK_SIZE)
