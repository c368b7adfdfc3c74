"""Background responses: worked on whether or not a client waits, and taken up again when a process has died.

A response is on the disk before its client hears of it. This process holds a lease on what it works on. Leases that
nobody renews are claimed by the next process that looks, this one after a restart included. What happens then:

    not begun, or nothing of it shown yet        it is computed, up to `MAX_ATTEMPTS` times in all
    begun as a stream, parts of which were read  it ends as failed: another answer would contradict them
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from evermini.errors import EngineStoppedError, OverloadedError, StorageError
from evermini.service.documents import Documents
from evermini.service.responses.context import Contexts
from evermini.service.responses.events import EventWriter
from evermini.service.responses.items import Json
from evermini.service.responses.run import (
    ResponseRun,
    failure,
    new_writer,
    start_chat,
)
from evermini.service.responses.schemas import ResponseRequest, parse_response
from evermini.service.runtime import Runtime
from evermini.storage.database import Database
from evermini.storage.responses import Addition, Lease, ResponseStore, StoredResponse

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
"""How long a response waits for a process that has died."""
RENEW_SECONDS = 5.0
FLUSH_SECONDS = 0.1
"""How long an event may wait to be stored with others."""
POLL_SECONDS = 0.1
"""How often a reader looks for new events; another process may be writing them."""
RETRY_SECONDS = 0.5
"""Pause before a full engine is asked again."""
MAX_ATTEMPTS = 3
_CLAIM = 16
_EVENTS = 500

INTERRUPTED: Json = {
    "code": "server_error",
    "message": "The server that computed this response stopped before it was complete. Send the request again.",
}


class Background:
    """The background responses that this process works on."""

    def __init__(
        self, runtime: Runtime, database: Database, contexts: Contexts, documents: Documents
    ) -> None:
        self._runtime = runtime
        self._database = database
        self._contexts = contexts
        self._documents = documents
        self._store = ResponseStore(database)
        self._owner = uuid.uuid4().hex
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take up what other processes left, now and from time to time. Needs the event loop."""
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self, seconds: float) -> None:
        """Let what runs finish for so many seconds, then leave the rest to the next process."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        tasks = [*self._tasks.values(), *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(StorageError):  # the leases run out by themselves
            await self._database.run(self._store.release, self._owner)

    async def submit(self, request: ResponseRequest, items: list[Json], body: Json) -> None:
        """Store a new response as queued and begin to work on it; it is on the disk when this returns."""
        writer = new_writer(body, request)
        events = [writer.snapshot("response.created"), writer.snapshot("response.queued")]
        stored = StoredResponse(
            body=dict(body),
            items=items,
            request=request.model_dump(by_alias=True, exclude_unset=True),
            is_resumable=bool(request.stream),
            num_attempts=1,
        )
        await self._database.run(self._store.add, stored, lease=self._lease())
        self._begin(stored, request, writer, events if stored.is_resumable else [])

    async def cancel(self, response_id: str) -> StoredResponse | None:
        """Make an unfinished response cancelled, whichever process works on it, and return it as it is then."""
        stored = await self._database.run(self._store.cancel, response_id)
        self._drop(response_id)
        return stored

    async def delete(self, response_id: str) -> bool:
        """Delete a response, finished or not; false if there is none of that id."""
        deleted = await self._database.run(self._store.delete, response_id)
        self._drop(response_id)
        return deleted

    async def follow(self, response_id: str, after: int) -> AsyncGenerator[Json, None]:
        """Yield a response's events after a sequence number, those to come included, until it is finished."""
        while True:
            # In this order: all events of a finished response are stored with its state.
            stored = await self._database.run(self._store.get, response_id)
            events = await self._database.run(self._store.events, response_id, after, _EVENTS)
            for event in events:
                yield event
                after = event["sequence_number"]
            if events:
                continue
            if stored is None or stored.is_finished:
                return
            await asyncio.sleep(POLL_SECONDS)

    # Work

    def _begin(
        self,
        stored: StoredResponse,
        request: ResponseRequest,
        writer: EventWriter,
        events: list[Json],
    ) -> None:
        task = asyncio.create_task(self._work(stored, request, writer, events))
        self._tasks[stored.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(stored.id, None))

    async def _work(
        self,
        stored: StoredResponse,
        request: ResponseRequest,
        writer: EventWriter,
        events: list[Json],
    ) -> None:
        log_of = _EventLog(self._database, self._store, self._owner, stored, events)
        try:
            try:
                run = await self._start(stored, request, writer, log_of)
            except EngineStoppedError:
                return  # whoever claims it computes it
            except Exception as error:
                await log_of.add(writer.fail(failure(error)))
                await log_of.save(writer.body, writer.terminal(), error)
                return
            try:
                async with aclosing(run.events()) as produced:
                    async for event in produced:
                        await log_of.add(event)
            finally:
                run.abort()
        except _NotOursError:
            log.info("response %s was cancelled, deleted or claimed", stored.id)
        except StorageError as error:  # whoever claims it when the lease has run out sees to it
            log.error("response %s: %s", stored.id, error.message)

    async def _start(
        self,
        stored: StoredResponse,
        request: ResponseRequest,
        writer: EventWriter,
        log_of: _EventLog,
    ) -> ResponseRun:
        context = [*await self._contexts.history(request), *stored.items]
        served = self._runtime.resolve(request.model)
        while True:
            try:
                running = await start_chat(
                    served,
                    request,
                    context,
                    writer.body,
                    documents=self._documents,
                    metrics=self._runtime.metrics,
                )
                return ResponseRun(writer, running, log_of.save)
            except OverloadedError:  # nobody waits at the other end: the response can
                await asyncio.sleep(RETRY_SECONDS)

    def _drop(self, response_id: str) -> None:
        if task := self._tasks.get(response_id):
            task.cancel()

    # Leases

    def _lease(self) -> Lease:
        return Lease(self._owner, time.time() + LEASE_SECONDS)

    async def _keep(self) -> None:
        while True:
            try:
                await self._renew()
                await self._claim()
            except StorageError as error:  # the leases hold for a while
                log.warning("background responses: %s", error.message)
            except Exception:
                log.exception("background responses: leases could not be renewed")
            await asyncio.sleep(RENEW_SECONDS)

    async def _renew(self) -> None:
        if mine := list(self._tasks):
            kept = await self._database.run(self._store.renew, self._lease(), mine)
            for response_id in set(mine) - kept:
                self._drop(response_id)

    async def _claim(self) -> None:
        claimed = await self._database.run(
            self._store.claim, self._lease(), now=time.time(), limit=_CLAIM
        )
        for stored in claimed:
            was_shown = stored.is_resumable and stored.body["status"] == "in_progress"
            if was_shown or stored.num_attempts > MAX_ATTEMPTS:
                await self._end(stored)
                continue
            log.info("response %s: taken up again, attempt %s", stored.id, stored.num_attempts)
            try:
                request = parse_response(stored.request)
                writer = new_writer({**stored.body, "status": "queued"}, request)
            except Exception as error:  # the model or a field of an older version is gone
                await self._end(stored, failure(error))
                continue
            known = await self._database.run(self._store.events, stored.id, -1, _EVENTS)
            writer.skip(len(known))
            self._begin(stored, request, writer, [])

    async def _end(self, stored: StoredResponse, error: Json = INTERRUPTED) -> None:
        """Make a response failed that cannot be computed again."""
        writer = EventWriter(stored.body, None)
        after, number = -1, 0
        while known := await self._database.run(self._store.events, stored.id, after, _EVENTS):
            after = known[-1]["sequence_number"]
            number += len(known)
        writer.skip(number)
        events = [writer.fail(error), writer.terminal()]
        shown = events if stored.is_resumable else []
        await self._database.run(self._store.save, writer.body, self._owner, shown)


