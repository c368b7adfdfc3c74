"""Creating, reading and cancelling batches."""

from __future__ import annotations

import time
from typing import Any, Literal

from evermini.errors import InvalidRequestError, NotFoundError
from evermini.service import validation
from evermini.service.caller import current_caller
from evermini.service.file_requests import ExpiresAfter
from evermini.service.files import FileService, random_token
from evermini.service.schemas import Metadata
from evermini.service.seen import Seen
from evermini.service.validation import WireModel
from evermini.storage.batches import FINAL, BatchStore, StoredBatch
from evermini.storage.database import Database
from evermini.storage.schema import Cursor, Page

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
MAX_INPUT_BYTES = 200 * 1024**2
WINDOW_SECONDS = 24 * 3600


class BatchCreate(WireModel):
    """A new batch."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


def parse_batch(body: object) -> BatchCreate:
    """Validate the body that creates a batch.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(BatchCreate, body)


class BatchService:
    """Creates batches and tells how they are getting on. The work itself is `evermini.service.batches.worker`'s.

    Args:
        database: Where they are.
        files: Where their input is.
    """

    def __init__(self, database: Database, files: FileService) -> None:
        self._database = database
        self._files = files
        self._store = BatchStore(database)
        self._seen = Seen(database, BatchStore, _no_such_batch)

    async def create(self, wanted: BatchCreate) -> StoredBatch:
        """Store a batch; it is begun when a process has room for it.

        Raises:
            NotFoundError: There is no such input file.
            InvalidRequestError: The file is not one for batches, or too large.
        """
        try:
            file = await self._files.get(wanted.input_file_id)
        except NotFoundError as error:
            raise NotFoundError(
                f"{error.message}. Upload it first (POST /v1/files), with the purpose 'batch'.",
                param="input_file_id",
            ) from None
        if file.purpose != "batch":
            raise InvalidRequestError(
                f"The file {file.id} has the purpose '{file.purpose}'. Upload it again with the purpose 'batch'.",
                param="input_file_id",
            )
        if file.num_bytes > MAX_INPUT_BYTES:
            raise InvalidRequestError(
                f"The file {file.id} has {file.num_bytes} bytes; batches take at most {MAX_INPUT_BYTES}. Split it.",
                param="input_file_id",
            )
        body = new_batch(wanted, file.id)
        expires = wanted.output_expires_after
        caller = current_caller.get()
        batch = StoredBatch(
            body, None if expires is None else expires.seconds, caller.key_id, caller.project
        )
        await self._database.run(self._store.add, batch)
        return batch

    async def get(self, batch_id: str) -> StoredBatch:
        """Return a batch.

        Raises:
            NotFoundError: There is none of that id.
        """
        return await self._seen.find(batch_id, BatchStore.get)

    async def list(self, cursor: Cursor) -> Page[StoredBatch] | None:
        """Return a page of batches; ``None`` if there is no batch ``cursor.after``."""
        return await self._seen.ask(BatchStore.list, cursor)

    async def cancel(self, batch_id: str) -> StoredBatch:
        """Let a batch end early; what is done by then is in its files.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It has ended, in another way.
        """
        batch = await self._seen.find(batch_id, BatchStore.cancel, int(time.time()))
        if batch.status in FINAL and batch.status != "cancelled":
            raise InvalidRequestError(
                f"Cannot cancel a batch with status '{batch.status}'.", param="batch_id"
            )
        return batch


def new_batch(wanted: BatchCreate, file_id: str) -> dict[str, Any]:
    """Return the object of a new batch whose input is the file ``file_id``."""
    now = int(time.time())
    return {
        "id": f"batch_{random_token(32)}",
        "object": "batch",
        "endpoint": wanted.endpoint,
        "model": None,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": wanted.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + WINDOW_SECONDS,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": wanted.metadata,
    }


def _no_such_batch(batch_id: str) -> NotFoundError:
    return NotFoundError(f"No batch found with id '{batch_id[:200]}'.", param="batch_id")


def request_line(
    custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a line of the output or error file."""
    return {
        "id": f"batch_req_{random_token(32)}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
