"""Works on the jobs in the database, in this process's event loop, beside other processes that do the same.

A job is taken up where its last worker left it, after a crash as after a restart: handlers keep their progress in the
database, under the lease. One whose lease is lost is stopped. One that raises is tried again, later each time in a
row: without end while the storage fails or a handler leaves the job to others, since somebody repairs that; otherwise
`MAX_FAILURES` times, in whatever processes. Then its kind gives it up: what it was done to ends as failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from evermini.errors import StorageError
from evermini.service import tracing
from evermini.storage.database import Database
from evermini.storage.jobs import Job, JobStore, LeaseLostError

log = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
"""How long a job waits for a process that has died."""
RENEW_SECONDS = 5.0
POLL_SECONDS = 1.0
"""How often to look for jobs of other processes; this one's own begin at once."""
MAX_BACKOFF = 300.0
"""Longest pause before a job that failed is tried again."""

MAX_STORAGE_BACKOFF = 10.0
"""Longest pause when the database or the files could not be used: somebody repairs that."""

MAX_FAILURES = 5
"""Failures that are a job's own after which it is given up."""

FAILED = (
    f"The server failed {MAX_FAILURES} times while it worked on this, so it has given up. The server's log tells the "
    "cause; send it again when its operator has seen to that."
)
"""What clients are told then."""

Handler = Callable[[Job], Awaitable[None]]
"""Does a job, and ends it in the database as its last change."""


class LeaveJobError(Exception):
    """Raised by a handler that cannot go on in this process, and may in another: the job is tried again later."""


@dataclass
class _Kind:
    handler: Handler
    give_up: Handler
    free_slots: int
    finishes: bool


