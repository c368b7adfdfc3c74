"""Computed prompts between KV memory and the disk, without a step of the engine waiting for either direction.

    engine's thread   offer(): copies blocks just computed        begin() ... take(): copies blocks that were read
                          |  at most MAX_WAITING_BYTES                  ^  at most MAX_WAITING_BYTES
    threads            writer -> PromptStore                     PromptStore -> reader

*Writing.* Each full block of a prompt that is worth it is offered once it is computed, so a request that is aborted
has kept what was done of it, and so has a process that is killed. The copy costs the engine less than a hundredth of
what computing took. If the disk is so slow that copies pile up, the rest is offered again after a later step. At a
request's end its blocks are marked as used, the last one first: when room is needed, a prompt loses its end before its
beginning, without which the rest is of no use.

*Reading.* A request that is admitted asks for the blocks after those found in memory. The engine goes on with the
other requests; before each step it takes what has arrived. Blocks are read for all who wait in turns, one each, so
nobody waits for another's long prompt. Who gets no block for `PATIENCE_SECONDS` computes the rest itself, and while a
single read takes that long, nobody else asks.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evermini.engine.kv import BlockKey
from evermini.engine.prompt_store import PromptStore

MIN_TOKENS = 1024
"""Prompts from this length on are kept and looked for, as OpenAI caches them; shorter ones are computed soon."""

MAX_WAITING_BYTES = 64 * 1024**2
"""Copies that wait to be written, and likewise blocks read that wait for a step."""

MAX_COPIES = 32
"""Blocks that are copied before or after a step, unless it computed more: mini's take 4 to 8 ms, while others wait."""

PATIENCE_SECONDS = 0.5
"""Without a block for so long, a request computes what is missing."""

LOOKUP_SECONDS = 0.002
"""How long a step waits to hear whether the disk has anything: else every new prompt would miss the step."""

TOUCH_SECONDS = 60.0
"""How often the use of what is in memory is noted on the disk, so that it stays there, too."""


@dataclass(frozen=True)
class PromptDiskStats:
    """A snapshot; the counters run from the process's start.

    Attributes:
        num_bytes: What the records of all models take on the disk, as far as this process knows.
        blocks_written: Records written.
        blocks_read: Records read.
        blocks_damaged: Records that were not what was written.
    """

    num_bytes: int = 0
    blocks_written: int = 0
    blocks_read: int = 0
    blocks_damaged: int = 0


class Restore:
    """Blocks that one request has asked for; made by `PromptDisk.begin`."""

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        self._keys = keys
        self._num_read = 0
        self._ready: list[Tensor] = []
        self._is_found: bool | None = None  # the first block is on the disk; `None`: not looked yet
        self._is_over = False
        self._last_news = time.monotonic()


@dataclass(frozen=True)
class _Write:
    """A block to be written; ``body`` is ``None`` where its record is only to be marked as used."""

    key: BlockKey
    body: Tensor | None


