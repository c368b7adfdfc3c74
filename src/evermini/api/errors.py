"""Every failure in OpenAI's shape: ``{"error": {message, type, param, code}}``, all four keys, no internals."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from evermini.errors import (
    AdapterError,
    AuthenticationError,
    EngineError,
    EngineStoppedError,
    EverminiError,
    InsufficientStorageError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    QuotaError,
    RateLimitError,
    RequestError,
    RequestTooLargeError,
    StorageError,
    UpstreamError,
    UpstreamUnavailableError,
)

log = structlog.get_logger("evermini.api")

RETRY_SECONDS = 1
"""What ``retry-after`` says when the engine is full or restarting, or the database locked."""


class JsonResponse(Response):
    """JSON, serialised in compiled code: the event loop also streams everybody else's tokens."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return ``content`` as UTF-8 JSON."""
        return to_json(content)


class MethodNotAllowedError(InvalidRequestError):
    """The route exists, but not for this method."""

    status = 405
    default_code = "method_not_supported"


def public(error: Exception) -> EverminiError:
    """Return what a client may know of ``error``; what it may not know is logged.

    Engine failures carry the exception's text, and anything that is not an `EverminiError` is a bug of ours: clients
    get a plain sentence and the request id to ask about.
    """
    if isinstance(error, RequestError | EngineStoppedError | UpstreamError):
        return error
    if isinstance(error, InsufficientStorageError):
        log.error("storage_full", error=error.message)
        return error
    if isinstance(error, StorageError):
        log.error("storage_error", error=error.message)
        return StorageError(
            "The server's storage cannot be used at the moment, so nothing was stored. Send the request again; if "
            "that fails too, the server's log tells the cause under this request's id."
        )
    if isinstance(error, EngineError):
        log.error("engine_error", error=error.message)
        return EngineError(
            "The model failed while computing this request, so it was ended. Send it again; if that fails too, the "
            "server's log tells the cause under this request's id."
        )
    if isinstance(error, AdapterError):  # says what does not fit, and nothing of this machine
        log.error("adapter_error", error=error.message)
        return error
    # As text: renderers that show local variables would write prompts into the log, and take seconds over it.
    log.error("unexpected_error", exception="".join(traceback.format_exception(error)))
    return EverminiError(
        "The server had an error while processing your request. Sorry about that! The server's log tells the cause "
        "under this request's id."
    )


def error_response(error: Exception) -> JsonResponse:
    """Return the response for any exception."""
    shown = public(error)
    headers = {}
    if isinstance(shown, InsufficientStorageError | AdapterError):
        headers["x-should-retry"] = "false"  # it would fail again
    elif isinstance(
        shown, OverloadedError | EngineStoppedError | StorageError | UpstreamUnavailableError
    ):
        headers["retry-after"] = str(RETRY_SECONDS)
    elif isinstance(shown, RateLimitError):
        headers["retry-after"] = str(math.ceil(shown.retry_after))
        headers["retry-after-ms"] = str(math.ceil(1000 * shown.retry_after))
    elif isinstance(shown, QuotaError):
        headers["x-should-retry"] = "false"
    elif isinstance(shown, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    elif isinstance(shown, RequestTooLargeError):
        headers["connection"] = "close"  # the rest of the body is not read
    return JsonResponse(shown.to_wire(), status_code=shown.status, headers=headers)


def _methods(request: Request, routes: Sequence[Route]) -> set[str]:
    """Return the methods that a path has, of all its routes; one without parameters comes before others."""
    found = [route for route in routes if route.matches(request.scope)[0] != Match.NONE]
    exact = [route for route in found if route.path == request.url.path]
    return {method for route in exact or found for method in route.methods or ()}


def _hint(path: str, routes: Sequence[Route]) -> str:
    """Return what was probably meant by a path that does not exist."""
    for meant in (path.rstrip("/"), f"/v1{path.rstrip('/')}", path.replace("/v1/v1/", "/v1/")):
        if meant != path and any(route.path_regex.match(meant) for route in routes):
            return f". Did you mean {meant}? The base_url of OpenAI's clients ends in /v1 here."
    return ""


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Answer every error of the routers' routes in OpenAI's shape."""
    routes = [route for router in routers for route in router.routes if isinstance(route, Route)]

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            response = error_response(
                MethodNotAllowedError(
                    f"Not allowed to {request.method} on {request.url.path}. (HINT: Perhaps you meant to use a "
                    "different HTTP method?)"
                )
            )
        elif error.status_code == 404:
            hint = _hint(request.url.path, routes)
            response = error_response(
                NotFoundError(f"Invalid URL ({request.method} {request.url.path}){hint}")
            )
        else:
            response = error_response(error)
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the router knows the first route of that path alone
            response.headers["allow"] = ", ".join(sorted(_methods(request, routes)))
        return response

    app.add_exception_handler(EverminiError, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
