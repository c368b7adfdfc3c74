"""The permissions that share a fine-tuned model with further projects; `Adapter.exists_for` goes by them.

A model belongs to the project that trained it. One that was imported is open to all.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from evermini.errors import InvalidRequestError, ModelNotFoundError, NotFoundError
from evermini.service import validation
from evermini.service.adapters import Adapter, AdapterStore
from evermini.service.validation import WireModel
from evermini.storage.database import Database
from evermini.storage.permissions import Permission, PermissionStore
from evermini.storage.schema import Cursor, Page

MAX_PROJECTS = 100
"""That one request may share a model with."""
_PARAM = "fine_tuned_model_checkpoint"


class PermissionCreate(WireModel):
    """``POST /v1/fine_tuning/checkpoints/{name}/permissions``."""

    project_ids: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        Field(min_length=1, max_length=MAX_PROJECTS),
    ]


def parse_permission(body: object) -> PermissionCreate:
    """Validate the body that shares a model.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(PermissionCreate, body)


class Permissions:
    """Shares fine-tuned models.

    Args:
        database: Where permissions are.
        adapters: Where models are.
    """

    def __init__(self, database: Database, adapters: AdapterStore) -> None:
        self._database = database
        self._adapters = adapters
        self._store = PermissionStore(database)

    async def share(self, model: str, projects: list[str]) -> list[Permission]:
        """Share a model with projects.

        Raises:
            ModelNotFoundError: There is no such fine-tuned model.
            InvalidRequestError: It is open to all projects already.
        """
        if (await self._find(model)).project is None:
            raise InvalidRequestError(
                f"The model `{model}` was imported, so it is open to every project. Permissions share models that a "
                "project has trained.",
                param=_PARAM,
            )
        made = await self._database.run(self._store.add, model, projects)
        if made is None:
            raise _no_such_model(model)
        return list(made)

    async def list(
        self, model: str, cursor: Cursor, project: str | None
    ) -> Page[Permission] | None:
        """Return a page of a model's permissions, as `PermissionStore.list` does.

        Raises:
            ModelNotFoundError: There is no such fine-tuned model.
        """
        await self._find(model)
        return await self._database.run(self._store.list, model, cursor, project)

    async def withdraw(self, model: str, permission_id: str) -> None:
        """Stop sharing a model with a project; requests in work end as they would have.

        Raises:
            NotFoundError: There is no such model, or it has no such permission.
        """
        await self._find(model)
        if not await self._database.run(self._store.delete, model, permission_id):
            raise NotFoundError(
                f"No permission found with id '{permission_id[:200]}' for the model `{model}`.",
                param="permission_id",
            )

    async def _find(self, model: str) -> Adapter:
        found = await self._database.run(self._adapters.get, model)
        if found is None:
            raise _no_such_model(model)
        return found


def permission_object(permission: Permission) -> dict[str, Any]:
    """Return a permission as clients see it."""
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project,
    }


def _no_such_model(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The model `{model[:256]}` does not exist, or is not a fine-tuned one. `evermini tune models` lists them.",
        param=_PARAM,
    )
