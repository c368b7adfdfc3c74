"""``POST /v1/responses``: the request, and the chat completion that answers it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from evermini.errors import InvalidRequestError
from evermini.service import unsupported, validation
from evermini.service.responses.items import InputItem, Json, as_messages
from evermini.service.schemas import ChatRequest, Extensions, Metadata, parse_chat
from evermini.service.tools import Word
from evermini.service.validation import WireModel, wrong_type

Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""What a response can show in addition; all but the log-probabilities belong to tools that are not there."""

_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "access_programs": (),
    "background_options": ({"completion_window": "soonest"},),
    "context_management": ([],),
    "image": (),
    "moderation": (),
    "personality": (),
    "prompt": (),
    "prompt_cache_options": ({"mode": "implicit"},),
    "reasoning": (
        {},
        {"effort": None, "summary": None},
        {"effort": "none"},
        {"effort": "none", "summary": None},
    ),
}
"""Field -> the values, besides null, that ask for nothing."""
_TOOL_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}
_TEXT_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {"verbosity": ("medium",)}


class ConversationReference(WireModel):
    """A conversation by its id."""

    id: str


class TextFormat(WireModel):
    """What the text must be: a chat completion's ``response_format``, flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(WireModel):
    """``text``; of the fields only the format is acted on."""

    model_config = ConfigDict(json_schema_extra=unsupported.shown(_TEXT_UNSUPPORTED))

    format: TextFormat | None = None


class GrammarFormat(WireModel):
    """What a custom tool's input must look like."""

    type: Literal["text", "grammar"]
    definition: str | None = None
    syntax: Literal["lark", "regex"] | None = None


