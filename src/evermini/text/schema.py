"""JSON Schema as people write it, in the keywords that the compiler of grammars enforces.

    enforceable({"type": "array", "contains": {"const": 1}})   # the same, or narrower, without "contains"

llguidance turns types, properties, items, bounds, patterns, ``anyOf``, ``allOf`` and references into grammars in full.
Other keywords are written in terms of these (``oneOf``, ``not``, ``if``, ``dependencies``, ``contains``, ...): what
comes out accepts nothing that the original refuses, though at times a little less than it accepts. Where that is not
possible the schema is refused, with the path of the keyword: nothing is ever enforced in part.

Keywords that JSON Schema does not know are annotations to it, as are formats outside its list; so they are here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from evermini.errors import InvalidRequestError
from evermini.text.json_formats import ENFORCED_FORMATS, FORMAT_PATTERNS, REFUSED_FORMATS
from evermini.text.negation import PLACES, Negation, item_at
from evermini.text.unique import unique_arrays

Json = Mapping[str, Any]
Schema = Json | bool
Context = tuple[str, ...]

MAX_DEPTH = 100
MAX_NODES = 20_000
"""Subschemas after rewriting; each costs the compiler a few microseconds."""

MAX_DIVISOR = 100_000

_PLAIN = frozenset(
    {
        *("type", "const", "enum", "required", "pattern", "minLength", "maxLength"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("minItems", "maxItems", "maxProperties"),
    }
)
_ONE = frozenset({"additionalProperties", "additionalItems"})
_MANY = frozenset({"anyOf", "allOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties"})
_REFUSED = frozenset(
    {
        *("unevaluatedProperties", "unevaluatedItems", "maxContains", "$dynamicRef"),
        *("$recursiveRef", "extends", "disallow", "divisibleBy"),
    }
)
_REF_STANDS_ALONE = ("draft-03", "draft-04", "draft-06", "draft-07")


class SchemaError(InvalidRequestError):
    """A schema that is wrong or cannot be enforced.

    Args:
        context: Keys from the schema's root to where the problem is.
        problem: What is wrong there.
    """

    def __init__(self, context: Context, problem: str) -> None:
        super().__init__(f"In context={context!r}, {problem}")

    def in_request(self, subject: str, param: str) -> InvalidRequestError:
        """Return the error for a request whose ``subject`` (``response_format 'X'``) has this schema."""
        return InvalidRequestError(f"Invalid schema for {subject}: {self.message}", param=param)


def enforceable(schema: Schema, max_options: int = 64) -> Schema:
    """Return a schema in enforced keywords alone that accepts nothing which ``schema`` refuses.

    Args:
        schema: Any JSON schema.
        max_options: Alternatives that may be written for what a part of it refuses; fewer make it narrower.

    Raises:
        SchemaError: There is none, or the schema is malformed or too large.
    """
    return _Rewriter(schema, max_options).rewritten()


class _Rewriter:
    """Rewrites one schema; each target of a reference once, into ``$defs`` of the result."""

    def __init__(self, root: Schema, max_options: int) -> None:
        self._root = root
        self._definitions: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._num_nodes = 0
        dialect = root.get("$schema") if isinstance(root, Mapping) else None
        self._ref_stands_alone = isinstance(dialect, str) and any(
            draft in dialect for draft in _REF_STANDS_ALONE
        )
        self._anchors = dict(_anchors(root))
        self._negation = Negation(self._target, max_options)

    def rewritten(self) -> Schema:
        result: Schema = self._rewrite(self._root, ())
        if isinstance(result, bool) or not self._definitions:
            return result
        return {**result, "$defs": self._definitions}

    def _rewrite(self, schema: object, context: Context) -> Any:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise SchemaError(context, f"the schema is too large: over {MAX_NODES} subschemas.")
        if len(context) > MAX_DEPTH:
            raise SchemaError((), f"the schema is nested more than {MAX_DEPTH} levels deep.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise SchemaError(context, "a schema must be an object or a boolean.")
        if (listed := unique_arrays(schema)) is not None:
            return listed
        if "$ref" in schema and self._ref_stands_alone:
            return {"$ref": self._reference(schema["$ref"], (*context, "$ref"))}
        result: dict[str, Any] = {}
        more: list[Any] = []
        for keyword, value in schema.items():
            self._apply(keyword, value, schema, context, result, more)
        if more:
            result["allOf"] = [*result.get("allOf", ()), *more]
        return result

    def _apply(
        self,
        keyword: str,
        value: Any,
        schema: Json,
        context: Context,
        result: dict[str, Any],
        more: list[Any],
    ) -> None:
        """Add to ``result`` what ``keyword`` becomes, or to ``more`` what must hold besides."""
        here = (*context, keyword)
        if keyword in _PLAIN:
            result[keyword] = value
        elif keyword in _ONE:
            result[keyword] = self._rewrite(value, here)
        elif keyword in _MANY:
            result[keyword] = self._rewrite_all(value, here)
        elif keyword in _NAMED:
            result[keyword] = {
                name: self._rewrite(item, (*here, name))
                for name, item in _object(value, here).items()
            }
        elif keyword == "items":
            is_list = isinstance(value, list)
            result[keyword] = (
                self._rewrite_all(value, here) if is_list else self._rewrite(value, here)
            )
        elif keyword == "$ref":
            result[keyword] = self._reference(value, here)
        elif keyword == "format":
            self._format(value, schema, here, result, more)
        elif keyword == "multipleOf":
            result[keyword] = self._multiple_of(value, context)
        elif keyword == "minProperties":
            result[keyword] = self._min_properties(value, schema, here)
        elif keyword == "uniqueItems":
            if value is not False and not _at_most_one(schema):
                raise SchemaError(context, "'uniqueItems' is not supported by this server.")
        elif keyword in _REFUSED:
            raise SchemaError(context, f"'{keyword}' is not supported by this server.")
        elif keyword in _REWRITES:
            more += [
                self._rewrite(item, here) for item in _REWRITES[keyword](self, value, schema, here)
            ]

    def _rewrite_all(self, schemas: object, context: Context) -> list[Any]:
        return [
            self._rewrite(item, (*context, str(number)))
            for number, item in enumerate(_array(schemas, context))
        ]

    def _reference(self, reference: object, context: Context) -> str:
        """Return the new place of a reference's target, which is rewritten when it is met first."""
        target = self._target(reference)
        if target is None:
            raise SchemaError(
                context,
                f"the reference {reference!r} leads nowhere in this schema. Others are not fetched.",
            )
        assert isinstance(reference, str)
        if reference not in self._names:
            name = str(len(self._names))
            self._names[reference] = name
            path = (
                tuple(reference.partition("#")[2].strip("/").split("/")) if "#" in reference else ()
            )
            self._definitions[name] = self._rewrite(target, tuple(filter(None, path)))
        return f"#/$defs/{self._names[reference]}"

    def _target(self, reference: object) -> Schema | None:
        """Return what a reference means inside the schema, or ``None``."""
        if not isinstance(reference, str):
            return None
        if reference in self._anchors:
            return self._anchors[reference]
        base, _, pointer = reference.partition("#")
        found: Any = self._anchors.get(base) if base else self._root
        for step in pointer.split("/")[1:] if pointer.startswith("/") else ():
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and key in found:
                found = found[key]
            elif isinstance(found, Sequence) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                return None
        if pointer and not pointer.startswith("/"):
            return None
        return found if isinstance(found, (Mapping, bool)) else None

    def _format(
        self,
        name: object,
        schema: Json,
        context: Context,
        result: dict[str, Any],
        more: list[Any],
    ) -> None:
        if name in REFUSED_FORMATS:
            raise SchemaError(context[:-1], f"the format '{name}' is not supported by this server.")
        if name in ENFORCED_FORMATS:
            result["format"] = name
        elif isinstance(name, str) and name in FORMAT_PATTERNS:
            pattern = {"pattern": FORMAT_PATTERNS[name]}
            if "pattern" in schema:
                more.append(pattern)
            else:
                result |= pattern

    def _multiple_of(self, value: object, context: Context) -> object:
        """Return the divisor if its automaton is small: it has a state per remainder."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            digits = "".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits))
            if int(digits) > MAX_DIVISOR:
                raise SchemaError(
                    context,
                    f"'multipleOf' whose digits, zeros at either end aside, make a number above {MAX_DIVISOR} is not "
                    "supported by this server.",
                )
        return value

    def _min_properties(self, value: object, schema: Json, context: Context) -> object:
        """Return the bound if the grammar keeps it: it cannot tell two free names apart, so one of them counts."""
        required = schema.get("required", ())
        closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
        if isinstance(value, int) and not closed and value > len(required) + 1:
            raise SchemaError(
                context[:-1],
                "'minProperties' may exceed the number of required properties by one on this server, unless "
                "'additionalProperties' is false.",
            )
        return value

    # Keywords in terms of others: each method returns what must hold instead.

    def _one_of(self, value: Any, schema: Json, context: Context) -> list[Schema]:
        options = _array(value, context)
        exclusive: list[Schema] = []
        for number, option in enumerate(options):
            conditions: list[Schema] = [option]
            for other_number, other in enumerate(options):
                if other_number == number or self._negation.are_disjoint(option, other):
                    continue
                conditions.append(self._complement(other, context))
            exclusive.append({"allOf": conditions} if conditions[1:] else option)
        return [{"anyOf": exclusive}]

    def _not(self, value: Any, schema: Json, context: Context) -> list[Schema]:
        return [self._complement(value, context)]

    def _if(self, value: Any, schema: Json, context: Context) -> list[Schema]:
        then, otherwise = schema.get("then", True), schema.get("else", True)
        if then is True and otherwise is True:
            return []
        branches: list[Schema] = [{"allOf": [value, then]}]
        unless = self._complement(value, context)
        return [{"anyOf": [*branches, {"allOf": [unless, otherwise]}]}]

    def _dependencies(self, value: Any, schema: Json, context: Context) -> list[Schema]:
        rules: list[Schema] = []
        for name, needed in _object(value, context).items():
            rule = {"required": needed} if isinstance(needed, list) else needed
            absent = {"type": "object", "properties": {name: False}}
            rules.append(
                {
                    "anyOf": [
                        absent,
                        {"allOf": [{"type": "object", "required": [name]}, rule]},
                        _NO_OBJECT,
                    ]
                }
            )
        return rules

    def _contains(self, value: Any, schema: Json, context: Context) -> list[Schema]:
        count = schema.get("minContains", 1)
        if not isinstance(count, int) or count > 32:
            raise SchemaError(
                context[:-1], "'minContains' above 32 is not supported by this server."
            )
        if count < 1:
            return []
        return [{"anyOf": [*(item_at(place, value, count) for place in range(PLACES)), _NO_ARRAY]}]

    def _property_names(self, value: Any, schema: Json, context: Context) -> list[Schema]:
        allowed = (
            self._target(value["$ref"]) if isinstance(value, dict) and "$ref" in value else value
        )
        if not isinstance(allowed, bool):
            allowed = _object(allowed, context)
        if allowed is False:
            return [{"anyOf": [{"type": "object", "maxProperties": 0}, _NO_OBJECT]}]
        if allowed is True or not allowed:
            return []
        pattern = _pattern_of_names(allowed)
        if pattern is None or "patternProperties" in schema:
            raise SchemaError(context[:-1], "this 'propertyNames' is not supported by this server.")
        closed = {
            "type": "object",
            "patternProperties": {pattern: True},
            "additionalProperties": False,
        }
        return [{"anyOf": [closed, _NO_OBJECT]}]

    def _complement(self, schema: Any, context: Context) -> Schema:
        """Return a schema that accepts only what ``schema`` refuses."""
        options = self._negation.negate(schema)
        if not options:
            keyword = context[-1]
            raise SchemaError(
                context[:-1],
                f"this use of '{keyword}' is not supported by this server: it cannot be told from the outside what "
                "the schemas in it refuse.",
            )
        return options[0] if len(options) == 1 else {"anyOf": options}


_NO_OBJECT: Json = {"type": ["null", "boolean", "number", "string", "array"]}
_NO_ARRAY: Json = {"type": ["null", "boolean", "number", "string", "object"]}

_REWRITES: Mapping[str, Callable[[_Rewriter, Any, Json, Context], list[Schema]]] = {
    "oneOf": _Rewriter._one_of,
    "not": _Rewriter._not,
    "if": _Rewriter._if,
    "dependencies": _Rewriter._dependencies,
    "dependentRequired": _Rewriter._dependencies,
    "dependentSchemas": _Rewriter._dependencies,
    "contains": _Rewriter._contains,
    "propertyNames": _Rewriter._property_names,
}


def _object(value: object, context: Context) -> Json:
    if not isinstance(value, Mapping):
        raise SchemaError(context, f"{value!r} is not of type 'object'.")
    return value


def _array(value: object, context: Context) -> list[Any]:
    if not isinstance(value, list):
        raise SchemaError(context, f"{value!r} is not of type 'array'.")
    return value


def _at_most_one(schema: Json) -> bool:
    """Return whether the items are unique because there is one of them at most."""
    limit = schema.get("maxItems")
    return isinstance(limit, int) and limit <= 1


def _pattern_of_names(allowed: Json) -> str | None:
    """Return the one pattern that says what ``propertyNames`` says, or ``None``."""
    meant = {k: v for k, v in allowed.items() if k not in ("title", "description", "$comment")}
    meant.pop("type", None) if meant.get("type") == "string" else None
    match meant:
        case {"pattern": str() as pattern, **rest} if not rest:
            return pattern
        case {"enum": list() as names, **rest} if not rest:
            texts = [re.escape(name) for name in names if isinstance(name, str)]
            return f"^(?:{'|'.join(texts)})$" if texts else None
    if meant and meant.keys() <= {"minLength", "maxLength"}:
        return f"^(?s:.){{{meant.get('minLength', 0)},{meant.get('maxLength', '')}}}$"
    return None


def _anchors(schema: object) -> Iterator[tuple[str, Schema]]:
    """Yield what references may name besides paths: each subschema with an ``$id`` or ``$anchor``."""
    if isinstance(schema, list):
        for item in schema:
            yield from _anchors(item)
    if not isinstance(schema, Mapping):
        return
    for keyword in ("$id", "id"):
        if isinstance(name := schema.get(keyword), str):
            yield name.removesuffix("#"), schema
    if isinstance(name := schema.get("$anchor"), str):
        yield f"#{name}", schema
    for keyword, item in schema.items():
        if keyword not in ("enum", "const", "default", "examples"):
            yield from _anchors(item)
