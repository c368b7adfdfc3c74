"""``/v1/chat/completions`` of earlier: list, retrieve, update, delete."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.body import read_request
from evermini.api.description import PageOf, Parameter, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import page_object, page_of, read_cursor, read_metadata
from evermini.api.services import services
from evermini.errors import NotFoundError
from evermini.service.schemas import MetadataUpdate, parse_metadata_update
from evermini.service.seen import Seen
from evermini.service.shapes import ChatAnswer, Deleted, StoredMessage
from evermini.storage.chats import ChatStore

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
    cursor = read_cursor(request, order="asc")
    found = await _stored(request).ask(
        ChatStore.list,
        cursor,
        model=request.query_params.get("model"),
        metadata=read_metadata(request),
    )
    return JsonResponse(page_object(found, cursor, lambda chat: chat.body))


@router.get("/{completion_id}")
@described(answer=ChatAnswer)
async def retrieve_chat_completion(request: Request, completion_id: str) -> Response:
    """Return a stored completion as it was answered."""
    found = await _stored(request).find(completion_id, ChatStore.get)
    return JsonResponse(found.body)


@router.post("/{completion_id}")
@described(body=MetadataUpdate, answer=ChatAnswer)
async def update_chat_completion(request: Request, completion_id: str) -> Response:
    """Replace a stored completion's metadata, the one thing about it that can change."""
    metadata = await read_request(request, parse_metadata_update)
    found = await _stored(request).find(completion_id, ChatStore.update, metadata)
    return JsonResponse(found.body)


@router.delete("/{completion_id}")
@described(answer=Deleted)
async def delete_chat_completion(request: Request, completion_id: str) -> Response:
    """Delete a stored completion."""
    await _stored(request).find(completion_id, ChatStore.delete)
    return JsonResponse({"object": "chat.completion.deleted", "id": completion_id, "deleted": True})


@router.get("/{completion_id}/messages")
@described(query=cursor("asc"), answer=PageOf(StoredMessage))
async def list_chat_messages(request: Request, completion_id: str) -> Response:
    """List the messages that a stored completion answered."""
    cursor = read_cursor(request, order="asc")
    found = await _stored(request).find(completion_id, ChatStore.get)
    return JsonResponse(page_of(found.messages, cursor))


def _stored(request: Request) -> Seen[ChatStore]:
    return Seen(services(request).database, ChatStore, _not_found)


def _not_found(completion_id: str) -> NotFoundError:
    return NotFoundError(
        f"Chat completion with id '{completion_id[:200]}' not found. Only completions made with 'store': true are "
        "kept.",
        param="completion_id",
    )
