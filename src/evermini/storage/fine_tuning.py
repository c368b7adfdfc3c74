"""Fine-tuning jobs; `evermini.storage.tuning_history` has what happened to them.

    validating_files -> queued -> running -> succeeded
           |              |          |-> failed, cancelled
           v              v          v
         failed         paused <-> queued

Checking the files and training are jobs of the queue, of kinds of their own: files are checked at once, trainings wait
for each other. A paused job is in no queue. Whoever works on a job writes under its lease; `cancel` and `pause` change
the status alone, and take the job out of the queue if nobody works on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import Index, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.files import StoredFile, add_file
from evermini.storage.jobs import Job, JobRow, drop, enqueue, finish, hold, subject_of
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
    behind,
    find,
    owned,
    page,
)
from evermini.storage.tuning_history import (
    Event,
    TuningCheckpoint,
    add_events,
    checkpoints_of,
    events_of,
    forget_after,
    metrics_of,
    put_checkpoint,
)

CHECK = "fine_tuning_check"
TRAIN = "fine_tuning"
FINAL = ("succeeded", "failed", "cancelled")


class FineTuningRow(Shown, Owned, Base):
    """A job; ``body`` is all of it that clients see, ``spec`` what the training process is told."""

    __tablename__ = "fine_tuning_jobs"
    __table_args__ = (Index(None, "project", "number"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str]
    body: Mapped[Json]
    spec: Mapped[Json]
    key_id: Mapped[str | None]
    project: Mapped[str]


@dataclass(frozen=True)
class StoredTuning(StoredObject):
    """A job.

    Attributes:
        spec: What the training process is told.
        key_id: The key that created it, if one did.
        project: Whose it is.
    """

    spec: Json
    key_id: str | None = None
    project: str = "default"


class TuningStore(ProjectStore):
    """Reads and writes fine-tuning jobs."""

    def add(self, tuning: StoredTuning, events: Sequence[Event]) -> None:
        """Store a new job, and the queue's job to check its files."""
        with self._database.writing() as session:
            row = _add(session, tuning)
            add_events(session, row.number, events)
            enqueue(session, CHECK, tuning.id)

    def restore(
        self,
        tuning: StoredTuning,
        events: Sequence[Event],
        checkpoints: Sequence[TuningCheckpoint],
    ) -> None:
        """Store a job as it is, in place of the one with its id; nobody will work on it."""
        with self._database.writing() as session:
            session.execute(delete(FineTuningRow).where(FineTuningRow.id == tuning.id))
            drop(session, tuning.id)
            row = _add(session, tuning)
            add_events(session, row.number, events)
            for checkpoint in checkpoints:
                put_checkpoint(session, row.number, checkpoint)

    def get(self, tuning_id: str) -> StoredTuning | None:
        """Return a job, ``None`` if there is none of that id."""
        with self._database.reading() as session:
            row = find(session, FineTuningRow, tuning_id, self._project)
            return None if row is None else _stored(row)

    def list(
        self, cursor: Cursor, metadata: Mapping[str, str] | None = None, *, bare: bool = False
    ) -> Page[StoredTuning] | None:
        """Return a page of jobs.

        Args:
            cursor: Which page.
            metadata: Only jobs with these pairs.
            bare: Only jobs without any metadata.

        Returns:
            The page; ``None`` if there is no job ``cursor.after``.
        """
        with self._database.reading() as session:
            query = owned(FineTuningRow, self._project)
            if not metadata and not bare:
                return page(session, FineTuningRow, query, cursor, _stored)
            rest = behind(session, FineTuningRow, query, cursor)
            if rest is None:
                return None
            rows = session.scalars(rest)
            fitting = (row for row in rows if _has(row.body["metadata"], metadata or {}, bare))
            some = [_stored(row) for row in islice(fitting, cursor.limit + 1)]
            return Page(some[: cursor.limit], len(some) > cursor.limit)

    def is_queued(self, tuning_id: str) -> bool:
        """Return whether a job is in the queue: it waits there, or somebody works on it."""
        with self._database.reading() as session:
            found = session.scalar(select(JobRow.number).where(JobRow.subject == tuning_id))
            return found is not None

    def cancel(self, tuning_id: str, event: Event) -> StoredTuning | None:
        """End a job that has not ended; return it, ``None`` if there is none of that id."""
        with self._database.writing() as session:
            row = find(session, FineTuningRow, tuning_id, self._project, lock=True)
            if row is None:
                return None
            if row.status not in FINAL:
                row.show(status="cancelled", finished_at=event.created_at, estimated_finish=None)
                add_events(session, row.number, [event])
                drop(session, tuning_id)
            return _stored(row)

    def pause(self, tuning_id: str, event: Event) -> StoredTuning | None:
        """Pause a job that waits or trains; return it, ``None`` if there is none of that id.

        One that trains stays in the queue until its worker has stopped.
        """
        with self._database.writing() as session:
            row = find(session, FineTuningRow, tuning_id, self._project, lock=True)
            if row is None:
                return None
            if row.status in ("queued", "running"):
                row.show(status="paused", estimated_finish=None)
                add_events(session, row.number, [event])
                session.execute(
                    delete(JobRow).where(JobRow.subject == tuning_id, JobRow.owner.is_(None))
                )
            return _stored(row)

    def resume(self, tuning_id: str, event: Event) -> StoredTuning | None:
        """Queue a paused job again; return it, ``None`` if there is none of that id."""
        with self._database.writing() as session:
            row = find(session, FineTuningRow, tuning_id, self._project, lock=True)
            if row is None:
                return None
            if row.status == "paused":
                row.show(status="queued")
                add_events(session, row.number, [event])
                queued = select(JobRow.number).where(JobRow.subject == tuning_id)
                if session.scalar(queued) is None:
                    enqueue(session, TRAIN, tuning_id)
            return _stored(row)

    def events(self, tuning_id: str, cursor: Cursor) -> Page[Event] | None:
        """Return a page of a job's events; ``None`` if there is no such job, or no event ``cursor.after``."""
        with self._database.reading() as session:
            row = find(session, FineTuningRow, tuning_id, self._project)
            if row is None:
                return None
            return events_of(session, row.number, cursor)

    def metrics(self, tuning_id: str) -> Sequence[Event]:
        """Return the metrics of a job's steps, in order."""
        with self._database.reading() as session:
            row = find(session, FineTuningRow, tuning_id)
            return [] if row is None else metrics_of(session, row.number)

    def checkpoints(self, tuning_id: str, cursor: Cursor) -> Page[TuningCheckpoint] | None:
        """Return a page of a job's checkpoints; ``None`` as for `events`."""
        with self._database.reading() as session:
            row = find(session, FineTuningRow, tuning_id, self._project)
            if row is None:
                return None
            return checkpoints_of(session, row.number, cursor)

    # By the worker

    def checked(self, job: Job, body: Json, spec: Json, event: Event) -> None:
        """Note that a job's files are good, and let it wait for its turn.

        Raises:
            LeaseLostError: The queue's job is another's, or the job was cancelled.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, FineTuningRow, job)
            row.show(**body, status="queued")
            row.spec = spec
            add_events(session, row.number, [event])
            finish(session, job)
            enqueue(session, TRAIN, row.id)

    def fail(self, job: Job, error: Json, events: Sequence[Event], now: int) -> None:
        """End a job that cannot be done.

        Raises:
            LeaseLostError: As for `checked`.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, FineTuningRow, job)
            row.show(status="failed", error=error, finished_at=now, estimated_finish=None)
            add_events(session, row.number, events)
            finish(session, job)

    def started(self, job: Job, step: int, event: Event) -> bool:
        """Note that a training begins or goes on after ``step``, and forget metrics of later steps.

        Returns:
            Whether it is still wanted: it may have been paused.

        Raises:
            LeaseLostError: As for `checked`.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, FineTuningRow, job)
            if row.status == "paused":
                return False
            row.show(status="running")
            forget_after(session, row.number, step)
            add_events(session, row.number, [event])
            return True

    def progress(
        self,
        job: Job,
        events: Iterable[Event],
        estimated_finish: int | None,
        checkpoint: TuningCheckpoint | None = None,
    ) -> str:
        """Store what happened, and return the job's status.

        Raises:
            LeaseLostError: As for `checked`.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, FineTuningRow, job)
            add_events(session, row.number, events)
            if checkpoint is not None:
                put_checkpoint(session, row.number, checkpoint)
            if row.status == "running" and estimated_finish is not None:
                row.show(estimated_finish=estimated_finish)
            return row.status

    def status(self, job: Job) -> str:
        """Return the status of a job."""
        with self._database.reading() as session:
            query = select(FineTuningRow.status).where(FineTuningRow.id == job.subject)
            return session.scalars(query).one()

    def stopped(self, job: Job) -> bool:
        """Take a paused job out of the queue, now that nobody trains it any more.

        Returns:
            Whether it is paused; it may have been resumed in the meantime.

        Raises:
            LeaseLostError: As for `checked`.
        """
        with self._database.writing() as session:
            hold(session, job)
            if subject_of(session, FineTuningRow, job).status != "paused":
                return False
            finish(session, job)
            return True

    def succeed(
        self, job: Job, body: Json, results: StoredFile, events: Sequence[Event], now: int
    ) -> None:
        """End a job: its result file, its state and the end of the queue's job are one change.

        Raises:
            LeaseLostError: As for `checked`.
        """
        with self._database.writing() as session:
            hold(session, job)
            row = subject_of(session, FineTuningRow, job)
            add_file(session, results)
            row.show(
                **body,
                status="succeeded",
                result_files=[results.id],
                finished_at=now,
                estimated_finish=None,
            )
            add_events(session, row.number, events)
            finish(session, job)


def _add(session: Session, tuning: StoredTuning) -> FineTuningRow:
    row = FineTuningRow(
        id=tuning.id,
        status=tuning.status,
        body=tuning.body,
        spec=tuning.spec,
        key_id=tuning.key_id,
        project=tuning.project,
    )
    session.add(row)
    session.flush()
    return row


def _has(metadata: Json | None, pairs: Mapping[str, str], bare: bool) -> bool:
    if bare and metadata:
        return False
    return all((metadata or {}).get(key) == value for key, value in pairs.items())


def _stored(row: FineTuningRow) -> StoredTuning:
    return StoredTuning(row.body, row.spec, row.key_id, row.project)
