"""Counts every request's tokens into the database, a few at a time, so that no answer waits for it.

What a crash can lose is the last `FLUSH_SECONDS` of the count. A database that cannot be written is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from evermini.errors import StorageError
from evermini.service.caller import current_caller
from evermini.service.generation import Usage
from evermini.service.prices import cost_of
from evermini.storage.database import Database
from evermini.storage.usage import Filter, UsageStore, Used

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.5
MAX_KEPT = 100_000
"""Requests that are remembered while the database cannot be written; the oldest go first, and the log says so."""


class Meter:
    """Counts what one process serves.

    Args:
        database: Where it is counted.

    Attributes:
        observers: Told of every request that is counted.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._store = UsageStore(database)
        self.observers: list[Callable[[Used], None]] = []
        self._waiting: list[Used] = []
        self._task: asyncio.Task[None] | None = None
        self._cpu_before = _cpu_seconds()
        self._since = int(time.time())

    def start(self) -> None:
        """Begin to write from time to time. Needs the event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    def count(self, model: str, usage: Usage, seconds: float) -> None:
        """Count a request of the current caller that has ended, answered or not.

        Args:
            model: Id of the model.
            usage: Its tokens.
            seconds: From its arrival to its end.
        """
        caller = current_caller.get()
        used = Used(
            at=int(time.time()),
            request_id=caller.request_id,
            endpoint=caller.endpoint,
            model=model,
            key_id=caller.key_id,
            project=caller.project,
            is_batch=caller.is_batch,
            input_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            accepted_tokens=usage.accepted_prediction_tokens,
            rejected_tokens=usage.rejected_prediction_tokens,
            seconds=seconds,
        )
        self._waiting.append(used)
        for observer in self.observers:
            observer(used)

    async def flush(self) -> None:
        """Write what has been counted since the last time."""
        now, cpu = int(time.time()), _cpu_seconds()
        busy = (cpu - self._cpu_before) / (os.cpu_count() or 1)
        if not self._waiting and busy < 1.0:  # an idle server writes nothing
            return
        since, before = self._since, self._cpu_before
        self._since, self._cpu_before = now, cpu
        some, self._waiting = self._waiting, []
        try:
            await self._database.run(self._store.add, some, since, busy)
        except StorageError as error:
            self._since, self._cpu_before = since, before
            self._waiting = [*some, *self._waiting]
            if len(self._waiting) > MAX_KEPT:
                log.error("usage of %d requests is lost: %s", len(self._waiting) - MAX_KEPT, error)
                del self._waiting[:-MAX_KEPT]

    async def cost_since(self, key_id: str, start: int) -> float:
        """Return what a key has cost since some time, in US dollars, by the list prices."""
        totals = await self._database.run(
            self._store.totals,
            start,
            int(time.time()) + 3600,
            group_by=("model", "is_batch"),
            only=Filter(keys=(key_id,)),
        )
        return cost_of(totals)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except Exception:  # the next one may work
                log.exception("usage cannot be written")


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system