class FlatTool(WireModel):
    """A function or custom tool, whose fields are those of a chat completion's, one level up."""

    model_config = ConfigDict(json_schema_extra=unsupported.shown(_TOOL_UNSUPPORTED))

    type: Literal["function", "custom"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: GrammarFormat | None = None

    def check(self, path: str) -> None:
        """Check what depends on the type.

        Raises:
            InvalidRequestError: A field belongs to the other type.
        """
        foreign = ("format",) if self.type == "function" else ("parameters", "strict")
        for name in foreign:
            if getattr(self, name) is not None:
                raise InvalidRequestError(
                    f"Unknown parameter: '{path}.{name}'.",
                    param=f"{path}.{name}",
                    code="unknown_parameter",
                )


class FlatChoice(WireModel):
    """``tool_choice``; a plain word stands in ``type``."""

    type: Literal["none", "auto", "required", "function", "custom", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class ResponseStreamOptions(WireModel):
    """``stream_options``; obfuscation is never added, which both of its values allow."""

    include_obfuscation: bool | None = None


def _as_input(value: object) -> object:
    if value is None or isinstance(value, str | list):
        return value
    raise wrong_type("a string or an array of objects")


def _as_choice(value: object) -> object:
    if isinstance(value, str):
        return {"type": value}
    if value is None or isinstance(value, dict):
        return value
    raise wrong_type("a string or an object")


def _as_conversation(value: object) -> object:
    if isinstance(value, str):
        return {"id": value}
    if value is None or isinstance(value, dict):
        return value
    raise wrong_type("a string or an object")


Conversation = Annotated[
    ConversationReference | None,
    BeforeValidator(_as_conversation, json_schema_input_type=str | ConversationReference | None),
]
Choice = Annotated[
    FlatChoice | None, BeforeValidator(_as_choice, json_schema_input_type=Word | FlatChoice | None)
]


class ContextRequest(WireModel):
    """What decides the prompt: shared by creating a response and counting its input's tokens."""

    model_config = ConfigDict(json_schema_extra=unsupported.shown(_UNSUPPORTED))

    model: str
    input: Annotated[
        Any, BeforeValidator(_as_input, json_schema_input_type=str | list[InputItem] | None)
    ] = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Conversation = None
    tools: list[FlatTool] | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        if self.previous_response_id is not None and self.conversation is not None:
            raise InvalidRequestError(
                "Mutually exclusive parameters: Ensure you are only providing one of: 'previous_response_id' or "
                "'conversation'.",
                param="previous_response_id",
                code="mutually_exclusive_parameters",
            )
        if self.input is None and self.previous_response_id is None and self.conversation is None:
            raise InvalidRequestError(
                "Missing required parameter: 'input'. One of 'input', 'previous_response_id' or 'conversation' must be "
                "provided.",
                param="input",
                code="missing_required_parameter",
            )
        for number, tool in enumerate(self.tools or ()):
            tool.check(f"tools[{number}]")
        return self


class ResponseRequest(ContextRequest):
    """``POST /v1/responses``."""

    background: bool | None = None
    include: list[Include] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    user: str | None = None
    x_evermini: Extensions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
            )
        if self.background and not self.is_stored:
            raise InvalidRequestError(
                "Background mode requires store=true: the answer is fetched later.",
                param="background",
            )
        return self

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept, which it is unless said otherwise."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether the output shows log-probabilities."""
        asked = "message.output_text.logprobs" in (self.include or ())
        return asked or bool(self.top_logprobs)


class TokenCountRequest(ContextRequest):
    """``POST /v1/responses/input_tokens``."""


def parse_response(body: object) -> ResponseRequest:
    """Validate the body of a response.

    Raises:
        UnsupportedParameterError: A field that this server does not act on is set.
        InvalidRequestError: Anything else is wrong.
    """
    return validation.parse(ResponseRequest, _plain(body))


def parse_token_count(body: object) -> TokenCountRequest:
    """Validate the body of a count of input tokens. Raises what `parse_response` does."""
    return validation.parse(TokenCountRequest, _plain(body))


def _plain(body: object) -> object:
    """Return the body without the fields that ask for nothing."""
    if not isinstance(body, dict):
        return body
    body = unsupported.without(body, _UNSUPPORTED, "")
    if isinstance(body.get("text"), dict):
        body["text"] = unsupported.without(body["text"], _TEXT_UNSUPPORTED, "text.")
    if isinstance(body.get("tools"), list):
        body["tools"] = [
            _plain_tool(tool, f"tools[{number}]") for number, tool in enumerate(body["tools"])
        ]
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") not in (
        "function",
        "custom",
        "allowed_tools",
    ):
        kind = str(choice.get("type"))[:100]
        raise unsupported.refusal("tool_choice", f"Tools of type '{kind}' are")
    return body


def _plain_tool(tool: object, path: str) -> object:
    if not isinstance(tool, dict):
        return tool
    kind = tool.get("type")
    if isinstance(kind, str) and kind not in ("function", "custom"):
        raise unsupported.refusal(f"{path}.type", f"Tools of type '{kind[:100]}' are")
    return unsupported.without(tool, _TOOL_UNSUPPORTED, f"{path}.")


def chat_request(request: ContextRequest, context: Sequence[Json]) -> ChatRequest:
    """Return the chat completion whose answer is the response's.

    Args:
        request: The response's request.
        context: All items the model reads, oldest first; the instructions come before them.

    Raises:
        InvalidRequestError: As for a chat completion, with the names of this request's fields.
    """
    body: Json = {"model": request.model, "messages": []}
    if request.instructions:
        body["messages"] = [{"role": "developer", "content": request.instructions}]
    body["messages"] += [message for message, _ in as_messages(context, "input")]
    if request.tools:
        body["tools"] = [_chat_tool(tool) for tool in request.tools]
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.tool_choice is not None:
        body["tool_choice"] = _chat_choice(request.tool_choice)
    if request.text is not None and request.text.format is not None:
        body["response_format"] = _chat_format(request.text.format)
    if isinstance(request, ResponseRequest):
        body |= {
            "max_completion_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "prompt_cache_retention": request.prompt_cache_retention,
        }
        if request.wants_logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if request.x_evermini is not None:
            body["x_evermini"] = request.x_evermini.model_dump(exclude_none=True)
    if not body["messages"]:
        raise InvalidRequestError(
            "Invalid 'input': empty array. The model needs something to answer.",
            param="input",
            code="empty_array",
        )
    try:
        return parse_chat(body)
    except InvalidRequestError as error:
        raise renamed(error) from None


