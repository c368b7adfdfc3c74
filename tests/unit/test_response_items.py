"""Items as messages, and deltas as events: the parts of the Responses API that need no model."""

from __future__ import annotations

from typing import Any

import pytest

from evermini.errors import ContextLengthError, InvalidRequestError, UnsupportedParameterError
from evermini.service.answer import ChatDelta, ToolCallDelta
from evermini.service.generation import Usage
from evermini.service.responses.events import EventWriter
from evermini.service.responses.items import as_messages, parse_items
from evermini.service.responses.run import new_body, turn_starts
from evermini.service.responses.schemas import chat_request, parse_response, renamed

USAGE = Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=1)
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "Sunny"}
USER = {"role": "user", "content": "Weather?"}


def messages(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [message for message, _ in as_messages(parse_items(list(items), "input"), "input")]


class TestItems:
    def test_a_call_joins_the_text_before_it(self) -> None:
        found = messages(USER, {"role": "assistant", "content": "Let me look."}, CALL, OUTPUT)
        assert [message["role"] for message in found] == ["user", "assistant", "tool"]
        assert found[1]["content"] == [{"type": "text", "text": "Let me look."}]
        assert found[1]["tool_calls"] == [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": "{}"},
            }
        ]
        assert found[2] == {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}

    def test_calls_in_a_row_are_one_message_and_outputs_follow_it(self) -> None:
        second = {**CALL, "call_id": "call_2"}
        other = {**OUTPUT, "call_id": "call_2"}
        found = messages(USER, CALL, second, USER, other, OUTPUT)
        assert [message["role"] for message in found] == [
            "user",
            "assistant",
            "tool",
            "tool",
            "user",
        ]
        assert [call["id"] for call in found[1]["tool_calls"]] == ["call_1", "call_2"]
        assert [m["tool_call_id"] for m in found[2:4]] == ["call_1", "call_2"]

    def test_a_call_after_an_output_is_a_new_message(self) -> None:
        second = {**CALL, "call_id": "call_2"}
        found = messages(USER, CALL, OUTPUT, second, {**OUTPUT, "call_id": "call_2"})
        roles = [message["role"] for message in found]
        assert roles == ["user", "assistant", "tool", "assistant", "tool"]

    def test_custom_tools(self) -> None:
        call = {"type": "custom_tool_call", "call_id": "call_1", "name": "sql", "input": "SELECT"}
        output = {
            "type": "custom_tool_call_output",
            "call_id": "call_1",
            "output": [{"type": "input_text", "text": "1"}],
        }
        found = messages(USER, call, output)
        assert found[1]["tool_calls"] == [
            {"id": "call_1", "type": "custom", "custom": {"name": "sql", "input": "SELECT"}}
        ]
        assert found[2]["content"] == [{"type": "text", "text": "1"}]

    def test_a_refusal_stays_one(self) -> None:
        part = {"type": "refusal", "refusal": "No."}
        found = messages(USER, {"role": "assistant", "content": [part]}, USER)
        assert found[1]["content"] == [part]

    def test_nulls_that_clients_add_are_no_fields(self) -> None:
        (item,) = parse_items([{**CALL, "namespace": None, "status": None, "id": None}], "input")
        assert item["id"].startswith("fc_")
        assert item["status"] == "completed"

    def test_items_read_back_are_taken_as_they_are(self) -> None:
        stored = parse_items([USER, CALL, OUTPUT, {"role": "assistant", "content": "x"}], "input")
        assert parse_items(stored, "input") == stored

    def test_turns_are_cut_where_no_call_loses_its_output(self) -> None:
        items = parse_items([USER, CALL, USER, OUTPUT, USER, USER], "input")
        assert turn_starts(items) == [4, 5]


def writer() -> EventWriter:
    request = parse_response({"model": "m", "input": "x"})
    return EventWriter(new_body(request, "m", "in_progress"), None)


def call_delta(index: int, *pieces: str, kind: Any = "function") -> list[ChatDelta]:
    head = ToolCallDelta(index, kind, f"call_{index}", f"tool_{index}")
    rest = [ToolCallDelta(index, kind, arguments=piece) for piece in pieces]
    return [ChatDelta(0, tool_calls=(delta,)) for delta in (head, *rest)]


def written(writer: EventWriter, deltas: list[ChatDelta], reason: Any) -> list[dict[str, Any]]:
    events = writer.started()
    for delta in deltas:
        events += writer.add(delta)
    return [*events, *writer.finish(reason, USAGE), writer.terminal()]


