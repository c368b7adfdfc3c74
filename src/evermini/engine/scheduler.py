"""Who runs in the next step, and who has to give up memory.

A step computes at most ``max_batch_tokens`` tokens, spent in this order:

1. *Decodes.* Every running request that only lacks its newest token gets it computed. One that crosses into a new
   block when none is free takes the memory of the youngest running request, which waits again and later recomputes
   (*preemption*; its tokens, random numbers and sent events stay).
2. *Drafts* of tokens that these requests may write next, as far as their rows are worth the time
   (`evermini.engine.speculation`) and memory is free; nobody is preempted for a guess.
3. *Prompts*, in chunks. Half of what is left goes to the oldest request, be it running or waiting, the rest to the
   one that could be done in the fewest full steps, then the next; of equals, to the older. So a short prompt behind a
   long one starts at once, and nobody starves: everybody becomes the oldest, and the oldest always advances. Prompts
   that fit into one step are equals: sorted by their tokens, too, those of 300 waited forty times as long as those of
   30 under full load, and the mean was the same.

While requests decode, prompts get only a quarter of the step, for a step's length is the time between two tokens of a
stream (mini on one core: 128 tokens take 0.25 s, at 85 % of the speed of 512, which take 0.9 s). Where a crowd waits
for its first tokens, they get up to half: else half of a full machine's clients wait to begin, rather than all of them
a little longer for each token. The answers end at the same time.

A request owns the blocks of all its known tokens from admission on, so prefill never runs out of memory. While blocks
of it are read from the disk (`evermini.engine.prompt_disk`), the steps are the others'.

"Oldest" and "youngest" go by priority first: every request that somebody waits for is older than every batch's. Batches
compute at most a quarter of a step's tokens for prompts, for whoever arrives during a step waits for its end; and they
give up their memory, youngest first, for a request that waits.
"""

from __future__ import annotations

from bisect import insort
from collections import abc
from dataclasses import dataclass, replace

from evermini.engine.kv import BlockManager, blocks_for
from evermini.engine.prompt_disk import MIN_TOKENS, PromptDisk
from evermini.engine.request import INTERACTIVE
from evermini.engine.sequence import Sequence
from evermini.engine.speculation import MAX_DRAFT, NO_DRAFT, Draft, break_even, plan
from evermini.models.batch import BLOCK_SIZE

MAX_SCORED_ROWS = 128
"""Prompt rows per step whose logits are wanted: 128 rows of 152k float32 are 78 MB."""

MAX_OVERTAKES = 32
"""Younger requests that may pass one that waits for memory; then admission is closed until it fits."""

MAX_CANDIDATES = 128
"""Oldest waiting requests that are looked at in a step, so that a long queue costs no time."""

CROWD = 8
"""Requests that wait for their first token while prompts get half of the steps; with half as many, a quarter."""

PREFIX_PATIENCE = 16
"""Steps without progress of the awaited prefix after which a request computes it itself."""


@dataclass(frozen=True)
class Chunk:
    """Compute tokens ``start:end`` of ``sequence`` in this step, and ``draft`` as if it followed them."""

    sequence: Sequence
    start: int
    end: int
    draft: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """Tokens of the sequence after this step, the draft included."""
        return self.end + len(self.draft)


