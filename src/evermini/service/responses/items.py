"""Items of a response's input and of conversations: checked, stored with ids, and read as messages.

An item is kept as clients see it (plain JSON), with an id and, for a message, a list of content parts.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from evermini.errors import InvalidRequestError
from evermini.service import unsupported, validation
from evermini.service.attachments import Detail, check_one_source
from evermini.service.messages import ToolName
from evermini.service.validation import WireModel, check_variant, wrong_type

Json = dict[str, Any]

ITEM_CHARACTERS = 100
"""Checking an item takes as long as tokenising so many characters."""

ItemId = Annotated[str, Field(min_length=1, max_length=64)]
CallId = Annotated[str, Field(min_length=1, max_length=64)]
Status = Literal["in_progress", "completed", "incomplete"]


def _as_text(value: object) -> object:
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    raise wrong_type("a string or an array of objects")


class Part(WireModel):
    """A piece of text, an image, a file or a refusal; what was a plain string has the type ``text`` here."""

    type: Literal["text", "input_text", "input_image", "input_file", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: Detail | None = None
    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None
    file_url: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


_Parts = Annotated[list[Part], Field(min_length=1)]
Parts = Annotated[_Parts, BeforeValidator(_as_text, json_schema_input_type=str | _Parts)]


class MessageItem(WireModel):
    """A message of any role."""

    type: Annotated[Literal["message"], WithJsonSchema({"enum": ["message", None]})] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    id: ItemId | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(WireModel):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: str
    id: ItemId | None = None
    status: Status | None = None


class CustomCallItem(WireModel):
    """A call of a custom tool."""

    type: Literal["custom_tool_call"]
    call_id: CallId
    name: ToolName
    input: str
    id: ItemId | None = None
    status: Status | None = None


class OutputItem(WireModel):
    """What a tool returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: CallId
    output: Parts
    id: ItemId | None = None
    status: Status | None = None


class Reference(WireModel):
    """An item that is stored already."""

    type: Annotated[
        Literal["item_reference"], WithJsonSchema({"enum": ["item_reference", None]})
    ] = "item_reference"
    id: ItemId


InputItem = MessageItem | FunctionCallItem | CustomCallItem | OutputItem | Reference
MODELS: dict[str, type[WireModel]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "custom_tool_call": CustomCallItem,
    "function_call_output": OutputItem,
    "custom_tool_call_output": OutputItem,
    "item_reference": Reference,
}
PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "function_call_output": "fco",
    "custom_tool_call_output": "ctco",
}
UNSUPPORTED_ITEMS = frozenset(
    {
        *("additional_tools", "apply_patch_call", "apply_patch_call_output"),
        *("code_interpreter_call", "compaction", "compaction_trigger", "computer_call"),
        *("computer_call_output", "configuration_update", "file_search_call"),
        *("image_generation_call", "local_shell_call", "local_shell_call_output"),
        *("mcp_approval_request", "mcp_approval_response", "mcp_call", "mcp_list_tools"),
        *("program", "program_output", "reasoning", "shell_call", "shell_call_output"),
        *("tool_search_call", "tool_search_output", "web_search_call"),
    }
)
UNSUPPORTED_PARTS = frozenset({"input_audio", "image_url", "computer_screenshot"})
_SHOWN_BY_USERS = ("input_text", "input_image", "input_file")
_SOURCES = {
    "input_image": ("image_url", "file_id"),
    "input_file": ("file_id", "file_data", "file_url"),
}
"""Types of parts -> the fields of which one says where the bytes are."""
_NAMED = {"input_image": ("detail",), "input_file": ("filename", "detail")}
_SOURCE_FIELDS = ("image_url", "file_id", "file_data", "file_url", "filename", "detail")
_ITEM_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "async": (False,),
    "caller": ({"type": "direct"},),
    "namespace": (),
}
_PART_UNSUPPORTED: dict[str, tuple[object, ...]] = {"prompt_cache_breakpoint": ()}


def new_id(prefix: str) -> str:
    """Return a fresh id, such as ``msg_68e1...``."""
    return f"{prefix}_{uuid.uuid4().hex}"