class JobRunner:
    """The jobs that this process works on: `handle` says which, `start` begins, `stop` ends.

    Args:
        database: Where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._store = JobStore(database)
        self._kinds: dict[str, _Kind] = {}
        self._owner = uuid.uuid4().hex
        self._news = asyncio.Event()
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._finder: asyncio.Task[None] | None = None
        self._failures: Counter[str] = Counter()
        self._drained_at: float | None = None

    def handle(
        self,
        kind: str,
        handler: Handler,
        *,
        give_up: Handler,
        num_slots: int,
        finishes: bool = False,
    ) -> None:
        """Work on a kind of jobs.

        Args:
            kind: The kind.
            handler: What does them.
            give_up: What ends them as failed, with `FAILED` as the reason.
            num_slots: How many at a time.
            finishes: When the process is to end, they get time to finish: the next process would have to begin anew.
        """
        self._kinds[kind] = _Kind(handler, give_up, num_slots, finishes)

    def start(self) -> None:
        """Begin to look for jobs. Needs the event loop."""
        self._finder = asyncio.create_task(self._find())

    def drain(self) -> None:
        """Look for no more jobs, and give those back that can go on elsewhere."""
        if self._drained_at is None:
            self._drained_at = time.monotonic()
            self._news.set()
            for job, task in self._tasks.items():
                if not self._kinds[job.kind].finishes:
                    task.cancel()

    async def stop(self, seconds: float = 0.0) -> None:
        """Leave everything to the next process; what is in work goes on there from its last stored progress.

        Args:
            seconds: What jobs that finish get, counted from `drain`.
        """
        self.drain()
        assert self._drained_at is not None
        if self._finder is not None:
            await self._finder
        left = self._drained_at + seconds - time.monotonic()
        finishing = [task for job, task in self._tasks.items() if self._kinds[job.kind].finishes]
        if finishing and left > 0:
            await asyncio.wait(finishing, timeout=left)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def poke(self) -> None:
        """Look for jobs now: this process has just stored one."""
        self._news.set()

    def abandon(self, subject: str) -> None:
        """Stop the work on a job that was deleted; other processes notice when they renew their lease."""
        for job, task in self._tasks.items():
            if job.subject == subject:
                task.cancel()

    async def _find(self) -> None:
        while self._drained_at is None:
            job = await self._claim()
            if job is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._news.wait()
                self._news.clear()
            elif self._drained_at is None:
                self._begin(job)
            else:
                await self._give_back(job, 0.0)

    async def _claim(self) -> Job | None:
        kinds = [name for name, kind in self._kinds.items() if kind.free_slots]
        if not kinds:
            return None
        try:
            return await self._database.run(
                self._store.claim,
                self._owner,
                kinds,
                LEASE_SECONDS,
                but=[job.subject for job in self._tasks],
            )
        except StorageError as error:
            log.warning("jobs: %s", error.message)
        except Exception:  # whatever it is, the others' jobs must go on
            log.exception("jobs: cannot look for work")
        return None

    def _begin(self, job: Job) -> None:
        kind = self._kinds[job.kind]
        kind.free_slots -= 1
        task = asyncio.create_task(self._work(job, kind))
        self._tasks[job] = task

        def ended(_: asyncio.Task[None]) -> None:
            del self._tasks[job]
            kind.free_slots += 1
            self._news.set()

        task.add_done_callback(ended)

    async def _work(self, job: Job, kind: _Kind) -> None:
        structlog.contextvars.bind_contextvars(job=f"{job.kind} {job.subject}")
        is_given_up = job.num_failures >= MAX_FAILURES
        try:
            work = asyncio.ensure_future(
                _traced(kind.give_up if is_given_up else kind.handler, job)
            )
            keeper = asyncio.create_task(self._keep(job, work))
            try:
                await work
            finally:
                work.cancel()
                keeper.cancel()
                await asyncio.gather(work, keeper, return_exceptions=True)
            self._failures.pop(job.subject, None)
            if is_given_up:
                log.error("job given up after %d failures", job.num_failures)
        except LeaseLostError as error:
            self._failures.pop(job.subject, None)
            log.info("%s", error.message)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(job, 0.0))
            raise
        except Exception as error:
            if isinstance(error, LeaveJobError | StorageError):
                pause = self._pause(job, MAX_STORAGE_BACKOFF)
                log.warning("job left: %s Again in %.0f s.", error, pause)
                await self._give_back(job, pause)
            else:
                is_last = job.num_failures + 1 == MAX_FAILURES
                pause = 0.0 if is_last else self._pause(job, MAX_BACKOFF)
                # As text: renderers that show local variables would write prompts into the log.
                text = "".join(traceback.format_exception(error))
                log.error("job failed; again in %.0f s: %s", pause, text)
                await self._give_back(job, pause, has_failed=self._drained_at is None)

    def _pause(self, job: Job, longest: float) -> float:
        """Return how long to wait after another failure in a row; claims after a crash are none."""
        if self._drained_at is not None:
            return 0.0  # another process may do better
        self._failures[job.subject] += 1
        return float(min(longest, 2.0 ** min(self._failures[job.subject], 30)))

    async def _keep(self, job: Job, work: asyncio.Future[None]) -> None:
        """Renew the lease while the work lasts, and stop the work when that is not possible any more."""
        expires = time.monotonic() + LEASE_SECONDS
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            asked = time.monotonic()
            try:
                await self._database.run(self._store.renew, job, LEASE_SECONDS)
                expires = asked + LEASE_SECONDS
            except LeaseLostError:
                work.cancel()
                return
            except Exception as error:
                log.warning("job %s %s: the lease is not renewed: %s", job.kind, job.subject, error)
                if time.monotonic() > expires - RENEW_SECONDS:
                    work.cancel()
                    return

    async def _give_back(self, job: Job, pause: float, *, has_failed: bool = False) -> None:
        with contextlib.suppress(StorageError):  # else the lease runs out by itself
            await self._database.run(self._store.retry, job, pause, has_failed=has_failed)


async def _traced(handler: Handler, job: Job) -> None:
    kind = job.kind.partition(" ")[0]
    with tracing.span(f"job {kind}", {"job.id": job.subject, "job.attempt": job.attempt}):
        await handler(job)
