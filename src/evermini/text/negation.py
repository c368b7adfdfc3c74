"""What a JSON schema refuses, as schemas: the part of it that can be said in plain keywords.

Used to write ``not``, ``oneOf`` and ``if`` in keywords that grammars can enforce.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]
Schema = Json | bool

TYPES = ("null", "boolean", "number", "string", "array", "object")
MAX_CHARACTERS = 4000
"""An enum with more is not complemented."""
PLACES = 4
"""Of an array, from the first on, where something stands that has to be somewhere: grammars have no "somewhere"."""
_MAX_DEPTH = 6
_ONE_CLASS = re.compile(r"\^\[(?P<negated>\^?)(?P<class>(?:[^\]\\]|\\.)+)\](?P<count>[+*])\$")
_SYNTAX = frozenset(r"\\^$.|?*+()[]{}-&~/")


class Negation:
    """Complements of the schemas of one document.

    Args:
        resolve: Returns what a reference means, or ``None``.
        max_options: Alternatives of one complement at most: fewer are still refused by the schema.
    """

    def __init__(self, resolve: Callable[[object], Schema | None], max_options: int) -> None:
        self._resolve = resolve
        self._max_options = max_options

    def negate(self, schema: Schema, depth: int = 0) -> list[Schema]:
        """Return schemas of which each accepts only what ``schema`` refuses; empty if none can be told."""
        if depth > _MAX_DEPTH:
            return []
        if isinstance(schema, bool):
            return [] if schema else [True]
        if not isinstance(schema, Mapping):
            return []
        found: list[Schema] = []
        for keyword, value in schema.items():
            if complement := _COMPLEMENTS.get(keyword):
                found += complement(self, value, schema, depth + 1)
        return found[: self._max_options]

    def are_disjoint(self, one: Schema, other: Schema, depth: int = 0) -> bool:
        """Return whether certainly no value is accepted by both."""
        if depth > _MAX_DEPTH:
            return False
        one, other = self._target(one), self._target(other)
        if one is False or other is False:
            return True
        if isinstance(one, bool) or isinstance(other, bool):
            return False
        for first, second in ((one, other), (other, one)):
            for group in ("anyOf", "oneOf"):
                options = first.get(group)
                if isinstance(options, list) and all(
                    self.are_disjoint(option, second, depth + 1) for option in options
                ):
                    return True
            members = first.get("allOf")
            if isinstance(members, list) and any(
                self.are_disjoint(member, second, depth + 1) for member in members
            ):
                return True
        mine, others = types_of(one), types_of(other)
        if not mine & others:
            return True
        if (values := _values_of(one)) is not None and (rest := _values_of(other)) is not None:
            return not values & rest
        if _refuses_all(other, one) or _refuses_all(one, other):
            return True
        if mine & others != {"object"}:
            return False
        return any(
            self._differ_at(name, one, other, depth)
            for name in {*_required_of(one), *_required_of(other)}
        )

    def _differ_at(self, name: str, one: Mapping[str, Any], other: Json, depth: int) -> bool:
        mine, others = _property_of(one, name), _property_of(other, name)
        return self.are_disjoint(mine, others, depth + 1)

    def _target(self, schema: Schema) -> Schema:
        for _ in range(_MAX_DEPTH):
            if not (isinstance(schema, Mapping) and "$ref" in schema and len(schema) == 1):
                return schema
            target = self._resolve(schema["$ref"])
            if target is None:
                return True
            schema = target
        return True

    # Complements of single keywords.

    def _type(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        named = (
            {value} if isinstance(value, str) else set(value) if isinstance(value, list) else None
        )
        if named is None:
            return []
        rest = [t for t in TYPES if t not in named and not (t == "number" and "integer" in named)]
        return [{"type": rest}] if rest else []

    def _enum(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        return list(_other_values(value)) if isinstance(value, list) else []

    def _const(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        return list(_other_values([value]))

    def _required(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        if not isinstance(value, list):
            return []
        return [{"type": "object", "properties": {name: False}} for name in value]

    def _properties(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        if not isinstance(value, Mapping):
            return []
        return [
            {"type": "object", "properties": {name: option}, "required": [name]}
            for name, item in value.items()
            for option in self.negate(item, depth)
        ]

    def _items(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        if isinstance(value, list):
            return []
        options = self.negate(value, depth)
        return [item_at(place, option) for place in range(PLACES) for option in options]

    def _any_of(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        if not isinstance(value, list):
            return []
        refused = [self.negate(option, depth) for option in value]
        combined = itertools.islice(itertools.product(*refused), self._max_options)
        return [_both(options) for options in combined]

    def _all_of(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        if not isinstance(value, list):
            return []
        return [option for item in value for option in self.negate(item, depth)]

    def _not(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        return [value]

    def _pattern(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        """Return the complement of a pattern of one class of characters; no other can be told."""
        if not isinstance(value, str) or not (match := _ONE_CLASS.fullmatch(value)):
            return []
        inside = match["class"] if match["negated"] else f"^{match['class']}"
        other: list[Schema] = [{"type": "string", "pattern": f"[{inside}]"}]
        return other if match["count"] == "*" else [*other, {"type": "string", "maxLength": 0}]

    def _ref(self, value: Any, schema: Json, depth: int) -> list[Schema]:
        target = self._resolve(value)
        return [] if target is None else self.negate(target, depth)


Complement = Callable[[Negation, Any, Json, int], list[Schema]]


def _bound(keyword: str, kind: str, opposite: str, step: int) -> Complement:
    """Return the complement of a bound: what breaks ``minLength: 3`` has ``maxLength: 2``."""
    exclusive = f"exclusive{keyword[:1].upper()}{keyword[1:]}"

    def complement(_: Negation, value: Any, schema: Json, __: int) -> list[Schema]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value + step < 0:
            return []
        if isinstance(schema.get(exclusive), bool):
            return []  # the first drafts' way to exclude the bound itself
        return [{"type": kind, opposite: value + step}]

    return complement


_COMPLEMENTS: Mapping[str, Complement] = {
    "type": Negation._type,
    "enum": Negation._enum,
    "const": Negation._const,
    "required": Negation._required,
    "properties": Negation._properties,
    "items": Negation._items,
    "anyOf": Negation._any_of,
    "oneOf": Negation._any_of,  # what none of them accepts
    "allOf": Negation._all_of,
    "not": Negation._not,
    "pattern": Negation._pattern,
    "$ref": Negation._ref,
    "minLength": _bound("minLength", "string", "maxLength", -1),
    "maxLength": _bound("maxLength", "string", "minLength", 1),
    "minItems": _bound("minItems", "array", "maxItems", -1),
    "maxItems": _bound("maxItems", "array", "minItems", 1),
    "minProperties": _bound("minProperties", "object", "maxProperties", -1),
    "minimum": _bound("minimum", "number", "exclusiveMaximum", 0),
    "maximum": _bound("maximum", "number", "exclusiveMinimum", 0),
    "exclusiveMinimum": _bound("exclusiveMinimum", "number", "maximum", 0),
    "exclusiveMaximum": _bound("exclusiveMaximum", "number", "minimum", 0),
}


def item_at(place: int, item: Schema, count: int = 1) -> Json:
    """Return the schema of arrays with ``count`` items of a kind from ``place`` (0: the first) on."""
    prefix = [True] * place + [item] * count
    return {"type": "array", "prefixItems": prefix, "minItems": len(prefix)}


def types_of(schema: Json) -> set[str]:
    """Return the types that values of ``schema`` can have, integers counted as numbers."""
    types = set(TYPES)
    named = schema.get("type")
    if isinstance(named, str):
        types &= {"number" if named == "integer" else named}
    elif isinstance(named, list):
        types &= {"number" if name == "integer" else str(name) for name in named}
    values = (
        schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    )
    if isinstance(values, list):
        types &= {_type_of(value) for value in values}
    return types


def _type_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _values_of(schema: Json) -> frozenset[str] | None:
    """Return the values that an ``enum`` or ``const`` allows, as canonical JSON; ``None``: there is neither."""
    values = (
        schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    )
    if not isinstance(values, list):
        return None
    return frozenset(json.dumps(_canonical(value), sort_keys=True) for value in values)


def _refuses_all(schema: Json, listed: Json) -> bool:
    """Return whether the pattern of ``schema`` certainly matches none of the texts that ``listed`` enumerates."""
    values, pattern = listed.get("enum", [listed.get("const")]), schema.get("pattern")
    if not (isinstance(pattern, str) and isinstance(values, list) and values):
        return False
    try:
        return all(isinstance(v, str) and not re.search(pattern, v) for v in values)
    except re.error:
        return False


def _canonical(value: Any) -> Any:
    """Write 1.0 as 1: they are equal to JSON Schema."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _canonical(item) for name, item in value.items()}
    return value


