"""What is refused, with which words, and under whose name."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serving import CHAT, HELLO, assert_error


def user(content: object, **fields: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


def assistant(**fields: object) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", **fields}]}


def refusal(base_url: str, path: str, body: object) -> dict[str, Any]:
    response = httpx.post(
        f"{base_url}/v1/{path}",
        content=json.dumps(body),  # httpx would send nothing for None
        headers={"content-type": "application/json"},
    )
    error = assert_error(response, 400)
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        (user(5), "messages[0].content", "invalid_type"),
        (user(None), "messages[0].content", "invalid_type"),
        (user([]), "messages[0].content", "empty_array"),
        (user([{"type": "text"}]), "messages[0].content[0].text", "missing_required_parameter"),
        (user([{"type": "poem", "text": ""}]), "messages[0].content[0].type", "invalid_value"),
        (user([{"type": "refusal", "refusal": ""}]), "messages[0].content[0].type", "invalid_value"),
        (user("x", refusal="no"), "messages[0].refusal", "unknown_parameter"),
        (user("x", foo=1), "messages[0].foo", "unknown_parameter"),
        (user("x", name="a b"), "messages[0].name", "invalid_value"),
        ({"model": None}, "model", "invalid_type"),
        ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"presence_penalty": 2.1}, "presence_penalty", "decimal_above_max_value"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "decimal_below_min_value"),
        ({"stop": list("abcde")}, "stop", "array_above_max_length"),
        ({"stop": ""}, "stop[0]", "empty_string"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 40_000}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "stream_options.x",
            "unknown_parameter",
        ),
        ({"metadata": dict.fromkeys("abcdefghijklmnopq", "")}, "metadata", "object_above_max_properties"),
        ({"metadata": {"k" * 65: ""}}, "metadata." + "k" * 65, "string_above_max_length"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length"),
        ({"service_tier": "gold"}, "service_tier", "invalid_value"),
        ({"safety_identifier": "x" * 129}, "safety_identifier", "string_above_max_length"),
        ({"prompt_cache_retention": "1h"}, "prompt_cache_retention", "invalid_value"),
        ({"top_k": 5}, "top_k", "unknown_parameter"),
    ],
)  # fmt: skip
def test_chat(base_url: str, change: dict[str, Any], param: str, code: str | None) -> None:
    error = refusal(base_url, "chat/completions", {**CHAT, **change})
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"messages": []},
            "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead.",
        ),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "Invalid value: 'robot'. Supported values are: 'developer', 'system', 'user', 'assistant', 'tool' and "
            "'function'.",
        ),
        ({"messages": [{}]}, "Missing required parameter: 'messages[0].role'."),
        (user("x", foo=1), "Unknown parameter: 'messages[0].foo'."),
        ({"model": None}, "Invalid type for 'model': expected a string, but got null instead."),
        (
            {"temperature": 2.5},
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead.",
        ),
        (
            {"n": 0},
            "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        ),
        (
            {"n": 1.5},
            "Invalid type for 'n': expected an integer, but got a decimal number instead.",
        ),
        (
            {"stop": list("abcde")},
            "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with length 5 "
            "instead.",
        ),
        (
            {"max_tokens": 40_000},
            "max_tokens is too large: 40000. This model supports at most 32768 completion tokens, whereas you provided "
            "40000.",
        ),
        (
            {"top_logprobs": 2},
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
        ),
        (
            {"stream_options": {"include_usage": True}},
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
        ),
        ({"foo": 1}, "Unrecognized request argument supplied: foo"),
        ({"foo": 1, "bar": 2}, "Unrecognized request arguments supplied: foo, bar"),
    ],
)
def test_wording(base_url: str, change: dict[str, Any], message: str) -> None:
    assert refusal(base_url, "chat/completions", {**CHAT, **change})["message"] == message


def test_missing_fields(base_url: str) -> None:
    error = refusal(base_url, "chat/completions", {"messages": HELLO})
    assert error["message"] == "Missing required parameter: 'model'."
    error = refusal(base_url, "chat/completions", {"model": "gpt-4.1-nano"})
    assert error["param"] == "messages"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"prompt_cache_options": {"mode": "explicit"}}, "prompt_cache_options"),
        (assistant(audio={"id": "1"}), "messages[0].audio"),
        (user([{"type": "input_audio", "input_audio": {}}]), "messages[0].content[0].type"),
        (
            user([{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}]),
            "messages[0].content[0].prompt_cache_breakpoint",
        ),
    ],
)
def test_what_is_not_acted_on_is_refused_by_name(
    base_url: str, change: dict[str, Any], param: str
) -> None:
    error = refusal(base_url, "chat/completions", {**CHAT, **change})
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt[1]"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 21}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": ["x"] * 300, "n": 7}, "prompt"),
        ({"messages": []}, "messages"),
    ],
)
def test_completions(base_url: str, change: dict[str, Any], param: str) -> None:
    body = {"model": "gpt-4.1-nano", "prompt": "x", "max_tokens": 1, **change}
    assert refusal(base_url, "completions", body)["param"] == param


@pytest.mark.parametrize("body", [["x"], "x", None, 5])
def test_a_body_that_is_no_object(base_url: str, body: object) -> None:
    assert refusal(base_url, "completions", body)["code"] == "invalid_type"
