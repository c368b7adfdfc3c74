"""Fine-tuned models: adapters under their ``ft:`` names, kept with the files and found by every server of a database.

    store = AdapterStore.open(settings, database)
    adapter = store.add(folder, name="ft:gpt-4.1-mini-2025-04-14:acme:support:AbCd1234", tier="mini")
    store.get(adapter.name)
    store.folder(adapter)        # its two files on this machine's disk

Methods block. An adapter's bytes are two blobs; `AdapterStore.folder` keeps a copy under the home folder, by hash,
which is checked when it is made. Rows are deleted first, then the blobs.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import string
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from uuid import uuid4

from evermini.config import Settings
from evermini.errors import AdapterError, InvalidRequestError, StorageError
from evermini.models import catalogue
from evermini.models.config import ModelConfig
from evermini.models.lora import CONFIG_FILE, WEIGHTS_FILE, read_peft
from evermini.models.store import sync_file
from evermini.storage.adapters import Adapter, AdapterTable, ModelAlias
from evermini.storage.blobs import READ_BYTES, BlobStore
from evermini.storage.database import Database

__all__ = ["Adapter", "AdapterStore", "FineTunedName", "ModelAlias"]

FOLDER = "adapters"
"""Under the home folder: copies of adapters in use, ``<sha256>/``."""
MAX_NAME = 256

_NAME = re.compile(
    r"ft:(?P<base>[^:\s]+):(?P<org>[^:\s]*):(?P<suffix>[^:\s]*):(?P<id>[^:\s]+)(?::ckpt-step-(?P<step>\d+))?"
)


@dataclass(frozen=True)
class FineTunedName:
    """``ft:BASE:ORG:SUFFIX:ID``, and ``:ckpt-step-N`` after it for a checkpoint on the way; SUFFIX may be empty."""

    base: str
    org: str
    suffix: str
    id: str
    step: int | None = None

    def __str__(self) -> str:
        """Return the name."""
        end = "" if self.step is None else f":ckpt-step-{self.step}"
        return f"ft:{self.base}:{self.org}:{self.suffix}:{self.id}{end}"

    @classmethod
    def new(cls, base: str, org: str, suffix: str = "") -> Self:
        """Return a name with a new id of eight letters and digits."""
        letters = string.ascii_letters + string.digits
        return cls(base, org, suffix, "".join(secrets.choice(letters) for _ in range(8)))

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name.

        Raises:
            InvalidRequestError: It is none.
        """
        match = _NAME.fullmatch(name)
        if match is None or len(name) > MAX_NAME:
            raise InvalidRequestError(
                f"{name[:MAX_NAME]!r} is no name of a fine-tuned model. Give one such as "
                "ft:gpt-4.1-mini-2025-04-14:my-org:my-suffix:AbCd1234 (the suffix may be empty).",
                param="name",
            )
        step = match["step"]
        number = None if step is None else int(step)
        return cls(match["base"], match["org"], match["suffix"], match["id"], number)

    @property
    def tier(self) -> str | None:
        """The tier that stands in for its base; ``None``: none does."""
        entry = catalogue.find(self.base)
        return entry.tier if entry else None


