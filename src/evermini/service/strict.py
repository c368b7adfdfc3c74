"""The subset of JSON Schema that strict mode allows, checked with OpenAI's words.

Every object says ``additionalProperties: false`` and requires all its properties, so that there is one way to write an
answer; an optional value is one that may be null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evermini.errors import InvalidRequestError

MAX_DEPTH = 10
MAX_PROPERTIES = 5_000
MAX_ENUM_VALUES = 1_000
MAX_NAME_CHARACTERS = 120_000
"""Over the names of properties and definitions, enum values and constants."""
MAX_LONG_ENUM_CHARACTERS = 15_000
LONG_ENUM = 250
"""Values from which on an enum of strings has a limit on its characters of its own."""

FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}
)
TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})

_ANYWHERE = frozenset({"type", "description", "title", "enum", "const", "anyOf", "$ref"})
_ROOT_ONLY = frozenset({"$defs", "definitions", "$schema", "$id"})
_OF_TYPE: Mapping[str, frozenset[str]] = {
    "string": frozenset({"pattern", "format", "minLength", "maxLength"}),
    "number": frozenset(
        {"multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    ),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_PERMITTED = _ANYWHERE.union(*_OF_TYPE.values())

Context = tuple[str, ...]


def check_strict(schema: Mapping[str, Any], *, subject: str, param: str) -> None:
    """Check a schema against strict mode's rules and limits.

    Args:
        schema: The schema.
        subject: What messages call it: ``response_format 'X'``, ``function 'X'``.
        param: The request's field.

    Raises:
        InvalidRequestError: ``Invalid schema for SUBJECT: In context=(...), ...``.
    """
    try:
        _Checker(schema).check()
    except _Fault as fault:
        raise InvalidRequestError(
            f"Invalid schema for {subject}: {fault}", param=param, code=None
        ) from None


class _Fault(Exception):
    """What is wrong, in OpenAI's words."""


def _fault(context: Context, problem: str) -> _Fault:
    return _Fault(f"In context={context!r}, {problem}")


