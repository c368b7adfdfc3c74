"""The messages of a conversation: their fields, and the order in which tool calls and their results must stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr

from evermini.errors import InvalidRequestError
from evermini.service import unsupported
from evermini.service.attachments import FileSource, ImageSource, Perceived
from evermini.service.validation import WireModel, check_variant, wrong_type

ToolName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
"""Name of a function or custom tool."""


def as_parts(value: object) -> object:
    """Return a string as a list with one text part, for a validator."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    raise wrong_type("a string or an array of objects")


class ContentPart(WireModel):
    """A piece of text, an image, a file, or an earlier refusal by the assistant."""

    model_config = ConfigDict(json_schema_extra=unsupported.shown(unsupported.PART_UNSUPPORTED))

    type: Literal["text", "refusal", "image_url", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: ImageSource | None = None
    file: FileSource | None = None
    _perceived: Perceived | None = PrivateAttr(None)

    @property
    def attachment(self) -> ImageSource | FileSource | None:
        """The image or file that the part names."""
        return self.image_url or self.file

    @property
    def perceived(self) -> Perceived | None:
        """What was read of the image or file, once that is done."""
        return self._perceived

    @property
    def shown(self) -> str:
        """The part as text; of an image or file, what was read of it."""
        if self._perceived is not None:
            return self._perceived.text
        return self.text or self.refusal or ""

    def with_perceived(self, perceived: Perceived) -> ContentPart:
        """Return the part with what was read of it."""
        copy = self.model_copy()
        copy._perceived = perceived
        return copy


PARTS_OF_ROLE: Mapping[str, tuple[str, ...]] = {
    "assistant": ("text", "refusal"),
    "user": ("text", "image_url", "file"),
    "tool": ("text", "image_url", "file"),
}
"""Types of content parts by role; in the others, text."""
_FIELD_OF_PART = {"text": "text", "refusal": "refusal", "image_url": "image_url", "file": "file"}


Parts = Annotated[list[ContentPart], Field(min_length=1)]


class FunctionCall(WireModel):
    """A function that the assistant called; ``arguments`` is what it wrote, JSON or not."""

    name: ToolName
    arguments: str


class CustomCall(WireModel):
    """A custom tool that the assistant called."""

    name: ToolName
    input: str


class MessageToolCall(WireModel):
    """One call in an assistant's message."""

    id: str
    type: Literal["function", "custom"]
    function: FunctionCall | None = None
    custom: CustomCall | None = None

    @property
    def name(self) -> str:
        """The tool's name."""
        called = self.function or self.custom
        assert called is not None, "checked before"
        return called.name

    @property
    def arguments(self) -> str:
        """The function's arguments or the custom tool's input."""
        if self.custom is not None:
            return self.custom.input
        assert self.function is not None, "checked before"
        return self.function.arguments


class Message(WireModel):
    """One message of the conversation."""

    model_config = ConfigDict(json_schema_extra=unsupported.shown(unsupported.MESSAGE_UNSUPPORTED))

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[
        Parts | None, BeforeValidator(as_parts, json_schema_input_type=str | Parts | None)
    ] = None
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s<|\\/>]+$")] | None = (
        None
    )
    refusal: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None

    def texts(self) -> list[str]:
        """Return the texts of the message's parts; an assistant's refusal is text it wrote."""
        pieces = [part.shown for part in self.content or ()]
        return [*pieces, self.refusal] if self.refusal else pieces

    def attached_parts(self) -> set[int]:
        """Return the numbers of the parts that are images or files."""
        return {
            number for number, part in enumerate(self.content or ()) if part.attachment is not None
        }

    def text(self) -> str:
        """Return the message's whole text."""
        return "".join(self.texts())

    def for_template(self, text: str) -> dict[str, Any]:
        """Return the message as chat templates expect it, with ``text`` as its text.

        Open models know no developer role, and their templates do not show participants' names. A name in front of
        the text tells participants apart, as the contract asks. Not for the assistant: it would copy the habit.
        """
        match self.role:
            case "tool" | "function":
                name = {} if self.name is None else {"name": self.name}
                return {"role": "tool", "content": text, "tool_call_id": self.tool_call_id} | name
            case "assistant":
                calls = [_for_template(call) for call in self.tool_calls or ()]
                if self.function_call is not None:
                    calls.append(_for_template(self.function_call))
                name = {} if self.name is None else {"name": self.name}
                message = {"role": "assistant", "content": text} | name
                return message | {"tool_calls": calls} if calls else message
        role = "system" if self.role == "developer" else self.role
        if self.name is None:
            return {"role": role, "content": text}
        return {"role": role, "content": f"{self.name}: {text}", "name": self.name}

    def check(self, path: str) -> None:
        """Check what depends on the role.

        Raises:
            InvalidRequestError: Naming the field below ``path``.
        """
        self._check_fields(path)
        if self.role not in ("assistant", "function") and self.content is None:
            raise InvalidRequestError(
                f"Invalid value for '{path}.content': expected a string or an array of objects, but got null.",
                param=f"{path}.content",
                code="invalid_type",
            )
        for number, part in enumerate(self.content or ()):
            where = f"{path}.content[{number}]"
            allowed = PARTS_OF_ROLE.get(self.role, ("text",))
            if part.type not in allowed:
                listed = ", ".join(f"'{kind}'" for kind in allowed)
                raise InvalidRequestError(
                    f"Invalid value: '{part.type}'. Supported values for a message with role '{self.role}' are: "
                    f"{listed}.",
                    param=f"{where}.type",
                    code="invalid_value",
                )
            check_variant(part, where, _FIELD_OF_PART)
            if part.attachment is not None:
                part.attachment.check(f"{where}.{part.type}")
        for number, call in enumerate(self.tool_calls or ()):
            variants = {"function": "function", "custom": "custom"}
            check_variant(call, f"{path}.tool_calls[{number}]", variants)

    def _check_fields(self, path: str) -> None:
        for field, role in _FIELD_OF_ROLE.items():
            if getattr(self, field) is not None and self.role != role:
                raise InvalidRequestError(
                    f"Unknown parameter: '{path}.{field}'. Only a message with role '{role}' has one.",
                    param=f"{path}.{field}",
                    code="unknown_parameter",
                )
        for role, field in (("tool", "tool_call_id"), ("function", "name")):
            if self.role == role and getattr(self, field) is None:
                raise InvalidRequestError(
                    f"Missing parameter '{field}': messages with role '{role}' must have a '{field}'.",
                    param=f"{path}.{field}",
                    code="missing_required_parameter",
                )