def _required_of(schema: Json) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _property_of(schema: Json, name: str) -> Schema:
    """Return a schema that property ``name`` must obey."""
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and isinstance(properties.get(name), (Mapping, bool)):
        found: Schema = properties[name]
        return found
    rest = schema.get("additionalProperties", True)
    return True if "patternProperties" in schema or not isinstance(rest, (Mapping, bool)) else rest


def _both(options: tuple[Schema, ...]) -> Schema:
    return options[0] if len(options) == 1 else {"allOf": list(options)}


def _other_values(values: list[Any]) -> Iterator[Schema]:
    """Yield schemas of values that are none of ``values``."""
    rest = [name for name in TYPES if name not in {_type_of(value) for value in values}]
    if rest:
        yield {"type": rest}
    booleans = [value for value in (True, False) if not any(value is taken for taken in values)]
    if len(booleans) == 1:
        yield {"const": booleans[0]}
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if numbers:
        yield {"type": "number", "exclusiveMinimum": max(numbers)}
        yield {"type": "number", "exclusiveMaximum": min(numbers)}
    texts = {value for value in values if isinstance(value, str)}
    if texts and sum(map(len, texts)) <= MAX_CHARACTERS:
        yield {"type": "string", "pattern": f"^{_other_than(texts)}$"}


def _other_than(texts: set[str]) -> str:
    """Return a pattern of all texts that are not in ``texts``."""
    heads = sorted({text[0] for text in texts if text})
    options = [f"{_escaped(c)}{_other_than({t[1:] for t in texts if t[:1] == c})}" for c in heads]
    other = f"[^{''.join(map(_escaped, heads))}]" if heads else "(?s:.)"
    options.append(f"{other}(?s:.*)")
    return f"(?:{'|'.join(options)}){'' if '' in texts else '?'}"


def _escaped(character: str) -> str:
    return f"\\{character}" if character in _SYNTAX else character
