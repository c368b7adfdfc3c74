"""Files and uploads: what they are called, for what, until when, and which blobs hold their bytes.

A file's bytes are those of its blobs, in order: completing an upload hands the parts' blobs to the file and copies
nothing. Rows are deleted first, then the blobs; between the two a crash leaves orphans, never a file without bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Double, ForeignKey, Index, Select, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship

from evermini.storage.schema import (
    Base,
    Cursor,
    Number,
    Owned,
    Page,
    ProjectStore,
    find,
    owned,
    page,
)


class FileRow(Owned, Base):
    """A file; times are Unix times."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "project", "number"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(index=True)
    num_bytes: Mapped[int] = mapped_column(Number)
    created_at: Mapped[int] = mapped_column(Number)
    expires_at: Mapped[float | None] = mapped_column(Double, index=True)
    project: Mapped[str] = mapped_column(server_default="default")
    blobs: Mapped[list[FileBlobRow]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True, order_by="FileBlobRow.position"
    )


class FileBlobRow(Base):
    """A piece of a file's bytes."""

    __tablename__ = "file_blobs"

    file: Mapped[int] = mapped_column(
        ForeignKey(FileRow.number, ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    blob: Mapped[str] = mapped_column(unique=True)
    num_bytes: Mapped[int] = mapped_column(Number)


class UploadRow(Owned, Base):
    """An upload in parts; ``status`` is pending, completed or cancelled, and expired follows from the time."""

    __tablename__ = "uploads"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(Number)
    created_at: Mapped[int] = mapped_column(Number)
    expires_at: Mapped[float] = mapped_column(Double, index=True)
    file_seconds: Mapped[int | None]
    status: Mapped[str]
    file_id: Mapped[str | None]
    project: Mapped[str] = mapped_column(server_default="default")
    parts: Mapped[list[UploadPartRow]] = relationship(
        cascade="all, delete-orphan", passive_deletes=True
    )


class UploadPartRow(Base):
    """A part of an upload."""

    __tablename__ = "upload_parts"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    upload: Mapped[int] = mapped_column(
        ForeignKey(UploadRow.number, ondelete="CASCADE"), index=True
    )
    blob: Mapped[str] = mapped_column(unique=True)
    num_bytes: Mapped[int] = mapped_column(Number)


@dataclass(frozen=True)
class Piece:
    """A blob and its length in bytes."""

    blob: str
    num_bytes: int


@dataclass(frozen=True)
class StoredFile:
    """A file of a project. Times are Unix times; it does not exist any more from ``expires_at`` on."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int | None
    pieces: tuple[Piece, ...] = ()
    project: str = "default"


@dataclass(frozen=True)
class StoredUpload:
    """An upload in parts.

    Attributes:
        num_bytes: Length of the whole file, as announced.
        file_seconds: How long the file will live; ``None``: until it is deleted.
        file_id: The file, once completed.
        parts: The parts that have arrived, by id.
        project: Whose it is, and whose the file will be.
    """

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int
    file_seconds: int | None
    status: str
    file_id: str | None
    parts: dict[str, Piece]
    project: str = "default"


class FileStore(ProjectStore):
    """Reads and writes files."""

    def add(self, file: StoredFile) -> None:
        """Store a file whose blobs are complete."""
        with self._database.writing() as session:
            add_file(session, file)

    def get(self, file_id: str, now: float) -> StoredFile | None:
        """Return a file, ``None`` if there is none of that id or it has expired."""
        with self._database.reading() as session:
            row = self._find(session, file_id, now)
            return None if row is None else _stored(row)

    def list(self, cursor: Cursor, *, purpose: str | None, now: float) -> Page[StoredFile] | None:
        """Return a page, newest first by default; ``None`` if there is no file ``cursor.after``."""
        query = there = self._there(now)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        with self._database.reading() as session:
            return page(session, FileRow, query, cursor, _stored, among=there)

    def delete(self, file_id: str, now: float) -> Sequence[str] | None:
        """Delete a file and return the blobs that are free now; ``None`` if there is none of that id."""
        with self._database.writing() as session:
            row = self._find(session, file_id, now)
            if row is None:
                return None
            blobs = [piece.blob for piece in row.blobs]
            session.delete(row)
            return blobs

    def delete_expired(self, now: float) -> Sequence[str]:
        """Delete expired files, and uploads that were never completed; return the blobs that are free now."""
        blobs: list[str] = []
        with self._database.writing() as session:
            # Locked: whoever completes an upload at this moment keeps its parts.
            old = select(FileRow).where(FileRow.expires_at <= now)
            files = session.scalars(old.with_for_update(skip_locked=True)).all()
            unused = select(UploadRow).where(UploadRow.expires_at <= now, UploadRow.parts.any())
            uploads = session.scalars(unused.with_for_update(skip_locked=True)).all()
            for file in files:
                blobs += [piece.blob for piece in file.blobs]
                session.delete(file)
            for upload in uploads:
                blobs += [part.blob for part in upload.parts]
                upload.parts = []
        return blobs

    def used_blobs(self, names: Collection[str]) -> set[str]:
        """Return which of these blobs belong to a file or an upload."""
        with self._database.reading() as session:
            return {
                *session.scalars(select(FileBlobRow.blob).where(FileBlobRow.blob.in_(names))),
                *session.scalars(select(UploadPartRow.blob).where(UploadPartRow.blob.in_(names))),
            }

    def _find(self, session: Session, file_id: str, now: float) -> FileRow | None:
        return session.scalar(self._there(now).where(FileRow.id == file_id))

    def _there(self, now: float) -> Select[FileRow]:
        """Return the query of the files that exist now, for the project."""
        is_alive = or_(FileRow.expires_at.is_(None), FileRow.expires_at > now)
        return owned(FileRow, self._project).where(is_alive)


class UploadStore(ProjectStore):
    """Reads and writes uploads in parts."""

    def add(self, upload: StoredUpload) -> None:
        """Store a new upload, which has no parts yet."""
        with self._database.writing() as session:
            session.add(
                UploadRow(
                    id=upload.id,
                    filename=upload.filename,
                    purpose=upload.purpose,
                    num_bytes=upload.num_bytes,
                    created_at=upload.created_at,
                    expires_at=upload.expires_at,
                    file_seconds=upload.file_seconds,
                    status=upload.status,
                    file_id=upload.file_id,
                    project=upload.project,
                )
            )

    def get(self, upload_id: str) -> StoredUpload | None:
        """Return an upload, ``None`` if there is none of that id."""
        with self._database.reading() as session:
            row = find(session, UploadRow, upload_id, self._project)
            return None if row is None else _stored_upload(row)

    def add_part(self, upload_id: str, part_id: str, piece: Piece, now: float) -> bool:
        """Store a part; false, and nothing is stored, if the upload takes no parts any more."""
        with self._database.writing() as session:
            row = self._pending(session, upload_id, now)
            if row is None:
                return False
            session.add(
                UploadPartRow(
                    id=part_id, upload=row.number, blob=piece.blob, num_bytes=piece.num_bytes
                )
            )
            return True

    def complete(
        self, upload_id: str, file: StoredFile, now: float
    ) -> tuple[StoredUpload, Sequence[str]] | None:
        """Make ``file``, whose pieces are parts of the upload, and complete the upload, all at once.

        Returns:
            The upload, and the blobs of parts that the file does not have; ``None``, and nothing is done, if the
            upload is not pending any more.
        """
        with self._database.writing() as session:
            row = self._pending(session, upload_id, now)
            if row is None:
                return None
            taken = {piece.blob for piece in file.pieces}
            free = [part.blob for part in row.parts if part.blob not in taken]
            row.parts = []
            row.status, row.file_id = "completed", file.id
            session.flush()
            add_file(session, file)
            return _stored_upload(row), free

    def cancel(self, upload_id: str, now: float) -> tuple[StoredUpload, Sequence[str]] | None:
        """Cancel an upload and return it with the blobs that are free now; ``None`` if it is not pending any more."""
        with self._database.writing() as session:
            row = self._pending(session, upload_id, now)
            if row is None:
                return None
            free = [part.blob for part in row.parts]
            row.parts = []
            row.status = "cancelled"
            session.flush()
            return _stored_upload(row), free

    def _pending(self, session: Session, upload_id: str, now: float) -> UploadRow | None:
        """Return an upload that takes parts, locked until the transaction ends."""
        row = find(session, UploadRow, upload_id, self._project, lock=True)
        is_pending = row is not None and row.status == "pending" and row.expires_at > now
        return row if is_pending else None


def add_file(session: Session, file: StoredFile) -> None:
    """Store a file, whose blobs are complete, as part of another change."""
    session.add(
        FileRow(
            id=file.id,
            filename=file.filename,
            purpose=file.purpose,
            num_bytes=file.num_bytes,
            created_at=file.created_at,
            expires_at=file.expires_at,
            project=file.project,
            blobs=[
                FileBlobRow(position=position, blob=piece.blob, num_bytes=piece.num_bytes)
                for position, piece in enumerate(file.pieces)
            ],
        )
    )


def _stored(row: FileRow) -> StoredFile:
    return StoredFile(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        expires_at=None if row.expires_at is None else int(row.expires_at),
        pieces=tuple(Piece(piece.blob, piece.num_bytes) for piece in row.blobs),
        project=row.project,
    )


def _stored_upload(row: UploadRow) -> StoredUpload:
    return StoredUpload(
        id=row.id,
        filename=row.filename,
        purpose=row.purpose,
        num_bytes=row.num_bytes,
        created_at=row.created_at,
        expires_at=int(row.expires_at),
        file_seconds=row.file_seconds,
        status=row.status,
        file_id=row.file_id,
        parts={part.id: Piece(part.blob, part.num_bytes) for part in row.parts},
        project=row.project,
    )
