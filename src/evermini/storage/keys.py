"""API keys and the log of what was done to them. A key itself is never stored, only its SHA-256."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import JSON, Double, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.database import Database
from evermini.storage.schema import Base, Json, Number


class ApiKeyRow(Base):
    """A key; times are Unix times."""

    __tablename__ = "api_keys"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    digest: Mapped[str] = mapped_column(unique=True)
    shown: Mapped[str]
    name: Mapped[str]
    project: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[int] = mapped_column(Number)
    expires_at: Mapped[int | None] = mapped_column(Number)
    revoked_at: Mapped[int | None] = mapped_column(Number)
    requests_per_minute: Mapped[int | None] = mapped_column(Number)
    tokens_per_minute: Mapped[int | None] = mapped_column(Number)
    monthly_budget: Mapped[float | None] = mapped_column(Double)


class AuditRow(Base):
    """Something that was done, when, and to what."""

    __tablename__ = "audit_log"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    at: Mapped[int] = mapped_column(Number)
    action: Mapped[str]
    subject: Mapped[str]
    details: Mapped[Json]


@dataclass(frozen=True)
class ApiKey:
    """A key, as far as it is known once its owner has it.

    Attributes:
        id: Its id, which is no secret.
        digest: SHA-256 of the key, in hexadecimal.
        shown: Its beginning and end, by which its owner knows it again.
        name: What it is for.
        project: What its tokens are counted for, and whose what it stores is.
        scopes: What it may do.
        created_at: Unix time.
        expires_at: Unix time from which on it is refused; ``None``: never.
        revoked_at: Unix time since which it is refused.
        requests_per_minute: Limit; ``None``: none.
        tokens_per_minute: Limit; ``None``: none.
        monthly_budget: US dollars per calendar month (UTC), by the list prices; ``None``: no limit.
    """

    id: str
    digest: str
    shown: str
    name: str
    project: str
    scopes: tuple[str, ...]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    monthly_budget: float | None = None

    def is_valid(self, now: float) -> bool:
        """Return whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True)
class AuditEntry:
    """A line of the audit log."""

    at: int
    action: str
    subject: str
    details: Json


class KeyStore:
    """Reads and writes keys. Every change writes a line of the audit log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: ApiKey) -> None:
        """Store a new key."""
        with self._database.writing() as session:
            session.add(
                ApiKeyRow(**{name: getattr(key, name) for name in _FIELDS}, scopes=list(key.scopes))
            )
            details = {"name": key.name, "project": key.project, "scopes": list(key.scopes)}
            _note(session, key.created_at, "key.created", key.id, details)

    def find(self, digest: str) -> ApiKey | None:
        """Return the key with a digest, whether or not it is valid."""
        with self._database.reading() as session:
            row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.digest == digest))
            return None if row is None else _stored(row)

    def list(self) -> Sequence[ApiKey]:
        """Return all keys, the oldest first."""
        with self._database.reading() as session:
            return [
                _stored(row)
                for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.number))
            ]

    def any_valid(self, now: float) -> bool:
        """Return whether there is a key that would be accepted."""
        return any(key.is_valid(now) for key in self.list())

    def revoke(self, key_id: str, now: int) -> ApiKey | None:
        """Refuse a key from now on; ``None`` if there is none of that id. Revoked keys stay as they are."""
        with self._database.writing() as session:
            row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.id == key_id).with_for_update())
            if row is None:
                return None
            if row.revoked_at is None:
                row.revoked_at = now
                _note(session, now, "key.revoked", key_id, {"name": row.name})
            return _stored(row)

    def count(self) -> int:
        """Return how many keys there are, valid or not."""
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(ApiKeyRow)) or 0

    def audit_log(self, limit: int) -> Sequence[AuditEntry]:
        """Return the newest lines of the audit log, the newest first."""
        with self._database.reading() as session:
            query = select(AuditRow).order_by(AuditRow.number.desc()).limit(limit)
            return [
                AuditEntry(row.at, row.action, row.subject, row.details)
                for row in session.scalars(query)
            ]


_FIELDS = (
    "id", "digest", "shown", "name", "project", "created_at", "expires_at", "revoked_at", "requests_per_minute",
    "tokens_per_minute", "monthly_budget",
)  # fmt: skip


def _note(session: Session, now: int, action: str, subject: str, details: Json) -> None:
    session.add(AuditRow(at=now, action=action, subject=subject, details=details))


def _stored(row: ApiKeyRow) -> ApiKey:
    return ApiKey(**{name: getattr(row, name) for name in _FIELDS}, scopes=tuple(row.scopes))