class Scheduler:
    """Keeps the waiting and the running requests, both oldest first.

    Args:
        blocks: KV memory; the scheduler opens, grows and frees accounts under the request's id.
        max_batch_tokens: Tokens per step; more than ``max_num_seqs``, so that prompts advance beside decodes.
        max_num_seqs: Requests running at once.
        speculation: Make drafts.
        disk: Where computed prompts are looked for that are not in KV memory.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        speculation: bool = True,
        disk: PromptDisk | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, not {max_num_seqs}")
        if max_batch_tokens <= max_num_seqs:
            raise ValueError(
                f"max_batch_tokens ({max_batch_tokens}) must exceed max_num_seqs ({max_num_seqs}): "
                "every running request takes one token of a step, and prompts need the rest"
            )
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._speculation = speculation
        self._disk = disk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Let ``sequence`` wait for admission."""
        sequence.chain.extend(sequence.token_ids)
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget ``sequence``, waiting or running, and free its blocks."""
        if sequence.is_running:
            self._dismiss(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks; every running request with a chunk has the blocks for it.

        Those without an adapter come first, then each adapter's; within that, decodes come first.

        The caller computes them all, or removes their requests, before the next call.
        """
        self._make_way()
        chunks = self._schedule_decodes()
        if self._speculation:
            chunks = self._add_drafts(chunks)
        budget = self._max_batch_tokens - sum(chunk.context - chunk.start for chunk in chunks)
        if chunks:
            budget = min(budget, max(BLOCK_SIZE, self._prompts_share()))
        return sorted(chunks + self._schedule_prompts(budget), key=_adapter_key)

    def _prompts_share(self) -> int:
        """Return the tokens of a step that prompts get beside decodes."""
        num_waiting = sum(
            sequence.priority == INTERACTIVE and not sequence.is_decoding
            for sequence in (*self.running, *self.waiting[:CROWD])
        )
        return self._max_batch_tokens * min(CROWD, max(CROWD // 2, num_waiting)) // (2 * CROWD)

    def _make_way(self) -> None:
        """Let batches give up memory and places, as far as a request before them waits and needs it."""
        while (
            self.waiting
            and self.running
            and self.running[-1].priority > self.waiting[0].priority
            and not self._fits(self.waiting[0])
        ):
            self._preempt(self.running[-1])

    def _fits(self, sequence: Sequence) -> bool:
        """Return whether there is a place for ``sequence``, and memory if none of it can be shared."""
        needed = blocks_for(len(sequence.token_ids)) + len(self.running)
        return len(self.running) < self._max_num_seqs and needed <= self._blocks.num_free

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if not (sequence.is_running and sequence.is_decoding) or sequence.restore:
                continue
            known = len(sequence.token_ids)
            while not self._blocks.grow(sequence.request_id, known):
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                chunks.append(Chunk(sequence, known - 1, known))
        return chunks

    def _add_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        drafts = [_propose(chunk.sequence, len(chunks)) for chunk in chunks]
        sizes = plan(drafts, len(chunks), (self._max_batch_tokens - len(chunks)) // 2)
        return [
            self._with_draft(chunk, draft.token_ids[:size])
            for chunk, draft, size in zip(chunks, drafts, sizes, strict=True)
        ]

    def _with_draft(self, chunk: Chunk, draft: abc.Sequence[int]) -> Chunk:
        """Return the chunk with as much of ``draft`` as its grammar allows and there is memory for."""
        if draft and chunk.sequence.constraint is not None:
            draft = draft[: chunk.sequence.constraint.num_valid(draft)]
        if draft and not self._blocks.grow(chunk.sequence.request_id, chunk.end + len(draft)):
            draft = draft[: -chunk.end % BLOCK_SIZE]
        return replace(chunk, draft=tuple(draft)) if draft else chunk

    def _preempt(self, sequence: Sequence) -> None:
        self._dismiss(sequence)
        sequence.num_computed = 0
        sequence.preempted = True
        sequence.chain.extend(sequence.token_ids)
        insort(self.waiting, sequence, key=_rank)
        self.num_preemptions += 1

    def _dismiss(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence.request_id)
        sequence.is_running = False
        if self._disk is not None and sequence.restore is not None:
            self._disk.cancel(sequence.restore)
            sequence.restore = None

    def _schedule_prompts(self, budget: int) -> list[Chunk]:
        by_age = [sequence for sequence in self.running if not sequence.is_decoding]
        if len(self.running) < self._max_num_seqs:
            by_age = sorted(by_age + self.waiting[:MAX_CANDIDATES], key=_rank)
        untried = iter(by_age)
        oldest = next((sequence for sequence in untried if self._is_ready(sequence)), None)
        if oldest is None:
            return []
        grants = {oldest: 0}
        by_size = sorted(untried, key=self._size)
        half = (budget + 1) // 2
        scored_rows = MAX_SCORED_ROWS
        batch_rows = max(BLOCK_SIZE, self._max_batch_tokens // 4)
        for sequence, limit in [(oldest, half), *((s, budget) for s in by_size), (oldest, budget)]:
            if sequence.is_scoring:
                limit = min(limit, scored_rows)
            if sequence.priority > INTERACTIVE:
                limit = min(limit, batch_rows)
            if min(limit, budget) == 0 or not self._is_ready(sequence):
                continue
            granted = grants.get(sequence, 0)
            size = min(limit, budget, sequence.num_remaining - granted)
            grants[sequence] = granted + size
            budget -= size
            scored_rows -= size if sequence.is_scoring else 0
            batch_rows -= size if sequence.priority > INTERACTIVE else 0
        return [
            Chunk(sequence, sequence.num_computed, sequence.num_computed + grants[sequence])
            for sequence in self.running
            if grants.get(sequence)
        ]

    def _size(self, sequence: Sequence) -> tuple[int, int]:
        """Order of the second half of the budget: requests that already streamed, then fewest full steps first."""
        if sequence.preempted and sequence.priority == INTERACTIVE:
            return -1, sequence.arrival
        in_memory = sequence.num_computed
        if not sequence.is_running:
            in_memory = len(self._blocks.match(sequence.shareable)) * BLOCK_SIZE
        num_left = len(sequence.token_ids) - in_memory
        return (num_left - 1) // self._max_batch_tokens, sequence.arrival

    def _is_ready(self, sequence: Sequence) -> bool:
        """Return whether ``sequence`` can be computed now, admitting it if it waits and may."""
        return self._holds_memory(sequence) and sequence.restore is None

    def _holds_memory(self, sequence: Sequence) -> bool:
        """Return whether ``sequence`` is running, admitting it now if it waits and may."""
        if sequence.is_running:
            return True
        oldest = self.waiting[0]
        is_closed = sequence is not oldest and oldest.num_overtaken >= MAX_OVERTAKES
        if is_closed or len(self.running) >= self._max_num_seqs or self._awaits_prefix(sequence):
            return False
        # Every running request may soon cross into a new block; without a reserve there were 5x the preemptions.
        cached = self._blocks.open(
            sequence.request_id,
            len(sequence.token_ids),
            sequence.shareable,
            reserve=len(self.running),
        )
        if cached is None:
            return False
        if sequence is not oldest:
            oldest.num_overtaken += 1
        sequence.num_computed = cached
        missing = sequence.shareable[cached // BLOCK_SIZE :]
        if self._disk is not None and missing and len(sequence.token_ids) >= MIN_TOKENS:
            sequence.restore = self._disk.begin(missing)
        sequence.preempted = False
        sequence.is_running = True
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_rank)
        return True

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Return whether a running request is computing the next block that ``sequence`` could share.

        The wait ends when that request stops, or after `PREFIX_PATIENCE` steps without progress: no deadlock, no
        starvation.
        """
        keys = sequence.shareable
        have = len(self._blocks.match(keys))
        if not self._blocks.prefix_caching or have == len(keys):
            return False
        if not any(
            other.num_computed < (have + 1) * BLOCK_SIZE
            and keys[have] in other.chain.keys[have : have + 1]
            for other in self.running
        ):
            return False
        if have > sequence.awaited:
            sequence.awaited = have
            sequence.patience = PREFIX_PATIENCE
        sequence.patience -= 1
        return sequence.patience >= 0


def _adapter_key(chunk: Chunk) -> bytes:
    adapter = chunk.sequence.adapter
    return b"" if adapter is None else adapter.key


def _propose(sequence: Sequence, num_rows: int) -> Draft:
    """Guess what ``sequence`` writes next; its last token is drawn from the row before it and needs none."""
    limit = min(MAX_DRAFT, sequence.params.max_tokens - sequence.num_generated - 1)
    if sequence.drafter is None or limit < 1:
        return NO_DRAFT
    if sequence.constraint is not None and (forced := sequence.constraint.forced()[:limit]):
        return Draft(forced, (1.0,) * len(forced))
    return sequence.drafter.propose(limit, break_even(num_rows, num_rows))


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
