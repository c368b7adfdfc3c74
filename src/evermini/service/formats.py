"""What form an answer must have: ``response_format``, and the grammars of ``x_evermini``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from evermini.engine.constraint import Constraint
from evermini.errors import InvalidRequestError
from evermini.service.strict import check_strict
from evermini.service.validation import WireModel
from evermini.text.grammar import GrammarCompiler
from evermini.text.schema import SchemaError

MAX_SHOWN = 8
"""A schema is shown to the model if its text has at most this share (one in so many) of the window's tokens."""
_CHARACTERS_PER_TOKEN = 3

_COMPILERS = ThreadPoolExecutor(2, thread_name_prefix="evermini-grammars")
"""Few, so that hostile schemas cannot take every core; a compilation ends within a second or so by its own limits."""


class JsonSchemaFormat(WireModel):
    """A named JSON schema.

    Attributes:
        name: For error messages, and shown to the model.
        description: What the answer is for; shown to the model.
        definition: The schema.
        strict: It must keep to the subset that OpenAI's strict mode allows.
    """

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(WireModel):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def check(self, path: str, texts: Sequence[str]) -> None:
        """Check what depends on the type.

        Args:
            path: Where the format stands in the request.
            texts: Those of the messages.

        Raises:
            InvalidRequestError: Naming the field.
        """
        if (self.json_schema is None) == (self.type == "json_schema"):
            missing = self.json_schema is None
            raise InvalidRequestError(
                f"{'Missing required' if missing else 'Unknown'} parameter: '{path}.json_schema'.",
                param=f"{path}.json_schema",
                code="missing_required_parameter" if missing else "unknown_parameter",
            )
        if self.type == "json_object" and not any("json" in text.lower() for text in texts):
            raise InvalidRequestError(
                "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
                param="messages",
            )
        if self.json_schema is not None and self.json_schema.strict:
            check_strict(
                self.json_schema.definition,
                subject=f"response_format '{self.json_schema.name}'",
                param=path,
            )


class Requested(Protocol):
    """What a request may say about the form of its answer."""

    @property
    def response_format(self) -> ResponseFormat | None:
        """The contract's field."""

    @property
    def grammar(self) -> str | None:
        """A Lark grammar."""

    @property
    def regex(self) -> str | None:
        """A regular expression."""


@dataclass(frozen=True)
class OutputFormat:
    """The form of an answer, ready to be enforced.

    Attributes:
        constraint: What the engine holds the answer to.
        instruction: What the model is told about it.
    """

    constraint: Constraint | None = None
    instruction: str | None = None


async def output_format(
    request: Requested,
    compiler: GrammarCompiler,
    *,
    window: int,
    on_compiled: Callable[[float], None],
) -> OutputFormat:
    """Compile the form that a request asks for, in a thread.

    Args:
        request: What is asked for; checked already.
        compiler: For the tokens of the model that will answer.
        window: Tokens of its window.
        on_compiled: Told how long it took, in seconds.

    Raises:
        InvalidRequestError: The schema, grammar or expression is wrong, too complex, or cannot be enforced in full.
    """
    wanted = request.response_format
    if request.grammar is not None:
        work = _in_request(compiler.lark, request.grammar, "x_evermini.grammar")
    elif request.regex is not None:
        work = _in_request(compiler.regex, request.regex, "x_evermini.regex")
    elif wanted is not None and wanted.type == "json_object":
        work = compiler.json_object
    elif wanted is not None and wanted.json_schema is not None:
        work = _schema_compiler(compiler, wanted.json_schema)
    else:
        return OutputFormat()
    began = time.perf_counter()
    constraint = await asyncio.get_running_loop().run_in_executor(_COMPILERS, work)
    on_compiled(time.perf_counter() - began)
    shown = wanted.json_schema if wanted is not None else None
    return OutputFormat(constraint, None if shown is None else _instruction(shown, window))


def _in_request(
    compile_text: Callable[[str], Constraint], text: str, path: str
) -> Callable[[], Constraint]:
    def work() -> Constraint:
        try:
            return compile_text(text)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"Invalid '{path}': {error.message}", param=path, code="invalid_value"
            ) from None

    return work


def _schema_compiler(
    compiler: GrammarCompiler, wanted: JsonSchemaFormat
) -> Callable[[], Constraint]:
    def work() -> Constraint:
        try:
            return compiler.json_schema(wanted.definition)
        except SchemaError as error:
            raise error.in_request(f"response_format '{wanted.name}'", "response_format") from None

    return work


def _instruction(wanted: JsonSchemaFormat, window: int) -> str:
    """Return what the model is told. The mask makes the answer fit; this makes it sensible."""
    purpose = f" ({wanted.description})" if wanted.description else ""
    schema = json.dumps(wanted.definition, ensure_ascii=False, separators=(",", ":"))
    if len(schema) > window // MAX_SHOWN * _CHARACTERS_PER_TOKEN:
        return f"Answer with a JSON value named {wanted.name}{purpose}."
    return f"Answer with a JSON value named {wanted.name}{purpose} that follows this JSON schema:\n{schema}"


def with_instruction(
    messages: Sequence[Mapping[str, str]], instruction: str
) -> list[Mapping[str, str]]:
    """Return template messages with ``instruction`` at the end of the system message, which is made if need be."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{instruction}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]
