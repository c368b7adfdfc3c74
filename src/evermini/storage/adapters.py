"""Fine-tuned models: which adapter answers to which ``ft:`` name, where its bytes are, and what other names mean."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import ForeignKey, Index, Select, delete, or_, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from evermini.storage.database import Database
from evermini.storage.fine_tuning import FineTuningRow
from evermini.storage.schema import Base, Listed, Number


class AdapterRow(Base):
    """An adapter; times are Unix times. ``job_id`` is the fine-tuning job that made it, if one did."""

    __tablename__ = "adapters"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    tier: Mapped[str]
    owner: Mapped[str]
    rank: Mapped[int]
    sha256: Mapped[str] = mapped_column(index=True)
    num_bytes: Mapped[int] = mapped_column(Number)
    base_name: Mapped[str | None]
    base_weights: Mapped[str | None]
    job_id: Mapped[str | None] = mapped_column(index=True)
    created_at: Mapped[int] = mapped_column(Number)
    config_blob: Mapped[str] = mapped_column(unique=True)
    weights_blob: Mapped[str] = mapped_column(unique=True)


class ModelAliasRow(Base):
    """A further name for a model that is served here."""

    __tablename__ = "model_aliases"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    target: Mapped[str]
    created_at: Mapped[int] = mapped_column(Number)


class ModelPermissionRow(Listed, Base):
    """A project that a model is shared with."""

    __tablename__ = "model_permissions"
    __table_args__ = (Index(None, "adapter", "project", unique=True),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    adapter: Mapped[int] = mapped_column(ForeignKey(AdapterRow.number, ondelete="CASCADE"))
    project: Mapped[str]
    created_at: Mapped[int] = mapped_column(Number)


@dataclass(frozen=True)
class Adapter:
    """A fine-tuned model.

    Attributes:
        name: What it answers to: ``ft:BASE:ORG:SUFFIX:ID``, with ``:ckpt-step-N`` for a checkpoint.
        tier: The tier whose model it belongs to.
        owner: The organisation in its name.
        rank: The largest rank of its layers.
        sha256: Hash of its two files; equal for equal adapters, wherever they came from.
        num_bytes: Of its two files.
        base_name: What its trainer called the base model, if it said so.
        base_weights: Hash of the base's weights that it was trained on, if known.
        job_id: The fine-tuning job that made it; ``None``: it was imported.
        created_at: Unix time.
        config_blob: Blob of ``adapter_config.json``.
        weights_blob: Blob of ``adapter_model.safetensors``.
        project: Whose it is: that of its job; ``None``: it was imported, and is everybody's.
        shared_with: Projects that may use it besides.
    """

    name: str
    tier: str
    owner: str
    rank: int
    sha256: str
    num_bytes: int
    base_name: str | None
    base_weights: str | None
    job_id: str | None
    created_at: int
    config_blob: str
    weights_blob: str
    project: str | None = None
    shared_with: frozenset[str] = frozenset()

    def belongs_to(self, project: str | None) -> bool:
        """Return whether a project's keys may do with it what they like; ``None``: whoever sees everything."""
        return project is None or self.project in (None, project)

    def exists_for(self, project: str | None) -> bool:
        """Return whether a project's keys may use it; ``None`` as for `belongs_to`."""
        return self.belongs_to(project) or project in self.shared_with


@dataclass(frozen=True)
class ModelAlias:
    """``name`` means ``target``: an adapter, a tier or one of its names."""

    name: str
    target: str
    created_at: int