class PromptDisk:
    """See the module docstring. All methods but `stats` and `close` are the engine's thread's.

    Args:
        store: The records.
    """

    def __init__(self, store: PromptStore) -> None:
        self._store = store
        self._changed = threading.Condition()  # guards what follows
        self._writes: deque[_Write] = deque()
        self._num_unwritten = 0  # of them, those with a body
        self._reads: deque[Restore] = deque()
        self._num_waiting_bytes = 0  # read, and not taken yet
        self._reading_since: float | None = None
        self._is_closing = False
        # Keys that are on the disk or about to be, the least recently used first: when their use was last noted.
        self._known: OrderedDict[BlockKey, float] = OrderedDict()
        self._max_known = store.max_bytes // store.record_bytes + 1
        self._blocks_written = 0
        self._blocks_read = 0
        self._threads = [
            threading.Thread(target=self._run_reader, name="evermini-prompts-read", daemon=True),
            threading.Thread(target=self._run_writer, name="evermini-prompts-write", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stats(self) -> PromptDiskStats:
        """Return a snapshot; safe from any thread."""
        return PromptDiskStats(
            self._store.num_bytes,
            self._blocks_written,
            self._blocks_read,
            self._store.num_damaged,
        )

    def close(self, timeout: float) -> None:
        """Write what waits to be written, as far as ``timeout`` seconds allow, and read nothing more."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def offer(
        self, keys: Sequence[BlockKey], first: int, copy: Callable[[list[int]], Tensor], limit: int
    ) -> int:
        """Keep blocks of a prompt that are not kept yet.

        Args:
            keys: Of its leading blocks, all of them computed.
            first: Blocks before this one have been offered.
            copy: Returns copies of some of the blocks, as `KVCache.copy_out` does.
            limit: Blocks that are copied at most.

        Returns:
            ``first`` for the next time: blocks from there on were too many for now.
        """
        fresh: list[int] = []
        end = first
        with self._changed:
            if self._store.is_paused:
                return first
            room = MAX_WAITING_BYTES // self._store.record_bytes - self._num_unwritten
            room = min(room, limit)
            while end < len(keys):
                if keys[end] not in self._known:
                    if len(fresh) >= room:
                        break
                    fresh.append(end)
                end += 1
        if fresh:
            bodies = copy(fresh)
            with self._changed:
                for index, body in zip(fresh, bodies, strict=True):
                    self._know(keys[index], noted=-math.inf)
                    self._writes.append(_Write(keys[index], body))
                self._num_unwritten += len(fresh)
                self._changed.notify_all()
        return end

    def note_use(self, keys: Sequence[BlockKey]) -> None:
        """Mark the leading blocks of a prompt as used, if one of them has not been for a while."""
        now = time.monotonic()
        with self._changed:
            known = [key for key in keys if key in self._known]
            if any(now - self._known[key] > TOUCH_SECONDS for key in known):
                for key in reversed(known):
                    self._know(key, noted=now)
                    self._writes.append(_Write(key, None))
                self._changed.notify_all()

    def begin(self, keys: Sequence[BlockKey]) -> Restore | None:
        """Ask for the blocks of ``keys``, each of which is of no use without those before it.

        Returns:
            What to `take` them from; ``None``: the disk does not have the first one, or does not answer anybody.
        """
        with self._changed:
            since = self._reading_since
            if since is not None and time.monotonic() - since > PATIENCE_SECONDS:
                return None
            restore = Restore(keys)
            self._reads.appendleft(restore)
            self._changed.notify_all()
            self._changed.wait_for(lambda: restore._is_found is not None, LOOKUP_SECONDS)
            return None if restore._is_found is False else restore

    def take(self, restore: Restore, limit: int) -> tuple[Sequence[Tensor], bool]:
        """Return at most ``limit`` blocks that have arrived, (bytes per block,) each, and whether that is all."""
        with self._changed:
            ready, restore._ready = restore._ready[:limit], restore._ready[limit:]
            now = time.monotonic()
            if ready:
                restore._last_news = now
                self._num_waiting_bytes -= len(ready) * self._store.record_bytes
                self._changed.notify_all()
            elif self._num_waiting_bytes >= MAX_WAITING_BYTES:
                restore._last_news = now  # it is not the disk that is slow
            elif now - restore._last_news > PATIENCE_SECONDS and not restore._ready:
                self._drop(restore)
            return ready, restore._is_over and not restore._ready

    def cancel(self, restore: Restore) -> None:
        """Read nothing more of it."""
        with self._changed:
            self._drop(restore)

    def wait(self, restores: Sequence[Restore], seconds: float) -> None:
        """Wait until there is something to `take` from one of them, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: any(r._ready or r._is_over for r in restores), seconds)

    def _drop(self, restore: Restore) -> None:
        self._num_waiting_bytes -= len(restore._ready) * self._store.record_bytes
        restore._ready = []
        restore._is_over = True
        self._changed.notify_all()

    def _know(self, key: BlockKey, noted: float) -> None:
        self._known[key] = noted
        self._known.move_to_end(key)
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def _run_reader(self) -> None:
        while (restore := self._next_read()) is not None:
            key = restore._keys[restore._num_read]
            if restore._is_found is None:
                is_found = self._store.has(key)
                with self._changed:
                    restore._is_found = is_found
                    self._end_turn(restore, is_there=is_found)
                continue
            body = np.empty(self._store.record_bytes, np.uint8)
            is_read = self._store.read(key, body.data)
            if is_read:
                self._store.touch(
                    key
                )  # now, so that what the same request writes does not push it out
            with self._changed:
                if is_read and not restore._is_over:
                    restore._ready.append(torch.from_numpy(body))
                    restore._num_read += 1
                    self._num_waiting_bytes += len(body)
                    self._blocks_read += 1
                    self._know(key, noted=-math.inf)
                self._end_turn(restore, is_there=is_read)

    def _next_read(self) -> Restore | None:
        """Return whose turn it is to have a block looked up or read; waits. ``None``: no more."""
        with self._changed:
            while True:
                if self._is_closing:
                    return None
                while self._reads and self._reads[0]._is_over:
                    self._reads.popleft()
                if self._reads:
                    is_lookup = self._reads[0]._is_found is None
                    if is_lookup or self._num_waiting_bytes < MAX_WAITING_BYTES:
                        self._reading_since = time.monotonic()
                        return self._reads.popleft()
                self._changed.wait()

    def _end_turn(self, restore: Restore, *, is_there: bool) -> None:
        """Put the request at the end of the queue, unless it has all that is there."""
        self._reading_since = None
        missing = restore._keys[restore._num_read :]
        if not is_there:
            for key in missing:  # evicted, by this process or another
                self._known.pop(key, None)
        if not is_there or not missing:
            restore._is_over = True
        elif not restore._is_over:
            self._reads.append(restore)
        self._changed.notify_all()

    def _run_writer(self) -> None:
        self._store.count()
        while True:
            with self._changed:
                while not self._writes and not self._is_closing:
                    self._changed.wait()
                if not self._writes:
                    return
                write = self._writes[0]
            if write.body is None:
                is_there = self._store.touch(write.key)
            else:
                is_there = self._store.write(write.key, write.body.numpy().data)
            with self._changed:
                self._writes.popleft()
                self._num_unwritten -= write.body is not None
                if not is_there:
                    self._known.pop(write.key, None)
                elif write.body is not None:
                    self._blocks_written += 1
