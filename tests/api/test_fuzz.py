"""Requests that nobody would write: whatever comes in, an answer or an error in the contract's shape goes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving import ERROR_KEYS

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-3, 3) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def fields(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


def sometimes_junk(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy that rarely goes astray: most requests must be good enough to be answered."""
    return st.integers(0, 99).flatmap(lambda number: JUNK if number == 99 else strategy)


NAME = sometimes_junk(st.sampled_from(["f", "g", "a-b_c", "f", "g", "get_it", "n" * 64, "x y"]))
SCHEMA = st.recursive(
    st.sampled_from(
        [
            *({}, {"type": "string", "maxLength": 3}, {"type": "integer"}, {"enum": [1, "a", None]}),
            *({"const": {}}, {"$ref": "#/$defs/x"}, {"type": "nothing"}, {"type": "string", "format": "uuid"}),
        ]
    ),
    lambda inner: fields({"type": st.just("object")}, {
        "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        "required": st.lists(st.sampled_from("abcd"), max_size=2),
        "additionalProperties": st.booleans(),
        "not": inner,
    }) | st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner)
    | st.builds(lambda options: {"anyOf": options}, st.lists(inner, max_size=2)),
    max_leaves=5,
)  # fmt: skip
FUNCTION = fields(
    {"name": NAME},
    {
        "description": sometimes_junk(st.text(max_size=5)),
        "parameters": sometimes_junk(SCHEMA),
        "strict": sometimes_junk(st.booleans()),
    },
)
FORMAT = st.sampled_from(
    [
        {"type": "text"},
        {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[ab]{2}"}},
        {"type": "grammar", "grammar": {"syntax": "regex", "definition": "(["}},
        {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "x"'}},
        {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: }"}},
        {"type": "grammar"},
    ]
)
TOOL = sometimes_junk(
    st.builds(lambda f: {"type": "function", "function": f}, sometimes_junk(FUNCTION))
    | st.builds(lambda n, f: {"type": "custom", "custom": {"name": n, "format": f}}, NAME, FORMAT)
)
CALL = sometimes_junk(
    st.builds(
        lambda i, n, a: {"id": i, "type": "function", "function": {"name": n, "arguments": a}},
        st.sampled_from("pq"), NAME, st.sampled_from(["{}", '{"a": 1}', "", "[", "null"]),
    )
    | st.builds(lambda n: {"id": "p", "type": "custom", "custom": {"name": n, "input": "x\n"}}, NAME)
)  # fmt: skip
TEXT = sometimes_junk(
    st.text(max_size=8) | st.just("\x00</s>") | st.just([{"type": "text", "text": "<tool_call>"}])
)
MESSAGE = sometimes_junk(
    fields(
        {"role": sometimes_junk(st.sampled_from(["system", "developer", "user", "assistant", "function"])),
            "content": TEXT,
        },
        {
            "name": sometimes_junk(st.just("Bo")),
            "tool_calls": sometimes_junk(st.none()), "function_call": sometimes_junk(st.none()),
            "refusal": sometimes_junk(st.none()),
        },
    )
)  # fmt: skip
PAIR = st.builds(
    lambda call, text: [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "p", "content": text},
    ],
    CALL,
    TEXT,
)
CHOICE = sometimes_junk(
    st.sampled_from(
        [
            *("none", "auto", "required", {"type": "function", "function": {"name": "f"}}),
            {"type": "custom", "custom": {"name": "g"}},
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "g"}}],
                },
            },
        ]
    )
)
BODY = fields(
    {
        "model": sometimes_junk(st.just("gpt-4.1-nano")),
        "messages": sometimes_junk(
            st.builds(
                lambda some, pair, last: [*some, *pair, last],
                st.lists(MESSAGE, max_size=2), PAIR | st.just([]), MESSAGE | st.just({"role": "user", "content": "x"}),
            )
        ),
        "max_tokens": sometimes_junk(st.integers(1, 12)),
    },
    {
        "tools": sometimes_junk(st.lists(TOOL, min_size=1, max_size=3)),
        "tool_choice": CHOICE, "parallel_tool_calls": sometimes_junk(st.booleans()),
        "n": sometimes_junk(st.integers(1, 2)), "stop": sometimes_junk(st.sampled_from(["a", ["{", "}"]])),
        "logprobs": sometimes_junk(st.booleans()), "stream": st.booleans(),
        "response_format": sometimes_junk(
            st.builds(lambda s: {"type": "json_schema", "json_schema": {"name": "r", "schema": s}}, SCHEMA)
        ),
        "temperature": sometimes_junk(st.floats(0, 2)),
        "logit_bias": sometimes_junk(st.dictionaries(st.sampled_from(["5", "90"]), st.integers(-99, 99), max_size=2)),
        "metadata": sometimes_junk(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
        "service_tier": sometimes_junk(st.sampled_from(["auto", "flex"])), "user": sometimes_junk(st.text(max_size=5)),
        "x_evermini": sometimes_junk(st.just({"why": True})),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@given(body=BODY)
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_an_answer_or_an_error(http: httpx.Client, body: dict[str, Any]) -> None:
    response = http.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error.keys() == ERROR_KEYS
        assert error["message"]
        assert error["type"] == "invalid_request_error"
        return
    if body.get("stream") is True:
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text
        return
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] in ("stop", "length", "tool_calls", "function_call")
        if choice["finish_reason"] == "tool_calls":
            for made in choice["message"]["tool_calls"]:
                if made["type"] == "function":
                    json.loads(made["function"]["arguments"])
