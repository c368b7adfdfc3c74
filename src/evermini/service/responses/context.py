"""What a response's input continues: earlier responses, a conversation, items that are stored already."""

from __future__ import annotations

from evermini.errors import InvalidRequestError, NotFoundError
from evermini.service.offload import tokenise
from evermini.service.responses.items import ITEM_CHARACTERS, Json, parse_items
from evermini.service.responses.schemas import ContextRequest
from evermini.service.seen import Seen
from evermini.storage.conversations import ConversationStore
from evermini.storage.database import Database
from evermini.storage.responses import ResponseStore


class Contexts:
    """Reads contexts from the database: those that the caller sees."""

    def __init__(self, database: Database) -> None:
        self._conversations = Seen(database, ConversationStore, no_conversation)
        self._responses = Seen(database, ResponseStore, no_response)

    async def items(self, request: ContextRequest) -> list[Json]:
        """Return the request's own input, each item with an id; references are replaced by what they refer to.

        Raises:
            InvalidRequestError: An item is malformed, or refers to nothing.
        """
        if request.input is None:
            return []
        size = ITEM_CHARACTERS * len(request.input) if isinstance(request.input, list) else 0
        items = await tokenise(size, parse_items, request.input, "input")
        return await self.resolve(items, "input")

    async def resolve(self, items: list[Json], path: str) -> list[Json]:
        """Return items with references replaced by what they refer to.

        Raises:
            NotFoundError: One refers to nothing.
        """
        resolved = []
        for number, item in enumerate(items):
            if item["type"] == "item_reference":
                found = await self._responses.ask(ResponseStore.find_item, item["id"])
                if found is None:
                    raise NotFoundError(
                        f"Item with id '{item['id']}' not found. Items are kept with stored responses and "
                        "conversations.",
                        param=f"{path}[{number}].id",
                    )
                item = found
            resolved.append(item)
        return resolved

    async def history(self, request: ContextRequest) -> list[Json]:
        """Return the items that come before the request's own, oldest first.

        Raises:
            InvalidRequestError: An earlier response cannot be continued.
            NotFoundError: The conversation does not exist.
        """
        if request.conversation is not None:
            return await self._of_conversation(request.conversation.id)
        if request.previous_response_id is not None:
            return await self._of_responses(request.previous_response_id)
        return []

    async def _of_conversation(self, conversation_id: str) -> list[Json]:
        return await self._conversations.find(conversation_id, ConversationStore.items)

    async def _of_responses(self, last_id: str) -> list[Json]:
        chain = await self._responses.ask(ResponseStore.chain, last_id)
        missing = last_id if not chain else chain[0].body["previous_response_id"]
        if missing is not None:
            raise InvalidRequestError(
                f"Previous response with id '{missing[:100]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        for link in chain:
            if not link.is_finished:
                raise InvalidRequestError(
                    f"Previous response with id '{link.id}' is not finished: its status is '{link.body['status']}'. "
                    "Wait for it, or cancel it.",
                    param="previous_response_id",
                )
            if link.body["conversation"] is not None:
                raise InvalidRequestError(
                    f"Previous response with id '{link.id}' belongs to a conversation. Continue that one: "
                    f"'conversation': '{link.body['conversation']['id']}'.",
                    param="previous_response_id",
                )
        return [item for link in chain for item in (*link.items, *link.body["output"])]


def no_conversation(conversation_id: str) -> NotFoundError:
    """Return the error for a conversation that does not exist."""
    return NotFoundError(
        f"Conversation with id '{conversation_id[:100]}' not found.", param="conversation"
    )


def no_response(response_id: str) -> NotFoundError:
    """Return the error for a response that is not stored."""
    return NotFoundError(
        f"Response with id '{response_id[:100]}' not found. Responses made with store=false are not kept.",
        param="response_id",
    )
