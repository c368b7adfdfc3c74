"""Tools that a chat request offers, and which of them the model may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from evermini.errors import InvalidRequestError
from evermini.service.messages import ToolName
from evermini.service.strict import check_strict
from evermini.service.validation import WireModel, check_variant, wrong_type

MAX_TOOLS = 128
MAX_DESCRIPTION = 1024
"""Characters of a function's own description; those of its parameters are free."""

Mode = Literal["none", "auto", "required"]
Description = Annotated[str, Field(max_length=MAX_DESCRIPTION)]


class FunctionDefinition(WireModel):
    """A function. No ``parameters``: it takes none."""

    name: ToolName
    description: Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomGrammar(WireModel):
    """What a custom tool's input must look like."""

    definition: str
    syntax: Literal["lark", "regex"]


class CustomFormat(WireModel):
    """Free text or text of a grammar."""

    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class CustomDefinition(WireModel):
    """A tool that takes one text."""

    name: ToolName
    description: Description | None = None
    format: CustomFormat | None = None


class Tool(WireModel):
    """One entry of ``tools``."""

    type: Literal["function", "custom"]
    function: FunctionDefinition | None = None
    custom: CustomDefinition | None = None

    @property
    def name(self) -> str:
        """The tool's name."""
        definition = self.function or self.custom
        assert definition is not None, "checked before"
        return definition.name


class Named(WireModel):
    """A tool by its name."""

    name: str


class ToolReference(WireModel):
    """A tool by its type and name."""

    type: Literal["function", "custom"]
    function: Named | None = None
    custom: Named | None = None

    @property
    def name(self) -> str:
        """The tool's name."""
        named = self.function or self.custom
        assert named is not None, "checked before"
        return named.name


class AllowedTools(WireModel):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Field(min_length=1)]


class ToolChoice(WireModel):
    """``tool_choice``; a plain word stands in ``type``."""

    type: Literal["none", "auto", "required", "function", "custom", "allowed_tools"]
    function: Named | None = None
    custom: Named | None = None
    allowed_tools: AllowedTools | None = None


def as_choice(value: object) -> object:
    """Return a word of ``tool_choice`` or ``function_call`` as an object."""
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"type": value}
    raise wrong_type("a string or an object")


class LegacyChoice(WireModel):
    """``function_call``: a word or a function's name."""

    type: Literal["none", "auto"] | None = None
    name: str | None = None


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
Functions = Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS)]
Word = Literal["none", "auto", "required"]
Choice = Annotated[
    ToolChoice | None, BeforeValidator(as_choice, json_schema_input_type=Word | ToolChoice | None)
]
OldChoice = Annotated[
    LegacyChoice | None,
    BeforeValidator(
        as_choice, json_schema_input_type=Literal["none", "auto"] | LegacyChoice | None
    ),
]


@dataclass(frozen=True)
class Toolset:
    """The tools of a request, whichever fields they came in.

    Attributes:
        tools: All of them, as the model is shown them.
        callable: Those that may be called.
        mode: Whether the model must, may or must not call.
        parallel: An answer may hold several calls.
        is_named: The caller named the one tool to call.
        is_legacy: They came as ``functions``.
    """

    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    mode: Mode = "none"
    parallel: bool = True
    is_named: bool = False
    is_legacy: bool = False


