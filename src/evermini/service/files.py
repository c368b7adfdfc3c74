"""Files and uploads: what may be stored, for how long, and what becomes of it. Free of HTTP.

files = FileService(database, blobs)
writer = await files.begin()
await files.write(writer, data, MAX_FILE_BYTES)
stored = await files.finish(writer, filename="rows.jsonl", purpose="batch")
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from evermini.errors import InvalidRequestError, NotFoundError, RequestTooLargeError
from evermini.service import validation
from evermini.service.validation import WireModel
from evermini.storage.blobs import BlobStore, BlobWriter
from evermini.storage.database import Database
from evermini.storage.files import (
    FileStore,
    Piece,
    StoredFile,
    StoredUpload,
    UploadStore,
)
from evermini.storage.schema import Cursor, Page

MAX_FILE_BYTES = 512 * 1024**2
"""Longest file that comes in one request."""
MAX_UPLOAD_BYTES = 8 * 1024**3
"""Longest file that comes in parts."""
MAX_PART_BYTES = 64 * 1024**2
"""Longest part."""
UPLOAD_SECONDS = 3600
"""How long an upload takes parts."""
BATCH_SECONDS = 30 * 86_400
"""How long a batch's input lives if nobody says otherwise."""

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
Filename = Annotated[str, Field(min_length=1, max_length=1024)]


class ExpiresAfter(WireModel):
    """When a file expires."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class FileCreate(WireModel):
    """What is said about a file that comes in one request."""

    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class UploadCreate(WireModel):
    """An upload that is announced."""

    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD_BYTES)]
    filename: Filename
    mime_type: str
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class UploadComplete(WireModel):
    """The parts of a complete upload, in order."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=16_384)]
    md5: str | None = None


