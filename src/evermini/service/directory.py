"""Every model that requests may name: those in memory, fine-tuned ones on top of them, and aliases.

    directory = Directory(runtime, store, database)
    served = await directory.resolve("ft:gpt-4.1-mini-2025-04-14:acme:support:AbCd1234")

What is added or deleted, by whatever process, counts from the next request on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from evermini.config import Settings
from evermini.errors import ModelNotFoundError, PermissionDeniedError
from evermini.models import catalogue
from evermini.models.lora import read_peft
from evermini.service.adapters import Adapter, AdapterStore
from evermini.service.caller import current_caller
from evermini.service.loading import name_of_tier
from evermini.service.model_info import ModelInfo, fingerprint
from evermini.service.runtime import AdapterSource, Runtime, Served, ServedModel, load
from evermini.storage.database import Database

log = logging.getLogger(__name__)


class Directory:
    """See the module docstring.

    Args:
        runtime: The models in memory.
        store: Adapters and aliases.
        database: Whose threads ask the store.
    """

    def __init__(self, runtime: Runtime, store: AdapterStore, database: Database) -> None:
        self._runtime = runtime
        self._store = store
        self._database = database
        self._warned: set[str] = set()

    async def resolve(self, name: str) -> Served:
        """Return the model that a request's ``model`` means.

        Raises:
            ModelNotFoundError: It is not served here; says what is, or how to get it served.
        """
        if served := self._runtime.names.get(name):
            return served
        found = await self._database.run(self._store.find, name)
        if isinstance(found, Adapter):
            if not found.exists_for(current_caller.get().sees):
                raise ModelNotFoundError(unknown_tuned(name), param="model")
            return self._tuned(found)
        if found is not None:
            return self._runtime.resolve(found)
        if name.startswith("ft:") and not self._runtime.answers_to_any_name:
            raise ModelNotFoundError(unknown_tuned(name), param="model")
        return self._runtime.resolve(name)

    async def list(self) -> Sequence[tuple[str, ModelInfo]]:
        """Return every name that is answered to, with what is known of its model."""
        listed = [(name, served.info) for name, served in self._runtime.names.items()]
        adapters, aliases = await self._database.run(
            lambda: (self._store.list(), self._store.aliases())
        )
        tuned = {
            adapter.name: tuned_info(adapter, base)
            for adapter in adapters
            if adapter.name not in self._runtime.names
            and adapter.exists_for(current_caller.get().sees)
            and (base := self._base(adapter)) is not None
        }
        listed += tuned.items()
        for alias in aliases:
            served = self._runtime.names.get(alias.target)
            info = served.info if served else tuned.get(alias.target)
            if info is not None and alias.name not in self._runtime.names:
                listed.append((alias.name, info))
        return listed

    async def delete(self, name: str) -> None:
        """Delete a fine-tuned model, or an alias.

        Raises:
            ModelNotFoundError: There is none of that name, or it is another project's.
            PermissionDeniedError: It is a model of this server's own.
        """
        if name in self._runtime.names:
            raise PermissionDeniedError(
                f"The model `{name}` is one that this server was started with, so it cannot be deleted. `evermini rm` "
                "deletes weights.",
                param="model",
            )
        meant = await self._database.run(self._store.find, name)
        project = current_caller.get().sees
        is_others = isinstance(meant, Adapter) and not meant.belongs_to(project)
        if is_others or not (
            await self._database.run(self._store.delete, name)
            or await self._database.run(self._store.delete_alias, name)
        ):
            raise ModelNotFoundError(
                f"The model `{name[:256]}` does not exist or you do not have access to it.",
                param="model",
            )

    def _base(self, adapter: Adapter) -> ServedModel | None:
        served = self._runtime.names.get(adapter.tier)
        return served if isinstance(served, ServedModel) else None

    def _tuned(self, adapter: Adapter) -> ServedModel:
        base = self._base(adapter)
        if base is None:
            is_elsewhere = adapter.tier in self._runtime.names
            raise ModelNotFoundError(
                not_run_here(adapter, is_elsewhere=is_elsewhere), param="model"
            )
        if adapter.base_weights not in (None, base.weights) and adapter.name not in self._warned:
            self._warned.add(adapter.name)
            log.warning(
                "%s was trained on other weights than those that the tier %s has now: its answers may be worse.",
                adapter.name,
                adapter.tier,
            )
        return tune(base, adapter, self._store)


def load_tuned(
    name: str, settings: Settings, *, progress: Callable[[int, int, str], None] | None = None
) -> Served:
    """Load the model of a tier and return it with an adapter, or as it is if the name is an alias of a tier.

    Args:
        name: A fine-tuned model or an alias, of the settings' database.
        settings: As for `evermini.service.runtime.load`.
        progress: As there.

    Raises:
        ModelNotFoundError: There is none of that name.
        AdapterError: The adapter does not fit the tier's model.
    """
    with Database.open(settings) as database:
        store = AdapterStore.open(settings, database)
        found = store.find(name)
        if found is None:
            raise ModelNotFoundError(unknown_tuned(name), param="model")
        if isinstance(found, Adapter):
            store.folder(found)  # from here on, neither database nor blobs are needed
    if not isinstance(found, Adapter):
        entry = catalogue.find(found)
        assert entry is not None, "an alias that means nothing else means a tier"
        return load(name_of_tier(entry.tier, settings), settings, progress=progress)
    base = load(name_of_tier(found.tier, settings), settings, progress=progress)
    if isinstance(base, ServedModel):
        return tune(base, found, store)
    base.close()
    raise ModelNotFoundError(not_run_here(found, is_elsewhere=True), param="model")


def tune(base: ServedModel, adapter: Adapter, store: AdapterStore) -> ServedModel:
    """Return a base model with an adapter, under the adapter's name."""
    source = AdapterSource(bytes.fromhex(adapter.sha256), lambda: read_peft(store.folder(adapter)))
    return base.tuned(tuned_info(adapter, base), source)


