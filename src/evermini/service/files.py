"""Files: stored, given back and deleted. Free of HTTP.

async with files.incoming() as writer:
    await files.write(writer, data, MAX_FILE_BYTES)
    stored = await files.finish(writer, "rows.jsonl", FileCreate(purpose="batch"))

A file is acknowledged when its row is stored, and its bytes before that. Where it cannot be told whether the row came
through, the bytes stay: an orphan (`evermini gc`) does no harm, a file without bytes does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

from evermini.errors import NotFoundError, RequestTooLargeError, StorageError
from evermini.service.caller import current_caller
from evermini.service.file_requests import FileCreate, check_name, lifetime
from evermini.service.seen import Seen
from evermini.storage.blobs import BlobStore, BlobWriter
from evermini.storage.database import Database
from evermini.storage.files import FileStore, Piece, StoredFile
from evermini.storage.schema import Cursor, Page

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FILE_BYTES = 512 * 1024**2
"""Longest file that comes in one request."""
JUMP_SECONDS = 60.0
"""A clock that moves so much more or less than time passes was set."""
JUMP_PAUSE = 3600.0
"""How long nothing is deleted after that: a clock that was set wrong is set right again by then."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class FileService:
    """Stores files and gives them back.

    Args:
        database: Where their names are.
        blobs: Where their bytes are.
    """

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs
        self._files = FileStore(database)
        self._seen = Seen(database, FileStore, _no_such_file)
        self._clock = _WatchedClock()

    # Bytes on their way in

    @asynccontextmanager
    async def incoming(self) -> AsyncIterator[BlobWriter]:
        """Give a place for bytes; they are dropped if the block fails before a row may name them.

        Raises:
            StorageError: They cannot be stored.
        """
        writer = await asyncio.to_thread(self._blobs.create)
        try:
            yield writer
        except BaseException:
            if not writer.is_settled:
                await self.drop(writer)
            raise

    async def write(self, writer: BlobWriter, data: bytes, limit: int) -> None:
        """Append bytes.

        Raises:
            RequestTooLargeError: There are more than ``limit``.
            StorageError: They cannot be stored.
        """
        if writer.num_bytes + len(data) > limit:
            raise RequestTooLargeError(
                f"File is too large: this endpoint takes at most {limit} bytes. "
                "Send larger files in parts (POST /v1/uploads), or split them.",
                param="file",
            )
        await asyncio.to_thread(writer.write, data)

    async def drop(self, writer: BlobWriter) -> None:
        """Throw away bytes that are not wanted, and that no row names."""
        await asyncio.to_thread(writer.discard)

    async def settle(self, writer: BlobWriter, store: Callable[[], T]) -> T:
        """Complete the bytes, then store the row that names them; both are on the disk when this returns.

        Args:
            writer: The bytes.
            store: Stores the row; runs in one of the database's threads, and is done even if the caller gives up.

        Raises:
            StorageError: One of them cannot be stored. The bytes are dropped, unless the row may be there.
        """
        writer.is_settled = (
            True  # from here on they are this function's, also if the caller is cancelled
        )

        def work() -> T:
            try:
                writer.close()
                return store()
            except Exception as error:
                if not (isinstance(error, StorageError) and error.may_be_stored):
                    writer.discard()
                raise

        return await self._database.run(work)

    async def finish(self, writer: BlobWriter, filename: str, wanted: FileCreate) -> StoredFile:
        """Make a file of the bytes; it is on the disk when this returns.

        Raises:
            InvalidRequestError: Such a file may not be stored.
            StorageError: It cannot be stored.
        """
        check_name(filename, wanted.purpose)
        file = _new_file(
            Piece(writer.name, writer.num_bytes),
            filename=filename,
            purpose=wanted.purpose,
            seconds=lifetime(wanted.purpose, wanted.expires_after),
            project=current_caller.get().project,
        )
        await self.settle(writer, lambda: self._files.add(file))
        await self._delete_expired()
        return file

    # Files: those that the caller sees

    async def get(self, file_id: str) -> StoredFile:
        """Return a file.

        Raises:
            NotFoundError: There is none of that id.
        """
        return await self._seen.find(file_id, FileStore.get, time.time())

    async def list(self, cursor: Cursor, purpose: str | None) -> Page[StoredFile] | None:
        """Return a page of files; ``None`` if there is no file ``cursor.after``."""
        return await self._seen.ask(FileStore.list, cursor, purpose=purpose, now=time.time())

    async def delete(self, file_id: str) -> None:
        """Delete a file and its bytes.

        Raises:
            NotFoundError: There is none of that id.
        """
        await self.free(await self._seen.find(file_id, FileStore.delete, time.time()))

    def read(self, file: StoredFile, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield a file's bytes from ``start`` to before ``end``. Blocks: iterate in a thread.

        Raises:
            StorageError: They cannot be read.
        """
        end = file.num_bytes if end is None else end
        at = 0
        for piece in file.pieces:
            first, last = max(start, at), min(end, at + piece.num_bytes)
            if first < last:
                yield from self._blobs.read(piece.blob, first - at, last - at)
            at += piece.num_bytes

    async def make(
        self,
        chunks: Iterable[bytes],
        *,
        filename: str,
        purpose: str,
        seconds: int | None,
        project: str,
    ) -> StoredFile | None:
        """Store the bytes of a file of our own making; the caller makes it known, with `add_file`.

        Args:
            chunks: Its bytes; iterated in a thread.
            filename: Its name.
            purpose: What it is.
            seconds: How long it is kept; ``None``: until it is deleted.
            project: Whose it is.

        Returns:
            The file; ``None`` if there are no bytes.
        """

        def write() -> Piece | None:
            writer = self._blobs.create()
            try:
                for data in chunks:
                    writer.write(data)
                if not writer.num_bytes:
                    writer.discard()
                    return None
                writer.close()
            except BaseException:
                writer.discard()
                raise
            return Piece(writer.name, writer.num_bytes)

        piece = await asyncio.to_thread(write)
        if piece is None:
            return None
        return _new_file(
            piece, filename=filename, purpose=purpose, seconds=seconds, project=project
        )

    async def free(self, blobs: Collection[str]) -> None:
        """Delete bytes that no row names any more. Where that fails, `evermini gc` does it later."""
        if not blobs:
            return
        try:
            await asyncio.to_thread(self._blobs.delete, blobs)
        except StorageError as error:
            log.warning("%d blobs are left to `evermini gc`: %s", len(blobs), error.message)

    async def _delete_expired(self) -> None:
        """Delete what has expired; it is not shown any more in any case."""
        if self._clock.was_set():
            return
        try:
            await self.free(await self._database.run(self._files.delete_expired, time.time()))
        except StorageError as error:
            log.warning("expired files are left for later: %s", error.message)


class _WatchedClock:
    """Notices when the clock is set: what seems to have expired then must not be deleted for good."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._set_at = -math.inf

    def was_set(self) -> bool:
        """Return whether the clock was set within the last `JUMP_PAUSE` seconds."""
        offset, now = time.time() - time.monotonic(), time.monotonic()
        if abs(offset - self._offset) > JUMP_SECONDS:
            log.warning(
                "the clock was set by %.0f s; expired files are kept for %.0f s",
                offset - self._offset,
                JUMP_PAUSE,
            )
            self._offset, self._set_at = offset, now
        return now < self._set_at + JUMP_PAUSE


def _new_file(
    piece: Piece, *, filename: str, purpose: str, seconds: int | None, project: str
) -> StoredFile:
    now = int(time.time())
    return StoredFile(
        id=f"file-{random_token(22)}",
        filename=filename,
        purpose=purpose,
        num_bytes=piece.num_bytes,
        created_at=now,
        expires_at=None if seconds is None else now + seconds,
        pieces=(piece,),
        project=project,
    )


def _no_such_file(file_id: str) -> NotFoundError:
    return NotFoundError(f"No such File object: {file_id[:200]}", param="id")


def random_token(length: int) -> str:
    """Return letters and digits that nobody can guess, for an id."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
