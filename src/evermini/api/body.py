"""Request bodies: JSON, whatever its size, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import Request

from evermini.api.services import services
from evermini.errors import InvalidRequestError, OverloadedError, UnsupportedMediaTypeError
from evermini.service.decoding import JsonError, decode_json

RequestT = TypeVar("RequestT")

INLINE_BYTES = 64 * 1024
"""Bodies up to this size are decoded at once; a larger one goes to a thread."""
MIN_TOTAL_BYTES = 256 * 1024**2
"""Bodies in memory at the same time may have at least this many bytes together."""


async def read_request(request: Request, parse: Callable[[object], RequestT]) -> RequestT:
    """Read the body, decode it and return what ``parse`` makes of it.

    Raises:
        UnsupportedMediaTypeError: The body is not declared as plain JSON. A web page of any origin can send other types
            to a server on localhost without asking first; JSON it cannot.
        InvalidRequestError: It is no JSON, or ``parse`` refuses it.
        OverloadedError: Others are sending so much that there is no memory for it.
    """
    declared = request.headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    if (
        kind != "application/json"
        or request.headers.get("content-encoding", "identity") != "identity"
    ):
        raise UnsupportedMediaTypeError(
            f"Unsupported content type: '{declared[:100]}'. This API only accepts 'application/json' requests without "
            "content encoding. Please try again with the header 'Content-Type: application/json'.",
            code="unsupported_content_type",
        )
    bodies = services(request).bodies
    async with bodies.reading(request) as body:

        def decode() -> RequestT:
            try:
                decoded = decode_json(body)
            except JsonError as error:
                raise InvalidRequestError(
                    f"We could not parse the JSON body of your request: {error.message}. (HINT: This likely means you "
                    "aren't using your HTTP library correctly. This API expects a JSON payload in UTF-8.)"
                ) from None
            return parse(decoded)

        if len(body) <= INLINE_BYTES:
            return decode()
        async with bodies.decoding:
            return await asyncio.to_thread(decode)


class Bodies:
    """The request bodies that are in memory, all together within a bound, however many clients send at once.

    Args:
        limit: Longest body, in bytes.

    Attributes:
        decoding: Held while a large body is decoded, which takes several times its size.
    """

    def __init__(self, limit: int) -> None:
        self.decoding = asyncio.Semaphore(2)
        self._left = max(MIN_TOTAL_BYTES, 4 * limit)

    @asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[bytes]:
        """Give a request's body; its memory counts until the block ends.

        Raises:
            OverloadedError: There is no room for it now.
        """
        taken = 0
        chunks = bytearray()
        try:
            async for chunk in request.stream():
                if len(chunk) > self._left:
                    raise OverloadedError(
                        "The server is receiving too many large requests at the same time. Send this one again."
                    )
                self._left -= len(chunk)
                taken += len(chunk)
                chunks += chunk
            yield bytes(chunks)
        finally:
            self._left += taken
