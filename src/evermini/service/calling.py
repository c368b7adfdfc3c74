"""A chat request's tools as the model's own format wants them: what it is shown, held to, and read back from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from evermini.engine.constraint import Constraint
from evermini.errors import InvalidRequestError
from evermini.service.schemas import ChatRequest
from evermini.service.tools import Tool, Toolset
from evermini.text.grammar import GrammarCompiler
from evermini.text.tools.formats import ToolFormat
from evermini.text.tools.grammar import Rules, tool_grammar
from evermini.text.tools.parser import CallParser
from evermini.text.tools.syntax import Syntax, ToolSpec


def tools_shown(toolset: Toolset) -> list[ToolSpec]:
    """Return the tools that the model is told of: with ``tool_choice`` none, it need not know any."""
    return [] if toolset.mode == "none" else specs(toolset.tools, toolset)


def may_list(toolset: Toolset, syntax: Syntax) -> bool:
    """Return whether the grammar lets the model write several calls as a JSON list."""
    return toolset.mode == "auto" and toolset.parallel and syntax.takes_plain


def specs(tools: Sequence[Tool], toolset: Toolset) -> list[ToolSpec]:
    """Return ``tools``, some of the toolset's, as the text layer knows them."""
    numbers = {tool.name: number for number, tool in enumerate(toolset.tools)}
    return [_spec(tool, numbers[tool.name], toolset.is_legacy) for tool in tools]


def new_parser(request: ChatRequest, form: ToolFormat) -> partial[CallParser] | None:
    """Return what makes a reader of the calls in an answer, if there can be any."""
    toolset = request.toolset
    if toolset.mode == "none":
        return None
    return partial(CallParser, answer_syntax(request, form), specs(toolset.callable, toolset))


def answer_syntax(request: ChatRequest, form: ToolFormat) -> Syntax:
    """Return how calls are written: where answers are JSON, with marks alone."""
    if request.answer_schema is None:
        return form.syntax
    return replace(form.syntax, takes_plain=False)


def needs_grammar(request: ChatRequest) -> bool:
    """Return whether tools have a say in what the answer may be."""
    toolset = request.toolset
    if toolset.mode != "none":
        return True
    # Without tools, a model that sees earlier calls may write another one, which nobody would read.
    has_called = any(message.tool_calls or message.function_call for message in request.messages)
    return has_called and request.answer_schema is None


def compile_tools(request: ChatRequest, form: ToolFormat, compiler: GrammarCompiler) -> Constraint:
    """Return the grammar of the whole answer.

    Raises:
        InvalidRequestError: A function's schema or custom tool's grammar is wrong, too complex, or cannot be enforced.
    """
    toolset = request.toolset
    callable_tools = specs(toolset.callable, toolset) if toolset.mode != "none" else []
    for tool in callable_tools:
        _check_definition(tool, compiler)
    rules = Rules(
        tuple(callable_tools),
        toolset.mode,
        toolset.parallel,
        request.answer_schema,
        form.syntax.tag is not None and compiler.is_special(form.syntax.tag),
    )
    return compiler.lark(tool_grammar(answer_syntax(request, form), rules))


def _spec(tool: Tool, number: int, is_legacy: bool) -> ToolSpec:
    if tool.function is not None:
        function = tool.function
        path = (
            f"functions[{number}].parameters"
            if is_legacy
            else f"tools[{number}].function.parameters"
        )
        return ToolSpec(
            function.name, "function", function.description, function.parameters, path=path
        )
    custom = tool.custom
    assert custom is not None, "checked before"
    grammar = custom.format.grammar if custom.format else None
    return ToolSpec(
        custom.name,
        "custom",
        custom.description,
        definition=grammar.definition if grammar else None,
        definition_syntax=grammar.syntax if grammar else "lark",
        path=f"tools[{number}].custom.format.grammar.definition",
    )


def _check_definition(tool: ToolSpec, compiler: GrammarCompiler) -> None:
    """Compile a custom tool's grammar by itself, so that an error names it."""
    if tool.definition is None:
        return
    try:
        if tool.definition_syntax == "lark":
            compiler.lark(tool.definition)
        else:
            compiler.regex(tool.definition)
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"Invalid '{tool.path}': {error.message}", param=tool.path, code="invalid_grammar"
        ) from None
