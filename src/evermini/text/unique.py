"""Arrays of different items out of a few values (``uniqueItems`` of an ``enum``): all of them, written out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

MAX_VALUES = 5
"""So many values have 326 arrays of different ones; six have 1,957."""

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)  # fmt: skip
_ARRAY = _ANNOTATIONS | {"type", "items", "minItems", "maxItems", "uniqueItems"}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
}


def unique_arrays(schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a schema of the arrays that ``schema`` accepts, one by one.

    Returns:
        ``None`` if it does not ask for different items, says more than this knows, or its items have too many values.
    """
    if schema.get("uniqueItems") is not True or schema.get("type") != "array":
        return None
    least, most = schema.get("minItems", 0), schema.get("maxItems", MAX_VALUES)
    values = _values(schema.get("items"))
    if not schema.keys() <= _ARRAY or values is None or not _is_count(least, most):
        return None
    lengths = range(least, min(most, len(values)) + 1)
    return {
        "anyOf": [
            {
                "type": "array",
                "prefixItems": [{"const": value} for value in chosen],
                "items": False,
                "minItems": length,
                "maxItems": length,
            }
            for length in lengths
            for chosen in itertools.permutations(values, length)
        ]
    }


def _is_count(*numbers: object) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)


def _values(items: object) -> list[Any] | None:
    """Return the different values that ``items`` accepts, if they are few and listed."""
    if not isinstance(items, Mapping) or not items.keys() <= _ANNOTATIONS | {
        "type",
        "enum",
        "const",
    }:
        return None
    kind = items.get("type")
    if "const" in items:
        listed = [items["const"]]
    elif "enum" in items:
        listed = items["enum"]
    elif kind == "boolean":
        listed = [False, True]
    else:
        return None
    if not isinstance(listed, list) or len({_key(value) for value in listed}) < len(listed):
        return None
    if "const" in items and "enum" in items:
        return None
    if kind is not None:
        kinds = [kind] if isinstance(kind, str) else kind
        if not isinstance(kinds, list) or not all(one in _TYPES for one in kinds):
            return None
        listed = [value for value in listed if any(_has_type(value, one) for one in kinds)]
    return listed if len(listed) <= MAX_VALUES else None


def _key(value: object) -> str:
    """Return a text that equal values share: 1 and 1.0 are equal in JSON Schema, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _has_type(value: object, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])
