"""The requests of the contract: exact field names, types and ranges.

Fields of the contract that this server does not act on are refused by `evermini.service.unsupported`. Fields outside
the contract are refused too: a misspelt ``temprature`` must not be ignored.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from evermini.errors import InvalidRequestError, UnsupportedParameterError
from evermini.service import unsupported, validation
from evermini.service.formats import ResponseFormat
from evermini.service.messages import Message, as_parts, check_conversation
from evermini.service.tools import (
    Choice,
    Functions,
    OldChoice,
    Tools,
    Toolset,
    from_functions,
    from_tools,
)
from evermini.service.validation import WireModel, wrong_type

MAX_OUTPUT_TOKENS = 32_768
"""Tokens one request may generate (gpt-4.1-mini's published limit)."""

MAX_CANDIDATES = 2048
"""Completions that one request may ask for, over all its prompts."""


def _as_stops(value: object) -> object:
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [value]
    raise wrong_type("a string or an array of strings")


def as_prompts(value: object) -> object:
    """Return a list of prompts, each a string or a list of token ids; null stays null."""
    if value is None:
        return None
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return value
    raise wrong_type(
        "a string, an array of strings, an array of token ids or an array of such arrays"
    )


Prompts = str | list[str] | list[int] | list[list[int]]
"""What `as_prompts` takes."""


def _are_ids(items: list[object]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]] | None,
    Field(max_length=4),
]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]


class StreamOptions(WireModel):
    """``stream_options``; obfuscation is never added, which both of its values allow."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingRequest(WireModel):
    """What chat and text completions have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[Stops, BeforeValidator(_as_stops, json_schema_input_type=str | Stops)] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
            )
        return self

    @property
    def num_choices(self) -> int:
        """``n``, 1 if not given."""
        return self.n or 1

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def bias_by_id(self, vocab_size: int) -> dict[int, float]:
        """Return ``logit_bias`` with integer keys.

        Raises:
            InvalidRequestError: A key is not a token id of the model.
        """
        biases = {}
        for key, bias in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
                raise InvalidRequestError(
                    f"Invalid key in 'logit_bias': {key[:40]}. You may only use token ids, as strings, from 0 to "
                    f"{vocab_size - 1}.",
                    param="logit_bias",
                    code="invalid_value",
                )
            biases[int(key)] = bias
        return biases


Reading = Literal["auto", "recall", "sweep", "dense"]


class Extensions(WireModel):
    """``x_evermini``: what goes beyond the contract.

    Attributes:
        reading: How the prompt is read: ``dense`` in the model's own window; ``recall`` its long texts in excerpts that
            the question needs; ``sweep`` all of its long texts, window by window; ``auto`` the first if it fits, else
            the second or third.
        why: Say in the response what was read.
        progress: Tell in a stream how far the reading of a long text is, in chunks without choices.
        grammar: The answer is a text of this grammar, in llguidance's dialect of Lark.
        regex: The answer matches this regular expression (Rust's syntax) from end to end.
    """

    reading: Reading | None = None
    why: bool | None = None
    progress: bool | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None


class PredictedText(WireModel):
    """A part of a prediction."""

    type: Literal["text"]
    text: str


class Prediction(WireModel):
    """``prediction``: the text that most of the answer is expected to be."""

    type: Literal["content"]
    content: Annotated[
        list[PredictedText],
        Field(min_length=1),
        BeforeValidator(as_parts, json_schema_input_type=str | list[PredictedText]),
    ]

    @property
    def text(self) -> str:
        """The whole of it."""
        return "".join(part.text for part in self.content)


MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(json_schema_extra=unsupported.shown(unsupported.CHAT_UNSUPPORTED))

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    tools: Tools | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: OldChoice = None
    prediction: Prediction | None = None
    x_evermini: Extensions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_conversation(self.messages)
        if self.tools and self.functions:
            raise InvalidRequestError(
                "Invalid value for 'functions': 'functions' (deprecated) cannot be used together with 'tools'.",
                param="functions",
            )
        self.toolset  # noqa: B018 - checked when it is made
        self._check_form()
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                "Setting 'max_tokens' and 'max_completion_tokens' to different values is not supported. Use "
                "'max_completion_tokens'; 'max_tokens' is deprecated.",
                param="max_tokens",
                code="invalid_value",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
                param="top_logprobs",
            )
        if self.prediction is not None:
            self._check_prediction()
        return self

    def _check_form(self) -> None:
        """Check what is asked about the form of the answer: one thing at most."""
        if self.response_format is not None:
            self.response_format.check([message.text() for message in self.messages])
        asked = {
            "response_format": self.response_format is not None
            and self.response_format.type != "text",
            "x_evermini.grammar": self.x_evermini is not None
            and self.x_evermini.grammar is not None,
            "x_evermini.regex": self.x_evermini is not None and self.x_evermini.regex is not None,
        }
        names = [name for name, is_asked in asked.items() if is_asked]
        if names and names[0] != "response_format" and self.toolset.mode != "none":
            raise InvalidRequestError(
                f"'{names[0]}' says what all of the answer is; it cannot be used with tools that may be called.",
                param=names[0],
            )
        if names[1:]:
            raise InvalidRequestError(
                f"'{names[0]}' and '{names[1]}' both say what form the answer has. Use one of them.",
                param=names[1],
            )

    def _check_prediction(self) -> None:
        """Refuse what the contract does not combine with a prediction."""
        for field, is_used in {
            "n": self.num_choices > 1,
            "logprobs": self.logprobs,
            "presence_penalty": (self.presence_penalty or 0.0) > 0.0,
            "frequency_penalty": (self.frequency_penalty or 0.0) > 0.0,
            "max_completion_tokens": self.max_completion_tokens is not None,
            "tools": self.tools,
            "functions": self.functions,
        }.items():
            if is_used:
                above = {"n": " above 1"}.get(field, " above 0" if "penalty" in field else "")
                raise UnsupportedParameterError(
                    f"Unsupported parameter: '{field}'{above} is not supported with 'prediction'. Leave one out.",
                    param=field,
                )

    @cached_property
    def toolset(self) -> Toolset:
        """The tools and how they may be called.

        Raises:
            InvalidRequestError: The fields do not fit together.
        """
        if self.functions or self.function_call:
            return from_functions(self.functions, self.function_call)
        return from_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def is_kept(self) -> bool:
        """Whether what is computed of the prompt may be kept on the disk."""
        return self.prompt_cache_retention in (None, "24h")

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that ``response_format`` holds an answer to."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        return wanted.json_schema.definition if wanted.json_schema else {"type": "object"}

    @property
    def offers_tools(self) -> bool:
        """Whether there are tools, callable or not."""
        return bool(self.tools or self.functions)

    @property
    def reading(self) -> Reading:
        """How the prompt is to be read."""
        wanted = self.x_evermini.reading if self.x_evermini else None
        return wanted or "auto"

    @property
    def wants_progress(self) -> bool:
        """Whether a stream says how far the reading of a long text is."""
        return bool(self.x_evermini and self.x_evermini.progress)

    @property
    def wants_why(self) -> bool:
        """Whether the response says what was read."""
        return bool(self.x_evermini and self.x_evermini.why)

    @property
    def max_output(self) -> int | None:
        """The requested limit under either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """``None``: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra=unsupported.shown(unsupported.COMPLETION_UNSUPPORTED)
    )

    prompt: Annotated[
        Annotated[list[str | list[int]], Field(min_length=1, max_length=MAX_CANDIDATES)] | None,
        BeforeValidator(as_prompts, json_schema_input_type=Prompts | None),
    ] = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_candidates < self.num_choices:
            raise InvalidRequestError(
                "You requested that the server return more choices than it will generate (HINT: 'best_of' must be "
                "greater than or equal to 'n').",
                param="best_of",
            )
        if len(self.prompt or ()) * self.num_candidates > MAX_CANDIDATES:
            raise InvalidRequestError(
                f"Too many completions: {len(self.prompt or ())} prompts with {self.num_candidates} each. One request "
                f"may ask for {MAX_CANDIDATES}; split it.",
                param="prompt",
                code="invalid_value",
            )
        if self.stream and self.num_candidates > self.num_choices:
            raise InvalidRequestError(
                "Cannot stream results with 'best_of' greater than 'n': the best are known only at the end.",
                param="best_of",
            )
        return self

    @property
    def num_candidates(self) -> int:
        """Completions to generate per prompt, of which the best ``n`` are returned."""
        return self.best_of or self.num_choices


def parse_chat(body: object) -> ChatRequest:
    """Validate the body of a chat completion.

    Raises:
        UnsupportedParameterError: A field that this server does not act on is set.
        InvalidRequestError: Anything else is wrong.
    """
    return validation.parse(ChatRequest, unsupported.plain_chat(body))


class MetadataUpdate(WireModel):
    """An update of a stored object, of which nothing but the metadata can change."""

    metadata: Metadata | None


def parse_metadata_update(body: object) -> dict[str, str]:
    """Return the new metadata from the body of an update; null empties it.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(MetadataUpdate, body).metadata or {}


def parse_completion(body: object) -> CompletionRequest:
    """Validate the body of a text completion.

    Raises:
        UnsupportedParameterError: ``suffix`` is set.
        InvalidRequestError: Anything else is wrong.
    """
    return validation.parse(CompletionRequest, unsupported.plain_completion(body))
