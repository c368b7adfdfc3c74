"""How a model family is told of tools and shown earlier calls; chosen by a look at its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evermini.text.tools.syntax import GENERIC, HERMES, LLAMA3, Syntax, ToolSpec

Message = Mapping[str, Any]

_DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class ToolFormat:
    """One family's way with tools.

    Attributes:
        family: ``hermes``, ``llama3`` or ``generic``.
        syntax: What its calls look like.
    """

    family: Literal["hermes", "llama3", "generic"]
    syntax: Syntax

    def prepare(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, several: bool = False
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Return the messages and tool definitions to hand to the chat template.

        Args:
            messages: As OpenAI's, with ``type`` ``function`` or ``custom`` in their calls.
            tools: What the model is told of.
            several: Ask for a call per thing wanted, where the family's template does not and the syntax allows it.
        """
        if self.family == "generic":
            written = list(self._as_text(messages))
            return (_with_system(written, _instructions(tools)) if tools else written), None
        prepared: list[Message] = []
        for message in messages:
            if any("custom" in call for call in message.get("tool_calls", ())):
                prepared.append(self._calls_as_text(message))
            else:
                prepared.append(message)
        if self.syntax.max_calls == 1:
            prepared = list(_one_call_each(prepared))
        functions = [tool for tool in tools if tool.kind == "function"]
        if several and functions and self.syntax.takes_plain:
            prepared = _with_system(prepared, _listing(functions))
        return prepared, [_definition(tool) for tool in tools] or None

    def _as_text(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Yield the messages with calls and results as text in assistant's and user's messages."""
        results: list[str] = []
        for message in messages:
            if message["role"] == "tool":
                results.append(
                    f"Result of {message.get('name', 'the call')}:\n{message['content']}"
                )
                continue
            if results:
                yield {"role": "user", "content": "\n\n".join(results)}
                results = []
            yield self._calls_as_text(message) if message.get("tool_calls") else message
        if results:
            yield {"role": "user", "content": "\n\n".join(results)}

    def _calls_as_text(self, message: Message) -> Message:
        """Return an assistant's message with its calls written out behind its text."""
        syntax = self.syntax
        written = []
        for call in message["tool_calls"]:
            if "custom" in call:
                tool = ToolSpec(call["custom"]["name"], "custom")
                written.append(f"{syntax.head(tool)}{call['custom']['input']}")
            else:
                tool = ToolSpec(call["function"]["name"])
                written.append(f"{syntax.head(tool)}{_tidy(call['function']['arguments'])}}}")
        text = message["content"] or ""
        calls = syntax.separator.join(f"{syntax.opener}{call}{syntax.closer}" for call in written)
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**plain, "content": f"{text}\n{calls}" if text else calls}


def choose_format(template: str, supports_tools: bool) -> ToolFormat:
    """Return the format of the model that has this chat template.

    Args:
        template: Jinja source.
        supports_tools: It writes tool definitions.
    """
    # Some write XML between the same marks (Qwen3-Coder): those get the generic instructions.
    if supports_tools and "<tool_call>" in template and "<function=" not in template:
        return ToolFormat("hermes", HERMES)
    if supports_tools and "ipython" in template and '"parameters"' in template.replace("\\", ""):
        return ToolFormat("llama3", LLAMA3)
    return ToolFormat("generic", GENERIC)


def _definition(tool: ToolSpec) -> dict[str, Any]:
    """Return a tool as templates know them: as a function."""
    function: dict[str, Any] = {"name": tool.name}
    description = tool.description or ""
    if tool.kind == "custom":
        description = f"{description} {_custom_rule(tool)}".strip()
    if description:
        function["description"] = description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _custom_rule(tool: ToolSpec) -> str:
    head = json.dumps({"name": tool.name})
    rule = f"Takes text instead of arguments: write {head}, a line break, and the text."
    if tool.definition is None:
        return rule
    language = "Lark grammar" if tool.definition_syntax == "lark" else "regular expression"
    return f"{rule} The text follows this {language}:\n{tool.definition}"


def _instructions(tools: Sequence[ToolSpec]) -> str:
    definitions = "\n".join(
        json.dumps(_definition(tool)["function"], ensure_ascii=False) for tool in tools
    )
    return (
        f"You can call these functions:\n{definitions}\n\n"
        "If a function helps with what the user asks for, answer only with the call, as JSON on one line:\n"
        '{"name": "FUNCTION", "arguments": {"ARGUMENT": VALUE}}\n'
        "Take the values from the user's words. Write several calls on a line each. "
        "If no function fits, answer in plain words."
    )


def _listing(functions: Sequence[ToolSpec]) -> str:
    """Return how to write several calls at once; with placeholders for names, small models would write those."""
    first, last = (
        f'{{"name": "{tool.name}", "arguments": {{...}}}}' for tool in (functions[0], functions[-1])
    )
    return (
        "If the request names several items, places or tasks, each needs a call of its own. "
        f"Write all of the calls in one JSON list, one entry per item:\n[{first}, {last}, ...]\n"
        "Otherwise write one call. If no function fits the request, answer in plain words."
    )


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": f"{_DEFAULT_SYSTEM}\n\n{text}"}, *messages]


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """Yield the messages with one call in each: call, its result, next call, its result.

    Templates that know a single call at a time refuse the others' order.
    """
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            yield {
                **message,
                "content": None if number else message["content"],
                "tool_calls": [call],
            }
            yield from (r for r in results if r.get("tool_call_id") == call.get("id"))


def _tidy(arguments: str) -> str:
    """Return JSON arguments as the model would write them; what is no JSON stays as it is."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except ValueError:
        return arguments
