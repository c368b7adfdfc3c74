"""What was used: a row per request with its tokens, and how long this machine was busy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from sqlalchemy import Double, func, select
from sqlalchemy.orm import Mapped, mapped_column

from evermini.storage.database import Database
from evermini.storage.schema import Base, Number

GROUPS = ("project", "key_id", "model", "is_batch", "endpoint")
"""Columns by which usage can be summed up."""


class UsageRow(Base):
    """One request; ``at`` is the Unix time of its end."""

    __tablename__ = "usage"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    at: Mapped[int] = mapped_column(Number, index=True)
    request_id: Mapped[str]
    endpoint: Mapped[str]
    model: Mapped[str]
    key_id: Mapped[str | None]
    project: Mapped[str]
    is_batch: Mapped[bool]
    input_tokens: Mapped[int] = mapped_column(Number)
    cached_tokens: Mapped[int] = mapped_column(Number)
    output_tokens: Mapped[int] = mapped_column(Number)
    accepted_tokens: Mapped[int] = mapped_column(Number)
    rejected_tokens: Mapped[int] = mapped_column(Number)
    seconds: Mapped[float] = mapped_column(Double)


class BusyRow(Base):
    """How long a server process used the processor in some stretch of time that began at ``at``."""

    __tablename__ = "busy"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    at: Mapped[int] = mapped_column(Number, index=True)
    machine_seconds: Mapped[float] = mapped_column(Double)


@dataclass(frozen=True)
class Used:
    """One request and its tokens.

    Attributes:
        at: Unix time of its end.
        request_id: Its id.
        endpoint: Its route.
        model: Id of the model that answered.
        key_id: The key it came with.
        project: What it is counted for.
        is_batch: It was a line of a batch.
        input_tokens: Of the prompt, cached ones included.
        cached_tokens: Those of them that were not computed again.
        output_tokens: Generated, rejected predictions included.
        accepted_tokens: Of a prediction, and right.
        rejected_tokens: Of a prediction, and wrong.
        seconds: From its arrival to its end.
    """

    at: int
    request_id: str
    endpoint: str
    model: str
    key_id: str | None
    project: str
    is_batch: bool
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    accepted_tokens: int
    rejected_tokens: int
    seconds: float


@dataclass(frozen=True)
class Total:
    """Usage of one stretch of time and one group.

    Attributes:
        start: Unix time at which the stretch begins.
        group: What all of it has in common, by column of `GROUPS`.
        num_requests: Requests.
        input_tokens: Of prompts, cached ones included.
        cached_tokens: Not computed again.
        output_tokens: Generated.
    """

    start: int
    group: dict[str, object]
    num_requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Filter:
    """Which usage counts; empty collections and ``None`` choose everything."""

    models: Collection[str] = ()
    projects: Collection[str] = ()
    keys: Collection[str] = ()
    endpoints: Collection[str] = ()
    is_batch: bool | None = None


class UsageStore:
    """Reads and writes usage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, used: Sequence[Used], busy_since: int, machine_seconds: float) -> None:
        """Store requests, and how long the machine was busy since the last call."""
        with self._database.writing() as session:
            session.add_all(
                UsageRow(**{field.name: getattr(one, field.name) for field in fields(one)})
                for one in used
            )
            if machine_seconds > 0:
                session.add(BusyRow(at=busy_since, machine_seconds=machine_seconds))

    def totals(
        self,
        start: int,
        end: int,
        *,
        width: int | None = None,
        group_by: Sequence[str] = (),
        only: Filter | None = None,
    ) -> Sequence[Total]:
        """Sum up the usage from ``start`` to before ``end``, in order of time.

        Args:
            start: Unix time.
            end: Unix time.
            width: Seconds per stretch, which begin at multiples of it; ``None``: one stretch.
            group_by: Columns of `GROUPS`.
            only: What counts.
        """
        only = only or Filter()
        bucket = UsageRow.at - UsageRow.at % width if width else None
        columns = [getattr(UsageRow, name) for name in group_by]
        keys = [*([bucket] if bucket is not None else []), *columns]
        query = select(
            *keys,
            func.count(),
            func.sum(UsageRow.input_tokens),
            func.sum(UsageRow.cached_tokens),
            func.sum(UsageRow.output_tokens),
        ).where(UsageRow.at >= start, UsageRow.at < end)
        for column, wanted in (
            (UsageRow.model, only.models),
            (UsageRow.project, only.projects),
            (UsageRow.key_id, only.keys),
            (UsageRow.endpoint, only.endpoints),
        ):
            if wanted:
                query = query.where(column.in_(wanted))
        if only.is_batch is not None:
            query = query.where(UsageRow.is_batch == only.is_batch)
        with self._database.reading() as session:
            rows = session.execute(query.group_by(*keys).order_by(*keys)).all()
        found = []
        for row in rows:
            values = list(row)
            at = int(values.pop(0)) if width else start
            group = dict(zip(group_by, values, strict=False))
            count, *sums = values[len(group_by) :]
            if count:
                found.append(Total(at, group, int(count), *(int(value) for value in sums)))
        return found

    def machine_seconds(self, start: int, end: int) -> float:
        """Return how long machines were busy from ``start`` to before ``end``: all cores for a second count as one."""
        with self._database.reading() as session:
            query = select(func.sum(BusyRow.machine_seconds))
            found = session.scalar(query.where(BusyRow.at >= start, BusyRow.at < end))
            return float(found or 0.0)