class AdapterStore:
    """Adds, finds and deletes adapters and aliases. Safe to use from several threads and processes.

    Args:
        database: Where their names are.
        blobs: Where their bytes are.
        home: The home folder, for copies of those in use.
    """

    def __init__(self, database: Database, blobs: BlobStore, home: Path) -> None:
        self._table = AdapterTable(database)
        self._blobs = blobs
        self._home = home / FOLDER

    @classmethod
    def open(cls, settings: Settings, database: Database) -> Self:
        """Return the store that the settings name.

        Raises:
            ConfigError: ``blob_url`` cannot be used.
        """
        return cls(database, BlobStore.open(settings), settings.home)

    def add(
        self,
        folder: Path,
        *,
        name: str,
        tier: str,
        job_id: str | None = None,
        base: ModelConfig | None = None,
        base_weights: str | None = None,
    ) -> Adapter:
        """Store an adapter under a name; from then on, every server of this database answers to it.

        Adding the same adapter under the same name again does nothing. Nor does a job that was killed and makes its
        model over: clients may have used the first already, which stays.

        Args:
            folder: What peft's ``save_pretrained`` wrote: ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: See `FineTunedName`.
            tier: ``nano``, ``mini`` or ``full``.
            job_id: The fine-tuning job that made it.
            base: Shape of the tier's model; given, the adapter must fit it.
            base_weights: Hash of the weights that it was trained on, if known.

        Raises:
            AdapterError: The folder holds no adapter that can be served, or it does not fit ``base``.
            InvalidRequestError: The name is malformed or another model's, or there is no such tier.
            StorageError: It cannot be stored.
        """
        parsed = FineTunedName.parse(name)
        if tier not in (entry.tier for entry in catalogue.CATALOGUE):
            raise InvalidRequestError(
                f"There is no tier {tier!r}. Give one of "
                f"{', '.join(entry.tier for entry in catalogue.CATALOGUE)}.",
                param="tier",
            )
        lora = read_peft(folder)
        if base is not None:
            lora.check(base)
        digest, num_bytes = _hash(folder)
        found = self._table.get(name)
        if found is None:
            found = self._store(
                folder,
                Adapter(
                    name=name,
                    tier=tier,
                    owner=parsed.org,
                    rank=lora.rank,
                    sha256=digest,
                    num_bytes=num_bytes,
                    base_name=lora.base_name,
                    base_weights=base_weights,
                    job_id=job_id,
                    created_at=int(time.time()),
                    config_blob="",
                    weights_blob="",
                ),
            )
        is_made_over = job_id is not None and found.job_id == job_id
        if not is_made_over and (found.sha256 != digest or found.tier != tier):
            raise InvalidRequestError(
                f"{name} is another model's name already. Choose another one, or delete that model first "
                "(`evermini tune rm`, or DELETE /v1/models/NAME).",
                param="name",
            )
        return found

    def get(self, name: str) -> Adapter | None:
        """Return the adapter of a name, ``None`` if there is none."""
        return self._table.get(name)

    def list(self) -> Sequence[Adapter]:
        """Return all adapters, the oldest first."""
        return self._table.list()

    def delete(self, name: str) -> bool:
        """Delete an adapter and the aliases that mean it; ``False``: there is none of that name.

        Requests in work keep what they have loaded.
        """
        adapter = self._table.delete(name)
        if adapter is None:
            return False
        self._blobs.delete([adapter.config_blob, adapter.weights_blob])
        if adapter.sha256 not in self._table.used_hashes():
            shutil.rmtree(self._home / adapter.sha256, ignore_errors=True)
        return True

    def folder(self, adapter: Adapter) -> Path:
        """Return the folder of its two files on this machine, fetching them from the blobs if they are not there.

        Raises:
            StorageError: They cannot be read, or are not what was stored.
        """
        place = self._home / adapter.sha256
        if place.is_dir():
            return place
        work = place.with_name(f"{place.name}.{uuid4().hex}")
        work.mkdir(parents=True)
        try:
            for name, blob in (
                (CONFIG_FILE, adapter.config_blob),
                (WEIGHTS_FILE, adapter.weights_blob),
            ):
                with (work / name).open("wb") as file:
                    file.writelines(self._blobs.read(blob))
                sync_file(work / name)
            if _hash(work)[0] != adapter.sha256:
                raise StorageError(
                    f"The stored files of {adapter.name} are damaged. Delete the model and import it again."
                )
            try:
                work.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster
                    raise
        except OSError as error:
            raise StorageError(
                f"{adapter.name} cannot be copied to {self._home}: {error}. Make room there, or set EVERMINI_HOME to "
                "another folder."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return place

    def used_blobs(self, names: Collection[str]) -> set[str]:
        """Return which of these blobs belong to an adapter."""
        return self._table.used_blobs(names)

    def delete_copies(self) -> int:
        """Delete copies under the home folder that no adapter needs any more; return how many."""
        used, deleted = self._table.used_hashes(), 0
        for place in self._home.glob("*"):
            if place.name not in used and time.time() - place.stat().st_mtime > 3600:
                shutil.rmtree(place, ignore_errors=True)
                deleted += 1
        return deleted

    def set_alias(self, name: str, target: str) -> ModelAlias:
        """Let ``name``, such as the ``ft:`` id of a model that is gone, mean another model from now on.

        Args:
            name: Not a tier's name, nor an adapter's.
            target: An adapter's name, a tier or one of its names.

        Raises:
            InvalidRequestError: One of the two is none of these.
        """
        if not name.strip() or len(name) > MAX_NAME or catalogue.find(name) or self.get(name):
            raise InvalidRequestError(
                f"{name[:MAX_NAME]!r} cannot be an alias: it is empty, too long, or a model's own name.",
                param="name",
            )
        if self.get(target) is None and catalogue.find(target) is None:
            raise InvalidRequestError(
                f"There is no model {target!r} that {name} could mean. Give a fine-tuned model "
                f"(`evermini tune models`) or one of {', '.join(catalogue.known_names())}.",
                param="target",
            )
        alias = ModelAlias(name, target, int(time.time()))
        self._table.set_alias(alias)
        return alias

    def delete_alias(self, name: str) -> bool:
        """Delete an alias; ``False``: there is none of that name."""
        return self._table.delete_alias(name)

    def alias(self, name: str) -> str | None:
        """Return what an alias means."""
        return self._table.alias(name)

    def find(self, name: str) -> Adapter | str | None:
        """Return the adapter that a name or an alias means, or the tier (or name of one) that an alias means."""
        if (adapter := self.get(name)) or (target := self.alias(name)) is None:
            return adapter
        return self.get(target) or (target if catalogue.find(target) else None)

    def aliases(self) -> Sequence[ModelAlias]:
        """Return all aliases, the oldest first."""
        return self._table.aliases()

    def _store(self, folder: Path, adapter: Adapter) -> Adapter:
        written: list[str] = []
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                written.append(self._write(folder / name))
            stored = self._table.add(
                replace(adapter, config_blob=written[0], weights_blob=written[1])
            )
        except BaseException:
            self._blobs.delete(written)
            raise
        if stored.weights_blob not in written:  # another process has added one of that name
            self._blobs.delete(written)
        return stored

    def _write(self, path: Path) -> str:
        writer = self._blobs.create()
        try:
            with path.open("rb") as file:
                while data := file.read(READ_BYTES):
                    writer.write(data)
            writer.close()
        except BaseException:
            writer.discard()
            raise
        return writer.name


def _hash(folder: Path) -> tuple[str, int]:
    """Return the hash of an adapter's two files, and their length together."""
    whole, num_bytes = hashlib.sha256(), 0
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            with (folder / name).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
                num_bytes += file.tell()
        except OSError as error:
            raise AdapterError(f"{folder / name} cannot be read: {error}.") from error
    return whole.hexdigest(), num_bytes