def from_tools(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> Toolset:
    """Return the tools of the fields ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        InvalidRequestError: They do not fit together.
    """
    if not tools:
        asks = choice if choice is not None and choice.type != "none" else None
        _refuse_without("tools", tool_choice=asks, parallel_tool_calls=parallel)
        return Toolset()
    offered = tuple(tools)
    for number, tool in enumerate(offered):
        _check_tool(tool, f"tools[{number}]")
    _refuse_duplicates([tool.name for tool in offered], "tools")
    several = parallel is not False
    if choice is None:
        return Toolset(offered, offered, "auto", several)
    match choice.type:
        case "none" | "auto" | "required" as mode:
            _check_choice(choice, None)
            return Toolset(offered, offered, mode, several)
        case "function" | "custom" as kind:
            _check_choice(choice, kind)
            named = choice.function or choice.custom
            assert named is not None, "checked just now"
            found = _find(offered, kind, named.name, f"tool_choice.{kind}.name")
            return Toolset(offered, (found,), "required", False, is_named=True)
        case "allowed_tools":
            _check_choice(choice, "allowed_tools")
            assert choice.allowed_tools is not None, "checked just now"
            allowed = set()
            for number, wanted in enumerate(choice.allowed_tools.tools):
                path = f"tool_choice.allowed_tools.tools[{number}]"
                check_variant(wanted, path, _VARIANTS)
                allowed.add(_find(offered, wanted.type, wanted.name, path).name)
            some = tuple(tool for tool in offered if tool.name in allowed)
            return Toolset(offered, some, choice.allowed_tools.mode, several)


def from_functions(
    functions: Sequence[FunctionDefinition] | None, choice: LegacyChoice | None
) -> Toolset:
    """Return the tools of the deprecated fields ``functions`` and ``function_call``: at most one call.

    Raises:
        InvalidRequestError: They do not fit together.
    """
    if not functions:
        asks = choice if choice is not None and choice.type != "none" else None
        _refuse_without("functions", function_call=asks)
        return Toolset()
    offered = tuple(Tool(type="function", function=function) for function in functions)
    _refuse_duplicates([tool.name for tool in offered], "functions")
    if choice is None:
        return Toolset(offered, offered, "auto", False, is_legacy=True)
    if (choice.type is None) == (choice.name is None):
        raise InvalidRequestError(
            "Invalid value for 'function_call': expected 'none', 'auto' or an object with a 'name'.",
            param="function_call",
            code="invalid_value",
        )
    if choice.name is None:
        return Toolset(offered, offered, choice.type or "auto", False, is_legacy=True)
    found = _find(offered, "function", choice.name, "function_call")
    return Toolset(offered, (found,), "required", False, is_named=True, is_legacy=True)


_VARIANTS = {"function": "function", "custom": "custom"}


def _refuse_without(needed: str, **fields: object) -> None:
    for field, value in fields.items():
        if value is not None:
            raise InvalidRequestError(
                f"Invalid value for '{field}': '{field}' is only allowed when '{needed}' are specified.",
                param=field,
            )


def _check_tool(tool: Tool, path: str) -> None:
    check_variant(tool, path, _VARIANTS)
    if tool.function is not None and tool.function.strict:
        _check_strict(tool.function, f"{path}.function.parameters")
    if tool.custom is None or tool.custom.format is None:
        return
    form, where = tool.custom.format, f"{path}.custom.format"
    if form.type == "grammar":
        check_variant(form, where, {"grammar": "grammar"})
    elif form.grammar is not None:
        raise InvalidRequestError(
            f"Unknown parameter: '{where}.grammar'.",
            param=f"{where}.grammar",
            code="unknown_parameter",
        )


def _check_strict(function: FunctionDefinition, path: str) -> None:
    schema = function.parameters
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        check_strict(schema, subject=f"function '{function.name}'", param=path)
    except InvalidRequestError as error:
        error.code = "invalid_function_parameters"
        raise


def _check_choice(choice: ToolChoice, wanted: str | None) -> None:
    """Check that of the fields for each type only ``wanted`` is there."""
    for field in ("function", "custom", "allowed_tools"):
        is_set = getattr(choice, field) is not None
        if is_set == (field == wanted):
            continue
        path = f"tool_choice.{field}"
        if is_set:
            raise InvalidRequestError(
                f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter"
            )
        raise InvalidRequestError(
            f"Missing required parameter: '{path}'.",
            param=path,
            code="missing_required_parameter",
        )


def _refuse_duplicates(names: Sequence[str], field: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise InvalidRequestError(
                f"Invalid value for '{field}': two of them have the name '{name}'. Give each its own.",
                param=f"{field}[{number}]",
                code="invalid_value",
            )


def _find(tools: Sequence[Tool], kind: str, name: str, path: str) -> Tool:
    for tool in tools:
        if (tool.type, tool.name) == (kind, name):
            return tool
    where = "functions" if path == "function_call" else "tools"
    raise InvalidRequestError(
        f"Tool choice '{name}' not found in '{where}' parameter.", param=path, code="invalid_value"
    )