class AdapterTable:
    """Reads and writes adapters and aliases. No two of them have the same name."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, adapter: Adapter) -> Adapter:
        """Store an adapter whose blobs are complete; return what has its name from now on, which may have been there.

        An alias of the same name gives way.
        """
        with self._database.writing() as session:
            if found := _find(session, adapter.name):
                return found
            session.execute(delete(ModelAliasRow).where(ModelAliasRow.name == adapter.name))
            session.add(AdapterRow(**{name: getattr(adapter, name) for name in _FIELDS}))
            session.flush()
            added = _find(session, adapter.name)
            assert added is not None, "of this transaction"
            return added

    def get(self, name: str) -> Adapter | None:
        """Return the adapter of a name."""
        with self._database.reading() as session:
            return _find(session, name)

    def list(self) -> Sequence[Adapter]:
        """Return all adapters, the oldest first."""
        with self._database.reading() as session:
            shared: defaultdict[int, set[str]] = defaultdict(set)
            for permission in session.scalars(select(ModelPermissionRow)):
                shared[permission.adapter].add(permission.project)
            rows = session.execute(_adapters().order_by(AdapterRow.number))
            return [_stored(row, project, shared[row.number]) for row, project in rows]

    def delete(self, name: str) -> Adapter | None:
        """Delete an adapter and the aliases that mean it; return what it was, whose blobs are free now."""
        with self._database.writing() as session:
            found = _find(session, name)
            if found is not None:
                session.execute(delete(ModelAliasRow).where(ModelAliasRow.target == name))
                session.execute(delete(AdapterRow).where(AdapterRow.name == name))
            return found

    def used_hashes(self) -> set[str]:
        """Return the hashes of all adapters."""
        with self._database.reading() as session:
            return set(session.scalars(select(AdapterRow.sha256)))

    def used_blobs(self, names: Collection[str]) -> set[str]:
        """Return which of these blobs belong to an adapter."""
        with self._database.reading() as session:
            rows = session.scalars(
                select(AdapterRow).where(
                    or_(AdapterRow.config_blob.in_(names), AdapterRow.weights_blob.in_(names))
                )
            ).all()
            return {row.config_blob for row in rows} | {row.weights_blob for row in rows}

    def set_alias(self, alias: ModelAlias) -> None:
        """Store an alias, in place of one of the same name."""
        with self._database.writing() as session:
            session.execute(delete(ModelAliasRow).where(ModelAliasRow.name == alias.name))
            session.add(
                ModelAliasRow(name=alias.name, target=alias.target, created_at=alias.created_at)
            )

    def delete_alias(self, name: str) -> bool:
        """Delete an alias; ``False``: there is none of that name."""
        with self._database.writing() as session:
            row = session.scalar(select(ModelAliasRow).where(ModelAliasRow.name == name))
            if row is None:
                return False
            session.delete(row)
            return True

    def alias(self, name: str) -> str | None:
        """Return what an alias means."""
        with self._database.reading() as session:
            return session.scalar(select(ModelAliasRow.target).where(ModelAliasRow.name == name))

    def aliases(self) -> Sequence[ModelAlias]:
        """Return all aliases, the oldest first."""
        with self._database.reading() as session:
            return [
                ModelAlias(row.name, row.target, row.created_at)
                for row in session.scalars(select(ModelAliasRow).order_by(ModelAliasRow.number))
            ]


_FIELDS = (
    "name", "tier", "owner", "rank", "sha256", "num_bytes", "base_name", "base_weights", "job_id", "created_at",
    "config_blob", "weights_blob",
)  # fmt: skip


def _adapters() -> Select[AdapterRow, str | None]:
    """Return the query of adapters, each with the project of the job that made it."""
    made_by = FineTuningRow.id == AdapterRow.job_id
    return select(AdapterRow, FineTuningRow.project).outerjoin(FineTuningRow, made_by)


def _find(session: Session, name: str) -> Adapter | None:
    found = session.execute(_adapters().where(AdapterRow.name == name)).one_or_none()
    if found is None:
        return None
    row, project = found
    shared = select(ModelPermissionRow.project).where(ModelPermissionRow.adapter == row.number)
    return _stored(row, project, session.scalars(shared))


def _stored(row: AdapterRow, project: str | None, shared: Iterable[str]) -> Adapter:
    fields = {name: getattr(row, name) for name in _FIELDS}
    return Adapter(**fields, project=project, shared_with=frozenset(shared))