_FIELD_OF_ROLE = {
    "refusal": "assistant",
    "tool_calls": "assistant",
    "function_call": "assistant",
    "tool_call_id": "tool",
}


def check_conversation(messages: Sequence[Message]) -> None:
    """Check each message, and that results follow the calls they answer.

    Raises:
        InvalidRequestError: Naming the message and the field.
    """
    waiting: list[str] = []
    known: set[str] = set()
    for number, message in enumerate(messages):
        message.check(f"messages[{number}]")
        # The contract writes these paths with a dot before the bracket, unlike all others.
        where = f"messages.[{number}]"
        if message.role == "tool":
            if not known:
                raise InvalidRequestError(
                    "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
                    "'tool_calls'.",
                    param=f"{where}.role",
                )
            call_id = message.tool_call_id
            if call_id not in known:
                raise InvalidRequestError(
                    f"Invalid parameter: 'tool_call_id' of '{call_id}' not found in 'tool_calls' of previous message.",
                    param=f"{where}.tool_call_id",
                )
            if call_id in waiting:
                waiting.remove(call_id)
            continue
        if waiting:
            raise _unanswered(waiting, f"{where}.role")
        known = {call.id for call in message.tool_calls or ()}
        waiting = [call.id for call in message.tool_calls or ()]
    if waiting:
        raise _unanswered(waiting, "messages")


def _unanswered(call_ids: Sequence[str], param: str) -> InvalidRequestError:
    return InvalidRequestError(
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
        f"The following tool_call_ids did not have response messages: {', '.join(call_ids)}",
        param=param,
    )


def _for_template(call: MessageToolCall | FunctionCall) -> Mapping[str, Any]:
    if isinstance(call, FunctionCall):
        return {"type": "function", "function": call.model_dump()}
    return call.model_dump(exclude_none=True)
