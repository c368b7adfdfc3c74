"""``/v1/chat/completions`` of earlier: list, retrieve, update, delete."""

from __future__ import annotations

import re

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.body import read_request
from evermini.api.description import PageOf, Parameter, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import list_object, no_such_cursor, page_of, read_cursor
from evermini.errors import NotFoundError
from evermini.service.caller import current_caller
from evermini.service.schemas import MetadataUpdate, parse_metadata_update
from evermini.service.shapes import ChatAnswer, Deleted, StoredMessage
from evermini.storage.chats import ChatStore
from evermini.storage.database import Database

router = APIRouter(prefix="/v1/chat/completions")

_LISTING = [
    *cursor("asc"),
    Parameter("model", {"type": "string"}, "Those of this model alone."),
    Parameter(
        "metadata",
        {"type": "object", "additionalProperties": {"type": "string"}},
        "Those with all of these pairs alone, each written metadata[key]=value.",
        style="deepObject",
    ),
]


@router.get("")
@described(query=_LISTING, answer=PageOf(ChatAnswer))
async def list_chat_completions(request: Request) -> Response:
    """List stored completions, filtered by model and by pairs of metadata (``metadata[key]=value``)."""
    database, store = _store(request)
    cursor = read_cursor(request, order="asc")
    pairs = {
        match[1]: value
        for key, value in request.query_params.multi_items()
        if (match := re.fullmatch(r"metadata\[(.+)\]", key, re.DOTALL))
    }
    found = await database.run(
        store.list, cursor, model=request.query_params.get("model"), metadata=pairs
    )
    if found is None:
        raise no_such_cursor(cursor)
    return JsonResponse(list_object([chat.body for chat in found.rows], found.has_more))


@router.get("/{completion_id}")
@described(answer=ChatAnswer)
async def retrieve_chat_completion(request: Request, completion_id: str) -> Response:
    """Return a stored completion as it was answered."""
    database, store = _store(request)
    found = await database.run(store.get, completion_id)
    if found is None:
        raise _not_found(completion_id)
    return JsonResponse(found.body)


@router.post("/{completion_id}")
@described(body=MetadataUpdate, answer=ChatAnswer)
async def update_chat_completion(request: Request, completion_id: str) -> Response:
    """Replace a stored completion's metadata, the one thing about it that can change."""
    database, store = _store(request)
    metadata = await read_request(request, parse_metadata_update)
    found = await database.run(store.update, completion_id, metadata)
    if found is None:
        raise _not_found(completion_id)
    return JsonResponse(found.body)


@router.delete("/{completion_id}")
@described(answer=Deleted)
async def delete_chat_completion(request: Request, completion_id: str) -> Response:
    """Delete a stored completion."""
    database, store = _store(request)
    if not await database.run(store.delete, completion_id):
        raise _not_found(completion_id)
    return JsonResponse({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})


@router.get("/{completion_id}/messages")
@described(query=cursor("asc"), answer=PageOf(StoredMessage))
async def list_chat_messages(request: Request, completion_id: str) -> Response:
    """List the messages that a stored completion answered."""
    database, store = _store(request)
    cursor = read_cursor(request, order="asc")
    found = await database.run(store.get, completion_id)
    if found is None:
        raise _not_found(completion_id)
    return JsonResponse(page_of(found.messages, cursor))


def _store(request: Request) -> tuple[Database, ChatStore]:
    database: Database = request.app.state.database
    return database, ChatStore(database, current_caller.get().sees)


def _not_found(completion_id: str) -> NotFoundError:
    return NotFoundError(
        f"Chat completion with id '{completion_id[:200]}' not found. Only completions made with 'store': true are "
        "kept.",
        param="completion_id",
    )
