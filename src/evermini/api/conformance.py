"""What OpenAI's own client tests need of a server, for ``evermini serve --conformance-fixtures``.

These tests were written for a mock: they name models that are not here, leave out required fields, ask for pages of no
length, and use ids that nobody has created. With the option

- every model name is answered to (`Runtime`),
- the ids below exist, and again after they were deleted,
- ``model`` and ``input`` are filled in where a body has none, answers are short unless a length is asked for, and
  ``limit=0`` and ``page=page`` count as not given,
- an upload announced with no bytes has one, and the MD5 checksum "md5" stands for the right one.

Nothing else is different: what the server does not support is refused as ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

from pydantic_core import from_json, to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evermini.api.conformance_tuning import seed_tunings
from evermini.service.answer import ChatDelta
from evermini.service.batches.requests import new_batch, parse_batch
from evermini.service.generation import Usage
from evermini.service.responses.events import EventWriter
from evermini.service.responses.items import Json, parse_items
from evermini.service.responses.run import new_body
from evermini.service.responses.schemas import parse_response
from evermini.storage.adapters import AdapterTable, ModelAlias
from evermini.storage.batches import BatchRow, BatchStore
from evermini.storage.blobs import BlobStore
from evermini.storage.chats import ChatStore
from evermini.storage.conversations import ConversationStore
from evermini.storage.database import Database
from evermini.storage.files import FileStore, Piece, StoredFile, UploadPartRow, UploadRow
from evermini.storage.responses import ResponseStore, StoredResponse

RESPONSES = ("resp_677efb5139a88190b512bc3fef8e535d", "resp_123", "response_id")
COMPLETIONS = ("completion_id", "after")
CONVERSATION = "conv_123"
FINE_TUNED = "ft:gpt-4o-mini:acemeco:suffix:abc123"
ITEMS = ("msg_abc", "after")
FILES = {
    "file_id": "assistants",
    "input_file_id": "batch",
    "after": "assistants",
    "string": "batch",
}
"""Id -> purpose. Clients before 3.0 call most things ``string``."""
BATCHES = ("batch_id", "after", "string")
UPLOAD = "upload_abc123"
PART = "string"

_DATA = b"Example data"
_USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=0)
_PLACEHOLDERS = {("limit", "0"), ("page", "page")}
_DEFAULTS: Mapping[str, Json] = {
    "/v1/chat/completions": {"max_completion_tokens": 16},
    "/v1/responses": {"model": "model", "input": "string", "max_output_tokens": 16},
    "/v1/responses/input_tokens": {"model": "model", "input": "string"},
    "/v1/uploads": {},
    f"/v1/uploads/{UPLOAD}/complete": {},
}


class ConformanceFixtures:
    """Middleware that makes the mock's world true before each request."""

    def __init__(self, app: ASGIApp, *, database: Database, blobs: BlobStore) -> None:
        self._app = app
        self._database = database
        self._blobs = blobs
        self._seeding = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with self._seeding:
            await self._database.run(seed, self._database, self._blobs)
            if scope["path"].startswith("/v1/uploads/"):
                has_part = not scope["path"].endswith("/parts")
                await self._database.run(_reset_upload, self._database, self._blobs, has_part)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        kept = [pair for pair in query if pair not in _PLACEHOLDERS]
        defaults = _DEFAULTS.get(scope["path"]) if scope["method"] == "POST" else None
        if defaults is not None:
            receive = await _with_defaults(receive, defaults)
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
            scope = {**scope, "headers": headers}
        await self._app({**scope, "query_string": urlencode(kept).encode()}, receive, send)


