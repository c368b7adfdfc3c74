"""Fields of the contract that this server does not act on: refused with a 400 that names them, never ignored.

A value that asks for nothing is fine: null, and those in the tables below (``modalities: ["text"]``). Frameworks send
them on every request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evermini.errors import UnsupportedParameterError

CHAT_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_cache_options": ({"mode": "implicit"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Field → the values, besides null, that ask for nothing."""

MESSAGE_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
}
PART_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {"prompt_cache_breakpoint": ()}
UNSUPPORTED_PARTS = frozenset({"input_audio"})
COMPLETION_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {"suffix": ("",)}


def plain_chat(body: object) -> object:
    """Return the body of a chat completion without the fields that are off.

    Raises:
        UnsupportedParameterError: One of them is on, or a message has a part that is not acted on.
    """
    if not isinstance(body, dict):
        return body
    body = without(body, CHAT_UNSUPPORTED, "")
    if isinstance(body.get("messages"), list):
        body["messages"] = [
            _plain_message(message, f"messages[{number}]")
            for number, message in enumerate(body["messages"])
        ]
    return body


def plain_completion(body: object) -> object:
    """Return the body of a text completion without the fields that are off.

    Raises:
        UnsupportedParameterError: One of them is on.
    """
    if not isinstance(body, dict):
        return body
    return without(body, COMPLETION_UNSUPPORTED, "")


def _plain_message(message: object, path: str) -> object:
    if not isinstance(message, dict):
        return message
    message = without(message, MESSAGE_UNSUPPORTED, f"{path}.")
    if isinstance(message.get("content"), list):
        message["content"] = [
            _plain_part(part, f"{path}.content[{number}]")
            for number, part in enumerate(message["content"])
        ]
    return message


def _plain_part(part: object, path: str) -> object:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind in UNSUPPORTED_PARTS:
        raise refusal(f"{path}.type", f"Content parts of type '{kind}' are")
    return without(part, PART_UNSUPPORTED, f"{path}.")


def without(
    body: dict[str, Any], table: Mapping[str, tuple[object, ...]], prefix: str
) -> dict[str, Any]:
    """Return a copy without the table's fields.

    Args:
        body: The object.
        table: Its fields that are not acted on -> the values, besides null, that ask for nothing.
        prefix: Of the fields' paths.

    Raises:
        UnsupportedParameterError: One of them asks for something.
    """
    for name, off in table.items():
        value = body.get(name)
        # `==` alone would let 0 pass for False.
        if value is not None and not any(value == v and type(value) is type(v) for v in off):
            raise refusal(f"{prefix}{name}", f"The parameter '{prefix}{name}' is")
    return {name: value for name, value in body.items() if name not in table}


def shown(table: Mapping[str, tuple[object, ...]]) -> Callable[[dict[str, Any]], None]:
    """Return what adds the table's fields to a model's JSON schema, with the values that are taken."""

    def add(schema: dict[str, Any]) -> None:
        schema["properties"] |= {name: {"enum": [None, *off]} for name, off in table.items()}

    return add


def refusal(param: str, what: str) -> UnsupportedParameterError:
    """Return the error for what is not acted on; ``what`` is a subject and its verb."""
    return UnsupportedParameterError(
        f"{what} not supported by this server. Leave it out. (Ignoring it would change the answer.)",
        param=param,
    )