class _NotOursError(Exception):
    """The response was cancelled, deleted, or claimed by another process."""


class _EventLog:
    """Stores one response's progress; for one that is not streamed, only its state."""

    def __init__(
        self,
        database: Database,
        store: ResponseStore,
        owner: str,
        stored: StoredResponse,
        pending: list[Json],
    ) -> None:
        self.pending = pending
        self._database = database
        self._store = store
        self._owner = owner
        self._stored = stored
        self._flushed = 0.0
        self._num_saved = 0

    async def add(self, event: Json) -> None:
        """Take the next event; it is stored at once or, with others, soon after.

        Raises:
            _NotOursError: The response is no longer this process's.
        """
        if event["sequence_number"] < self._num_saved:
            return  # the last one, which was stored with the finished response
        if self._stored.is_resumable:
            self.pending.append(event)
        if event["type"] == "response.in_progress":
            await self._store_state(event["response"], None)
        elif self.pending and time.monotonic() > self._flushed + FLUSH_SECONDS:
            done = await self._database.run(
                self._store.append_events, self._stored.id, self._owner, self.pending
            )
            self._after(done)

    async def save(self, body: Json, last: Json, error: Exception | None) -> None:
        """Store the finished response and its last events, unless the engine was stopped under it."""
        if isinstance(error, EngineStoppedError) and not self._stored.is_resumable:
            raise _NotOursError  # the next process computes it
        if self._stored.is_resumable:
            self.pending.append(last)
        self._num_saved = last["sequence_number"] + 1
        addition = None
        if error is None and body["conversation"] is not None:
            items = [*self._stored.items, *body["output"]]
            addition = Addition(body["conversation"]["id"], items)
        await self._store_state(body, addition)

    async def _store_state(self, body: Json, addition: Addition | None) -> None:
        done = await self._database.run(
            self._store.save, dict(body), self._owner, self.pending, addition
        )
        self._after(done)

    def _after(self, done: bool) -> None:
        if not done:
            raise _NotOursError
        self.pending = []
        self._flushed = time.monotonic()
