"""Messages to a prompt, by the model's own chat template.

The template is Jinja source from the checkpoint: it runs in a sandbox, with what `transformers` offers templates, so
that the prompt is the one the model was trained on. What comes from messages is text and nothing but text: a message
that contains ``<|im_end|>`` reaches the model as those characters (see `evermini.text.guard`).

Templates of vision-language models take a message's content as parts. Until then an image is `IMAGE_MARK` in its text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from evermini.errors import (
    DamagedCheckpointError,
    InvalidRequestError,
    UnsupportedParameterError,
)
from evermini.text.guard import SpecialGuard
from evermini.text.tokenizer import Tokenizer
from evermini.text.tools.formats import choose_format

Message = Mapping[str, Any]

IMAGE_MARK = f"[image {secrets.token_hex(16)}]"
"""Stands for an image in a message's text; another one in each process, so that no user can write it."""


class ChatTemplate:
    """One model's way to write conversations.

    Args:
        tokenizer: The model's tokenizer; it carries the template.

    Attributes:
        supports_tools: The template writes tool definitions.
        tool_format: How the model is told of tools, and calls them.

    Raises:
        DamagedCheckpointError: The template is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._guard = SpecialGuard(tokenizer.special_texts)
        self._source = tokenizer.chat_template or ""
        try:
            self._template = _ENVIRONMENT.from_string(self._source)
            variables = find_undeclared_variables(_ENVIRONMENT.parse(self._source))
        except jinja2.TemplateSyntaxError as error:
            raise DamagedCheckpointError(
                f"The checkpoint's chat template is not valid Jinja (line {error.lineno}: {error.message}). "
                "Use another conversion of this model."
            ) from error
        self.supports_tools = "tools" in variables
        self.tool_format = choose_format(self._source, self.supports_tools)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt as text, for people to look at; `encode_chat` is what the model gets.

        Args:
            messages: OpenAI messages: ``role``, ``content`` (text, or None beside ``tool_calls``; lists of parts are
                flattened by the caller), ``tool_calls`` (``arguments`` may be JSON text) and so on.
            tools: OpenAI tool definitions.
            add_generation_prompt: End with the beginning of the assistant's turn.
            variables: More of what this model's template reads, such as ``enable_thinking``; never a user's text.

        Raises:
            InvalidRequestError: The template refuses the conversation, or the model has no template.
            UnsupportedParameterError: There are tools or tool calls, and the template does not write them.
        """
        data = self._template_data(messages, tools)
        return self._render(data, add_generation_prompt, variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Return the prompt as token ids: special tokens only where the template itself writes them.

        Arguments and errors are those of `render`.
        """
        data, mark = self._guarded(messages, tools)
        return self._encode(self._render(data, add_generation_prompt, variables), mark)

    def encode_answer(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[int]]:
        """Return a prompt and the answer that follows it, as token ids, for a model to learn the one from the other.

        The prompt is what `encode_chat` gives for all messages but the last. The answer is what the template writes for
        the last one behind it, up to and with the token that ends it: tokens never reach across the border, as they
        do not when a model writes.

        Args:
            messages: As for `render`; the last is the assistant's.
            tools: As for `render`.
            variables: As for `render`.

        Raises:
            InvalidRequestError: The template refuses the conversation, or writes something else than the prompt in
                front of the answer, or no end behind it.
            UnsupportedParameterError: There are tools or tool calls, and the template does not write them.
        """
        data, mark = self._guarded(messages, tools)
        whole = self._render(data, False, variables)
        data["messages"] = data["messages"][:-1]
        prompt = self._render(data, True, variables)
        answer = self._encode(whole[len(prompt) :], mark, continues=True)
        end = next((at for at, i in enumerate(answer) if i in self._tokenizer.eos_ids), None)
        if end is None or not whole.startswith(prompt):
            raise InvalidRequestError(
                "This model's chat template does not write an answer as the prompt for it and an end: nothing can be "
                "learnt from the conversation. Train a model with another template.",
                param="messages",
            )
        return self._encode(prompt, mark), answer[: end + 1]

    def _guarded(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[dict[str, Any], str]:
        """Return what the template gets, special tokens in texts broken by a mark, and the mark; it may be ""."""
        data = self._template_data(messages, tools)
        mark = self._guard.find_mark(_strings(data))
        if mark:
            data = _map_strings(data, lambda text: self._guard.protect(text, mark))
        return data, mark

    def _encode(self, rendered: str, mark: str, *, continues: bool = False) -> list[int]:
        """Return what was rendered as token ids; ``continues``: other text stands in front of it."""
        segments = (
            segment.replace(mark, "") if mark and isinstance(segment, str) else segment
            for segment in self._tokenizer.split_special(rendered)
        )
        return self._tokenizer.encode_segments(("", *segments) if continues else segments)

    def _template_data(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> dict[str, Any]:
        if tools and not self.supports_tools:
            raise UnsupportedParameterError(
                "This model's chat template does not know tools. "
                "Leave 'tools' out, or serve a model with tool support.",
                param="tools",
            )
        if "tool_calls" not in self._source:
            for index, message in enumerate(messages):
                if message.get("tool_calls"):
                    raise UnsupportedParameterError(
                        "This model's chat template does not know tool calls. Put them into the text, or serve a model "
                        "with tool support.",
                        param=f"messages[{index}].tool_calls",
                    )
        prepared = [_prepare(message) for message in messages]
        if self._tokenizer.takes_parts:
            prepared = [message | {"content": _parts(message["content"])} for message in prepared]
        data = {"messages": prepared, "tools": tools or None}
        plain: dict[str, Any] = _map_strings(data, str)
        return plain

    def _render(
        self, data: dict[str, Any], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        if not self._source:
            raise InvalidRequestError(
                "This model has no chat template: it is not made for chat. Use /v1/completions, or serve a chat model."
            )
        context = self._tokenizer.named_tokens | {"documents": None} | variables | data
        try:
            return self._template.render(context, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # template code can fail in any way
            raise InvalidRequestError(
                f"This model's chat template cannot write the conversation: {error}. "
                "Change the roles or contents of the messages accordingly.",
                param="messages",
            ) from error


def _prepare(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it: tool arguments as objects, no content as "" unless it calls tools."""
    calls = message.get("tool_calls")
    prepared = {**message, "content": message.get("content")}
    if not calls:
        prepared.pop("tool_calls", None)
        if prepared["content"] is None:
            prepared["content"] = ""
        return prepared
    prepared["tool_calls"] = []
    for call in calls:
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = None  # what a model wrote in its call need not be JSON; it stays text
            function["arguments"] = parsed if isinstance(parsed, dict) else arguments
        prepared["tool_calls"].append({**call, "function": function})
    return prepared


def _parts(text: str | None) -> list[dict[str, str]]:
    """Return a message's text as parts, its images among them; there is one at least, for templates look at it."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate((text or "").split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Copy JSON-like data with every string changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _strings(value: Any) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _map_strings(value, note)
    return found


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML; models are trained on plain JSON.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