class TestEvents:
    def test_text_and_parallel_calls(self) -> None:
        out = writer()
        deltas = [ChatDelta(0, "Let "), ChatDelta(0, "me."), *call_delta(0, '{"a"', ":1}")]
        events = written(out, [*deltas, *call_delta(1, "SELECT", kind="custom")], "tool_calls")
        assert [event["type"].removeprefix("response.") for event in events] == [
            *("created", "in_progress"),
            *("output_item.added", "content_part.added", *["output_text.delta"] * 2),
            *("output_text.done", "content_part.done", "output_item.done"),
            *("output_item.added", *["function_call_arguments.delta"] * 2),
            *("function_call_arguments.done", "output_item.done"),
            *("output_item.added", "custom_tool_call_input.delta"),
            *("custom_tool_call_input.done", "output_item.done", "completed"),
        ]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        text, function, custom = events[-1]["response"]["output"]
        assert text["content"][0]["text"] == "Let me."
        assert (function["call_id"], function["name"], function["arguments"]) == (
            "call_0",
            "tool_0",
            '{"a":1}',
        )
        assert (custom["type"], custom["input"]) == ("custom_tool_call", "SELECT")
        for event in events[2:-1]:
            item = event.get("item")
            item_id = item["id"] if item else event["item_id"]
            place = [text["id"], function["id"], custom["id"]].index(item_id)
            assert event["output_index"] == place

    def test_a_call_that_is_cut_is_incomplete(self) -> None:
        events = written(writer(), call_delta(0, '{"a"'), "length")
        last = events[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
        (call,) = last["response"]["output"]
        assert (call["status"], call["arguments"]) == ("incomplete", '{"a"')

    def test_an_empty_answer_is_an_empty_message(self) -> None:
        (item,) = written(writer(), [], "stop")[-1]["response"]["output"]
        assert item["content"][0]["text"] == ""

    def test_a_failure_keeps_what_was_finished(self) -> None:
        out = writer()
        out.started()
        for delta in [ChatDelta(0, "Hi"), *call_delta(0, "{")]:
            out.add(delta)
        error = out.fail({"code": "server_error", "message": "planned"})
        last = out.terminal()
        assert (error["type"], error["code"], error["message"]) == (
            "error",
            "server_error",
            "planned",
        )
        assert last["type"] == "response.failed"
        assert [item["type"] for item in last["response"]["output"]] == ["message"]


class TestTranslation:
    def test_tools_and_formats_move_a_level_down(self) -> None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
        body: dict[str, Any] = {
            "model": "m",
            "input": "x",
            "tools": [
                {"type": "function", "name": "f", "parameters": schema, "strict": True},
                {
                    "type": "custom",
                    "name": "c",
                    "format": {"type": "grammar", "syntax": "regex", "definition": "a+"},
                },
            ],
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}],
            },
            "parallel_tool_calls": False,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}},
            "max_output_tokens": 5,
        }
        request = parse_response(body)
        chat = chat_request(request, parse_items(request.input, "input"))
        toolset = chat.toolset
        assert [tool.name for tool in toolset.tools] == ["f", "c"]
        assert [tool.name for tool in toolset.callable] == ["f"]
        assert (toolset.mode, toolset.parallel) == ("required", False)
        assert chat.max_output == 5
        assert chat.response_format is not None

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
            ({"tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
            ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
            ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ],
    )
    def test_errors_name_this_requests_fields(self, change: dict[str, Any], param: str) -> None:
        tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}}]
        request = parse_response({"model": "m", "input": "x", "tools": tools, **change})
        with pytest.raises(InvalidRequestError) as caught:
            chat_request(request, parse_items(request.input, "input"))
        assert caught.value.param == param
        assert "json_schema." not in caught.value.message
        assert "function." not in caught.value.message

    @pytest.mark.parametrize(
        ("error", "param"),
        [
            (ContextLengthError("x", param="messages"), "input"),
            (UnsupportedParameterError("x", param="messages[2].content[0]"), "input"),
            (InvalidRequestError("x", param="temperature"), "temperature"),
            (
                InvalidRequestError("x", param="response_format.json_schema.schema"),
                "text.format.schema",
            ),
        ],
    )
    def test_kind_and_code_stay(self, error: InvalidRequestError, param: str) -> None:
        again = renamed(error)
        assert (type(again), again.code, again.param) == (type(error), error.code, param)
