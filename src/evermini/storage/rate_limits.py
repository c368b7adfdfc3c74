"""What is left of keys' requests and tokens per minute, for all processes of a PostgreSQL database together.

A bucket fills evenly up to one minute's worth. It may be overdrawn, and then has to fill up again. Times are the
database's, so processes need no common clock. With SQLite nobody asks: each commit would be flushed to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Double, func, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, mapped_column

from evermini.storage.database import Database
from evermini.storage.schema import Base


class RateLimitRow(Base):
    """A bucket of a key: its level at a time, Unix time. ``unit`` is requests or tokens."""

    __tablename__ = "rate_limits"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[float] = mapped_column(Double)
    at: Mapped[float] = mapped_column(Double)


class RateLimitStore:
    """Reads and writes buckets of a PostgreSQL database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, key_id: str, taken: Mapping[str, tuple[int, float]]) -> dict[str, float]:
        """Take something out of a key's buckets, and return their levels.

        Args:
            key_id: The key.
            taken: For each unit, what a full bucket holds, and how much is taken.
        """
        now = func.extract("epoch", func.clock_timestamp())
        levels: dict[str, float] = {}
        with self._database.writing() as session:
            # A crash of the database may forget the last moments; nobody waits for its disk.
            session.execute(text("SET LOCAL synchronous_commit TO OFF"))
            for unit, (size, amount) in sorted(taken.items()):
                filled = func.greatest(0.0, now - RateLimitRow.at) * (size / 60)
                statement = (
                    insert(RateLimitRow)
                    .values(key_id=key_id, unit=unit, level=size - amount, at=now)
                    .on_conflict_do_update(
                        index_elements=[RateLimitRow.key_id, RateLimitRow.unit],
                        set_={
                            "level": func.least(float(size), RateLimitRow.level + filled) - amount,
                            "at": now,
                        },
                    )
                    .returning(RateLimitRow.level)
                )
                levels[unit] = session.scalars(statement).one()
        return levels
