"""What happened to fine-tuning jobs: their events, among them the metrics of steps, and their checkpoints.

`job` is the number of the job's row (`evermini.storage.fine_tuning`); all of it goes when the job does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ForeignKey, String, UniqueConstraint, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.schema import Base, Cursor, Json, Listed, Number, Page, page

Level = Literal["info", "warn", "error"]


class FineTuningEventRow(Listed, Base):
    """Something that happened; ``step`` is set for metrics, of which a step has one."""

    __tablename__ = "fine_tuning_events"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    job: Mapped[int] = mapped_column(
        ForeignKey("fine_tuning_jobs.number", ondelete="CASCADE"), index=True
    )
    created_at: Mapped[int] = mapped_column(Number)
    level: Mapped[str]
    message: Mapped[str]
    step: Mapped[int | None]
    data: Mapped[Json]


class FineTuningCheckpointRow(Listed, Base):
    """An epoch's weights; ``name`` is the model's."""

    __tablename__ = "fine_tuning_checkpoints"
    __table_args__ = (UniqueConstraint("job", "step"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    job: Mapped[int] = mapped_column(ForeignKey("fine_tuning_jobs.number", ondelete="CASCADE"))
    step: Mapped[int]
    created_at: Mapped[int] = mapped_column(Number)
    name: Mapped[str] = mapped_column(String)
    metrics: Mapped[Json]


@dataclass(frozen=True)
class Event:
    """Something that happened; metrics have the step that they are of."""

    id: str
    created_at: int
    message: str
    level: Level = "info"
    step: int | None = None
    data: Json | None = None


@dataclass(frozen=True)
class TuningCheckpoint:
    """An epoch's weights."""

    id: str
    step: int
    created_at: int
    name: str
    metrics: Json


def add_events(session: Session, job: int, events: Iterable[Event]) -> None:
    """Add events; a step's metrics that are known are added to."""
    for event in events:
        known = None
        if event.step is not None:
            known = session.scalar(
                select(FineTuningEventRow).where(
                    FineTuningEventRow.job == job, FineTuningEventRow.step == event.step
                )
            )
        if known is not None:
            known.message, known.data = event.message, {**known.data, **(event.data or {})}
            continue
        session.add(
            FineTuningEventRow(
                id=event.id,
                job=job,
                created_at=event.created_at,
                level=event.level,
                message=event.message,
                step=event.step,
                data=event.data or {},
            )
        )


def put_checkpoint(session: Session, job: int, checkpoint: TuningCheckpoint) -> None:
    """Add a checkpoint; of one whose step is known, only the metrics are taken."""
    found = session.scalar(
        select(FineTuningCheckpointRow).where(
            FineTuningCheckpointRow.job == job,
            FineTuningCheckpointRow.step == checkpoint.step,
        )
    )
    if found is not None:
        found.metrics = checkpoint.metrics
        return
    session.add(
        FineTuningCheckpointRow(
            id=checkpoint.id,
            job=job,
            step=checkpoint.step,
            created_at=checkpoint.created_at,
            name=checkpoint.name,
            metrics=checkpoint.metrics,
        )
    )


def forget_after(session: Session, job: int, step: int) -> None:
    """Forget the metrics and checkpoints of later steps: the job goes on from this one."""
    event, checkpoint = FineTuningEventRow, FineTuningCheckpointRow
    session.execute(delete(event).where(event.job == job, event.step > step))
    session.execute(delete(checkpoint).where(checkpoint.job == job, checkpoint.step > step))


def events_of(session: Session, job: int, cursor: Cursor) -> Page[Event] | None:
    """Return a page of a job's events; ``None`` if it has no event ``cursor.after``."""
    query = select(FineTuningEventRow).where(FineTuningEventRow.job == job)
    return page(session, FineTuningEventRow, query, cursor, _event)


def metrics_of(session: Session, job: int) -> Sequence[Event]:
    """Return the metrics of a job's steps, in order."""
    query = (
        select(FineTuningEventRow)
        .where(FineTuningEventRow.job == job, FineTuningEventRow.step.is_not(None))
        .order_by(FineTuningEventRow.step)
    )
    return [_event(one) for one in session.scalars(query)]


def checkpoints_of(session: Session, job: int, cursor: Cursor) -> Page[TuningCheckpoint] | None:
    """Return a page of a job's checkpoints; ``None`` as for `events_of`."""
    query = select(FineTuningCheckpointRow).where(FineTuningCheckpointRow.job == job)
    return page(session, FineTuningCheckpointRow, query, cursor, _checkpoint)


def _event(row: FineTuningEventRow) -> Event:
    level: Level = row.level  # type: ignore[assignment]  # written by us
    return Event(row.id, row.created_at, row.message, level, row.step, row.data)


def _checkpoint(row: FineTuningCheckpointRow) -> TuningCheckpoint:
    return TuningCheckpoint(row.id, row.step, row.created_at, row.name, row.metrics)
