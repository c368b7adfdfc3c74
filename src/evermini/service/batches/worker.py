"""Does a batch's lines, each of them once, and writes its files.

Every result is in the database before the next is begun by whoever takes over: after ``kill -9`` at most the lines in
flight are computed again, and none of them is written twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import IO, Any

from evermini.errors import NotFoundError, StorageError
from evermini.service.batches.lines import Input, Line, in_order, read_body, read_input
from evermini.service.batches.requests import request_line
from evermini.service.caller import Caller
from evermini.service.files import FileService
from evermini.service.jobs import FAILED
from evermini.storage.batches import BatchStore, Result, StoredBatch, Tokens
from evermini.storage.database import Database
from evermini.storage.files import StoredFile
from evermini.storage.jobs import Job, LeaseLostError

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.25
"""How long a result may wait to be stored with others."""
STORAGE_PAUSE = 0.5
"""Pause before results are stored again that could not be."""
MAX_TRIES = 5
"""How often a line is sent whose failure may pass: a full queue, an engine that restarts."""
_ENDINGS = {
    "expired": {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    },
    "cancelled": {
        "code": "batch_cancelled",
        "message": "This request was not executed: the batch was cancelled before its turn.",
    },
    "failed": {"code": "server_error", "message": FAILED},
}

Execute = Callable[[Caller, bytes], Awaitable[tuple[int, str, Any]]]
"""(for whom and where, JSON body) -> (HTTP status, request id, decoded body): what a client would have got."""


class BatchWorker:
    """The handler of batch jobs.

    Args:
        database: Where batches are.
        files: Where their files are.
        execute: Does one request.
        num_requests: Requests at a time, over all batches of this process.
    """

    def __init__(
        self, database: Database, files: FileService, execute: Execute, *, num_requests: int
    ) -> None:
        self._database = database
        self._files = files
        self._store = BatchStore(database)
        self._execute = execute
        self._places = asyncio.Semaphore(num_requests)

    async def __call__(self, job: Job) -> None:
        """Do a batch, or what is left of it.

        Raises:
            LeaseLostError: Another process has taken over.
            StorageError: The database or the storage of files cannot be used; the job can be tried again.
        """
        batch = await self._database.run(self._store.get, job.subject)
        assert batch is not None, "batches are never deleted"
        with tempfile.TemporaryFile(prefix="evermini-batch-") as file:
            try:
                found = await self._read(batch, file)
            except NotFoundError:
                gone = {
                    "code": "file_not_found",
                    "message": "The input file was deleted or has expired.",
                }
                await self._fail(job, [{**gone, "line": None, "param": "input_file_id"}])
                return
            except StorageError as error:
                if time.time() < batch.body["expires_at"]:
                    raise  # it may be readable later
                log.error("batch %s: %s", batch.id, error.message)
                lost = {"code": "file_unreadable", "message": "The input file could not be read."}
                await self._fail(job, [{**lost, "line": None, "param": "input_file_id"}])
                return
            if found.errors:
                await self._fail(job, found.errors)
                return
            now = int(time.time())
            await self._database.run(self._store.begin, job, len(found.lines), found.model, now)
            ending = await self._do_lines(job, batch, found.lines, file)
        await self._end(job, batch, found.lines, ending)

    async def give_up(self, job: Job) -> None:
        """End a batch as failed that the server cannot do. The results that there are get into its files.

        Raises:
            LeaseLostError: Another process has taken over.
            StorageError: As when it is done.
        """
        batch = await self._database.run(self._store.get, job.subject)
        assert batch is not None, "batches are never deleted"
        if batch.status != "validating":
            try:
                with tempfile.TemporaryFile(prefix="evermini-batch-") as file:
                    found = await self._read(batch, file)
                await self._end(job, batch, found.lines, "failed")
                return
            except StorageError:
                raise
            except Exception:  # the input is gone, or it is reading and writing what fails
                log.exception("batch %s: its results cannot be written", batch.id)
        await self._fail(job, [{**_ENDINGS["failed"], "line": None, "param": None}])

    async def _fail(self, job: Job, errors: list[dict[str, Any]]) -> None:
        await self._database.run(self._store.fail, job, errors, int(time.time()))

    async def _read(self, batch: StoredBatch, file: IO[bytes]) -> Input:
        """Copy the input to a file at hand, where lines can be read in any order, and check it."""
        stored = await self._files.get(batch.body["input_file_id"])

        def read() -> Input:
            for data in self._files.read(stored):
                file.write(data)
            file.seek(0)
            return read_input(file, batch.body["endpoint"])

        return await asyncio.to_thread(read)

    async def _do_lines(
        self, job: Job, batch: StoredBatch, lines: list[Line], file: IO[bytes]
    ) -> str:
        """Do the lines that have no result yet; return how the batch ends: completed, cancelled or expired."""
        done = await self._database.run(self._store.done_lines, job.subject)
        todo = in_order([line for line in lines if line.number not in done])
        results = _Results(self._database, self._store, job)
        status = await self._database.run(self._store.status, job)
        # By a clock that nobody sets: a jump of the other one must not end a batch that runs.
        deadline = time.monotonic() + batch.body["expires_at"] - time.time()
        running: set[asyncio.Task[None]] = set()
        feeder = asyncio.create_task(self._feed(batch, todo, file, results, running))
        try:
            while status != "cancelling" and time.monotonic() < deadline:
                await asyncio.wait([feeder], timeout=FLUSH_SECONDS)
                is_last = feeder.done() and not running
                status = await results.save() or status
                if is_last and not results.waiting:
                    feeder.result()  # an error of ours ends the attempt
                    results.check()
                    return "completed"
                if running and feeder.done():
                    await asyncio.wait(running, timeout=FLUSH_SECONDS)
        finally:
            tasks = [feeder, *running]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        while results.waiting:
            await results.save()
        return "cancelled" if status == "cancelling" else "expired"

    async def _feed(
        self,
        batch: StoredBatch,
        lines: Iterator[Line],
        file: IO[bytes],
        results: _Results,
        running: set[asyncio.Task[None]],
    ) -> None:
        """Begin one line after the other, as there are places."""

        async def do(line: Line, body: bytes) -> None:
            try:
                result = await self._do(batch, line, body)
                results.waiting.append(result)
            except Exception as error:
                results.failure = error
            finally:
                self._places.release()

        for line in lines:
            await self._places.acquire()
            try:
                body = await asyncio.to_thread(read_body, file, line)
            except BaseException:
                self._places.release()
                raise
            task = asyncio.create_task(do(line, body))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _do(self, batch: StoredBatch, line: Line, body: bytes) -> Result:
        caller = Caller(
            endpoint=batch.body["endpoint"],
            key_id=batch.key_id,
            project=batch.project,
            is_batch=True,
        )
        for attempt in range(1, MAX_TRIES + 1):
            status, request_id, answer = await self._execute(caller, body)
            if status not in (409, 429) and status < 500:
                break
            log.info("batch %s, line %s: %d, try %d", batch.id, line.number, status, attempt)
            if attempt < MAX_TRIES:
                await asyncio.sleep(0.5 * 2**attempt)
        response = {"status_code": status, "request_id": request_id, "body": answer}
        text = json.dumps(request_line(line.custom_id, response, None), ensure_ascii=False)
        return Result(line.number, not 200 <= status < 300, text, _tokens(answer))

    async def _end(self, job: Job, batch: StoredBatch, lines: list[Line], ending: str) -> None:
        if ending == "completed":
            await self._database.run(self._store.set_status, job, "finalizing", int(time.time()))
        else:
            done = await self._database.run(self._store.done_lines, job.subject)
            left = [line for line in lines if line.number not in done]
            for first in range(0, len(left), 1000):
                some = [_not_done(line, ending) for line in left[first : first + 1000]]
                await self._database.run(self._store.add_results, job, some)
        output = await self._write(batch, "output", errors=False)
        errors = await self._write(batch, "error", errors=True)
        reasons = [{**_ENDINGS[ending], "line": None, "param": None}] if ending == "failed" else []
        await self._database.run(
            self._store.end, job, ending, output, errors, int(time.time()), reasons
        )
        log.info("batch %s %s", batch.id, ending)

    async def _write(self, batch: StoredBatch, what: str, *, errors: bool) -> StoredFile | None:
        """Write the output or error file; ``None`` if it would be empty."""

        def chunks() -> Iterable[bytes]:
            for text in self._store.results(batch.id, errors=errors):
                yield text.encode() + b"\n"

        return await self._files.make(
            chunks(),
            filename=f"{batch.id}_{what}.jsonl",
            purpose="batch_output",
            seconds=batch.output_seconds,
            project=batch.project,
        )


class _Results:
    """Results on their way into the database. One that cannot be written keeps them waiting while the lease holds.

    Attributes:
        waiting: Those that are not known to be stored.
        failure: Why a line has none: a bug of ours, not an answer.
    """

    def __init__(self, database: Database, store: BatchStore, job: Job) -> None:
        self.waiting: list[Result] = []
        self.failure: Exception | None = None
        self._database, self._store, self._job = database, store, job
        self._is_doubtful = False

    async def save(self) -> str | None:
        """Store what waits and return the batch's status; ``None``: the database cannot be used now.

        Raises:
            LeaseLostError: The job is another's.
        """
        taken = list(self.waiting)
        try:
            if self._is_doubtful:  # what failed may have been stored nevertheless
                done = await self._database.run(self._store.done_lines, self._job.subject)
                self._remove([result for result in taken if result.line in done])
                taken = list(self.waiting)
                self._is_doubtful = False
            if not taken:
                return await self._database.run(self._store.status, self._job)
            status = await self._database.run(self._store.add_results, self._job, taken)
        except LeaseLostError:
            raise
        except StorageError as error:
            log.warning(
                "batch %s: %d results wait: %s", self._job.subject, len(taken), error.message
            )
            self._is_doubtful = True
            await asyncio.sleep(STORAGE_PAUSE)
            return None
        self._remove(taken)
        return status

    def check(self) -> None:
        """Raise why a line has no result, if one has none: without it the batch is not done."""
        if self.failure is not None:
            raise self.failure

    def _remove(self, stored: list[Result]) -> None:
        lines = {result.line for result in stored}
        self.waiting[:] = [result for result in self.waiting if result.line not in lines]


def _not_done(line: Line, ending: str) -> Result:
    text = json.dumps(request_line(line.custom_id, None, _ENDINGS[ending]), ensure_ascii=False)
    return Result(line.number, True, text)


def _tokens(answer: Any) -> Tokens:
    usage: Any = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return Tokens()
    details = usage.get("prompt_tokens_details", usage.get("input_tokens_details")) or {}
    return Tokens(
        usage.get("prompt_tokens") or usage.get("input_tokens") or 0,
        details.get("cached_tokens") or 0,
        usage.get("completion_tokens") or usage.get("output_tokens") or 0,
    )
