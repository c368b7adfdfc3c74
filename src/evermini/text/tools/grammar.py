"""Grammars (in llguidance's Lark) of whole answers with tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evermini.text.schema import SchemaError, enforceable
from evermini.text.tools.plain import BETWEEN, BLANK, CLOSE, END, head
from evermini.text.tools.syntax import Syntax, ToolSpec

MAX_PARALLEL_CALLS = 32
"""Calls in one answer; a small model that has lost its thread would go on for ever."""

_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True)
class Rules:
    """What an answer may hold.

    Attributes:
        tools: What may be called; empty if nothing.
        mode: A call must come, may come, or must not.
        parallel: There may be several.
        answer: JSON schema of an answer without calls; ``None``: any text.
        tag: The vocabulary has the syntax's special token.
    """

    tools: tuple[ToolSpec, ...]
    mode: Literal["auto", "required", "none"]
    parallel: bool = True
    answer: Mapping[str, Any] | None = None
    tag: bool = False


def tool_grammar(syntax: Syntax, rules: Rules) -> str:
    """Return the grammar of an answer.

    Raises:
        InvalidRequestError: A function's schema is wrong or cannot be enforced in full.
        SchemaError: The answer's is.
    """
    lines: list[str] = []
    if rules.mode == "required":
        lines.append("start: calls")
    else:
        lines += _text_rules(syntax, rules)
    if rules.mode != "none":
        lines += _call_rules(syntax, rules)
    if _takes_plain(syntax, rules):
        lines += _plain_rules(syntax, rules)
    return "\n".join(lines) + "\n"


def _text_rules(syntax: Syntax, rules: Rules) -> list[str]:
    """Return the start rule and those for an answer's text."""
    calls = " | calls" if rules.mode == "auto" else ""
    if rules.answer is not None:
        return [f"start: answer{calls}", f"answer: {_json(rules.answer)}"]
    if not syntax.has_opener:
        # An answer that begins with a brace is a call.
        return [f"start: TEXT?{calls}", r"TEXT: /\s*[^\s{](?s:.)*/"]
    opener, plain = _escaped(syntax.opener.strip()), ""
    begins = opener
    if _takes_plain(syntax, rules):
        begins, plain = f"({opener}|{_OBJECT})", " | plain"
    lines = [f"TEXT: /(?s:.)*/ & ~/(?s:.)*{begins}(?s:.)*/"]
    if rules.mode == "none":
        return ["start: TEXT", *lines]
    # The first opener ends the text, and nothing but a call follows.
    before = f"BEFORE: /(?s:.)*{opener}/ & ~/(?s:.)*{begins}(?s:.)+/"
    return [f"start: TEXT | BEFORE call_rest{plain}", *lines, before]


def _takes_plain(syntax: Syntax, rules: Rules) -> bool:
    wanted = syntax.takes_plain and rules.mode == "auto" and rules.answer is None
    return wanted and any(tool.kind == "function" for tool in rules.tools)


_OBJECT = rf'\{{{BLANK}"name":{BLANK}"'
"""What calls without marks begin with, and other JSON."""


def _plain_rules(syntax: Syntax, rules: Rules) -> list[str]:
    """Return ``plain``: text up to the first object with a name, then calls without marks, or text without any.

    The text is one lexeme, whatever is called: with one for each tool, the lexer grows with the square of their number.
    """
    opener, most = _escaped(syntax.opener.strip()), _most_calls(syntax, rules)
    functions = [(n, tool) for n, tool in enumerate(rules.tools) if tool.kind == "function"]
    names = "|".join(tool.name for _, tool in functions)
    # A head with any name: with all the tools' in here, too, the lexer would outgrow its limits.
    further = f"({opener}|{head('[a-zA-Z0-9_-]*', syntax.key)})"
    rest = rf'({names})",{BLANK}"{syntax.key}": ?'
    lines = [
        f"OBJECT: /(?s:.)*{_OBJECT}/ & ~/(?s:.)*({opener}|{_OBJECT})(?s:.)+/",
        f"OTHER: /(?s:.)+/ & ~/{rest}(?s:.)*/ & ~/(?s:.)*{further}(?s:.)*/",
    ]
    calls = []
    for number, tool in functions:
        lines.append(f'NAME_{number}: /{tool.name}",{BLANK}"{syntax.key}": ?/')
        calls.append(f"NAME_{number} args_{number} CLOSE")
    more = ""
    if most > 1:
        lines.append(f"NEXT: /{BETWEEN}{_OBJECT}/")
        more = f"(NEXT plain_call){{0,{most - 1}}} "
    return [
        f"plain: OBJECT (OTHER? | plain_call {more}END?)",
        f"plain_call: {' | '.join(calls)}",
        *lines,
        f"CLOSE: /{CLOSE}/",
        f"END: /{END}/",
    ]