@dataclass(frozen=True)
class UploadPart:
    """A part that was stored."""

    id: str
    created_at: int
    upload_id: str


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
        self._uploads = UploadStore(database)

    # Bytes on their way in

    async def begin(self) -> BlobWriter:
        """Begin to store bytes; whoever does must `finish` or `drop` them.

        Raises:
            StorageError: They cannot be stored.
        """
        return await asyncio.to_thread(self._blobs.create)

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
        """Throw away bytes that are not wanted."""
        await asyncio.to_thread(writer.discard)

    async def finish(self, writer: BlobWriter, filename: str, wanted: FileCreate) -> StoredFile:
        """Make a file of the bytes; it is on the disk when this returns.

        Raises:
            InvalidRequestError: Such a file may not be stored.
            StorageError: It cannot be stored.
        """
        check_name(filename, wanted.purpose)
        now = int(time.time())
        seconds = lifetime(wanted.purpose, wanted.expires_after)
        file = StoredFile(
            id=f"file-{random_token(22)}",
            filename=filename,
            purpose=wanted.purpose,
            num_bytes=writer.num_bytes,
            created_at=now,
            expires_at=None if seconds is None else now + seconds,
            pieces=(Piece(writer.name, writer.num_bytes),),
        )

        def store() -> None:
            writer.close()
            self._files.add(file)

        await self._database.run(store)
        await self.delete_expired()
        return file

    # Files

    async def get(self, file_id: str) -> StoredFile:
        """Return a file.

        Raises:
            NotFoundError: There is none of that id.
        """
        file = await self._database.run(self._files.get, file_id, time.time())
        if file is None:
            raise _no_such_file(file_id)
        return file

    async def list(self, cursor: Cursor, purpose: str | None) -> Page[StoredFile] | None:
        """Return a page of files; ``None`` if there is no file ``cursor.after``."""
        return await self._database.run(self._files.list, cursor, purpose=purpose, now=time.time())

    async def delete(self, file_id: str) -> None:
        """Delete a file and its bytes.

        Raises:
            NotFoundError: There is none of that id.
        """
        blobs = await self._database.run(self._files.delete, file_id, time.time())
        if blobs is None:
            raise _no_such_file(file_id)
        await asyncio.to_thread(self._blobs.delete, blobs)

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
        self, chunks: Iterable[bytes], *, filename: str, purpose: str, seconds: int | None
    ) -> StoredFile | None:
        """Store the bytes of a file of our own making; the caller makes it known, with `add_file`.

        Args:
            chunks: Its bytes; iterated in a thread.
            filename: Its name.
            purpose: What it is.
            seconds: How long it is kept; ``None``: until it is deleted.

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
        now = int(time.time())
        return StoredFile(
            id=f"file-{random_token(22)}",
            filename=filename,
            purpose=purpose,
            num_bytes=piece.num_bytes,
            created_at=now,
            expires_at=None if seconds is None else now + seconds,
            pieces=(piece,),
        )

    async def delete_expired(self) -> None:
        """Delete what has expired."""
        blobs = await self._database.run(self._files.delete_expired, time.time())
        if blobs:
            await asyncio.to_thread(self._blobs.delete, blobs)

    # Uploads in parts

    async def announce(self, wanted: UploadCreate) -> StoredUpload:
        """Begin an upload in parts.

        Raises:
            InvalidRequestError: Such a file may not be stored.
        """
        filename = base_name(wanted.filename)
        check_name(filename, wanted.purpose)
        now = int(time.time())
        upload = StoredUpload(
            id=f"upload_{random_token(32)}",
            filename=filename,
            purpose=wanted.purpose,
            num_bytes=wanted.bytes,
            created_at=now,
            expires_at=now + UPLOAD_SECONDS,
            file_seconds=lifetime(wanted.purpose, wanted.expires_after),
            status="pending",
            file_id=None,
            parts={},
        )
        await self._database.run(self._uploads.add, upload)
        return upload

    async def pending(self, upload_id: str) -> StoredUpload:
        """Return an upload that takes parts.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It does not take parts any more.
        """
        upload = await self._database.run(self._uploads.get, upload_id)
        if upload is None:
            raise NotFoundError(f"No such Upload object: {upload_id[:200]}", param="upload_id")
        status = upload.status
        if status == "pending" and upload.expires_at <= time.time():
            status = "expired"
        if status != "pending":
            raise InvalidRequestError(
                f"Upload {upload_id} is {status}, so nothing can be added to it or changed. Create another one.",
                param="upload_id",
            )
        return upload

    async def add_part(self, upload_id: str, writer: BlobWriter) -> UploadPart:
        """Make a part of the bytes.

        Raises:
            NotFoundError: There is no such upload.
            InvalidRequestError: It does not take parts any more, or these are more bytes than were announced.
            StorageError: It cannot be stored.
        """
        upload = await self.pending(upload_id)
        sent = sum(piece.num_bytes for piece in upload.parts.values()) + writer.num_bytes
        if sent > upload.num_bytes:
            raise InvalidRequestError(
                f"The parts of this upload are longer ({sent} bytes) than the {upload.num_bytes} bytes that were "
                "announced. Create an upload with the file's length.",
                param="data",
            )
        part_id = f"part_{random_token(32)}"

        def store() -> bool:
            writer.close()
            piece = Piece(writer.name, writer.num_bytes)
            return self._uploads.add_part(upload_id, part_id, piece, time.time())

        if not await self._database.run(store):
            await self.pending(upload_id)  # says why not
        return UploadPart(part_id, int(time.time()), upload_id)

    async def complete(
        self, upload_id: str, wanted: UploadComplete
    ) -> tuple[StoredUpload, StoredFile]:
        """Make a file of an upload's parts.

        Raises:
            NotFoundError: There is no such upload.
            InvalidRequestError: It is not pending any more; a part is unknown or named twice; or the parts together
                are not the file that was announced.
        """
        upload = await self.pending(upload_id)
        pieces = _pieces(upload, wanted.part_ids)
        now = int(time.time())
        file = StoredFile(
            id=f"file-{random_token(22)}",
            filename=upload.filename,
            purpose=upload.purpose,
            num_bytes=sum(piece.num_bytes for piece in pieces),
            created_at=now,
            expires_at=None if upload.file_seconds is None else now + upload.file_seconds,
            pieces=pieces,
        )
        if file.num_bytes != upload.num_bytes:
            raise InvalidRequestError(
                f"The parts together have {file.num_bytes} bytes, but {upload.num_bytes} were announced. Add what is "
                "missing, then complete the upload again.",
                param="part_ids",
            )
        if wanted.md5 is not None:
            found = await asyncio.to_thread(self._md5, file)
            if found != wanted.md5.lower():
                raise InvalidRequestError(
                    f"The uploaded bytes have the MD5 checksum {found}, not {wanted.md5[:64]}. Send the parts again.",
                    param="md5",
                )
        done = await self._database.run(self._uploads.complete, upload_id, file, time.time())
        if done is None:
            await self.pending(upload_id)
            raise InvalidRequestError(f"Upload {upload_id} was changed. Look at it again.")
        completed, free = done
        await asyncio.to_thread(self._blobs.delete, free)
        return completed, file

    async def cancel(self, upload_id: str) -> StoredUpload:
        """Cancel an upload and delete its parts.

        Raises:
            NotFoundError: There is no such upload.
            InvalidRequestError: It is not pending any more.
        """
        upload = await self.pending(upload_id)
        done = await self._database.run(self._uploads.cancel, upload_id, time.time())
        if done is None:
            return replace(await self.pending(upload_id), parts=upload.parts)
        cancelled, free = done
        await asyncio.to_thread(self._blobs.delete, free)
        return cancelled

    def _md5(self, file: StoredFile) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for data in self.read(file):
            digest.update(data)
        return digest.hexdigest()


def parse_file_create(fields: dict[str, str]) -> FileCreate:
    """Return what the fields of a form say about a file.

    Raises:
        InvalidRequestError: They say nothing that can be honoured.
    """
    body: dict[str, object] = {}
    nested: dict[str, object] = {}
    for name, value in fields.items():
        if match := re.fullmatch(r"expires_after\[(\w+)\]", name):
            is_number = match[1] == "seconds" and value.isascii() and value.isdigit()
            nested[match[1]] = int(value[:12]) if is_number else value
        else:
            body[name] = value
    if nested:
        body["expires_after"] = nested
    return validation.parse(FileCreate, body)


def parse_upload_create(body: object) -> UploadCreate:
    """Validate the body that announces an upload.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(UploadCreate, body)


