"""Whatever schema is asked for, what the real nano model writes under it is valid, alone and in a crowd."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from evermini import LLM
from evermini.errors import InvalidRequestError
from tests.schemas import SCHEMAS, is_valid

ASK = [{"role": "user", "content": "Make up something small, in JSON."}]


@pytest.fixture(scope="module")
def llm():
    with LLM("nano", kv_memory="64MiB", recall=False, prompt_disk=0) as llm:
        yield llm


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS)
def test_what_nano_writes_is_valid(llm, schema):
    assume(isinstance(schema, dict))
    try:
        answer = llm.chat(
            ASK, response_format=form(schema), temperature=1.0, max_completion_tokens=60, n=2
        )
    except InvalidRequestError:
        assume(False)
        raise AssertionError from None
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            assert is_valid(schema, json.loads(choice.text)), choice.text


def test_a_crowd_changes_no_answer(llm):
    schemas = [
        {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 5},
        {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        {"type": "string", "format": "date"},
        {"anyOf": [{"type": "integer"}, {"type": "object"}]},
    ]

    def answer(number: int) -> str:
        params = {"temperature": 0, "max_completion_tokens": 60}
        if number % 5 < 4:
            params["response_format"] = form(schemas[number % 5])
        return str(llm.chat(ASK, **params).text)

    alone = [answer(number) for number in range(5)]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(answer, range(20)))
    assert together == alone * 4