def _most_calls(syntax: Syntax, rules: Rules) -> int:
    return min(syntax.max_calls, MAX_PARALLEL_CALLS) if rules.parallel else 1


def _call_rules(syntax: Syntax, rules: Rules) -> list[str]:
    """Return ``calls`` and, where text may come first, ``call_rest``: calls but for the first opener."""
    most = _most_calls(syntax, rules)
    lines: list[str] = []
    closed: list[str] = []
    names: list[str] = []
    for number, tool in enumerate(rules.tools):
        name, body = f"tool_{number}", f"{_quoted(_quoted(tool.name))} "
        names.append(name)
        if tool.kind == "function":
            body += f'", " {_quoted(_quoted(syntax.key))} ": " args_{number} '
            lines.append(f"args_{number}: {_arguments(tool)}")
            body += _quoted("}" + syntax.closer)
        else:
            text, more = _input(syntax, tool, f"INPUT_{number}")
            body += f'"}}\\n" {text}'
            lines += more
        lines.append(f"{name}: {body}")
        if not syntax.ends_answer(tool):
            closed.append(name)
    # Pieces as in JSON, so that a JSON answer can begin alike.
    begin = '"{" "\\"name\\"" ": "'
    opener = syntax.opener.strip()
    further = f"{_quoted(syntax.separator + syntax.opener)} {begin}"
    lines.append(f"last: {' | '.join(names)}")
    before = ""
    if most > 1 and closed:
        lines.append(f"closed: {' | '.join(closed)}")
        before = f"(closed {further}){{0,{most - 1}}} "
    tag = f"{syntax.tag}? " if syntax.tag and rules.tag else ""
    first = f"{_quoted(syntax.opener)} " if syntax.opener else ""
    lines.append(f"calls: {tag}{first}{begin} {before}last")
    if opener:
        rest = _quoted(syntax.opener.removeprefix(opener))
        lines.append(f"call_rest: {rest} {begin} {before}last")
    return lines


def _arguments(tool: ToolSpec) -> str:
    schema: Mapping[str, Any] = tool.parameters or {"type": "object", "properties": {}}
    try:
        return _json(declared_only({**schema, "type": "object"}))
    except SchemaError as error:
        refused = error.in_request(f"function '{tool.name}'", tool.path)
        refused.code = "invalid_function_parameters"
        raise refused from None


def declared_only(schema: Any) -> Any:
    """Return a schema that accepts, of the values it did, those without properties that nobody declared.

    Where a schema does not say whether others are fine, models make some up; no function expects them.
    """
    if isinstance(schema, list):
        return [declared_only(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            result[keyword] = {name: declared_only(item) for name, item in value.items()}
        elif keyword in ("items", "prefixItems", "anyOf"):
            result[keyword] = declared_only(value)
        else:
            result[keyword] = value
    if isinstance(schema.get("properties"), Mapping) and not _OPEN & schema.keys():
        result["additionalProperties"] = False
    return result


_OPEN = frozenset(
    {
        *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames"),
        *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "minProperties"),
        *("dependencies", "dependentSchemas", "dependentRequired"),
    }
)
"""Beside one of these, ``properties`` need not be all that a schema declares."""


def _json(schema: Mapping[str, Any]) -> str:
    rewritten = enforceable(schema)
    assert isinstance(rewritten, dict), "an object's schema stays one"
    return f"%json {json.dumps({**rewritten, 'x-guidance': _JSON_STYLE})}"


def _input(syntax: Syntax, tool: ToolSpec, name: str) -> tuple[str, Sequence[str]]:
    """Return what stands for a custom tool's text, with the closing mark if there is one, and the rules for it."""
    if tool.definition is not None and tool.definition_syntax == "lark":
        return f"%lark {{\n{tool.definition}\n}}", []
    pattern = "(?s:.)*" if tool.definition is None else f"(?:{_slashed(tool.definition)})"
    if syntax.ends_answer(tool):
        return name, [f"{name}: /{pattern}/"]
    # One lexeme with the mark: on its own, the text would take the mark for more of itself.
    closer = _escaped(syntax.closer)
    return name, [f"{name}: /{pattern}{closer}/ & ~/(?s:.)*{closer}(?s:.)+/"]


def _quoted(text: str) -> str:
    return json.dumps(text)


def _escaped(text: str) -> str:
    return "".join(f"\\x{ord(char):02x}" if not char.isalnum() else char for char in text)


def _slashed(pattern: str) -> str:
    """Return a regular expression as it stands between slashes."""
    out, is_escaped = [], False
    for char in pattern:
        if char == "/" and not is_escaped:
            out.append("\\")
        out.append("\\n" if char == "\n" else char)
        is_escaped = char == "\\" and not is_escaped
    return "".join(out)
