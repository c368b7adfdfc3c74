"""What surrounds every request, as plain ASGI so that streams and disconnects pass through untouched.

RequestContext      request id, timing headers, access log, request counter, last resort for errors
Draining            refuses new requests when the server is about to end
CORS                only if origins are configured
Authentication      who asks, and whether they may
BodyLimit           counts the body while it comes in
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evermini.api.errors import error_response
from evermini.errors import (
    AuthenticationError,
    EngineStoppedError,
    EverminiError,
    RequestTooLargeError,
)
from evermini.service import tracing
from evermini.service.access import Access
from evermini.service.caller import Caller, current_caller
from evermini.service.metrics import Metrics
from evermini.service.readiness import Readiness

log = structlog.get_logger("evermini.api")

OPENAI_VERSION = "2020-10-01"
EXPOSED_HEADERS = (
    "x-request-id",
    "openai-processing-ms",
    "openai-version",
    "retry-after",
    *(
        f"x-ratelimit-{what}-{unit}"
        for unit in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)
"""Headers that pages from an allowed origin may read."""

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that are asked for every few seconds; they are logged for debugging only."""

INTERNAL = "evermini.internal"
"""Key of an ASGI scope that this process made itself, for a batch; its value is the `Caller`. Nothing that comes in
over a socket has it."""

DISCARD_SECONDS = 5.0
"""How long the rest of a too large body is read and thrown away, so that its sender gets to read the answer."""


class RequestContext:
    """Outermost layer: identifies, times, counts and logs each request, and answers what nobody else answered."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and account for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.perf_counter()
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(arrived=arrived, request_id=request_id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - arrived)))
                headers["openai-version"] = OPENAI_VERSION
            await send(message)

        with _traced(scope) as note, structlog.contextvars.bound_contextvars(**_ids(request_id)):
            try:
                await self._app(scope, receive, send_with_headers)
            except ClientDisconnect:
                pass
            except Exception as error:
                if status:  # the head is out: all that is left is to cut the connection
                    raise
                await error_response(error)(scope, receive, send_with_headers)
            finally:
                note(getattr(scope.get("route"), "path", None), status or 499, request_id)
                self._note(scope, status, arrived)

    def _note(self, scope: Scope, status: int, arrived: float) -> None:
        # A route's pattern, not the path, or every misspelt URL would become a time series.
        route = getattr(scope.get("route"), "path", "unmatched")
        shown = str(status or 499)  # 499: the client left before there was an answer
        self._metrics.http_requests.labels(scope["method"], route, shown).inc()
        client_id = Headers(scope=scope).get("x-client-request-id")
        write = log.debug if scope["path"] in PROBES else log.info
        write(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=int(shown),
            ms=round(1000 * (time.perf_counter() - arrived)),
            **({"key": key_id} if (key_id := scope["state"].get("key_id")) else {}),
            **({"client_request_id": client_id[:512]} if client_id else {}),
        )


def _traced(scope: Scope) -> AbstractContextManager[Callable[[str | None, int, str], None]]:
    """Trace a request, unless a probe sends it."""
    if scope["path"] in PROBES:
        return nullcontext(lambda route, status, request_id: None)
    return tracing.request_span(scope["method"], scope["path"], Headers(scope=scope))


def _ids(request_id: str) -> dict[str, str]:
    """Return what every log line of a request carries."""
    trace_id = tracing.trace_id()
    return {"request_id": request_id, **({"trace_id": trace_id} if trace_id else {})}


class Draining:
    """Refuses what comes in while the server lets running requests finish; probes go on being answered."""

    def __init__(self, app: ASGIApp, *, readiness: Readiness) -> None:
        self._app = app
        self._readiness = readiness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if (
            scope["type"] != "http"
            or not self._readiness.is_draining
            or scope["path"] in PROBES
            or INTERNAL in scope
        ):
            await self._app(scope, receive, send)
            return
        error = EngineStoppedError(
            "The server is shutting down and takes no new requests. Send the request again: another server will "
            "answer, or this one after its restart."
        )
        response = error_response(error)
        response.headers["connection"] = "close"
        await response(scope, receive, send)


class Authentication:
    """Finds out who asks, below ``/v1/``, and whether they may; health and metrics stay open for probes.

    Everything that the request sets off knows its caller from then on (`evermini.service.caller`).
    """

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        request_id: str = scope["state"]["request_id"]
        internal: Caller | None = scope.get(INTERNAL)
        key = None
        if internal is not None:
            caller = replace(internal, request_id=request_id)
        else:
            try:
                key = await self._access.identify(_authorization(Headers(scope=scope)))
                self._access.check_scope(key, scope["path"], scope["method"])
                if scope["method"] == "POST":
                    await self._access.admit(key)
            except EverminiError as error:
                response = error_response(error)
                response.headers.update(self._access.headers(key))
                await response(scope, receive, send)
                return
            caller = Caller(
                request_id=request_id,
                endpoint=scope["path"],
                key_id=key.id if key else None,
                project=key.project if key else "default",
                is_operator=key is None or "admin" in key.scopes,
            )

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and key is not None:
                MutableHeaders(scope=message).update(self._access.headers(key))
            await send(message)

        scope["state"]["key_id"] = caller.key_id
        token = current_caller.set(caller)
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            current_caller.reset(token)


def _authorization(headers: Headers) -> str:
    """Return the one Authorization header; of two, a proxy in front may have checked the other one."""
    given = headers.getlist("authorization")
    if len(given) > 1:
        raise AuthenticationError("There are several Authorization headers. Send one.")
    return given[0] if given else ""


class BodyLimit:
    """Refuses bodies beyond a limit in bytes, by Content-Length at once, without one when the limit is passed.

    Args:
        app: What is protected.
        limit: For most paths.
        by_path: Limits of paths that match, in full, a pattern.
    """

    def __init__(
        self, app: ASGIApp, *, limit: int, by_path: Sequence[tuple[re.Pattern[str], int]] = ()
    ) -> None:
        self._app = app
        self._limit = limit
        self._by_path = by_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a counted body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        matching = [limit for pattern, limit in self._by_path if pattern.fullmatch(path)]
        limit = matching[0] if matching else self._limit
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            await self._refuse(limit, scope, receive, send)
            return
        num_bytes = 0
        passed = False

        async def counted() -> Message:
            nonlocal num_bytes, passed
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit:
                passed = True
                raise _LimitPassed
            return message

        try:
            await self._app(scope, counted, send)
        except _LimitPassed:
            await self._refuse(limit, scope, receive, send)

    async def _refuse(self, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestTooLargeError(
            f"The request body is larger than the {limit} bytes that this server reads here. Send less, send files in "
            "parts (POST /v1/uploads), or ask the server's operator to raise max_request_bytes."
        )
        if "expect" not in Headers(scope=scope):  # who expects 100-continue has not begun to send
            await _discard(receive)
        await error_response(error)(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Read what is left of a body: closing on unread data resets the connection, and with it the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body"):
                pass


class _LimitPassed(Exception):
    """The body passed the limit; no `EverminiError`, so that only `BodyLimit` handles it."""
