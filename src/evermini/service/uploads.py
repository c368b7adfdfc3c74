"""Uploads: files that come in parts. Free of HTTP.

upload = await uploads.announce(UploadCreate(bytes=3, filename="a.txt", mime_type="text/plain", purpose="user_data"))
async with files.incoming() as writer: ...; part = await uploads.add_part(upload.id, writer)
upload, file = await uploads.complete(upload.id, UploadComplete(part_ids=[part.id]))
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.errors import InvalidRequestError, NotFoundError
from evermini.service.caller import current_caller
from evermini.service.file_requests import (
    UploadComplete,
    UploadCreate,
    base_name,
    check_name,
    lifetime,
)
from evermini.service.files import FileService, random_token
from evermini.service.seen import Seen
from evermini.storage.blobs import BlobWriter
from evermini.storage.database import Database
from evermini.storage.files import Piece, StoredFile, StoredUpload, UploadStore

MAX_PART_BYTES = 64 * 1024**2
"""Longest part."""
UPLOAD_SECONDS = 3600
"""How long an upload takes parts."""


@dataclass(frozen=True)
class UploadPart:
    """A part that was stored."""

    id: str
    created_at: int
    upload_id: str


class UploadService:
    """Takes files in parts.

    Args:
        database: Where the names of uploads are.
        files: Where their bytes are, and what they become.
    """

    def __init__(self, database: Database, files: FileService) -> None:
        self._database = database
        self._files = files
        self._uploads = UploadStore(database)
        self._seen = Seen(database, UploadStore, _no_such_upload)

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
            project=current_caller.get().project,
        )
        await self._database.run(self._uploads.add, upload)
        return upload

    async def pending(self, upload_id: str) -> StoredUpload:
        """Return an upload that takes parts.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It does not take parts any more.
        """
        upload = await self._seen.find(upload_id, UploadStore.get)
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
            piece = Piece(writer.name, writer.num_bytes)
            return self._uploads.add_part(upload_id, part_id, piece, time.time())

        if not await self._files.settle(writer, store):
            await self._files.drop(writer)
            await self.pending(upload_id)  # says why not
            raise InvalidRequestError(f"Upload {upload_id} was changed. Look at it again.")
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
            project=upload.project,
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
        await self._files.free(free)
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
        await self._files.free(free)
        return cancelled

    def _md5(self, file: StoredFile) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for data in self._files.read(file):
            digest.update(data)
        return digest.hexdigest()


def _no_such_upload(upload_id: str) -> NotFoundError:
    return NotFoundError(f"No such Upload object: {upload_id[:200]}", param="upload_id")


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
