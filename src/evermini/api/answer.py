"""How every generating endpoint answers: as a stream of events or whole, and ended if nobody listens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.errors import JsonResponse


class Run(Protocol):
    """A generation in flight."""

    def abort(self) -> None:
        """End it if it still runs."""


async def stream_or_collect(
    request: Request,
    run: Run,
    *,
    stream: bool | None,
    events: AsyncGenerator[bytes, None],
    whole: Coroutine[Any, Any, dict[str, Any]],
) -> Response:
    """Return the response; ``run`` is aborted when it has been sent, or when the client leaves.

    Args:
        request: The HTTP request.
        run: What is in flight.
        stream: Which of the two is wanted; the other is closed unused.
        events: The stream's events.
        whole: Gives the whole answer's body.
    """
    if stream:
        whole.close()
        return sse.EventStream(events, run.abort)
    try:
        return JsonResponse(await sse.unless_disconnected(request, whole))
    finally:
        run.abort()
