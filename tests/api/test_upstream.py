"""Models that another engine runs, over real HTTP: an Evermini with the nano model is the engine.

What is asked through it is what it answers when it is asked directly: token for token, streamed or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from evermini.backends.spec import UpstreamSpec
from evermini.config import Settings
from evermini.service.runtime import Runtime
from evermini.service.upstream.load import connect
from tests.serving import make_client, serving

NAME = "behind"
HELLO = [{"role": "user", "content": "Name three colours."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CITY = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "size": {"enum": ["big", "small"]},
            },
            "required": ["name", "size"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def url(base_url: str) -> Iterator[str]:
    """A server whose only model the shared server runs."""
    spec = UpstreamSpec(NAME, f"{base_url}/v1", model="gpt-4.1-nano")
    with Runtime([connect(spec, Settings())]) as runtime, serving(runtime) as url:
        yield url


@pytest.fixture(scope="module")
def behind(url: str) -> Iterator[openai.OpenAI]:
    with make_client(url) as client:
        yield client


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "seeded": {"seed": 7, "temperature": 0.8, "top_p": 0.9, "n": 3},
    "developer": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "name": "ann", "content": "Hi!"},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "am I?"}]},
        ]
    },
    "stop": {"stop": ["a", "the"], "max_completion_tokens": 40},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"198": -100}},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "json_schema": {"response_format": CITY, "max_completion_tokens": 60},
    "json_object": {
        "messages": [{"role": "user", "content": "Write JSON."}],
        "response_format": {"type": "json_object"},
        "max_completion_tokens": 30,
    },
    "tools_named": {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "max_completion_tokens": 60,
    },
    "tools_required": {"tools": [WEATHER], "tool_choice": "required", "max_completion_tokens": 60},
    "tools_auto": {"tools": [WEATHER], "parallel_tool_calls": False},
    "tools_none": {"tools": [WEATHER], "tool_choice": "none"},
    "tool_result": {
        "messages": [
            *HELLO,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "call_a",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_a", "content": "sunny"},
        ],
        "tools": [WEATHER],
    },
    "custom_tool": {
        "tools": [{"type": "custom", "custom": {"name": "note"}}],
        "tool_choice": "required",
        "max_completion_tokens": 40,
    },
}  # fmt: skip


def without_ids(value: Any) -> Any:
    """Drop what differs between two answers to the same request."""
    if isinstance(value, dict):
        random = {"id", "created", "model", "system_fingerprint"}
        return {key: without_ids(item) for key, item in value.items() if key not in random}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def body_of(case: str) -> dict[str, Any]:
    defaults = {"messages": HELLO, "max_completion_tokens": 12, "temperature": 0}
    return {**defaults, **CASES[case]}


def cached(body: dict[str, Any]) -> dict[str, Any]:
    """How much of a prompt was computed before depends on the order of the requests."""
    details = body["usage"]["prompt_tokens_details"]
    return {
        **body,
        "usage": {**body["usage"], "prompt_tokens_details": {**details, "cached_tokens": 0}},
    }


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_that_of_the_engine(behind, client, case):
    ours = behind.chat.completions.create(model=NAME, **body_of(case))
    theirs = client.chat.completions.create(model="gpt-4.1-nano", **body_of(case))
    assert ours.model == NAME
    assert cached(without_ids(ours.model_dump())) == cached(without_ids(theirs.model_dump()))


def assembled(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """What a stream's choices are in the end, however it was cut into chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk.choices:
            own = choices.setdefault(
                part.index, {"text": "", "calls": {}, "logprobs": [], "reason": None}
            )
            own["text"] += part.delta.content or ""
            own["logprobs"] += [
                t.model_dump() for t in (part.logprobs.content if part.logprobs else [])
            ]
            own["reason"] = part.finish_reason
            for call in part.delta.model_dump().get("tool_calls") or ():
                seen = own["calls"].setdefault(
                    call["index"], {"heads": 0, "name": "", "written": ""}
                )
                seen["heads"] += call.get("id") is not None
                named = call.get("function") or call["custom"]
                seen["name"] += named.get("name") or ""
                seen["written"] += named.get("arguments") or named.get("input") or ""
    return choices


@pytest.mark.parametrize("case", CASES)
def test_a_stream_is_that_of_the_engine_too(behind, client, case):
    wanted = {**body_of(case), "stream": True, "stream_options": {"include_usage": True}}
    ours = list(behind.chat.completions.create(model=NAME, **wanted))
    theirs = list(client.chat.completions.create(model="gpt-4.1-nano", **wanted))
    assert assembled(ours) == assembled(theirs)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in ours}) == 1
    assert ours[-1].choices == []
    assert ours[-1].usage.completion_tokens == theirs[-1].usage.completion_tokens
    assert ours[-1].usage.prompt_tokens == theirs[-1].usage.prompt_tokens
    first = ours[0].choices[0].delta.model_dump(exclude_unset=True)
    assert first == {
        "role": "assistant",
        "content": None if wanted.get("tools") else "",
        "refusal": None,
    }
