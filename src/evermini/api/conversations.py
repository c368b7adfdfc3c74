"""``/v1/conversations`` and their items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, SkipValidation
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.body import read_request
from evermini.api.description import PageOf, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import list_object, no_such_cursor, read_cursor
from evermini.api.services import services
from evermini.errors import NotFoundError
from evermini.service import validation
from evermini.service.caller import current_caller
from evermini.service.responses.context import no_conversation
from evermini.service.responses.items import InputItem, new_id, parse_items
from evermini.service.responses.shapes import ConversationAnswer, Item
from evermini.service.schemas import Metadata, MetadataUpdate, parse_metadata_update
from evermini.service.seen import Seen
from evermini.service.shapes import Deleted
from evermini.service.validation import WireModel
from evermini.storage.conversations import ConversationStore, StoredConversation

router = APIRouter(prefix="/v1/conversations")

MAX_ITEMS = 20
"""Items that one request may add."""

# `parse_items` checks them.
Items = Annotated[list[SkipValidation[InputItem]], Field(max_length=MAX_ITEMS)]


class NewConversation(WireModel):
    """A conversation that is to be created."""

    items: Items | None = None
    metadata: Metadata | None = None


class NewItems(WireModel):
    """Items that are to be added."""

    items: Annotated[Items, Field(min_length=1)]


@router.post("")
@described(body=NewConversation, answer=ConversationAnswer)
async def create_conversation(request: Request) -> Response:
    """Create a conversation, with items or without."""
    wanted = await read_request(request, lambda body: validation.parse(NewConversation, body))
    items = await _resolved(request, wanted.items or [])
    made = await _stored(request).ask(
        ConversationStore.add,
        new_id("conv"),
        wanted.metadata or {},
        items,
        current_caller.get().project,
    )
    return JsonResponse(conversation_object(made))


@router.get("/{conversation_id}")
@described(answer=ConversationAnswer)
async def retrieve_conversation(request: Request, conversation_id: str) -> Response:
    """Return a conversation."""
    found = await _stored(request).find(conversation_id, ConversationStore.get)
    return JsonResponse(conversation_object(found))


@router.post("/{conversation_id}")
@described(body=MetadataUpdate, answer=ConversationAnswer)
async def update_conversation(request: Request, conversation_id: str) -> Response:
    """Replace a conversation's metadata."""
    metadata = await read_request(request, parse_metadata_update)
    changed = await _stored(request).find(conversation_id, ConversationStore.update, metadata)
    return JsonResponse(conversation_object(changed))


@router.delete("/{conversation_id}")
@described(answer=Deleted)
async def delete_conversation(request: Request, conversation_id: str) -> Response:
    """Delete a conversation and its items; responses that belong to it stay."""
    await _stored(request).find(conversation_id, ConversationStore.delete)
    return JsonResponse({"id": conversation_id, "object": "conversation.deleted", "deleted": True})


@router.post("/{conversation_id}/items")
@described(body=NewItems, answer=PageOf(Item))
async def create_items(request: Request, conversation_id: str) -> Response:
    """Add items at the end."""
    wanted = await read_request(request, lambda body: validation.parse(NewItems, body))
    items = await _resolved(request, wanted.items)
    added = await _stored(request).find(conversation_id, ConversationStore.append, items)
    return JsonResponse(list_object(added, has_more=False))


@router.get("/{conversation_id}/items")
@described(query=cursor("desc"), answer=PageOf(Item))
async def list_items(request: Request, conversation_id: str) -> Response:
    """List the items, the newest first unless said otherwise."""
    cursor = read_cursor(request, order="desc")
    try:
        found = await _stored(request).find(conversation_id, ConversationStore.list, cursor)
    except KeyError:
        raise no_such_cursor(cursor) from None
    return JsonResponse(list_object(found.rows, found.has_more))


@router.get("/{conversation_id}/items/{item_id}")
@described(answer=Item)
async def retrieve_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Return an item."""
    item = await _stored(request).ask(ConversationStore.get_item, conversation_id, item_id)
    if item is None:
        raise _no_item(conversation_id, item_id)
    return JsonResponse(item)


@router.delete("/{conversation_id}/items/{item_id}")
@described(answer=ConversationAnswer)
async def delete_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Delete an item and return its conversation."""
    try:
        left = await _stored(request).find(conversation_id, ConversationStore.delete_item, item_id)
    except KeyError:
        raise _no_item(conversation_id, item_id) from None
    return JsonResponse(conversation_object(left))


def conversation_object(stored: StoredConversation) -> dict[str, Any]:
    """Return the contract's conversation object."""
    return {
        "id": stored.id,
        "object": "conversation",
        "created_at": stored.created_at,
        "metadata": stored.metadata,
    }


def _stored(request: Request) -> Seen[ConversationStore]:
    return Seen(services(request).database, ConversationStore, no_conversation)


async def _resolved(request: Request, items: Sequence[InputItem]) -> list[dict[str, Any]]:
    return await services(request).responses.contexts.resolve(parse_items(items, "items"), "items")


def _no_item(conversation_id: str, item_id: str) -> NotFoundError:
    return NotFoundError(
        f"Item with id '{item_id[:100]}' not found in conversation '{conversation_id[:100]}'.",
        param="item_id",
    )
