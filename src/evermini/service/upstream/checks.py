"""Whether an answer has the form that was asked for: engines may ignore what they do not support.

Grammars make sure of that on our own engine. Here an answer is looked at when it is complete, and one of another form
is an error, not an answer. Regular expressions in a schema are left out: a stranger's may take forever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from evermini.errors import InvalidRequestError, UpstreamError
from evermini.service.answer import ChatChoice
from evermini.service.schemas import ChatRequest

_NUMBER = re.compile(r"\d+(?:,\d{3})*")


class FormCheck:
    """Looks at the finished choices of a request.

    Args:
        request: What is asked.
        figures: Numbers that a sweep has counted, the one that the question asks for first.

    Raises:
        InvalidRequestError: A schema is none.
    """

    def __init__(self, request: ChatRequest, figures: Sequence[int] = ()) -> None:
        self._figures = figures
        self._answer = _validator(request.answer_schema, "response_format")
        self._must_call = request.toolset.mode == "required"
        self._tools: dict[str, Validator | None] = {}
        for number, tool in enumerate(request.toolset.callable):
            function = tool.function
            strict = function.parameters if function is not None and function.strict else None
            self._tools[tool.name] = _validator(strict, f"tools[{number}].function.parameters")

    def check(self, choice: ChatChoice) -> None:
        """Check a choice that ended by itself.

        Raises:
            UpstreamError: It has another form than was asked for.
        """
        for call in choice.tool_calls:
            if call.name not in self._tools:
                raise _wrong(f"it calls '{call.name}', which is none of the tools")
            if (validator := self._tools[call.name]) is not None:
                _check(validator, call.arguments, f"the arguments of '{call.name}'")
        if choice.tool_calls:
            return
        if self._must_call:
            raise _wrong("no tool is called, though one must be")
        if self._answer is not None:
            _check(self._answer, choice.text, "the text")
        numbers = {number.replace(",", "") for number in _NUMBER.findall(choice.text)}
        if self._figures and numbers and str(self._figures[0]) not in numbers:
            raise UpstreamError(
                f"{self._figures[0]} was counted in the text, and the engine behind this model wrote another figure. "
                "Send the request again."
            )


def _validator(schema: dict[str, Any] | None, path: str) -> Validator | None:
    if schema is None:
        return None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise InvalidRequestError(
            f"Invalid schema for '{path}': {error.message}", param=path, code="invalid_value"
        ) from None
    plain: Any = extend(  # type: ignore[no-untyped-call]
        kind,
        {
            "pattern": _ignored,
            "patternProperties": _ignored,
            "additionalProperties": _additional(kind.VALIDATORS["additionalProperties"]),
        },
    )
    made: Validator = plain(schema, registry=Registry())  # the empty registry fetches nothing
    return made


def _ignored(*_: object) -> Iterator[ValidationError]:
    return iter(())


def _additional(check: Any) -> Any:
    def additional(
        validator: Any, allowed: Any, instance: Any, schema: Any
    ) -> Iterator[ValidationError]:
        if "patternProperties" not in schema:
            yield from check(validator, allowed, instance, schema)

    return additional


def _check(validator: Validator, text: str, what: str) -> None:
    try:
        problem = best_match(validator.iter_errors(json.loads(text)))
    except ValueError:
        raise _wrong(f"{what} is no JSON") from None
    except Unresolvable as error:
        raise _wrong(f"{what} cannot be checked: {error}") from None
    if problem is not None:
        raise _wrong(f"at {problem.json_path} of {what}: {problem.message[:300]}")


def _wrong(reason: str) -> UpstreamError:
    return UpstreamError(
        f"The engine behind this model did not keep to the form that was asked for: {reason}. Send the request again; "
        "if that fails too, it may not support this form."
    )
