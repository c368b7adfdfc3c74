"""Works on the jobs in the database, in this process's event loop, beside other processes that do the same.

A job is taken up where its last worker left it, after a crash as after a restart: handlers keep their progress in the
database, under the job's lease. One that raises is tried again, later each time in a row; one whose lease is lost is
stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from evermini.errors import StorageError
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

Handler = Callable[[Job], Awaitable[None]]
"""Does a job, and ends it in the database as its last change."""


class JobRunner:
    """The jobs that this process works on.

    Args:
        database: Where they are.
        handlers: What does the jobs of each kind.
        num_slots: Jobs at a time.
    """

    def __init__(
        self, database: Database, handlers: Mapping[str, Handler], *, num_slots: int = 4
    ) -> None:
        self._database = database
        self._store = JobStore(database)
        self._handlers = handlers
        self._owner = uuid.uuid4().hex
        self._free_slots = asyncio.Semaphore(num_slots)
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._finder: asyncio.Task[None] | None = None
        self._failures: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to look for jobs. Needs the event loop."""
        self._finder = asyncio.create_task(self._find())

    async def stop(self) -> None:
        """Leave everything to the next process; what is in work goes on there from its last stored progress."""
        tasks = [*([self._finder] if self._finder else []), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def poke(self) -> None:
        """Look for jobs now: this process has just stored one."""
        self._news.set()

    async def _find(self) -> None:
        while True:
            await self._free_slots.acquire()
            try:
                job = await self._database.run(
                    self._store.claim, self._owner, list(self._handlers), LEASE_SECONDS
                )
            except StorageError as error:
                log.warning("jobs: %s", error.message)
                job = None
            except Exception:  # whatever it is, the others' jobs must go on
                log.exception("jobs: cannot look for work")
                job = None
            except BaseException:
                self._free_slots.release()
                raise
            if job is not None:
                task = asyncio.create_task(self._work(job))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                continue
            self._free_slots.release()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._news.wait()
            self._news.clear()

    async def _work(self, job: Job) -> None:
        try:
            work = asyncio.ensure_future(self._handlers[job.kind](job))
            keeper = asyncio.create_task(self._keep(job, work))
            try:
                await work
            finally:
                work.cancel()
                keeper.cancel()
                await asyncio.gather(work, keeper, return_exceptions=True)
            self._failures.pop(job.subject, None)
        except LeaseLostError as error:
            self._failures.pop(job.subject, None)
            log.info("%s", error.message)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(job, 0.0))
            raise
        except StorageError as error:
            pause = self._pause(job, MAX_STORAGE_BACKOFF)
            log.warning(
                "job %s %s: %s Again in %.0f s.", job.kind, job.subject, error.message, pause
            )
            await self._give_back(job, pause)
        except Exception:
            pause = self._pause(job, MAX_BACKOFF)
            log.exception("job %s %s failed; again in %.0f s", job.kind, job.subject, pause)
            await self._give_back(job, pause)
        finally:
            self._free_slots.release()

    def _pause(self, job: Job, longest: float) -> float:
        """Return how long to wait after another failure in a row; claims after a crash are none."""
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

    async def _give_back(self, job: Job, pause: float) -> None:
        with contextlib.suppress(StorageError):  # else the lease runs out by itself
            await self._database.run(self._store.retry, job, pause)
