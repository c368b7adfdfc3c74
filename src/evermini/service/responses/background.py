"""Background responses: worked on whether or not a client waits, and taken up again when a process has died.

A response is on the disk before its client hears of it, and a job with it (`evermini.service.jobs`). What happens when
the job is taken up again, by another process or by this one after a restart:

    not begun, or nothing of it shown yet        it is computed, up to `MAX_ATTEMPTS` times in all
    begun as a stream, parts of which were read  it ends as failed: another answer would contradict them
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict
from functools import partial

from evermini.errors import EngineStoppedError, OverloadedError, StorageError
from evermini.service.caller import Caller, current_caller
from evermini.service.directory import Directory
from evermini.service.documents import Documents
from evermini.service.jobs import FAILED, JobRunner, LeaveJobError
from evermini.service.metrics import Metrics
from evermini.service.responses.context import Contexts
from evermini.service.responses.events import EventWriter
from evermini.service.responses.items import Json
from evermini.service.responses.run import (
    AbandonedError,
    ResponseRun,
    failure,
    new_writer,
    start_chat,
)
from evermini.service.responses.schemas import ResponseRequest, parse_response
from evermini.storage.database import Database
from evermini.storage.jobs import Job, LeaseLostError
from evermini.storage.responses import Addition, ResponseStore, StoredResponse

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.1
"""How long an event may wait to be stored with others."""
POLL_SECONDS = 0.1
"""How often a reader looks for new events; another process may be writing them."""
RETRY_SECONDS = 0.5
"""Pause before a full engine is asked again."""
MAX_ATTEMPTS = 3
_EVENTS = 500

INTERRUPTED: Json = {
    "code": "server_error",
    "message": "The server that computed this response stopped before it was complete. Send the request again.",
}


class Background:
    """The background responses of one server. Being called is how it handles their jobs."""

    def __init__(
        self,
        directory: Directory,
        metrics: Metrics,
        database: Database,
        contexts: Contexts,
        documents: Documents,
        jobs: JobRunner,
    ) -> None:
        self._directory = directory
        self._metrics = metrics
        self._database = database
        self._contexts = contexts
        self._documents = documents
        self._jobs = jobs
        self._store = ResponseStore(database)

    async def submit(self, request: ResponseRequest, items: list[Json], body: Json) -> None:
        """Store a new response as queued; it is on the disk when this returns, and soon worked on."""
        writer, caller = new_writer(body, request), current_caller.get()
        events = [writer.snapshot("response.created"), writer.snapshot("response.queued")]
        stored = StoredResponse(
            body=dict(body),
            items=items,
            request=request.model_dump(by_alias=True, exclude_unset=True),
            is_resumable=bool(request.stream),
            caller=asdict(caller),
            project=caller.project,
        )
        shown = events if stored.is_resumable else []
        await self._database.run(self._store.submit, stored, shown)
        self._jobs.poke()

    async def cancel(self, response_id: str) -> StoredResponse | None:
        """Make an unfinished response cancelled, whichever process works on it, and return it as it is then."""
        stored = await self._database.run(self._store.cancel, response_id)
        self._jobs.abandon(response_id)
        return stored

    async def delete(self, response_id: str) -> bool:
        """Delete a response, finished or not; false if there is none of that id."""
        deleted = await self._database.run(self._store.delete, response_id)
        self._jobs.abandon(response_id)
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

    async def __call__(self, job: Job) -> None:
        """Finish a response.

        Raises:
            LeaseLostError: It was cancelled or deleted, or another process has taken over.
            LeaveJobError: The engine was stopped; another can compute it.
            StorageError: The database cannot be used; it can be tried again.
        """
        stored = await self._database.run(self._store.get, job.subject)
        if stored is None or stored.is_finished:  # since the job was claimed
            return
        current_caller.set(Caller(**(stored.caller or {})))
        was_shown = stored.is_resumable and stored.body["status"] == "in_progress"
        if was_shown or job.attempt > MAX_ATTEMPTS:
            await self._end(job, stored)
            return
        if job.attempt > 1:
            log.info("response %s: taken up again, attempt %s", stored.id, job.attempt)
        try:
            request = parse_response(stored.request)
            writer = new_writer({**stored.body, "status": "queued"}, request)
        except Exception as error:  # a field of an older version is gone
            await self._end(job, stored, failure(error))
            return
        known = await self._database.run(self._store.events, stored.id, -1, _EVENTS)
        writer.skip(len(known))
        await self._work(job, stored, request, writer)

    async def give_up(self, job: Job) -> None:
        """End a response as failed that the server cannot compute.

        Raises:
            LeaseLostError: As when it is computed.
            StorageError: As then.
        """
        stored = await self._database.run(self._store.get, job.subject)
        if stored is not None and not stored.is_finished:
            await self._end(job, stored, {"code": "server_error", "message": FAILED})

    async def _work(
        self, job: Job, stored: StoredResponse, request: ResponseRequest, writer: EventWriter
    ) -> None:
        log_of = _EventLog(self._database, self._store, job, stored)
        try:
            try:
                run = await self._start(stored, request, writer, log_of)
            except (EngineStoppedError, StorageError) as error:
                raise LeaveJobError(error.message) from None
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
        except AbandonedError as error:
            raise error.reason from None
        if isinstance(run.error, StorageError):  # its end could not be stored
            raise run.error

    async def _start(
        self,
        stored: StoredResponse,
        request: ResponseRequest,
        writer: EventWriter,
        log_of: _EventLog,
    ) -> ResponseRun:
        context = [*await self._contexts.history(request), *stored.items]
        served = await self._directory.resolve(request.model)
        while True:
            try:
                running = await start_chat(
                    served,
                    request,
                    context,
                    writer.body,
                    documents=self._documents,
                    metrics=self._metrics,
                )
                return ResponseRun(writer, running, log_of.save)
            except OverloadedError:  # nobody waits at the other end: the response can
                await asyncio.sleep(RETRY_SECONDS)

    async def _end(self, job: Job, stored: StoredResponse, error: Json = INTERRUPTED) -> None:
        """Make a response failed that cannot be computed again."""
        writer = EventWriter(stored.body, None)
        after, number = -1, 0
        while known := await self._database.run(self._store.events, stored.id, after, _EVENTS):
            after = known[-1]["sequence_number"]
            number += len(known)
        writer.skip(number)
        events = [writer.fail(error), writer.terminal()]
        shown = events if stored.is_resumable else []
        await self._database.run(self._store.save, writer.body, job, shown)


class _EventLog:
    """Stores one response's progress; for one that is not streamed, only its state."""

    def __init__(
        self, database: Database, store: ResponseStore, job: Job, stored: StoredResponse
    ) -> None:
        self._database = database
        self._store = store
        self._job = job
        self._stored = stored
        self._pending: list[Json] = []
        self._flushed = 0.0
        self._num_saved = 0

    async def add(self, event: Json) -> None:
        """Take the next event; it is stored at once or, with others, soon after.

        Raises:
            AbandonedError: The response is no longer this process's.
            StorageError: It could not be stored.
        """
        if event["sequence_number"] < self._num_saved:
            return  # the last one, which was stored with the finished response
        if self._stored.is_resumable:
            self._pending.append(event)
        if event["type"] == "response.in_progress":
            await self._store_state(event["response"], None)
        elif self._pending and time.monotonic() > self._flushed + FLUSH_SECONDS:
            append = self._store.append_events
            await self._write(partial(append, self._stored.id, self._job, self._pending))

    async def save(self, body: Json, last: Json, error: Exception | None) -> None:
        """Store the finished response and its last events, unless the engine was stopped under it."""
        if isinstance(error, EngineStoppedError) and not self._stored.is_resumable:
            raise AbandonedError(LeaveJobError(error.message))
        if self._stored.is_resumable:
            self._pending.append(last)
        self._num_saved = last["sequence_number"] + 1
        addition = None
        if error is None and body["conversation"] is not None:
            items = [*self._stored.items, *body["output"]]
            addition = Addition(body["conversation"]["id"], items)
        await self._store_state(body, addition)

    async def _store_state(self, body: Json, addition: Addition | None) -> None:
        save = self._store.save
        await self._write(partial(save, dict(body), self._job, self._pending, addition))

    async def _write(self, write: Callable[[], None]) -> None:
        try:
            await self._database.run(write)
        except LeaseLostError as error:
            raise AbandonedError(error) from None
        self._pending = []
        self._flushed = time.monotonic()
