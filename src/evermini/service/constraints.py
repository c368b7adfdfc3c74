"""The grammar that a request's answer must follow, compiled off the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from evermini.engine.constraint import Constraint
from evermini.errors import InvalidRequestError
from evermini.service.calling import compile_tools, needs_grammar
from evermini.service.metrics import RequestTimer
from evermini.service.schemas import ChatRequest
from evermini.text.grammar import GrammarCompiler
from evermini.text.schema import SchemaError
from evermini.text.tools.formats import ToolFormat

_COMPILERS = ThreadPoolExecutor(2, thread_name_prefix="evermini-grammars")
"""Few, so that hostile schemas cannot take every core; a compilation ends by its own limits."""


async def constraint_of(
    request: ChatRequest, form: ToolFormat, compiler: GrammarCompiler, timer: RequestTimer
) -> Constraint | None:
    """Return the grammar that ``request`` asks for, compiled for the tokens of ``compiler``'s model.

    Args:
        request: Its tools and the form of its answer count.
        form: How the model calls tools.
        compiler: For the model's tokens.
        timer: Told how long it took.

    Raises:
        InvalidRequestError: The schema, grammar or expression is wrong, too complex, or cannot be enforced in full.
    """
    wanted, extensions = request.response_format, request.x_evermini
    work: Callable[[], Constraint]
    if extensions is not None and extensions.grammar is not None:
        work = partial(_named, compiler.lark, extensions.grammar, "x_evermini.grammar")
    elif extensions is not None and extensions.regex is not None:
        work = partial(_named, compiler.regex, extensions.regex, "x_evermini.regex")
    elif needs_grammar(request):
        work = partial(compile_tools, request, form, compiler)
    elif wanted is not None and wanted.json_schema is not None:
        subject = f"response_format '{wanted.json_schema.name}'"
        work = partial(_schema, compiler, wanted.json_schema.definition, subject)
    elif wanted is not None and wanted.type == "json_object":
        work = compiler.json_object
    else:
        return None
    return await _compiled(work, timer)


async def constrain(compiler: GrammarCompiler, regex: str, timer: RequestTimer) -> Constraint:
    """Return the grammar of an expression of our own, compiled off the event loop."""
    return await _compiled(partial(compiler.regex, regex), timer)


async def _compiled(work: Callable[[], Constraint], timer: RequestTimer) -> Constraint:
    began = time.perf_counter()
    constraint = await asyncio.get_running_loop().run_in_executor(_COMPILERS, work)
    timer.compiled(time.perf_counter() - began)
    return constraint


def _named(compile_text: Callable[[str], Constraint], text: str, path: str) -> Constraint:
    try:
        return compile_text(text)
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"Invalid '{path}': {error.message}", param=path, code="invalid_value"
        ) from None


def _schema(compiler: GrammarCompiler, schema: dict[str, object], subject: str) -> Constraint:
    try:
        return compiler.json_schema(schema)
    except SchemaError as error:
        raise error.in_request(subject, "response_format") from None
