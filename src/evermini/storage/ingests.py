"""Which uploaded files are indexed for which model before anybody asks, how far that is, and what it left on the disk.

An ingest outlives its file until its index is gone: it names the segments, so that a file's deletion can be followed up
after a crash, too. Segments are known by their content, so files with the same text share them.

    queued -> in_progress -> completed | failed
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ForeignKey, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.database import Database
from evermini.storage.files import FileRow
from evermini.storage.jobs import Job, drop, enqueue, finish, hold
from evermini.storage.schema import Base, Number


class IngestRow(Base):
    """An ingest; ``model`` is the id of the model whose prompts will find the file's text indexed."""

    __tablename__ = "ingests"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    file_id: Mapped[str] = mapped_column(unique=True)
    model: Mapped[str] = mapped_column(index=True)
    status: Mapped[str]
    num_tokens: Mapped[int | None] = mapped_column(Number)
    num_tokens_done: Mapped[int] = mapped_column(Number)
    error: Mapped[str | None]


class IngestSegmentRow(Base):
    """A segment that an ingest needs, by the hash of its content."""

    __tablename__ = "ingest_segments"

    ingest: Mapped[int] = mapped_column(
        ForeignKey(IngestRow.number, ondelete="CASCADE"), primary_key=True
    )
    digest: Mapped[str] = mapped_column(primary_key=True, index=True)


@dataclass(frozen=True)
class StoredIngest:
    """An ingest.

    Attributes:
        num_tokens: Of the file's text; ``None`` before it was read.
        num_tokens_done: Those that are indexed.
        error: Why it failed.
    """

    file_id: str
    model: str
    status: str = "queued"
    num_tokens: int | None = None
    num_tokens_done: int = 0
    error: str | None = None


def kind(model: str) -> str:
    """Return the kind of jobs that index for a model: only a process that serves it can do them."""
    return f"ingest {model}"


class IngestStore:
    """Reads and writes ingests."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, file_id: str, model: str) -> StoredIngest:
        """Store a new ingest and the job to do it."""
        with self._database.writing() as session:
            row = IngestRow(file_id=file_id, model=model, status="queued", num_tokens_done=0)
            session.add(row)
            enqueue(session, kind(model), file_id)
            return _stored(row)

    def get(self, file_ids: Collection[str]) -> dict[str, StoredIngest]:
        """Return the ingests of those files that have one."""
        found: dict[str, StoredIngest] = {}
        ids = list(file_ids)
        with self._database.reading() as session:
            for first in range(0, len(ids), 500):
                query = select(IngestRow).where(IngestRow.file_id.in_(ids[first : first + 500]))
                found |= {row.file_id: _stored(row) for row in session.scalars(query)}
        return found

    def begin(self, job: Job, digests: Collection[str]) -> None:
        """Note what will be on the disk, before it is.

        Raises:
            LeaseLostError: The job is another's, or the file was deleted.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = _one(session, job.subject)
            row.status = "in_progress"
            of_row = IngestSegmentRow.ingest == row.number
            known = set(session.scalars(select(IngestSegmentRow.digest).where(of_row)))
            session.add_all(
                IngestSegmentRow(ingest=row.number, digest=digest)
                for digest in sorted(set(digests) - known)
            )

    def progress(self, job: Job, num_tokens: int, num_tokens_done: int) -> None:
        """Note how far it is.

        Raises:
            LeaseLostError: As `begin` says.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = _one(session, job.subject)
            row.num_tokens, row.num_tokens_done = num_tokens, num_tokens_done

    def end(self, job: Job, num_tokens: int | None, error: str | None) -> None:
        """End it, and its job: completed, or failed if there is an error.

        Raises:
            LeaseLostError: As `begin` says.
        """
        with self._database.writing() as session:
            finish(session, job)
            row = _one(session, job.subject)
            row.status, row.error = "failed" if error else "completed", error
            if num_tokens is not None:
                row.num_tokens = num_tokens
                row.num_tokens_done = num_tokens

    # Files that are gone

    def orphans(self, models: Collection[str]) -> Sequence[str]:
        """Return the deleted files whose ingests for these models are left, and drop their jobs."""
        gone = (
            select(IngestRow.file_id)
            .outerjoin(FileRow, FileRow.id == IngestRow.file_id)
            .where(IngestRow.model.in_(models), FileRow.id.is_(None))
        )
        with self._database.reading() as session:
            found = session.scalars(gone).all()
        if found:
            with self._database.writing() as session:
                for file_id in found:
                    drop(session, file_id)
        return found

    def unneeded(self, file_id: str) -> Sequence[str]:
        """Return the segments that no other file's ingest for the same model needs."""
        with self._database.reading() as session:
            row = session.scalar(select(IngestRow).where(IngestRow.file_id == file_id))
            if row is None:
                return []
            others = (
                select(IngestSegmentRow.digest)
                .join(IngestRow, IngestRow.number == IngestSegmentRow.ingest)
                .join(
                    FileRow, FileRow.id == IngestRow.file_id
                )  # that of a deleted file does not count
                .where(IngestRow.model == row.model, IngestRow.number != row.number)
            )
            query = select(IngestSegmentRow.digest).where(
                IngestSegmentRow.ingest == row.number, IngestSegmentRow.digest.not_in(others)
            )
            return session.scalars(query).all()

    def model_of(self, file_id: str) -> str | None:
        """Return the model that a file is indexed for."""
        with self._database.reading() as session:
            return session.scalar(select(IngestRow.model).where(IngestRow.file_id == file_id))

    def forget(self, file_id: str) -> None:
        """Delete an ingest, whose index is gone."""
        with self._database.writing() as session:
            session.execute(delete(IngestRow).where(IngestRow.file_id == file_id))


def _one(session: Session, file_id: str) -> IngestRow:
    return session.scalars(select(IngestRow).where(IngestRow.file_id == file_id)).one()


def _stored(row: IngestRow) -> StoredIngest:
    return StoredIngest(
        row.file_id, row.model, row.status, row.num_tokens, row.num_tokens_done, row.error
    )
