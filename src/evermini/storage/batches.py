"""Batches, and the results of their lines until these are in the output file.

A result is written once: its line is the key, and the writer must hold the batch's job. The files that a batch ends
with, its new state, and the end of its job are one transaction.

    validating -> in_progress -> finalizing -> completed
        |             |-> cancelling -> cancelled
        v             +-> expired
      failed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from sqlalchemy import ForeignKey, Index, delete, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.files import StoredFile, add_file
from evermini.storage.jobs import Job, enqueue, finish, hold, subject_of
from evermini.storage.schema import (
    Base,
    Cursor,
    Json,
    Number,
    Owned,
    Page,
    ProjectStore,
    Shown,
    StoredObject,
    find,
    owned,
    page,
)

JOB = "batch"
FINAL = ("failed", "completed", "expired", "cancelled")
_RESULTS_READ = 500


class BatchRow(Shown, Owned, Base):
    """A batch; ``body`` is all of it that clients see and nobody searches for."""

    __tablename__ = "batches"
    __table_args__ = (Index(None, "project", "number"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str]
    body: Mapped[Json]
    output_seconds: Mapped[int | None]
    key_id: Mapped[str | None]
    project: Mapped[str] = mapped_column(server_default="default")


class BatchResultRow(Base):
    """The result of one line; ``text`` is its line of the output or error file."""

    __tablename__ = "batch_results"

    batch: Mapped[int] = mapped_column(
        ForeignKey(BatchRow.number, ondelete="CASCADE"), primary_key=True
    )
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    is_error: Mapped[bool]
    text: Mapped[str]
    input_tokens: Mapped[int] = mapped_column(Number)
    cached_tokens: Mapped[int] = mapped_column(Number)
    output_tokens: Mapped[int] = mapped_column(Number)


@dataclass(frozen=True)
class Tokens:
    """What a line, or all of them, used."""

    input: int = 0
    cached: int = 0
    output: int = 0


@dataclass(frozen=True)
class Result:
    """The result of a line, counted from 0; ``text`` is its line of the output or error file."""

    line: int
    is_error: bool
    text: str
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True)
class Counts:
    """Lines that are done, and what they used."""

    completed: int
    failed: int
    tokens: Tokens


@dataclass(frozen=True)
class StoredBatch(StoredObject):
    """A batch.

    Attributes:
        output_seconds: How long its files are kept; ``None``: until they are deleted.
        key_id: The key that created it, if one did.
        project: Whose it is, and what its tokens are counted for.
    """

    output_seconds: int | None
    key_id: str | None = None
    project: str = "default"


class BatchStore(ProjectStore):
    """Reads and writes batches."""

    def add(self, batch: StoredBatch) -> None:
        """Store a new batch and the job to work on it."""
        with self._database.writing() as session:
            session.add(
                BatchRow(
                    id=batch.id,
                    status=batch.status,
                    body=batch.body,
                    output_seconds=batch.output_seconds,
                    key_id=batch.key_id,
                    project=batch.project,
                )
            )
            enqueue(session, JOB, batch.id)

    def get(self, batch_id: str) -> StoredBatch | None:
        """Return a batch with its counts as they are now, ``None`` if there is none of that id."""
        with self._database.reading() as session:
            row = find(session, BatchRow, batch_id, self._project)
            return None if row is None else _stored(session, row)

    def list(self, cursor: Cursor) -> Page[StoredBatch] | None:
        """Return a page; ``None`` if there is no batch ``cursor.after``."""
        with self._database.reading() as session:
            query = owned(BatchRow, self._project)
            return page(session, BatchRow, query, cursor, partial(_stored, session))

    def cancel(self, batch_id: str, now: int) -> StoredBatch | None:
        """Let a batch end early, unless it has ended; return it, ``None`` if there is none of that id."""
        with self._database.writing() as session:
            row = find(session, BatchRow, batch_id, self._project, lock=True)
            if row is None:
                return None
            if row.status in ("validating", "in_progress"):
                row.show(status="cancelling", cancelling_at=now)
            return _stored(session, row)

    # By the worker

    def begin(self, job: Job, total: int, model: str | None, now: int) -> None:
        """Note that a batch's lines are valid.

        Raises:
            LeaseLostError: The job is another's.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, BatchRow, job)
            counts = {"total": total, "completed": 0, "failed": 0}
            row.show(request_counts=counts, model=model)
            if row.status == "validating":
                row.show(status="in_progress", in_progress_at=now)

    def fail(self, job: Job, errors: Sequence[Json], now: int) -> None:
        """End a batch whose lines are not valid.

        Raises:
            LeaseLostError: The job is another's.
        """
        with self._database.writing() as session:
            row = subject_of(session, BatchRow, job)
            listed = {"object": "list", "data": list(errors)}
            row.show(status="failed", failed_at=now, errors=listed)
            finish(session, job)

    def status(self, job: Job) -> str:
        """Return the status of a job's batch, without counting its results."""
        with self._database.reading() as session:
            return session.scalars(select(BatchRow.status).where(BatchRow.id == job.subject)).one()

    def done_lines(self, batch_id: str) -> set[int]:
        """Return the lines that have a result."""
        with self._database.reading() as session:
            row = find(session, BatchRow, batch_id, self._project)
            if row is None:
                return set()
            query = select(BatchResultRow.line).where(BatchResultRow.batch == row.number)
            return set(session.scalars(query))

    def add_results(self, job: Job, results: Sequence[Result]) -> str:
        """Store results, each of them once, and return the batch's status.

        Raises:
            LeaseLostError: The job is another's.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, BatchRow, job)
            session.add_all(
                BatchResultRow(
                    batch=row.number,
                    line=result.line,
                    is_error=result.is_error,
                    text=result.text,
                    input_tokens=result.tokens.input,
                    cached_tokens=result.tokens.cached,
                    output_tokens=result.tokens.output,
                )
                for result in results
            )
            return row.status

    def set_status(self, job: Job, status: str, now: int) -> None:
        """Change a batch's status, and the time that goes with it.

        Raises:
            LeaseLostError: The job is another's.
        """
        with self._database.writing() as session:
            hold(session, job)
            subject_of(session, BatchRow, job).show(**{"status": status, f"{status}_at": now})

    def results(self, batch_id: str, *, errors: bool) -> Iterator[str]:
        """Yield the lines of the output file, or of the error file, in the input's order."""
        last = -1
        while True:
            with self._database.reading() as session:
                row = find(session, BatchRow, batch_id, self._project)
                assert row is not None
                query = (
                    select(BatchResultRow)
                    .where(
                        BatchResultRow.batch == row.number,
                        BatchResultRow.is_error == errors,
                        BatchResultRow.line > last,
                    )
                    .order_by(BatchResultRow.line)
                    .limit(_RESULTS_READ)
                )
                found = session.scalars(query).all()
            for result in found:
                yield result.text
            if len(found) < _RESULTS_READ:
                return
            last = found[-1].line

    def end(
        self,
        job: Job,
        status: str,
        output: StoredFile | None,
        errors: StoredFile | None,
        now: int,
        reasons: Sequence[Json] = (),
    ) -> None:
        """End a batch: its files, its state and the end of its job are one change; the results lie in the files now.

        Args:
            job: The batch's job.
            status: How it ends.
            output: The file of answers.
            errors: The file of errors.
            now: Unix time.
            reasons: Why it has failed as a whole.

        Raises:
            LeaseLostError: The job is another's.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, BatchRow, job)
            counts = _counts(session, row)
            num_lines = row.body["request_counts"]["total"]
            assert counts.completed + counts.failed == num_lines, "a line has no result"
            for file in (output, errors):
                if file is not None:
                    add_file(session, file)
            row.show(
                **_shown(row, counts),
                **{"status": status, f"{status}_at": now},
                output_file_id=output and output.id,
                error_file_id=errors and errors.id,
                errors={"object": "list", "data": list(reasons)} if reasons else None,
            )
            session.execute(delete(BatchResultRow).where(BatchResultRow.batch == row.number))
            finish(session, job)


def _counts(session: Session, row: BatchRow) -> Counts:
    totals = {
        is_error: rest
        for is_error, *rest in session.execute(
            select(
                BatchResultRow.is_error,
                func.count(),
                func.sum(BatchResultRow.input_tokens),
                func.sum(BatchResultRow.cached_tokens),
                func.sum(BatchResultRow.output_tokens),
            )
            .where(BatchResultRow.batch == row.number)
            .group_by(BatchResultRow.is_error)
        )
    }
    good = totals.get(False, [0, 0, 0, 0])
    bad = totals.get(True, [0, 0, 0, 0])
    tokens = [int(a) + int(b) for a, b in zip(good[1:], bad[1:], strict=True)]
    return Counts(int(good[0]), int(bad[0]), Tokens(*tokens))


def _shown(row: BatchRow, counts: Counts) -> Json:
    return {
        "request_counts": {
            **row.body["request_counts"],
            "completed": counts.completed,
            "failed": counts.failed,
        },
        "usage": {
            "input_tokens": counts.tokens.input,
            "input_tokens_details": {"cached_tokens": counts.tokens.cached},
            "output_tokens": counts.tokens.output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts.tokens.input + counts.tokens.output,
        },
    }


def _stored(session: Session, row: BatchRow) -> StoredBatch:
    body = row.body
    if row.status not in FINAL:
        body = {**body, **_shown(row, _counts(session, row))}
    return StoredBatch(body, row.output_seconds, row.key_id, row.project)
