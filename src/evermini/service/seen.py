"""What the caller sees of what is stored: its project's rows, each known by its id, or an error that there is none.

batches = Seen(database, BatchStore, no_such_batch)
await batches.find(batch_id, BatchStore.get)    # raises `no_such_batch(batch_id)` if there is none
await batches.ask(BatchStore.list, cursor)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, Generic, ParamSpec, TypeVar

from evermini.errors import NotFoundError
from evermini.service.caller import current_caller
from evermini.storage.database import Database
from evermini.storage.schema import ProjectStore

P = ParamSpec("P")
T = TypeVar("T")
StoreT = TypeVar("StoreT", bound=ProjectStore)


class Seen(Generic[StoreT]):
    """The rows of one store that exist for whoever asks.

    Args:
        database: Where they are.
        store: What reads and writes them.
        missing: Makes the error for an id that the caller has nothing of.
    """

    def __init__(
        self,
        database: Database,
        store: type[StoreT],
        missing: Callable[[str], NotFoundError],
    ) -> None:
        self._database, self._store, self._missing = database, store, missing

    async def ask(
        self, method: Callable[Concatenate[StoreT, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return what a method of the caller's store says."""
        store = self._store(self._database, current_caller.get().sees)
        return await self._database.run(method, store, *args, **kwargs)

    async def find(
        self,
        object_id: str,
        method: Callable[Concatenate[StoreT, str, P], T | None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Return what a method of the caller's store says of an object.

        Args:
            object_id: Its id, the method's first argument.
            method: Says ``None`` or false if there is none of that id.
            args: The method's further arguments.
            kwargs: And those by name.

        Raises:
            NotFoundError: There is none of that id.
        """
        found = await self.ask(method, object_id, *args, **kwargs)
        if found is None or found is False:
            raise self._missing(object_id)
        return found