def tuned_info(adapter: Adapter, base: ServedModel) -> ModelInfo:
    """Return what clients may know of a fine-tuned model."""
    return ModelInfo(
        id=adapter.name,
        aliases=(),
        created=adapter.created_at,
        context_window=base.info.context_window,
        system_fingerprint=fingerprint(base.info.system_fingerprint, adapter.sha256),
        owned_by=adapter.owner or "evermini",
        sees=base.info.sees,
    )


def not_run_here(adapter: Adapter, *, is_elsewhere: bool) -> str:
    """Return why a fine-tuned model cannot be served, and what to do about it.

    Args:
        adapter: The model.
        is_elsewhere: An upstream engine runs its tier.
    """
    name, tier = adapter.name, adapter.tier
    if is_elsewhere:
        return (
            f"The model `{name}` is an adapter of the tier {tier}, which another engine runs for this server: adapters "
            f"need the weights here. Either run the tier here (`evermini serve --model {tier}` in the place of "
            f"{tier}=URL); or, if that engine has the fine-tuned model itself, name it "
            f"(`evermini serve --model {tier}=URL --model '{name}=URL?model=THE-ENGINES-NAME-FOR-IT'`); or let the "
            f"name mean the tier as it is: `evermini tune rm {name}`, then `evermini tune alias {name} {tier}`."
        )
    return (
        f"The model `{name}` belongs to the tier {tier}, which this server does not run itself. Start "
        f"it with that one, too: `evermini serve --model {tier}`."
    )


def unknown_tuned(name: str) -> str:
    """Return why a fine-tuned model is not found, and what to do about it."""
    shown = name[:256]
    return (
        f"The model `{shown}` does not exist or you do not have access to it. To have a fine-tuned model answer to "
        f"this name, import its adapter (`evermini tune import FOLDER --as {shown}`), train it here "
        f"(POST /v1/fine_tuning/jobs), have it shared with your project if another one trained it "
        f"(POST /v1/fine_tuning/checkpoints/{shown}/permissions), or let the name mean another model "
        f"(`evermini tune alias {shown} gpt-4.1-mini`)."
    )
