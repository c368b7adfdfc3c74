"""The input file of a batch: which lines it has, and what is wrong with them.

A line that is no request fails the whole batch, with all such lines named at once; a request that the endpoint refuses
fails alone, when it is its turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from evermini.service.decoding import JsonError, decode_json

MAX_LINES = 50_000
MAX_ERRORS = 100
"""Errors that are listed; a file of another format has one per line."""
MAX_LINE_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Line:
    """One request.

    Attributes:
        number: Counts the requests from 0.
        start: Where the line begins in the file.
        end: Where it ends.
        custom_id: What its sender calls it.
        prefix: Equal for requests whose prompts begin alike.
    """

    number: int
    start: int
    end: int
    custom_id: str
    prefix: bytes


@dataclass(frozen=True)
class Input:
    """What a file holds: requests, or errors in the contract's shape."""

    lines: list[Line]
    errors: list[dict[str, Any]]
    model: str | None


def read_input(file: IO[bytes], endpoint: str) -> Input:
    """Check every line of a batch's input. Blank lines are skipped.

    Args:
        file: The input, at its beginning.
        endpoint: Where the batch says its requests go.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    ids: dict[str, int] = {}
    models: set[str] = set()
    at = 0
    for shown, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        start, at = at, at + len(raw)
        if not raw.strip():
            continue
        if len(lines) == MAX_LINES:
            errors.append(
                _error(
                    "too_many_requests",
                    f"A batch has at most {MAX_LINES} requests. Split it.",
                    shown,
                )
            )
            break
        try:
            request = _request(raw, endpoint)
        except _LineError as problem:
            errors.append(_error(problem.code, problem.message, shown, problem.param))
        else:
            custom_id = request["custom_id"]
            if custom_id in ids:
                message = (
                    f"The custom_id '{custom_id[:100]}' was used before, on line {ids[custom_id]}."
                )
                errors.append(_error("duplicate_custom_id", message, shown, "custom_id"))
            ids.setdefault(custom_id, shown)
            model = request["body"].get("model")
            models |= {model} if isinstance(model, str) else set()
            lines.append(Line(len(lines), start, at, custom_id, _prefix(request["body"])))
        if len(errors) == MAX_ERRORS or len(raw) > MAX_LINE_BYTES:
            break  # there may be no end to a line that is too long
    if not lines and not errors:
        errors.append(
            _error("empty_file", "The input file is empty. Send at least one request.", None)
        )
    return Input(lines, errors, models.pop() if len(models) == 1 else None)


def read_body(file: IO[bytes], line: Line) -> bytes:
    """Return the body of a request that `read_input` has checked, as JSON."""
    file.seek(line.start)
    request: Any = decode_json(file.read(line.end - line.start))
    return json.dumps(request["body"]).encode()


def in_order(lines: list[Line]) -> Iterator[Line]:
    """Yield the lines so that those whose prompts begin alike follow each other: the second finds it computed."""
    first_seen: dict[bytes, int] = {}
    for line in lines:
        first_seen.setdefault(line.prefix, line.number)
    yield from sorted(lines, key=lambda line: (first_seen[line.prefix], line.number))


class _LineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _request(raw: bytes, endpoint: str) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise _LineError("line_too_long", f"This line has more than {MAX_LINE_BYTES} bytes.")
    try:
        request = decode_json(raw)
    except JsonError as error:
        raise _LineError(
            "invalid_json_line", f"This line is not parseable as valid JSON: {error.message}."
        ) from None
    if not isinstance(request, dict):
        raise _LineError("invalid_json_line", "This line is no JSON object.")
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if name not in request:
            raise _LineError(
                "missing_required_parameter", f"Missing required parameter: '{name}'.", name
            )
        if not isinstance(request[name], kind):
            what = "an object" if kind is dict else "a string"
            raise _LineError("invalid_type", f"Invalid type for '{name}': expected {what}.", name)
    if unknown := sorted(request.keys() - {"custom_id", "method", "url", "body"}):
        raise _LineError(
            "unknown_parameter", f"Unknown parameter: '{unknown[0][:100]}'.", unknown[0][:100]
        )
    if not 1 <= len(request["custom_id"]) <= 512:
        raise _LineError("invalid_value", "A custom_id has 1 to 512 characters.", "custom_id")
    if request["method"] != "POST":
        raise _LineError("invalid_method", "The method of every request must be POST.", "method")
    if request["url"] != endpoint:
        raise _LineError(
            "invalid_url",
            f"The URL '{request['url'][:100]}' does not match the batch's endpoint '{endpoint}'.",
            "url",
        )
    if request["body"].get("stream"):
        raise _LineError(
            "invalid_value", "A batch has no streams. Leave out 'stream'.", "body.stream"
        )
    return request


def _prefix(body: dict[str, Any]) -> bytes:
    """Return a digest of what comes first in the prompt: instructions and tools, or the beginning of the text."""
    first: list[object] = [body.get("model"), body.get("tools"), body.get("instructions")]
    match body.get("messages", body.get("input", body.get("prompt"))):
        case [message, *_]:
            first.append(message)
        case str(text):
            first.append(text[:256])
    return hashlib.blake2b(json.dumps(first).encode(), digest_size=16).digest()


def _error(code: str, message: str, line: int | None, param: str | None = None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": param}