def parse_upload_complete(body: object) -> UploadComplete:
    """Validate the body that completes an upload.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(UploadComplete, body)


def base_name(filename: str) -> str:
    """Return a file's name without folders and control characters. It is shown, and never used as a path."""
    last = re.split(r"[/\\]", filename)[-1]
    return "".join(c for c in last if c.isprintable()).strip() or "upload"


def check_name(filename: str, purpose: str) -> None:
    """Refuse files whose name says that they are not what their purpose needs.

    Raises:
        InvalidRequestError: A purpose that needs JSON Lines, and another ending.
    """
    if purpose in ("batch", "fine-tune") and not filename.lower().endswith(".jsonl"):
        raise InvalidRequestError(
            f"Invalid file format for purpose '{purpose}': '{filename[:200]}'. Send a JSON Lines file whose name ends "
            "in .jsonl.",
            param="file",
        )


def lifetime(purpose: str, expires_after: ExpiresAfter | None) -> int | None:
    """Return for how many seconds a file is kept; ``None``: until it is deleted."""
    if expires_after is not None:
        return expires_after.seconds
    return BATCH_SECONDS if purpose == "batch" else None


def _pieces(upload: StoredUpload, part_ids: Sequence[str]) -> tuple[Piece, ...]:
    seen: set[str] = set()
    for part_id in part_ids:
        if part_id in seen or part_id not in upload.parts:
            why = "named twice" if part_id in seen else "not a part of this upload"
            raise InvalidRequestError(
                f"Invalid 'part_ids': {part_id[:100]} is {why}. Name each part once, in the file's order.",
                param="part_ids",
            )
        seen.add(part_id)
    return tuple(upload.parts[part_id] for part_id in part_ids)


def _no_such_file(file_id: str) -> NotFoundError:
    return NotFoundError(f"No such File object: {file_id[:200]}", param="id")


def random_token(length: int) -> str:
    """Return letters and digits that nobody can guess, for an id."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
