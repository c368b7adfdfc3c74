"""From a decoded JSON body to a typed request, or to the 400 that OpenAI would have sent.

`parse` is the one entrance for every request, whatever carried it (HTTP, a batch file, the Python API), so that all of
them accept and refuse the same things with the same words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from evermini.errors import InvalidRequestError

RequestT = TypeVar("RequestT", bound=BaseModel)


class WireModel(BaseModel):
    """Base of what comes over the wire: exact names, exact types, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a decimal",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}


def parse(model: type[RequestT], body: object, path: str = "") -> RequestT:
    """Validate ``body`` (decoded JSON) against ``model``.

    Args:
        model: What it should be.
        body: What it is.
        path: Where it stands, if it is a part of the request.

    Raises:
        InvalidRequestError: With OpenAI's wording, and ``param`` naming the field (``messages[0].role``).
    """
    if not isinstance(body, dict):
        where = f"'{path}'" if path else "the request body"
        raise InvalidRequestError(
            f"Invalid type for {where}: expected an object, but got {_named(body)} instead.",
            param=path or None,
            code="invalid_type",
        )
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _translate(error.errors(include_url=False), path) from None


def find_problems(model: type[RequestT], body: object) -> RequestT | list[tuple[str, str]]:
    """Validate ``body`` as `parse` does, and return every problem that it has, each as (path, message).

    For files, whose authors want to correct all of it at once.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        found = []
        for problem in error.errors(include_url=False):
            path = field_path([part for part in problem["loc"] if part != "[key]"], "")
            found.append((path, _describe(problem, path)[0]))
        return found


def wrong_type(expected: str) -> PydanticCustomError:
    """Return what a validator raises for a value of another type than ``expected`` ("a string or an array")."""
    return PydanticCustomError("wrong_type", "wrong type", {"expected": expected})


def check_variant(variant: BaseModel, path: str, fields: Mapping[str, str]) -> None:
    """Check that of a tagged object's fields exactly the one that its type asks for is set.

    Args:
        variant: The object; its ``type`` is a key of ``fields``.
        path: Where it stands.
        fields: Type -> name of its field.

    Raises:
        InvalidRequestError: The field is missing, or that of another type is there.
    """
    kind = getattr(variant, "type")  # noqa: B009 - every variant has one, the base class does not
    wanted = fields[kind]
    if getattr(variant, wanted) is None:
        raise InvalidRequestError(
            f"Missing required parameter: '{path}.{wanted}'.",
            param=f"{path}.{wanted}",
            code="missing_required_parameter",
        )
    for other in fields.values():
        if other != wanted and getattr(variant, other) is not None:
            raise InvalidRequestError(
                f"Unknown parameter: '{path}.{other}'.",
                param=f"{path}.{other}",
                code="unknown_parameter",
            )


def field_path(loc: Sequence[int | str], path: str = "") -> str:
    """Return ``("messages", 0, "role")`` as ``messages[0].role``, below ``path``."""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _named(value: object) -> str:
    """Return what messages call a JSON value, such as "an array"."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a decimal number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _translate(errors: list[ErrorDetails], below: str) -> InvalidRequestError:
    """Turn pydantic's findings into one error; unknown arguments come first, as at OpenAI."""
    unknown = [
        str(e["loc"][0]) for e in errors if e["type"] == "extra_forbidden" and len(e["loc"]) == 1
    ]
    if unknown and not below:
        word = "argument" if len(unknown) == 1 else "arguments"
        return InvalidRequestError(
            f"Unrecognized request {word} supplied: {', '.join(unknown)}",
            param=unknown[0],
            code="unknown_parameter",
        )
    error = errors[0]
    path = field_path([part for part in error["loc"] if part != "[key]"], below)
    message, code = _describe(error, path)
    return InvalidRequestError(message, param=path, code=code)


def _describe(error: ErrorDetails, path: str) -> tuple[str, str]:
    """Return OpenAI's message and code for one finding."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return f"Missing required parameter: '{path}'.", "missing_required_parameter"
    if kind == "extra_forbidden":
        return f"Unknown parameter: '{path}'.", "unknown_parameter"
    if kind in _EXPECTED:
        return (
            f"Invalid type for '{path}': expected {_EXPECTED[kind]}, but got {_named(value)} instead.",
            "invalid_type",
        )
    if kind == "wrong_type":  # raised by our own validators
        return (
            f"Invalid type for '{path}': expected {context['expected']}, but got {_named(value)} instead.",
            "invalid_type",
        )
    if kind == "literal_error":
        allowed = re.findall(r"'[^']*'|\d+", str(context["expected"]))
        listed = ", ".join(allowed[:-1]) + (" and " if allowed[1:] else "") + allowed[-1]
        shown = f"'{value}'" if isinstance(value, str) else _named(value)
        if isinstance(value, (int, float)):
            shown = json.dumps(value)
        return f"Invalid value: {shown}. Supported values are: {listed}.", "invalid_value"
    if kind in {"greater_than_equal", "less_than_equal"}:
        return _out_of_range(path, value, context)
    if kind in {"too_short", "too_long", "string_too_short", "string_too_long"}:
        return _wrong_length(kind, path, value, context)
    if kind == "string_pattern_mismatch":
        return (
            f"Invalid '{path}': string does not match pattern. Expected a string that matches the pattern "
            f"'{context['pattern']}'.",
            "invalid_value",
        )
    return f"Invalid '{path}': {error['msg'][:1].lower()}{error['msg'][1:]}.", "invalid_value"


def _out_of_range(path: str, value: Any, context: dict[str, Any]) -> tuple[str, str]:
    above = "le" in context
    bound = context["le" if above else "ge"]
    kind = "integer" if isinstance(bound, int) else "decimal"
    shown = value if isinstance(value, int) else f"{value:g}"
    return (
        f"Invalid '{path}': {kind} {'above maximum' if above else 'below minimum'} value. Expected a value "
        f"{'<=' if above else '>='} {bound:g}, but got {shown} instead.",
        f"{kind}_{'above_max' if above else 'below_min'}_value",
    )


def _wrong_length(kind: str, path: str, value: Any, context: dict[str, Any]) -> tuple[str, str]:
    kinds: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    what = kinds[type(value)]
    noun = what.split()[1]
    if kind.endswith("too_short"):
        return (
            f"Invalid '{path}': empty {noun}. Expected {what} with minimum length {context['min_length']}, but got an "
            f"empty {noun} instead.",
            f"empty_{noun}",
        )
    limit = context["max_length"]
    if noun == "object":
        return (
            f"Invalid '{path}': too many properties. Expected an object with at most {limit} properties, but got an "
            f"object with {len(value)} properties instead.",
            "object_above_max_properties",
        )
    return (
        f"Invalid '{path}': {noun} too long. Expected {what} with maximum length {limit}, but got {what} with length "
        f"{len(value)} instead.",
        f"{noun}_above_max_length",
    )
