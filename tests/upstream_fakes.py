"""An engine behind a model that does what a test says: on time or not, in form or not, to the end or not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evermini.backends.spec import UpstreamSpec
from evermini.config import Settings
from evermini.service.runtime import Runtime
from evermini.service.upstream.load import connect
from evermini.service.upstream.model import UpstreamModel
from tests.serving import serve_app, serving

Json = dict[str, Any]
NAME = "behind"
ASIDE = ("/model_info", "/get_model_info", "/api/show")
FOREVER = "forever"
"""In a stream: nothing more comes, and the connection stays open until the other side leaves."""
CUT = "cut"
"""In a stream: the connection breaks."""


@dataclass
class FakeEngine:
    """Answers with ``answer``, which is set by the test.

    Attributes:
        answer: The request's body -> a response, or the pieces of a stream.
        models: What ``/v1/models`` lists.
        props: What llama-server tells under ``/props``.
        told: What other engines tell under paths of their own, such as ``/model_info``.
        asked: Every request: path, headers, body.
        num_left: Streams that the other side has left.
    """

    answer: Callable[[Json], Response | list[Any]] = lambda body: Response(status_code=500)
    models: list[Json] = field(default_factory=lambda: [{"id": "theirs"}])
    props: Json | None = None
    told: dict[str, Json] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], Json]] = field(default_factory=list)
    num_left: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        raw = await request.body()
        path = scope["path"]
        self.asked.append((path, dict(request.headers), json.loads(raw) if raw else {}))
        if path == "/v1/models":
            answer: Response | list[Any] = json_response({"data": self.models})
        elif path == "/props":
            answer = Response(status_code=404) if self.props is None else json_response(self.props)
        elif path in ASIDE:
            told = self.told.get(path)
            answer = Response(status_code=404) if told is None else json_response(told)
        else:
            answer = self.answer(self.asked[-1][2])
        if isinstance(answer, Response):
            await answer(scope, receive, send)
        else:
            await self._stream(answer, receive, send)

    async def _stream(self, pieces: list[Any], receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            if piece == CUT:
                raise RuntimeError("cut on purpose")  # uvicorn closes the connection
            if piece == FOREVER:
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.num_left += 1
                return
            data = piece if isinstance(piece, str) else json.dumps(piece)
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_response(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(body), status, media_type="application/json")


def refused(status: int, **error: Any) -> Callable[[Json], Response]:
    return lambda body: json_response({"error": error}, status)


def chunk(finish_reason: str | None = None, **delta: Any) -> Json:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def whole(finish_reason: str = "stop", **message: Any) -> Json:
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    return {"choices": [choice], "usage": usage}


@contextmanager
def fake_engine() -> Iterator[tuple[FakeEngine, str]]:
    """Serve a fake; yield it and its base URL."""
    engine = FakeEngine()
    with serve_app(engine) as url:
        yield engine, f"{url}/v1"


@contextmanager
def behind(
    base_url: str, *, spec: Json | None = None, **settings: Any
) -> Iterator[tuple[str, UpstreamModel]]:
    """Serve a model that an engine runs; yield the server's URL and the model."""
    served = connect(UpstreamSpec(NAME, base_url, **(spec or {})), Settings(**settings))
    with Runtime([served]) as runtime, serving(runtime) as url:
        yield url, served


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece
