"""Request bodies: JSON, whatever its size, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from pydantic_core import from_json
from starlette.requests import Request

from evermini.errors import InvalidRequestError, UnsupportedMediaTypeError

RequestT = TypeVar("RequestT")

INLINE_BYTES = 64 * 1024
"""Bodies up to this size are decoded at once; a larger one goes to a thread."""


async def read_request(request: Request, parse: Callable[[object], RequestT]) -> RequestT:
    """Read the body, decode it and return what ``parse`` makes of it.

    Raises:
        UnsupportedMediaTypeError: The body is not declared as plain JSON. A web page of any origin can send other types
            to a server on localhost without asking first; JSON it cannot.
        InvalidRequestError: It is no JSON, or ``parse`` refuses it.
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
    body = await request.body()

    def decode() -> RequestT:
        try:
            decoded = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise InvalidRequestError(
                f"We could not parse the JSON body of your request: {error}. (HINT: This likely means you aren't using "
                "your HTTP library correctly. This API expects a JSON payload in UTF-8.)"
            ) from None
        return parse(decoded)

    return decode() if len(body) <= INLINE_BYTES else await asyncio.to_thread(decode)
