"""Work that outlives a request and a process: who does it, until when nobody else may, and when it is tried again.

A job is stored in the transaction that makes its subject (a batch, say), so neither exists without the other. The
process that works on it holds a lease, which it renews while it lives; a job whose lease has run out may be claimed by
any process. A claim carries the number of the attempt: a process that was only slow, and whose job was claimed in the
meantime, finds out at its next write and leaves it alone.

    waiting (from run_after on)  ->  leased  ->  deleted when done
                ^                      |
                +---- retry, release, lease run out

Leases run by the database's clock (`evermini.storage.database.clock`), which all its processes share. When it is set
back, the leases of dead processes look endless, and so do pauses: what lies further ahead than any could is over.
Transactions that change a job and its subject lock the job first.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Double, delete, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.errors import StorageError
from evermini.storage.database import Database, clock
from evermini.storage.schema import Base, Number, OwnedT, find

MAX_LEASE = 300.0
"""Longest lease, in seconds."""
MAX_PAUSE = 3600.0
"""Longest pause before a job is tried again, in seconds."""


class JobRow(Base):
    """A job; times are Unix times. ``owner`` and ``lease_expires`` are null while it waits."""

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    kind: Mapped[str]
    subject: Mapped[str] = mapped_column(unique=True)
    run_after: Mapped[float] = mapped_column(Double)
    num_attempts: Mapped[int]
    num_failures: Mapped[int] = mapped_column(server_default="0")
    owner: Mapped[str | None]
    lease_expires: Mapped[float | None] = mapped_column(Double)


@dataclass(frozen=True)
class Job:
    """A claimed job.

    Attributes:
        kind: What there is to do.
        subject: Id of what it is done to.
        attempt: Counts the claims, from 1.
        owner: Who has claimed it.
        num_failures: How often it has failed for reasons of its own before.
    """

    kind: str
    subject: str
    attempt: int
    owner: str
    num_failures: int = 0


class LeaseLostError(StorageError):
    """Another process works on the job, or it was deleted; this one must leave it alone."""


class JobStore:
    """Reads and writes jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(
        self, owner: str, kinds: Collection[str], lease: float, *, but: Collection[str] = ()
    ) -> Job | None:
        """Return the oldest job that nobody works on, claimed.

        Args:
            owner: Who will work on it.
            kinds: What it may be.
            lease: For how many seconds, at most `MAX_LEASE`.
            but: Subjects that the owner works on already; after a jump of the clock their leases look over.
        """
        with self._database.writing() as session:
            now = clock(session)
            is_due = (JobRow.run_after <= now) | (JobRow.run_after > now + MAX_PAUSE)
            is_free = (
                JobRow.lease_expires.is_(None)
                | (JobRow.lease_expires <= now)
                | (JobRow.lease_expires > now + MAX_LEASE)
            )
            query = (
                select(JobRow)
                .where(JobRow.kind.in_(kinds), is_due, is_free, JobRow.subject.not_in(but))
                .order_by(JobRow.number)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = session.scalar(query)
            if row is None:
                return None
            row.owner, row.lease_expires = owner, now + lease
            row.num_attempts += 1
            return Job(row.kind, row.subject, row.num_attempts, owner, row.num_failures)

    def renew(self, job: Job, lease: float) -> None:
        """Keep a job for ``lease`` more seconds.

        Raises:
            LeaseLostError: It is another's.
        """
        with self._database.writing() as session:
            expires = clock(session) + lease
            done = session.execute(update(JobRow).where(*_mine(job)).values(lease_expires=expires))
            _require(done.rowcount, job)  # type: ignore[attr-defined]

    def retry(self, job: Job, pause: float, *, has_failed: bool = False) -> None:
        """Give a job back, to be done in ``pause`` seconds (at most `MAX_PAUSE`); does nothing if it is another's.

        Args:
            job: The job.
            pause: In seconds.
            has_failed: Count a failure that is the job's own.
        """
        with self._database.writing() as session:
            run_after = clock(session) + pause
            session.execute(
                update(JobRow)
                .where(*_mine(job))
                .values(
                    owner=None,
                    lease_expires=None,
                    run_after=run_after,
                    num_failures=job.num_failures + has_failed,
                )
            )


def enqueue(session: Session, kind: str, subject: str) -> None:
    """Add a job as part of another change."""
    session.add(
        JobRow(kind=kind, subject=subject, run_after=clock(session), num_attempts=0, num_failures=0)
    )


def drop(session: Session, subject: str) -> None:
    """Delete a job that is not wanted any more, whoever works on it, as part of another change."""
    session.execute(delete(JobRow).where(JobRow.subject == subject))


def hold(session: Session, job: Job) -> None:
    """Make sure, as part of another change, that the job is still its worker's when the change is made.

    Raises:
        LeaseLostError: It is another's.
    """
    number = session.scalar(select(JobRow.number).where(*_mine(job)).with_for_update())
    _require(number is not None, job)


def finish(session: Session, job: Job) -> None:
    """Delete a job that is done, as part of another change.

    Raises:
        LeaseLostError: It is another's.
    """
    done = session.execute(delete(JobRow).where(*_mine(job)))
    _require(done.rowcount, job)  # type: ignore[attr-defined]


def subject_of(session: Session, rows: type[OwnedT], job: Job) -> OwnedT:
    """Return what a job is done to, locked until the transaction ends. It is of a kind that is never deleted."""
    row = find(session, rows, job.subject, lock=True)
    assert row is not None, "its kind is never deleted"
    return row


def _mine(job: Job):  # type: ignore[no-untyped-def]  # SQLAlchemy's types of conditions say nothing to a reader
    return (
        JobRow.subject == job.subject,
        JobRow.owner == job.owner,
        JobRow.num_attempts == job.attempt,
    )


def _require(is_mine: object, job: Job) -> None:
    if not is_mine:
        raise LeaseLostError(
            f"The job {job.kind} {job.subject} is not this process's any more: it was cancelled, or its lease ran out "
            "and another process has taken it up."
        )
