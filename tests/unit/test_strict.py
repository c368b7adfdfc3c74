"""Strict mode's limits. (Its rules are tested through the client, in tests/api/test_formats.py.)"""

from __future__ import annotations

from typing import Any

import pytest

from evermini.errors import InvalidRequestError
from evermini.service import strict
from tests.schemas import strict_object


def problem(schema: dict[str, Any]) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        strict.check_strict(schema, subject="function 'f'", param="tools[0].function.parameters")
    assert caught.value.param == "tools[0].function.parameters"
    assert caught.value.message.startswith("Invalid schema for function 'f': ")
    return caught.value.message.removeprefix("Invalid schema for function 'f': ")


def accepted(schema: dict[str, Any]) -> None:
    strict.check_strict(schema, subject="function 'f'", param="x")


TEXT = {"type": "string"}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = strict_object(a=TEXT)
    for _ in range(levels - 1):
        schema = strict_object(a=schema)
    return schema


def test_levels():
    accepted(nested(10))
    assert problem(nested(11)) == "11 levels of nesting exceeds limit of 10."


def test_properties():
    accepted(strict_object(**{f"p{i}": TEXT for i in range(5000)}))
    assert "5000 object properties" in problem(
        strict_object(**{f"p{i}": TEXT for i in range(5001)})
    )


def test_enum_values():
    accepted(strict_object(a={"type": "string", "enum": [f"v{i}" for i in range(1000)]}))
    assert "1000 enum values" in problem(
        strict_object(a={"type": "integer", "enum": list(range(600))}, b={"enum": list(range(401))})
    )


def test_characters_of_long_enums():
    assert "15000 characters" in problem(
        strict_object(a={"type": "string", "enum": [f"{i:061}" for i in range(251)]})
    )


def test_characters_of_names():
    names = {f"{'x' * 59}{i:04}": TEXT for i in range(2000)}
    assert "120000 characters" in problem(strict_object(**names))


@pytest.mark.parametrize(
    "schema",
    [
        strict_object(),
        {"type": "object", "additionalProperties": False},
        strict_object(a={"type": ["string", "null"], "description": "x", "title": "A"}),
        strict_object(a={"anyOf": [TEXT, {"type": "null"}]}),
        strict_object(a={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3}),
        strict_object(a={"type": "number", "multipleOf": 0.5, "exclusiveMinimum": 0}),
        strict_object(a={"type": "string", "pattern": "^a", "format": "date"}),
        strict_object(a={"const": "x"}, b={"enum": ["x", 1, None]}),
        {**strict_object(a={"$ref": "#"}), "title": "Recursive", "$schema": "x"},
        {"$ref": "#/$defs/a", "$defs": {"a": strict_object(a=TEXT)}},
        {**strict_object(a={"$ref": "#/definitions/n"}), "definitions": {"n": {"type": "integer"}}},
    ],
)
def test_what_is_allowed(schema):
    accepted(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"anyOf": [strict_object()]}, "In context=(), 'anyOf' is not permitted at the root"),
        ({"type": "object", "anyOf": []}, "In context=(), 'anyOf' is not permitted at the root"),
        ({}, "got 'type: \"None\"'"),
        (strict_object(a=True), "In context=('properties', 'a'), schema must have a 'type' key."),
        (strict_object(a={"type": "any"}), "In context=('properties', 'a', 'type'), 'any' is not"),
        (strict_object(a={"$ref": "#/$defs/no"}), "reference can only point to definitions"),
        (strict_object(a={"$ref": "#/properties/b"}, b=TEXT), "reference can only point"),
        (strict_object(a={"anyOf": []}), "In context=('properties', 'a', 'anyOf'), []"),
        (
            strict_object(a={"type": "string", "enum": []}),
            "In context=('properties', 'a', 'enum'), []",
        ),
        (
            strict_object(a={"type": "array", "items": {"type": "object"}}),
            "In context=('properties', 'a', 'items'), 'additionalProperties' is required",
        ),
        (
            {
                **strict_object(a={"$ref": "#/$defs/x"}),
                "$defs": {"x": {"type": "string", "not": {}}},
            },
            "In context=('$defs', 'x'), 'not' is not permitted.",
        ),
        (
            {"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
            "'required' is required to be supplied and to be an array including every key in properties. Missing 'a'.",
        ),
    ],
)
def test_what_is_not(schema, message):
    assert message in problem(schema)
