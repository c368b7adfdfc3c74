"""A request's messages as token ids, by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evermini.errors import InvalidRequestError
from evermini.service.calling import answer_syntax, may_list, tools_shown
from evermini.service.messages import Message
from evermini.service.schemas import ChatRequest
from evermini.service.tools import Toolset
from evermini.text.chat import ChatTemplate
from evermini.text.chat import Message as TemplateMessage
from evermini.text.tools.syntax import Syntax


def encode(template: ChatTemplate, request: ChatRequest, texts: Sequence[str]) -> list[int]:
    """Return the prompt.

    Args:
        template: The model's.
        request: What is asked.
        texts: Each message's text, which may be another one than was sent (an excerpt).

    Raises:
        InvalidRequestError: The template refuses the conversation.
    """
    messages: list[TemplateMessage] = [
        message.for_template(text) for message, text in zip(request.messages, texts, strict=True)
    ]
    if request.response_format is not None and (told := request.response_format.instruction):
        messages = with_instruction(messages, told)
    syntax = answer_syntax(request, template.tool_format)
    return template.encode_chat(*_with_tools(template, messages, request.toolset, syntax))


def encode_answer(
    template: ChatTemplate, messages: Sequence[Message], toolset: Toolset
) -> tuple[list[int], list[int]]:
    """Return the prompt that `encode` makes of all messages but the last, and the last as the model has to write it.

    Raises:
        InvalidRequestError: The template refuses the conversation, or cannot write the answer in one turn.
    """
    last = messages[-1]
    if len(last.tool_calls or ()) > 1 and template.tool_format.syntax.max_calls == 1:
        raise InvalidRequestError(
            "This model calls one tool at a time, and the answer has several calls. Split it into several turns.",
            param=f"messages[{len(messages) - 1}].tool_calls",
        )
    written: list[TemplateMessage] = [message.for_template(message.text()) for message in messages]
    syntax = template.tool_format.syntax
    return template.encode_answer(*_with_tools(template, written, toolset, syntax))


def _with_tools(
    template: ChatTemplate, messages: list[TemplateMessage], toolset: Toolset, syntax: Syntax
) -> tuple[list[TemplateMessage], list[dict[str, Any]] | None]:
    """Return messages and tool definitions as the model's template wants them."""
    if not toolset.tools and not any("tool_calls" in m or m["role"] == "tool" for m in messages):
        return messages, None
    return template.tool_format.prepare(
        _with_tool_names(messages), tools_shown(toolset), several=may_list(toolset, syntax)
    )


def _with_tool_names(messages: Sequence[TemplateMessage]) -> list[TemplateMessage]:
    """Return the messages with the tool's name in each result: some templates show it."""
    names: dict[str, str] = {}
    named: list[TemplateMessage] = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call[call["type"]]["name"]
        if message["role"] == "tool" and "name" not in message:
            name = names.get(message["tool_call_id"])
            named.append(message if name is None else {**message, "name": name})
        else:
            named.append(message)
    return named


def with_instruction(
    messages: Sequence[TemplateMessage], instruction: str
) -> list[TemplateMessage]:
    """Return ``messages`` with more at the end of the system message, which is made if there is none."""
    if messages and messages[0]["role"] == "system":
        content = f"{messages[0]['content']}\n\n{instruction}"
        return [{**messages[0], "content": content}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]