def parse_items(value: object, path: str) -> list[Json]:
    """Check a request's items and return them as they are stored.

    A string is one user message. References have no id of their own; see `references`.

    Args:
        value: What the request has.
        path: Where it has it.

    Raises:
        UnsupportedParameterError: An item or a part is of a kind that this server does not act on.
        InvalidRequestError: It is malformed.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise InvalidRequestError(
            f"Invalid type for '{path}': expected a string or an array of objects.",
            param=path,
            code="invalid_type",
        )
    return [_parse_item(item, f"{path}[{number}]") for number, item in enumerate(value)]


def _parse_item(value: object, path: str) -> Json:
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"Invalid type for '{path}': expected an object.", param=path, code="invalid_type"
        )
    # Clients that send back what they got send optional fields as null.
    given = {name: content for name, content in value.items() if content is not None}
    kind = given.get("type", "message" if "role" in given else "item_reference")
    if isinstance(kind, str) and kind in UNSUPPORTED_ITEMS:
        raise unsupported.refusal(f"{path}.type", f"Items of type '{kind}' are")
    if not isinstance(kind, str) or kind not in MODELS:
        supported = ", ".join(f"'{name}'" for name in MODELS)
        raise InvalidRequestError(
            f"Invalid value: '{str(kind)[:100]}'. Supported values are: {supported}.",
            param=f"{path}.type",
            code="invalid_value",
        )
    given = unsupported.without(given, _ITEM_UNSUPPORTED, f"{path}.")
    for field in ("content", "output"):
        if isinstance(given.get(field), list):
            given[field] = [
                _plain_part(part, f"{path}.{field}[{number}]")
                for number, part in enumerate(given[field])
            ]
    item = validation.parse(MODELS[kind], {"type": kind, **given}, path)
    return _stored(item, path)


def _plain_part(part: object, path: str) -> object:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind in UNSUPPORTED_PARTS:
        raise unsupported.refusal(f"{path}.type", f"Content parts of type '{kind}' are")
    return unsupported.without(part, _PART_UNSUPPORTED, f"{path}.")


def _stored(item: WireModel, path: str) -> Json:
    match item:
        case MessageItem():
            allowed: tuple[str, ...] = ("output_text", "refusal")
            if item.role != "assistant":
                allowed = _SHOWN_BY_USERS if item.role == "user" else ("input_text",)
            phase = {} if item.phase is None else {"phase": item.phase}
            return {
                "id": item.id or new_id("msg"),
                "type": "message",
                "status": item.status or "completed",
                "role": item.role,
                "content": _stored_parts(item.content, allowed, f"{path}.content"),
                **phase,
            }
        case FunctionCallItem() | CustomCallItem():
            fields = item.model_dump(exclude={"id", "status", "type"})
            return {
                "id": item.id or new_id(PREFIXES[item.type]),
                "type": item.type,
                "status": item.status or "completed",
                **fields,
            }
        case OutputItem():
            parts = _stored_parts(item.output, _SHOWN_BY_USERS, f"{path}.output")
            was_string = item.output[0].type == "text"
            return {
                "id": item.id or new_id(PREFIXES[item.type]),
                "type": item.type,
                "status": item.status or "completed",
                "call_id": item.call_id,
                "output": parts[0]["text"] if was_string else parts,
            }
        case Reference():
            return {"type": "item_reference", "id": item.id}
        case _:
            raise AssertionError(item)


def _stored_parts(parts: Sequence[Part], allowed: tuple[str, ...], path: str) -> list[Json]:
    stored: list[Json] = []
    for number, part in enumerate(parts):
        kind = allowed[0] if part.type == "text" else part.type
        where = f"{path}[{number}]"
        if kind not in allowed:
            supported = " and ".join(f"'{name}'" for name in allowed)
            raise InvalidRequestError(
                f"Invalid value: '{kind}'. Supported values are: {supported}.",
                param=f"{where}.type",
                code="invalid_value",
            )
        _check_sources(part, where)
        if kind in _SOURCES:
            stored.append(part.model_dump(exclude_none=True))
            continue
        fields = dict.fromkeys(("text", "input_text", "output_text"), "text")
        check_variant(part, where, fields | {"refusal": "refusal"})
        match kind:
            case "refusal":
                stored.append({"type": kind, "refusal": part.refusal})
            case "output_text":
                kept = {"annotations": part.annotations or [], "logprobs": part.logprobs or []}
                stored.append({"type": kind, "text": part.text, **kept})
            case _:
                stored.append({"type": kind, "text": part.text})
    return stored


def _check_sources(part: Part, path: str) -> None:
    """Check that a part has the fields of its type that say where bytes are, and no others.

    Raises:
        InvalidRequestError: It has not.
    """
    sources = _SOURCES.get(part.type, ())
    for field in _SOURCE_FIELDS:
        if getattr(part, field) is not None and field not in (*sources, *_NAMED.get(part.type, ())):
            raise InvalidRequestError(
                f"Unknown parameter: '{path}.{field}'.",
                param=f"{path}.{field}",
                code="unknown_parameter",
            )
    if sources:
        check_one_source(path, {name: getattr(part, name) for name in sources})


def references(items: Sequence[Json]) -> list[str]:
    """Return the ids that the items refer to."""
    return [item["id"] for item in items if item["type"] == "item_reference"]


def as_messages(items: Sequence[Json], param: str) -> list[tuple[Json, int]]:
    """Return the items as messages of a chat completion, each with the number of the item that its content is from.

    Calls that follow each other are one message of the assistant, with the text before them. What a call returned
    comes right after that message, wherever it stands among the items.

    Args:
        items: The whole context, without references.
        param: The request's field that errors name.

    Raises:
        InvalidRequestError: A call has no output, or an output no call.
    """
    outputs = {item["call_id"]: item for item in items if item["type"].endswith("_output")}
    called: set[str] = set()
    numbers = {
        item["call_id"]: n for n, item in enumerate(items) if item["type"].endswith("_output")
    }
    messages: list[tuple[Json, int]] = []
    answers: list[tuple[Json, int]] = []  # to the calls of the last message
    for number, item in enumerate(items):
        kind = item["type"]
        if kind in ("function_call", "custom_tool_call"):
            call_id = item["call_id"]
            if call_id not in outputs:
                raise _mismatch(f"No tool output found for {_NAMES[kind]} {call_id}.", param)
            called.add(call_id)
            if not messages or messages[-1][0]["role"] != "assistant":
                messages.append(({"role": "assistant", "content": None}, number))
            messages[-1][0].setdefault("tool_calls", []).append(_call(item))
            answer = {
                "role": "tool",
                "tool_call_id": call_id,
                "content": _content(outputs[call_id]["output"]),
            }
            answers.append((answer, numbers[call_id]))
            continue
        messages += answers
        answers = []
        if kind == "message":
            message = {"role": item["role"], "content": _content(item["content"])}
            messages.append((message, number))
        elif item["call_id"] not in called:
            raise _mismatch(f"No tool call found for {_NAMES[kind]} {item['call_id']}.", param)
    return messages + answers


_NAMES = {
    "function_call": "function call",
    "custom_tool_call": "custom tool call",
    "function_call_output": "function call output with call_id",
    "custom_tool_call_output": "custom tool call output with call_id",
}


def _mismatch(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param)


def _call(item: Json) -> Json:
    if item["type"] == "function_call":
        called = {"name": item["name"], "arguments": item["arguments"]}
        return {"id": item["call_id"], "type": "function", "function": called}
    called = {"name": item["name"], "input": item["input"]}
    return {"id": item["call_id"], "type": "custom", "custom": called}


def _content(content: str | Sequence[Json]) -> str | list[Json]:
    if isinstance(content, str):
        return content
    return [_chat_part(part) for part in content]


def _chat_part(part: Json) -> Json:
    match part["type"]:
        case "refusal":
            return {"type": "refusal", "refusal": part["refusal"]}
        case "input_image":
            image = {"url": part.get("image_url"), "file_id": part.get("file_id")}
            return {"type": "image_url", "image_url": {**image, "detail": part.get("detail")}}
        case "input_file":
            names = ("file_id", "file_data", "filename", "file_url")
            return {"type": "file", "file": {name: part.get(name) for name in names}}
        case _:
            return {"type": "text", "text": part["text"]}
