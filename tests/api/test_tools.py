"""Tool calling, as OpenAI's client sees it, with the real nano model held to the tools' schemas."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.api.test_validation import refusal
from tests.serving import CHAT

MODEL = "gpt-4.1-nano"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "description": "Get the time"}}
NOTE = {
    "type": "custom",
    "custom": {
        "name": "count",
        "description": "Writes digits",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[0-9]{3}"}},
    },
}
SQL = {
    "type": "custom",
    "custom": {
        "name": "sql",
        "format": {
            "type": "grammar",
            "grammar": {
                "syntax": "lark",
                "definition": 'start: "SELECT " NAME ";"\nNAME: /[a-z]{1,8}/',
            },
        },
    },
}
TOOLS = [WEATHER, TIME]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"messages": ASK, "tools": TOOLS, "temperature": 0, "max_tokens": 200, **fields}
    return client.chat.completions.create(model=MODEL, **fields)


def named(name: str, kind: str = "function") -> dict[str, Any]:
    return {"type": kind, kind: {"name": name}}


def call(call_id: str, name: str = "get_weather", arguments: str = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class TestCalls:
    def test_required(self, client: openai.OpenAI) -> None:
        choice = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.refusal is None
        (made,) = choice.message.tool_calls
        assert made.id.startswith("call_")
        assert made.type == "function"
        assert made.function.name == "get_weather"
        arguments = json.loads(made.function.arguments)
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        assert arguments["city"] == "Paris"

    def test_a_named_function_ends_with_stop(self, client: openai.OpenAI) -> None:
        choice = ask(client, tool_choice=named("get_time")).choices[0]
        assert choice.finish_reason == "stop"
        (made,) = choice.message.tool_calls
        assert (made.function.name, made.function.arguments) == ("get_time", "{}")

    def test_allowed_tools(self, client: openai.OpenAI) -> None:
        allowed = {"mode": "required", "tools": [named("get_time")]}
        answer = ask(client, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        made = answer.choices[0].message.tool_calls
        assert {one.function.name for one in made} == {"get_time"}
        assert answer.usage.prompt_tokens == ask(client).usage.prompt_tokens

    def test_none_calls_nothing(self, client: openai.OpenAI) -> None:
        choice = ask(client, tool_choice="none", max_tokens=30).choices[0]
        assert choice.message.tool_calls is None
        assert choice.message.content

    def test_auto_may_answer_in_words(self, client: openai.OpenAI) -> None:
        message = ask(
            client, messages=[{"role": "user", "content": "Name a prime number."}], max_tokens=30
        )
        assert message.choices[0].message.tool_calls is None
        assert message.choices[0].message.content

    def test_several_calls_have_ids_of_their_own(self, client: openai.OpenAI) -> None:
        made = [
            one
            for choice in ask(client, tool_choice="required", temperature=1.5, n=8, seed=3).choices
            for one in choice.message.tool_calls or ()
        ]
        assert len({one.id for one in made}) == len(made) >= 8

    @pytest.mark.parametrize("temperature", [0.7, 1.8])
    def test_every_call_is_valid(self, client: openai.OpenAI, temperature: float) -> None:
        schema = {
            "type": "object",
            "properties": {
                "tags": {
                    "type": "array",
                    "items": {"type": "string", "maxLength": 8},
                    "maxItems": 3,
                },
                "level": {"type": "integer", "minimum": 1, "maximum": 12},
                "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
                "place": {"$ref": "#/$defs/place"},
            },
            "required": ["level", "when"],
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                    "required": ["x"],
                }
            },
        }
        tool = {"type": "function", "function": {"name": "mark", "parameters": schema}}
        answer = ask(
            client, tools=[tool], tool_choice="required", temperature=temperature, n=12, seed=1, max_tokens=120
        )  # fmt: skip
        for choice in answer.choices:
            complete = choice.message.tool_calls or []
            if choice.finish_reason == "length":
                complete = complete[:-1]
            for one in complete:
                arguments = json.loads(one.function.arguments)
                jsonschema.validate(arguments, schema)
                assert arguments.keys() <= schema["properties"].keys()

    def test_cut_by_length(self, client: openai.OpenAI) -> None:
        choice = ask(client, tool_choice="required", max_tokens=12).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.content is None

    def test_stop_strings_do_not_cut_arguments(self, client: openai.OpenAI) -> None:
        free = ask(client, tool_choice="required", parallel_tool_calls=False).choices[0]
        choice = ask(
            client, tool_choice="required", parallel_tool_calls=False, stop=["Paris", "{"]
        ).choices[0]
        assert choice.message.tool_calls[0].function == free.message.tool_calls[0].function

    def test_logprobs_are_those_of_the_text(self, client: openai.OpenAI) -> None:
        called = ask(client, tool_choice=named("get_time"), logprobs=True).choices[0]
        assert called.logprobs.content == []
        said = ask(client, tool_choice="none", logprobs=True, max_tokens=5).choices[0]
        assert "".join(token.token for token in said.logprobs.content) == said.message.content


class TestCustomTools:
    def test_regex(self, client: openai.OpenAI) -> None:
        choice = ask(client, tools=[NOTE], tool_choice="required").choices[0]
        (made,) = choice.message.tool_calls
        assert (made.type, made.custom.name) == ("custom", "count")
        assert len(made.custom.input) == 3
        assert made.custom.input.isdecimal()

    def test_lark(self, client: openai.OpenAI) -> None:
        choice = ask(client, tools=[WEATHER, SQL], tool_choice=named("sql", "custom")).choices[0]
        (made,) = choice.message.tool_calls
        assert made.custom.input.startswith("SELECT ")
        assert made.custom.input.endswith(";")

    def test_free_text_streams(self, client: openai.OpenAI) -> None:
        tool = {"type": "custom", "custom": {"name": "write"}}
        stream = ask(client, tools=[tool], tool_choice="required", max_tokens=40, stream=True)
        deltas = [c.choices[0].delta.to_dict() for c in stream if c.choices]
        pieces = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
        assert pieces[0]["type"] == "custom"
        assert pieces[0]["custom"] == {"name": "write", "input": ""}
        assert all(
            set(p) == {"index", "custom"} and set(p["custom"]) == {"input"} for p in pieces[1:]
        )
        assert "".join(p["custom"]["input"] for p in pieces)

    def test_a_wrong_grammar(self, base_url: str) -> None:
        tool = json.loads(json.dumps(SQL))
        tool["custom"]["format"]["grammar"]["definition"] = "start: nothing_here"
        error = refusal(base_url, "chat/completions", {**CHAT, "tools": [tool]})
        assert error["param"] == "tools[0].custom.format.grammar.definition"


class TestStream:
    @pytest.mark.parametrize("choice", ["required", "none", named("get_weather"), "auto"])
    def test_equals_the_whole(self, client: openai.OpenAI, choice: Any) -> None:
        whole = ask(client, tool_choice=choice, n=3, temperature=1, seed=5, max_tokens=60)
        with client.chat.completions.stream(
            model=MODEL, messages=ASK, tools=TOOLS, tool_choice=choice, n=3, temperature=1, seed=5,
            max_tokens=60, stream_options={"include_usage": True},
        ) as stream:  # fmt: skip
            events = list(stream)
            final = stream.current_completion_snapshot
        assert events
        assert final.usage == whole.usage
        for streamed, given in zip(final.choices, whole.choices, strict=True):
            assert streamed.finish_reason == given.finish_reason
            assert streamed.message.content == given.message.content
            one = [
                (c.function.name, c.function.arguments) for c in streamed.message.tool_calls or ()
            ]
            two = [(c.function.name, c.function.arguments) for c in given.message.tool_calls or ()]
            assert one == two

    def test_the_shape_of_deltas(self, client: openai.OpenAI) -> None:
        chunks = list(ask(client, tool_choice="required", stream=True))
        deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
        pieces = [delta["tool_calls"] for delta in deltas[1:-1]]
        assert all(len(piece) == 1 for piece in pieces)
        heads = [piece[0] for piece in pieces if "id" in piece[0]]
        assert [head["index"] for head in heads] == list(range(len(heads)))
        assert all(head["function"]["arguments"] == "" for head in heads)
        assert all(
            piece[0].keys() == {"index", "function"} for piece in pieces if "id" not in piece[0]
        )
        assert deltas[-1] == {}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

    def test_helper_events(self, client: openai.OpenAI) -> None:
        class GetWeather(BaseModel):
            city: str
            unit: Literal["celsius", "fahrenheit"]

        tool = openai.pydantic_function_tool(GetWeather)
        with client.chat.completions.stream(
            model=MODEL, messages=ASK, tools=[tool], tool_choice="required", parallel_tool_calls=False,
            temperature=0,
        ) as stream:  # fmt: skip
            kinds = {event.type for event in stream}
            parsed = stream.get_final_completion().choices[0].message.tool_calls[0]
        assert "tool_calls.function.arguments.done" in kinds
        assert isinstance(parsed.function.parsed_arguments, GetWeather)

    def test_parse(self, client: openai.OpenAI) -> None:
        class Query(BaseModel):
            word: str
            limit: int

        answer = client.chat.completions.parse(
            model=MODEL, messages=ASK, tools=[openai.pydantic_function_tool(Query)],
            tool_choice=named("Query"), temperature=0,
        )  # fmt: skip
        call_made = answer.choices[0].message.tool_calls[0]
        assert isinstance(call_made.function.parsed_arguments, Query)


class TestLegacy:
    def test_function_call(self, client: openai.OpenAI) -> None:
        fields = {"tools": openai.omit, "functions": [WEATHER["function"]]}
        choice = ask(client, **fields, function_call={"name": "get_weather"}).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls is None
        assert json.loads(choice.message.function_call.arguments)["city"] == "Paris"
        stream = ask(client, **fields, function_call={"name": "get_weather"}, stream=True)
        deltas = [chunk.choices[0].delta.to_dict() for chunk in stream]
        calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
        assert calls[0] == {"name": "get_weather", "arguments": ""}
        assert "".join(c["arguments"] for c in calls) == choice.message.function_call.arguments

    def test_results_go_back(self, client: openai.OpenAI) -> None:
        made = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'}
        messages = [
            *ASK,
            {"role": "assistant", "content": None, "function_call": made},
            {"role": "function", "name": "get_weather", "content": "Sunny, 31 degrees"},
        ]
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, functions=[WEATHER["function"]], function_call="none", temperature=0,
            max_tokens=40,
        )  # fmt: skip
        assert "31" in answer.choices[0].message.content


class TestResults:
    def test_an_agent_loop(self, client: openai.OpenAI) -> None:
        messages: list[Any] = [*ASK]
        for turn in range(2):
            answer = ask(client, messages=messages, tool_choice="required").choices[0].message
            messages.append(answer)
            for made in answer.tool_calls:
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": made.id,
                        "content": [{"type": "text", "text": f"Result {turn}: sunny, 31 degrees"}],
                    }
                )
        final = ask(client, messages=messages, tool_choice="none", max_tokens=60).choices[0]
        assert "31" in final.message.content

    def test_parts_count_in_the_prompt(self, client: openai.OpenAI) -> None:
        def count(**fields: Any) -> int:
            return ask(client, max_tokens=1, **fields).usage.prompt_tokens

        bare = count(tools=openai.omit)
        assert bare < count(tools=[TIME]) < count(tools=TOOLS)
        history = [*ASK, {"role": "assistant", "tool_calls": [call("c1")]}]
        short = [*history, {"role": "tool", "tool_call_id": "c1", "content": "12 C"}]
        assert count(messages=short) > count(messages=ASK)


UNANSWERED = (
    "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. The "
    "following tool_call_ids did not have response messages: "
)


def two_calls(*after: dict[str, Any]) -> dict[str, Any]:
    calls = [call("a"), call("b")]
    return {"messages": [*ASK, {"role": "assistant", "tool_calls": calls}, *after]}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x"}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (two_calls(), "messages", UNANSWERED + "a, b"),
        (two_calls(result("b")), "messages", UNANSWERED + "a"),
        (two_calls(result("b"), *ASK), "messages.[3].role", UNANSWERED + "a"),
        (
            {"messages": [*ASK, result("a")]},
            "messages.[1].role",
            "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
            "'tool_calls'.",
        ),
        (
            two_calls(result("z")),
            "messages.[2].tool_call_id",
            "Invalid parameter: 'tool_call_id' of 'z' not found in 'tool_calls' of previous message.",
        ),
        (
            {"messages": [*ASK, {"role": "tool", "content": "x"}]},
            "messages[1].tool_call_id",
            "Missing parameter 'tool_call_id': messages with role 'tool' must have a 'tool_call_id'.",
        ),
        (
            {"messages": [{"role": "function", "content": "x"}]},
            "messages[0].name",
            "Missing parameter 'name': messages with role 'function' must have a 'name'.",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [call("a")]}]},
            "messages[0].tool_calls",
            "Unknown parameter: 'messages[0].tool_calls'. Only a message with role 'assistant' has one.",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0].type",
            "Invalid value: 'web_search'. Supported values are: 'function' and 'custom'.",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing required parameter: 'tools[0].function'."),
        (
            function(name="a b"),
            "tools[0].function.name",
            "Invalid 'tools[0].function.name': string does not match pattern. Expected a string that matches the "
            "pattern '^[a-zA-Z0-9_-]+$'.",
        ),
        (
            function(name="a" * 65),
            "tools[0].function.name",
            "Invalid 'tools[0].function.name': string too long. Expected a string with maximum length 64, but got a "
            "string with length 65 instead.",
        ),
        (
            function(description="d" * 1025),
            "tools[0].function.description",
            "Invalid 'tools[0].function.description': string too long. Expected a string with maximum length 1024, but "
            "got a string with length 1025 instead.",
        ),
        (
            {"tools": [TIME] * 129},
            "tools",
            "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an array with length "
            "129 instead.",
        ),
        (
            {"tools": [TIME, TIME]},
            "tools[1]",
            "Invalid value for 'tools': two of them have the name 'get_time'. Give each its own.",
        ),
        (
            {"tool_choice": "auto"},
            "tool_choice",
            "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
        ),
        (
            {"parallel_tool_calls": False},
            "parallel_tool_calls",
            "Invalid value for 'parallel_tool_calls': 'parallel_tool_calls' is only allowed when 'tools' are "
            "specified.",
        ),
        (
            {"tools": TOOLS, "tool_choice": named("fly")},
            "tool_choice.function.name",
            "Tool choice 'fly' not found in 'tools' parameter.",
        ),
        (
            {"tools": TOOLS, "tool_choice": "maybe"},
            "tool_choice.type",
            "Invalid value: 'maybe'. Supported values are: 'none', 'auto', 'required', 'function', 'custom' and "
            "'allowed_tools'.",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", None),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", None),
        ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions", None),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call", None),
        (
            function(strict=True, parameters={"type": "object", "properties": {"a": {"type": "string"}}}),
            "tools[0].function.parameters",
            "Invalid schema for function 'f': In context=(), 'additionalProperties' is required to be supplied and to "
            "be false.",
        ),
        (
            function(parameters={"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}),
            "tools[0].function.parameters",
            None,
        ),
        (
            {"tools": TOOLS, "x_evermini": {"regex": "a+"}},
            "x_evermini.regex",
            None,
        ),
    ],
)  # fmt: skip
def test_refusals(base_url: str, change: dict[str, Any], param: str, message: str | None) -> None:
    error = refusal(base_url, "chat/completions", {**CHAT, **change})
    assert error["param"] == param, error
    if message is not None:
        assert error["message"] == message


def test_response_format_and_tools_share_an_answer(client: openai.OpenAI) -> None:
    form = {
        "type": "json_schema",
        "json_schema": {
            "name": "prime",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"prime": {"type": "integer"}},
                "required": ["prime"],
                "additionalProperties": False,
            },
        },
    }
    answer = ask(client, response_format=form, temperature=1, seed=2, n=8, max_tokens=80)
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue
        if choice.message.tool_calls:
            assert choice.message.content is None
        else:
            assert json.loads(choice.message.content).keys() == {"prime"}