async def _with_defaults(receive: Receive, defaults: Json) -> Receive:
    """Read the body, add what it lacks, and return what gives it again."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    given = from_json(body) if body else {}
    if "max_tokens" in given:  # the older name of what is filled in
        defaults = {}
    if given.get("bytes") == 0:
        given["bytes"] = 1
    if given.get("md5") == "md5":
        given["md5"] = hashlib.md5(_DATA, usedforsecurity=False).hexdigest()
    body = to_json({**defaults, **given})
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def seed(database: Database, blobs: BlobStore) -> None:
    """Create what does not exist of the objects that the tests ask for."""
    chats, conversations = ChatStore(database), ConversationStore(database)
    responses = ResponseStore(database)
    adapters = AdapterTable(database)
    if adapters.alias(FINE_TUNED) is None:
        adapters.set_alias(ModelAlias(FINE_TUNED, "mini", int(time.time())))
    for completion_id in COMPLETIONS:
        if chats.get(completion_id) is None:
            chats.add(_completion(completion_id), _messages(), {"foo": "string"})
    if conversations.get(CONVERSATION) is None:
        conversations.add(CONVERSATION, {}, [])
    for item_id in ITEMS:
        if conversations.get_item(CONVERSATION, item_id) is None:
            conversations.append(CONVERSATION, [_item(item_id)])
    for response_id in RESPONSES:
        if responses.get(response_id) is None:
            stored, events = _response(response_id)
            responses.add(stored, events=events)
    seed_tunings(database)
    now, files = int(time.time()), FileStore(database)
    for file_id, purpose in FILES.items():
        if files.get(file_id, now) is None:
            pieces = (_piece(blobs),)
            size = pieces[0].num_bytes
            files.add(StoredFile(file_id, "file.jsonl", purpose, size, now, None, pieces))
    batches = BatchStore(database)
    for batch_id in BATCHES:
        if batches.get(batch_id) is None:
            _add_batch(database, batch_id)


def _piece(blobs: BlobStore) -> Piece:
    writer = blobs.create()
    writer.write(_DATA)
    writer.close()
    return Piece(writer.name, writer.num_bytes)


def _add_batch(database: Database, batch_id: str) -> None:
    """Add a batch that nobody will work on, and that may be cancelled again."""
    wanted = parse_batch(
        {
            "input_file_id": "input_file_id",
            "endpoint": "/v1/responses",
            "completion_window": "24h",
        }
    )
    status = {"id": batch_id, "status": "cancelled", "cancelled_at": int(time.time())}
    body = {**new_batch(wanted, "input_file_id"), **status}
    with database.writing() as session:
        session.add(BatchRow(id=batch_id, status="cancelled", body=body))


def _reset_upload(database: Database, blobs: BlobStore, has_part: bool) -> None:
    """Make the upload pending again: with all of its bytes, or none, which is what another part can be added to."""
    piece = _piece(blobs)
    now = int(time.time())
    with database.writing() as session:
        for old in session.query(UploadRow).filter_by(id=UPLOAD).all():
            session.delete(old)
        session.flush()
        part = UploadPartRow(id=PART, blob=piece.blob, num_bytes=piece.num_bytes)
        session.add(
            UploadRow(
                id=UPLOAD,
                filename="file.jsonl",
                purpose="assistants",
                num_bytes=piece.num_bytes,
                created_at=now,
                expires_at=now + 3600,
                status="pending",
                parts=[part] if has_part else [],
            )
        )


def _item(item_id: str) -> Json:
    (item,) = parse_items([{"role": "user", "content": "string", "id": item_id}], "input")
    return item


def _messages() -> list[Json]:
    # The client's type of stored messages knows no other role; real ones have it, as OpenAI's do.
    message: Json = {
        "role": "assistant",
        "content": "string",
        "refusal": None,
        "content_parts": None,
    }
    return [{"id": name, **message} for name in ("completion_id-0", "after")]


def _completion(completion_id: str) -> Json:
    message: Json = {"role": "assistant", "content": "string", "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "model",
        "choices": [choice],
        "usage": usage,
    }


def _response(response_id: str) -> tuple[StoredResponse, list[Json]]:
    """Return a finished background stream and its events."""
    given = {"model": "model", "input": "string", "background": True, "stream": True}
    body = {**new_body(parse_response(given), "model", "queued"), "id": response_id}
    writer = EventWriter(body, None)
    events = [writer.snapshot("response.created"), *writer.started()]
    events += writer.add(ChatDelta(0, "string"))
    events += writer.finish("stop", _USAGE)
    events.append(writer.terminal())
    return StoredResponse(body, [_item("after"), _item("msg_abc")], given, True), events
