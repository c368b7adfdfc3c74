"""Connections with bounds: nobody holds one, or this process's memory, by being slow or endless.

    uvicorn.Server(server_config(app, lifespan="on"))

head        `HEAD_SECONDS` from its first byte on, `MAX_HEAD_BYTES`
body        `BODY_SECONDS`, and one more for every `BODY_BYTES_PER_SECOND` that have come; our own pauses do not count
response    a client that takes none of it for `WRITE_SECONDS` is cut off
idle        uvicorn's keep-alive timeout
number      `connection_limit`; beyond it the connection goes that has waited longest for a request to be complete

How large a body may be is `evermini.api.middleware.BodyLimit`'s matter.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog
import uvicorn
from pydantic_core import to_json
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from evermini.errors import EverminiError, InvalidRequestError, OverloadedError

log = structlog.get_logger("evermini.api")

HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
BODY_BYTES_PER_SECOND = 1024
WRITE_SECONDS = 60.0
CLOSE_SECONDS = 10.0
"""What a client gets to take the end of a response when the connection is closed."""
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 8192
CHECK_SECONDS = 1.0
_SPARE_FILES = 256
"""File descriptors that are not for connections: database, files, weights."""


class RequestTimeoutError(InvalidRequestError):
    """The request did not come in time."""

    status = 408
    default_code = "request_timeout"


class HeadTooLargeError(InvalidRequestError):
    """The request's URL and headers are too long."""

    status = 431
    default_code = "headers_too_large"


def server_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for the application; ``options`` are uvicorn's."""
    return uvicorn.Config(app, http=BoundedProtocol, ws="none", server_header=False, **options)


def connection_limit() -> int:
    """Return how many connections this process may have; raises its limit of open files as far as it may."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(16, min(MAX_CONNECTIONS, soft - _SPARE_FILES))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with the bounds above, and errors in the contract's shape."""

    limit: int | None = None
    """How many connections there may be, over all; found out with the first one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._body_bytes = 0
        self._steps = (
            0  # heads, pieces of bodies and ends of messages that the parser has made of what came
        )
        self._bytes_since_step = 0
        self._write_since: float | None = None
        self._closing_since: float | None = None
        self._watch: asyncio.TimerHandle | None = None

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and make room for it where there are too many."""
        super().connection_made(transport)
        self._head_since = time.monotonic()
        self._watch = self.loop.call_later(CHECK_SECONDS, self._check)
        if BoundedProtocol.limit is None:
            BoundedProtocol.limit = connection_limit()
        if len(self.connections) > BoundedProtocol.limit:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the watch over it."""
        super().connection_lost(exc)
        if self._watch is not None:
            self._watch.cancel()

    def data_received(self, data: bytes) -> None:
        """Take what has come, unless it is the rest of an endless head."""
        if self.transport.is_closing():
            return
        steps = self._steps
        super().data_received(data)
        if self._steps != steps:
            self._bytes_since_step = 0
            return
        # It was only a part of a head, or of what may follow a chunked body; the parser keeps it until the rest comes.
        self._bytes_since_step += len(data)
        if self._bytes_since_step > MAX_HEAD_BYTES:
            self.refuse(
                HeadTooLargeError(
                    f"The request's URL and headers are longer than {MAX_HEAD_BYTES} bytes. Send long values in the "
                    "body."
                )
            )

    def pause_writing(self) -> None:
        """Note that the client is slower than the response."""
        super().pause_writing()
        self._write_since = time.monotonic()

    def resume_writing(self) -> None:
        """Note that it has taken some."""
        super().resume_writing()
        self._write_since = None

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of the head."""
        self._head_since = self._head_since or time.monotonic()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; those that follow a body mean nothing here."""
        if self._body_since is None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to wait for the body."""
        self._steps += 1
        self._head_since = None
        self._body_since, self._body_bytes = time.monotonic(), 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._steps += 1
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop waiting for the body."""
        self._steps += 1
        self._body_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self.refuse(
            InvalidRequestError(
                f"{msg} This server speaks HTTP/1.1; behind TLS a reverse proxy has to stand in front of it."
            )
        )

    # Bounds

    def refuse(self, error: EverminiError) -> None:
        """Answer with an error, if no answer has begun, and close the connection."""
        if self.transport.is_closing():
            return
        log.warning(
            "connection_refused", status=error.status, client=self.client and self.client[0]
        )
        if self._can_answer():
            body = to_json(error.to_wire())
            headers = (
                b"content-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n" % len(body)
            )
            self.transport.write(STATUS_LINE[error.status] + headers + body)
        if self._is_at_work():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _can_answer(self) -> bool:
        """Return whether what is written now is the answer to the request that is coming in."""
        if self.pipeline:
            return False
        if self._is_at_work():
            return not self.cycle.response_started
        return self._head_since is not None

    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _check(self) -> None:
        self._watch = self.loop.call_later(CHECK_SECONDS, self._check)
        now = time.monotonic()
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now > self._closing_since + CLOSE_SECONDS:
                self.transport.abort()
        elif self._write_since is not None and now > self._write_since + WRITE_SECONDS:
            self.transport.abort()
        elif self._head_since is not None:
            if now > self._head_since + HEAD_SECONDS:
                self.refuse(_too_slow("headers", HEAD_SECONDS))
        elif self._body_since is not None:
            if self.flow.read_paused or self.cycle.waiting_for_100_continue:
                self._body_since += CHECK_SECONDS  # it is this server that keeps the client waiting
            allowed = BODY_SECONDS + self._body_bytes / BODY_BYTES_PER_SECOND
            if now > self._body_since + allowed:
                self.refuse(_too_slow("body", allowed))
        elif self.timeout_keep_alive_task is None and not self._is_at_work():
            self.transport.close()  # bytes between two requests that begin none

    def _make_room(self) -> None:
        """Close the connection that has waited longest for a request to be complete; this one, if all are at work."""
        waiting = [
            (since, index, one)
            for index, one in enumerate(self.connections)
            if isinstance(one, BoundedProtocol)
            and one is not self
            and not one.transport.is_closing()
            and (since := one._idle_since()) is not None
        ]
        chosen = min(waiting)[2] if waiting else self
        chosen.refuse(
            OverloadedError("The server has too many connections. Send the request again.")
        )

    def _idle_since(self) -> float | None:
        if self._head_since is not None:
            return self._head_since
        return self._body_since if self._is_at_work() else 0.0  # kept alive for a next request


def _too_slow(what: str, seconds: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"The request's {what} did not arrive within {seconds:.0f} s. Send it again, over a faster connection."
    )