_RENAMED = (
    (r"tools\[(\d+)\]\.(?:function|custom)\.format\.grammar\b", r"tools[\1].format"),
    (r"tools\[(\d+)\]\.(?:function|custom)\b", r"tools[\1]"),
    (r"tool_choice\.(?:function|custom|allowed_tools)\b", "tool_choice"),
    (r"response_format\.json_schema\b", "text.format"),
    (r"response_format\b", "text.format"),
    (r"max_completion_tokens\b", "max_output_tokens"),
    (r"messages(?:\.?\[\d+\][\w.\[\]]*|(?=$|'))", "input"),
)


def renamed(error: InvalidRequestError) -> InvalidRequestError:
    """Put a chat completion's error into the words of a response: its fields have other names there."""
    param, message = error.param, error.message
    for pattern, name in _RENAMED:
        param = param and re.sub(f"^{pattern}", name, param)
        message = re.sub(rf"(?<!\w){pattern}", name, message)
    error.message, error.param, error.args = message, param, (message,)
    return error


def located(
    error: InvalidRequestError, request: ContextRequest, context: Sequence[Json]
) -> InvalidRequestError:
    """Put an error about an image or file where it stands in the request's ``input``; others are `renamed`.

    Args:
        error: As a chat completion has it.
        request: The response's request.
        context: The items that the chat completion was made of; the request's own are the last ones.
    """
    found = re.fullmatch(_ATTACHED, error.param or "")
    if found is None or not isinstance(request.input, list):
        return renamed(error)
    message = int(found["message"]) - bool(request.instructions)
    number = as_messages(context, "input")[message][1]
    own = number - (len(context) - len(request.input))
    if own < 0:  # of an earlier response
        return renamed(error)
    holder = "output" if context[number]["type"].endswith("_output") else "content"
    field = "image_url" if found["field"] == "url" else found["field"]
    error.param = f"input[{own}].{holder}[{found['part']}].{field}"
    return error


_ATTACHED = (
    r"messages\[(?P<message>\d+)\]\.content\[(?P<part>\d+)\]\.(?:image_url|file)\.(?P<field>\w+)"
)


def _chat_tool(tool: FlatTool) -> Json:
    fields = tool.model_dump(exclude={"type", "format"}, exclude_none=True)
    if tool.format is not None and tool.format.type == "grammar":
        grammar = tool.format.model_dump(exclude={"type"}, exclude_none=True)
        fields["format"] = {"type": "grammar", "grammar": grammar}
    elif tool.format is not None:
        fields["format"] = tool.format.model_dump(exclude_none=True)
    return {"type": tool.type, tool.type: fields}


def _chat_choice(choice: FlatChoice) -> object:
    match choice.type:
        case "none" | "auto" | "required":
            return choice.type
        case "function" | "custom" as kind:
            return {"type": kind, kind: {"name": choice.name}}
        case "allowed_tools":
            allowed = [_chat_reference(tool) for tool in choice.tools or ()]
            return {
                "type": "allowed_tools",
                "allowed_tools": {"mode": choice.mode or "auto", "tools": allowed},
            }


def _chat_reference(tool: Mapping[str, Any]) -> Json:
    kind = str(tool.get("type"))
    rest = {name: value for name, value in tool.items() if name not in ("type", "name")}
    return {"type": kind, kind: {"name": tool.get("name")}, **rest}


def _chat_format(wanted: TextFormat) -> Json:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    fields = wanted.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": "json_schema", "json_schema": fields}
