"""Uploaded files that are read before anybody asks: indexed in the background, so that the first question is quick.

    POST /v1/files  purpose=user_data  x_evermini[ingest]=mini
      -> the file, and a job  -> its text (`Documents`)  -> its segments in the index of the model  -> completed

A prompt with the file then finds the same segments: they are known by their content. The index lies in the home folder
of the process that did the job. It goes with the file, unless another file with the same text is indexed, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from evermini.errors import (
    EngineStoppedError,
    InvalidRequestError,
    NotFoundError,
    RequestError,
    StorageError,
)
from evermini.recall.recall import Progress
from evermini.recall.segment import cut
from evermini.service.documents import Documents
from evermini.service.files import FileService
from evermini.service.jobs import FAILED, JobRunner, LeaveJobError
from evermini.service.reading import LongReader
from evermini.service.runtime import Runtime
from evermini.storage.database import Database
from evermini.storage.ingests import IngestStore, StoredIngest, kind
from evermini.storage.jobs import Job

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 1.0
"""How often progress is written."""
RETRY_SECONDS = 5.0
"""When to look again at an index that could not be deleted for being written."""


class IngestService:
    """The ingests of one server.

    Args:
        runtime: The loaded models.
        database: Where ingests are.
        files: Where the files are.
        documents: What reads them.
        jobs: What does the work.
    """

    def __init__(
        self,
        runtime: Runtime,
        database: Database,
        files: FileService,
        documents: Documents,
        jobs: JobRunner,
    ) -> None:
        self._runtime = runtime
        self._database = database
        self._files = files
        self._documents = documents
        self._jobs = jobs
        self._store = IngestStore(database)
        self._readers: dict[str, LongReader] = {
            served.info.id: served.reader for served in runtime.models if served.reader is not None
        }
        self._later: asyncio.Task[None] | None = None
        for model in self._readers:
            jobs.handle(kind(model), self._work, give_up=self._give_up, num_slots=1)

    def check(self, name: str | None, purpose: str) -> str | None:
        """Return the id of the model that a file of some purpose is to be indexed for; ``None``: none was named.

        Raises:
            InvalidRequestError: It cannot be.
        """
        if name is None:
            return None
        if purpose != "user_data":
            raise InvalidRequestError(
                f"Only files of purpose 'user_data' can be ingested, not '{purpose}'. Leave x_evermini.ingest out, or "
                "set purpose to 'user_data'.",
                param="x_evermini.ingest",
            )
        try:
            served = self._runtime.resolve(name)
        except NotFoundError as error:
            error.param = "x_evermini.ingest"
            raise
        if served.reader is None:
            raise InvalidRequestError(
                f"The model `{name}` reads no long prompts here: recall is switched off for it. Name another one, or "
                "leave x_evermini.ingest out.",
                param="x_evermini.ingest",
            )
        return served.info.id

    async def begin(self, file_id: str, model: str) -> StoredIngest:
        """Have a file indexed; the job is on the disk when this returns."""
        ingest = await self._database.run(self._store.add, file_id, model)
        self._jobs.poke()
        return ingest

    async def of(self, file_ids: Collection[str]) -> Mapping[str, StoredIngest]:
        """Return the ingests of those files that have one."""
        return await self._database.run(self._store.get, file_ids)

    async def follow_deletions(self) -> None:
        """Stop what is done for files that are gone, and delete their index; what fails is tried again later."""
        try:
            is_done = await self._follow_deletions()
        except (StorageError, EngineStoppedError) as error:
            log.warning("the index of deleted files is left for later: %s", error.message)
            is_done = False
        if not is_done and (self._later is None or self._later.done()):
            self._later = asyncio.create_task(self._try_later())

    async def _follow_deletions(self) -> bool:
        is_done = True
        for file_id in await self._database.run(self._store.orphans, list(self._readers)):
            self._jobs.abandon(file_id)
            model = await self._database.run(self._store.model_of, file_id)
            if model is None:
                continue
            digests = await self._database.run(self._store.unneeded, file_id)
            if await self._readers[model].forget(digests):
                await self._database.run(self._store.forget, file_id)
            else:
                is_done = False
        return is_done

    async def stop(self) -> None:
        """End what runs in the background; the next server sees to what is left."""
        if self._later is not None:
            self._later.cancel()
            await asyncio.gather(self._later, return_exceptions=True)

    async def _try_later(self) -> None:
        await asyncio.sleep(RETRY_SECONDS)
        self._later = None
        await self.follow_deletions()

    async def _work(self, job: Job) -> None:
        """Index a file.

        Raises:
            LeaseLostError: The file was deleted, or another process has taken over.
            LeaveJobError: The server is shutting down.
            StorageError: The file cannot be read now.
        """
        reader = self._readers[job.kind.removeprefix(kind(""))]
        try:
            file = await self._files.get(job.subject)
        except NotFoundError:  # expired: the next look for deleted files takes its ingest along
            await self._database.run(self._store.end, job, None, "The file has expired.")
            return
        try:
            document = await self._documents.document_of(file)
            segments = cut(document.text, document.name)
            await self._database.run(self._store.begin, job, {s.digest for s in segments})
            last: Progress | None = None

            def note(progress: Progress) -> None:
                nonlocal last
                if progress.stage == Progress.stage:  # else it counts other texts than this file's
                    last = progress

            indexing = asyncio.ensure_future(reader.index(segments, note))
            try:
                while not (await asyncio.wait([indexing], timeout=PROGRESS_SECONDS))[0]:
                    if last is not None:
                        await self._database.run(
                            self._store.progress, job, last.total_tokens, last.done_tokens
                        )
                num_tokens = await indexing
            finally:
                indexing.cancel()
                await asyncio.gather(indexing, return_exceptions=True)
        except EngineStoppedError as error:
            raise LeaveJobError(error.message) from None
        except RequestError as error:
            log.info("file %s cannot be ingested: %s", file.id, error.message)
            await self._database.run(self._store.end, job, None, error.message)
            return
        await self._database.run(self._store.end, job, num_tokens, None)
        log.info("file %s: %d tokens are indexed", file.id, num_tokens)

    async def _give_up(self, job: Job) -> None:
        """End an ingest as failed that the server cannot do."""
        await self._database.run(self._store.end, job, None, FAILED)


def ingest_object(ingest: StoredIngest) -> dict[str, object]:
    """Return what clients see of an ingest."""
    return {
        "model": ingest.model,
        "status": ingest.status,
        "tokens": ingest.num_tokens,
        "tokens_done": ingest.num_tokens_done,
        "error": ingest.error,
    }
