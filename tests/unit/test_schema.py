"""JSON schemas as grammars: what the masks take is what `jsonschema` finds valid, or less, never more."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from evermini.errors import GrammarLimitError
from evermini.text.grammar import Grammar, GrammarCompiler
from evermini.text.schema import SchemaError, enforceable
from evermini.text.tokenizer import Tokenizer
from tests.schemas import SCHEMAS, VALUES, is_valid
from tests.vocabularies import gguf_source, smollm_tokenizer

TOKENIZER = Tokenizer(gguf_source(smollm_tokenizer(), "smollm"))
COMPILER = GrammarCompiler(TOKENIZER)
SINGLE = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}


def takes(grammar: Grammar, value: Any) -> bool:
    """Whether the masks let the value through, byte by byte."""
    state = grammar.start()
    ids = [SINGLE[bytes([byte])] for byte in json.dumps(value, ensure_ascii=False).encode()]
    if state.num_valid(ids) < len(ids):
        return False
    for token_id in ids:
        state.advance(token_id)
    return bool(allowed(state)[list(TOKENIZER.eos_ids)].any())


def allowed(state: Any) -> Any:
    row = torch.zeros(-(-TOKENIZER.vocab_size // 32), dtype=torch.int32)
    state.fill_mask(row)
    bits = np.unpackbits(row.numpy().view(np.uint8), bitorder="little")
    return bits[: TOKENIZER.vocab_size].view(bool)


def walk(grammar: Grammar, rng: np.random.Generator, limit: int = 150) -> str | None:
    """Draw a text from the masks alone; ``None``: it did not end."""
    state, ids = grammar.start(), []
    ends = list(TOKENIZER.eos_ids)
    for _ in range(limit):
        bits = allowed(state)
        may_end = bits[ends].any()
        bits[ends] = False
        going = np.flatnonzero(bits)
        if not len(going) or (may_end and rng.random() < 0.3):
            return TOKENIZER.decode(ids)
        ids.append(int(rng.choice(going)))
        state.advance(ids[-1])
    return None


def compiled(schema: Any) -> Grammar:
    try:
        return COMPILER.json_schema(schema)
    except SchemaError:
        assume(False)
        raise AssertionError from None


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.lists(VALUES, min_size=1, max_size=12))
def test_nothing_invalid_is_taken(schema, values):
    grammar = compiled(schema)
    for value in values:
        if takes(grammar, value):
            assert is_valid(schema, value), value


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.integers(0, 10_000))
def test_nothing_invalid_is_written(schema, seed):
    grammar = compiled(schema)
    try:
        text = walk(grammar, np.random.default_rng(seed))
    except GrammarLimitError:  # beyond the limits of the grammar's engine
        return
    if text is not None:
        assert is_valid(schema, json.loads(text)), text


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]},
            [1, -3],
            [2, 3, 1.5],
        ),
        (
            {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
            [{"a": 1}, {"b": 1, "c": 2}],
            [{}, {"a": 1, "b": 1}],
        ),
        (
            {"oneOf": [{"type": "string", "pattern": "^[0-9.]+$"}, {"enum": ["beta", "stable"]}]},
            ["1.2", "beta"],
            ["x", 1],
        ),
        ({"not": {"type": ["string", "null"]}}, [1, [], {}], ["", None]),
        (
            {"type": "string", "not": {"enum": ["", "ab", "ac"]}},
            ["a", "abc", "b"],
            ["", "ab", "ac"],
        ),
        ({"type": "string", "not": {"pattern": "^[.,]+$"}}, ["", "a", ".a"], [".", ".,"]),
        (
            {"type": "object", "not": {"required": ["a", "b"]}},
            [{}, {"a": 1}, {"b": 1}],
            [{"a": 1, "b": 1}],
        ),
        (
            {
                "type": "object",
                "properties": {"kind": {"enum": ["x", "y"]}, "n": {"type": "integer"}},
                "required": ["kind"],
                "if": {"properties": {"kind": {"const": "x"}}},
                "then": {"required": ["n"]},
            },
            [{"kind": "x", "n": 1}, {"kind": "y"}],
            [{"kind": "x"}, {}],
        ),
        (
            {"type": "object", "dependencies": {"a": ["b"], "c": {"maxProperties": 1}}},
            [{}, {"b": 1}, {"c": 1}],
            [{"a": 1}, {"c": 1, "d": 1}],
        ),
        ({"type": "array", "contains": {"const": 1}}, [[1], [1, 2], [2, 2, 1, 2]], [[], [2]]),
        (
            {"type": "array", "contains": {"type": "null"}, "minContains": 2},
            [[None, None], [1, None, None]],
            [[None], [1, None]],
        ),
        (
            {"not": {"type": "array", "items": {"type": "string"}}, "type": "array"},
            [[1], ["a", 1], ["a", "b", 1, "c"]],
            [[], ["a"], ["a", "b"]],
        ),
        (
            {
                "type": "array",
                "uniqueItems": True,
                "items": {"enum": ["a", 1, None]},
                "minItems": 1,
            },
            [["a"], [1, "a"], [None, "a", 1]],
            [[], ["a", "a"], [1, None, 1], ["b"], ["a", 1, None, "a"]],
        ),
        (
            {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "maxItems": 9},
            [[], [True], [False, True]],
            [[True, True], [True, False, True]],
        ),
        (
            {
                "type": "array",
                "uniqueItems": True,
                "items": {"type": "string", "enum": ["ab", "abc", 3]},
                "maxItems": 1,
            },
            [[], ["ab"], ["abc"]],
            [[3], ["ab", "abc"]],
        ),
        (
            {"type": "object", "propertyNames": {"enum": ["a", "b"]}},
            [{}, {"a": 1}],
            [{"c": 1}],
        ),
        ({"type": "string", "format": "date"}, ["2024-02-29", "2023-12-31"], ["2023-02-29", "x"]),
        ({"type": "string", "format": "date", "pattern": "^2024"}, ["2024-01-01"], ["2023-01-01"]),
        ({"type": "string", "format": "uri-reference"}, ["/a/b?c#d", "http://x/y"], ["\\", "a b"]),
        ({"type": "string", "format": "colour"}, ["anything"], [1]),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}, [1], ["1"]),
        (
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "$id": "http://x.org/s.json",
                "definitions": {"n": {"$id": "#num", "type": "integer"}},
                "type": "array",
                "items": [{"$ref": "#num"}, {"$ref": "http://x.org/s.json#/definitions/n"}],
                "additionalItems": False,
            },
            [[1, 2], [1]],
            [["1"], [1, 2, 3]],
        ),
        ({"x-order": 1, "tsType": "Foo", "type": "boolean"}, [True], [1]),
        ({"const": '\n"\\ä🦙'}, ['\n"\\ä🦙'], ["ä"]),
        ({"type": "string", "maxLength": 2}, ["🦙🦙"], ["abc"]),
    ],
)
def test_keywords_in_terms_of_others(schema, good, bad):
    grammar = COMPILER.json_schema(schema)
    for value in good:
        assert is_valid(schema, value)
        assert takes(grammar, value), value
    for value in bad:
        assert not takes(grammar, value), value


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"uniqueItems": True}, "In context=(), 'uniqueItems' is not supported"),
        (
            {"type": "array", "uniqueItems": True, "items": {"enum": [1, 1.0]}},
            "In context=(), 'uniqueItems' is not supported",
        ),
        (
            {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3, 4, 5, 6]}},
            "In context=(), 'uniqueItems' is not supported",
        ),
        (
            {"properties": {"a": {"unevaluatedItems": False}}},
            "('properties', 'a'), 'unevaluatedItems'",
        ),
        ({"items": {"$ref": "#/nowhere"}}, "('items', '$ref'), the reference '#/nowhere'"),
        ({"anyOf": [{"not": {"pattern": "a.*b"}}]}, "('anyOf', '0'), this use of 'not'"),
        ({"format": "regex"}, "the format 'regex' is not supported"),
        ({"minProperties": 3}, "'minProperties' may exceed"),
        ({"multipleOf": 1_000_003}, "'multipleOf' whose digits"),
        ({"properties": []}, "('properties',), [] is not of type 'object'"),
        ({"items": 3}, "('items',), a schema must be an object or a boolean"),
        (
            {"type": "string", "enum": [1]},
            "In context=(), the schema cannot be enforced: Unsatisfiable",
        ),
        ({"type": "strnig"}, "In context=(), the schema cannot be enforced: Invalid type"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_its_path(schema, message):
    with pytest.raises(SchemaError) as caught:
        COMPILER.json_schema(schema)
    assert message in caught.value.message


def test_what_nobody_refers_to_does_no_harm():
    schema = {"type": "integer", "$defs": {"unused": {"uniqueItems": True}}}
    assert enforceable(schema) == {"type": "integer"}


def test_plain_schemas_stay_as_they_are():
    schema = {
        "type": "object",
        "properties": {"b": {"type": "string"}, "a": {"anyOf": [{"type": "null"}, {"minimum": 1}]}},
        "required": ["b"],
        "additionalProperties": False,
    }
    assert json.dumps(enforceable(schema)) == json.dumps(schema)


def test_lone_surrogates_are_never_written():
    grammar = COMPILER.json_schema({"type": "string"})
    state = grammar.start()
    ids = [SINGLE[bytes([byte])] for byte in rb'"\ud800"']
    assert state.num_valid(ids) == 2
