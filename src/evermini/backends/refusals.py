"""What an upstream engine's errors are here: its refusals stay refusals, its failures and absence say so."""

from __future__ import annotations

import json
import re
from typing import Any

from evermini.errors import (
    ContextLengthError,
    EverminiError,
    InvalidRequestError,
    OverloadedError,
    RequestTooLargeError,
    UnsupportedParameterError,
    UpstreamError,
    UpstreamUnavailableError,
)

_TOO_LONG = re.compile(
    r"context (length|size|window)|maximum (model |input |prompt )?(length|tokens)|longer than the model",
    re.IGNORECASE,
)
"""What engines say of prompts that are too long and have no code for it."""
_BLIND = re.compile(
    r"not a multimodal model|image input is not supported|(does not|doesn't|not) support (image|vision|multimodal)",
    re.IGNORECASE,
)
"""What engines say to images whose model reads text only; llama-server with the status of a failure."""
_TOO_LONG_KINDS = {"context_length_exceeded", "exceed_context_size_error"}
_SHOWN_CHARS = 2000


def refusal(status: int, content: bytes, *, path: str) -> EverminiError:
    """Return the error for a response that is none.

    Args:
        status: The response's HTTP status.
        content: Its body.
        path: What was asked, such as ``/chat/completions``.
    """
    error = _error_of(content)
    message = str(error.get("message") or "no reason given")[:_SHOWN_CHARS]
    param, code = (
        error[key] if isinstance(error.get(key), str) else None for key in ("param", "code")
    )
    said = f"The engine behind this model refuses the request: {message}"
    match status:
        case 400 | 422 | 500 if _BLIND.search(message):
            return UnsupportedParameterError(
                f"{said}. Leave the images out; its operator can start the engine with a model that sees (llama-server "
                "with --mmproj), or have images read here and sent as text with ?images=no.",
                param="messages",
            )
        case 400 | 422 if {code, error.get("type")} & _TOO_LONG_KINDS or _TOO_LONG.search(message):
            return ContextLengthError(said, param=param)
        case 400 | 422:
            return InvalidRequestError(said, param=param, code=code)
        case 401 | 403:
            return UpstreamError(
                "The engine behind this model refuses this server's key. Its operator sets it with upstream_key."
            )
        case 404 if "model" in message.lower():
            return UpstreamError(
                f"The engine behind this model does not have it: {message}. Its operator names it with ?model=NAME."
            )
        case 404 | 405 | 501:
            return UnsupportedParameterError(
                f"The engine behind this model does not serve {path}: {message}"
            )
        case 413:
            return RequestTooLargeError(said)
        case 429:
            return OverloadedError(f"The engine behind this model is busy: {message}")
        case 503:
            return UpstreamUnavailableError(
                f"The engine behind this model is not ready: {message}. Try again later."
            )
    return UpstreamError(
        f"The engine behind this model failed with status {status}. Send the request again; if that fails too, the "
        "log tells more."
    )


def failure_in_stream(data: dict[str, Any]) -> EverminiError | None:
    """Return the error that an event of a stream tells of, if it does."""
    error = data.get("error")
    if not error:
        return None
    status = error.get("code") if isinstance(error, dict) else None
    if status in (400, 422, 429, 503):
        return refusal(status, json.dumps(data).encode(), path="streams")
    return UpstreamError(
        "The engine behind this model failed in the middle of the answer. Send the request again; if that fails too, "
        "the log tells more."
    )


def _error_of(content: bytes) -> dict[str, Any]:
    """Return the error's fields, in whichever of the usual forms they come."""
    try:
        body = json.loads(content)
    except ValueError:
        return {"message": content.decode("utf-8", "replace").strip()}
    if not isinstance(body, dict):
        return {"message": str(body)}
    error = body.get("error", body)
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    return error if "message" in error else {**error, "message": error.get("detail")}