class _Checker:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num_properties = 0
        self._num_enum_values = 0
        self._num_characters = 0

    def check(self) -> None:
        root = self._root
        if "anyOf" in root and root.get("type") is None:
            raise _fault((), "'anyOf' is not permitted at the root of the schema.")
        found = root.get("type")
        if found != "object" and "$ref" not in root:
            raise _Fault(
                f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{found}\"'."
            )
        if "anyOf" in root:
            raise _fault((), "'anyOf' is not permitted at the root of the schema.")
        if "$ref" in root:
            target = self._target(root["$ref"], ())
            if not isinstance(target, Mapping) or target.get("type") != "object":
                raise _Fault(
                    "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"None\"'."
                )
        self._visit(root, (), 0)
        for group in ("$defs", "definitions"):
            definitions = root.get(group, {})
            if not isinstance(definitions, Mapping):
                raise _fault((), f"'{group}' must be an object.")
            for name, definition in definitions.items():
                self._count_characters(name)
                self._visit(definition, (group, name), 0)

    def _visit(self, schema: object, context: Context, depth: int) -> None:
        if not isinstance(schema, Mapping):
            problem = "schema must have a 'type' key."
            raise _fault(
                context,
                problem if isinstance(schema, bool) else f"{schema!r} is not of type 'object'.",
            )
        self._check_keywords(schema, context)
        if "$ref" in schema:
            others = sorted(schema.keys() - {"$ref"} - (_ROOT_ONLY if not context else frozenset()))
            if others:
                listed = ", ".join(map(repr, others))
                raise _fault(context, f"$ref cannot have keywords {{{listed}}}.")
            self._target(schema["$ref"], context)
            return
        if "anyOf" in schema:
            self._visit_any_of(schema, context, depth)
        elif not {"type", "enum", "const"} & schema.keys():
            raise _fault(context, "schema must have a 'type' key.")
        types = self._types(schema, context)
        self._count_values(schema, context)
        if "format" in schema and schema["format"] not in FORMATS:
            raise _fault(context, f"'{schema['format']}' is not a valid format.")
        if "object" in types:
            self._visit_object(schema, context, depth)
        if "array" in types:
            if "items" not in schema:
                raise _fault(context, "array schema missing items.")
            self._visit(schema["items"], (*context, "items"), depth)

    def _check_keywords(self, schema: Mapping[str, Any], context: Context) -> None:
        permitted = _PERMITTED if context else _PERMITTED | _ROOT_ONLY
        for keyword in schema:
            if keyword not in permitted:
                raise _fault(context, f"'{keyword}' is not permitted.")

    def _types(self, schema: Mapping[str, Any], context: Context) -> frozenset[str]:
        named = schema.get("type", [])
        types = [named] if isinstance(named, str) else named
        if not isinstance(types, list) or not all(isinstance(t, str) and t in TYPES for t in types):
            raise _fault(
                (*context, "type"), f"{named!r} is not valid under any of the given schemas."
            )
        return frozenset(types)

    def _visit_any_of(self, schema: Mapping[str, Any], context: Context, depth: int) -> None:
        options = schema["anyOf"]
        if not isinstance(options, list) or not options:
            raise _fault((*context, "anyOf"), f"{options!r} is not a non-empty array.")
        for number, option in enumerate(options):
            self._visit(option, (*context, "anyOf", str(number)), depth)

    def _visit_object(self, schema: Mapping[str, Any], context: Context, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise _Fault(f"{depth + 1} levels of nesting exceeds limit of {MAX_DEPTH}.")
        if schema.get("additionalProperties") is not False:
            raise _fault(
                context, "'additionalProperties' is required to be supplied and to be false."
            )
        properties = schema.get("properties", {})
        if not isinstance(properties, Mapping):
            raise _fault((*context, "properties"), f"{properties!r} is not of type 'object'.")
        self._check_required(schema, properties, context)
        self._num_properties += len(properties)
        if self._num_properties > MAX_PROPERTIES:
            raise _Fault(f"schema has more than {MAX_PROPERTIES} object properties in total.")
        for name, value in properties.items():
            self._count_characters(name)
            self._visit(value, (*context, "properties", name), depth + 1)

    def _check_required(
        self, schema: Mapping[str, Any], properties: Mapping[str, Any], context: Context
    ) -> None:
        required = schema.get("required")
        wanted = (
            "'required' is required to be supplied and to be an array including every key in "
            "properties."
        )
        if required is None and not properties:
            return
        if not isinstance(required, list):
            missing = next(iter(properties), None)
            raise _fault(context, f"{wanted} Missing '{missing}'." if missing else wanted)
        for name in properties:
            if name not in required:
                raise _fault(context, f"{wanted} Missing '{name}'.")
        for name in required:
            if name not in properties:
                raise _fault(context, f"{wanted} Extra required key '{name}' supplied.")

    def _count_values(self, schema: Mapping[str, Any], context: Context) -> None:
        values = schema.get("enum", [])
        if not isinstance(values, list) or ("enum" in schema and not values):
            raise _fault((*context, "enum"), f"{values!r} is not a non-empty array.")
        self._num_enum_values += len(values)
        if self._num_enum_values > MAX_ENUM_VALUES:
            raise _Fault(f"schema has more than {MAX_ENUM_VALUES} enum values in total.")
        texts = [value for value in values if isinstance(value, str)]
        length = sum(map(len, texts))
        if len(values) > LONG_ENUM and length > MAX_LONG_ENUM_CHARACTERS:
            raise _fault(
                (*context, "enum"),
                f"an enum of more than {LONG_ENUM} values may have {MAX_LONG_ENUM_CHARACTERS} characters in total, not "
                f"{length}.",
            )
        for text in (*texts, *_strings(schema.get("const"))):
            self._count_characters(text)

    def _count_characters(self, text: str) -> None:
        self._num_characters += len(text)
        if self._num_characters > MAX_NAME_CHARACTERS:
            raise _Fault(
                "the names of properties and definitions, enum values and constants have more than "
                f"{MAX_NAME_CHARACTERS} characters in total."
            )

    def _target(self, reference: object, context: Context) -> object:
        """Return what a ``$ref`` means: the root, or a definition at the root."""
        if reference == "#":
            return self._root
        if isinstance(reference, str) and reference.startswith("#/"):
            steps = [s.replace("~1", "/").replace("~0", "~") for s in reference[2:].split("/")]
            if len(steps) == 2 and steps[0] in ("$defs", "definitions"):
                group = self._root.get(steps[0], {})
                if isinstance(group, Mapping) and steps[1] in group:
                    return group[steps[1]]
        raise _fault(
            context,
            f"reference can only point to definitions defined at the top level of the schema, not {reference!r}.",
        )


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
