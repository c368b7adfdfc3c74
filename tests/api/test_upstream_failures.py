"""What clients see of an engine that is away, refuses, fails, breaks off, is silent, or does not keep to the form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.responses import Response

from tests.ports import free_port
from tests.serving import abandoned, assert_error, make_client, serve_app, wait_for
from tests.upstream_fakes import (
    CUT,
    FOREVER,
    NAME,
    FakeEngine,
    behind,
    chunk,
    fake_engine,
    json_response,
    refused,
    whole,
)

CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "Hello!"}]}
FORMS: dict[str, dict[str, Any]] = {"whole": {}, "stream": {"stream": True}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "add", "strict": True, "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeEngine, str]]:
    with fake_engine() as (engine, base_url), behind(base_url, upstream_timeout=3) as (url, _):
        yield engine, url


@pytest.fixture
def engine(running) -> FakeEngine:
    fresh = FakeEngine()
    running[0].__dict__.update(fresh.__dict__)
    return running[0]


@pytest.fixture
def url(running) -> str:
    return running[1]


def post(url: str, path: str = "chat/completions", **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={**CHAT, **fields}, timeout=30)


@pytest.fixture(scope="module")
def nowhere() -> str:
    """A base URL where nothing listens."""
    return f"http://127.0.0.1:{free_port()}/v1"


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_that_is_away_is_a_503_that_says_so_and_comes_back_by_itself(nowhere, form):
    with behind(nowhere) as (url, _):
        response = post(url, **FORMS[form])
        error = assert_error(response, 503)
        assert "cannot be reached" in error["message"]
        assert error["type"] == "server_error"
        assert "retry-after" in response.headers
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["context_window"] is None
        engine = FakeEngine(lambda body: whole_or_stream(body, "Hi"))
        port = int(nowhere.split(":")[2].removesuffix("/v1"))
        with make_client(url) as client, serve_app(engine, port=port):
            answer = client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == "Hi"


def whole_or_stream(body: dict[str, Any], text: str) -> Any:
    if body.get("stream"):
        return [chunk(content=text), chunk("stop"), "[DONE]"]
    return json_response(whole(content=text))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("status", "fields", "ours", "code", "says"),
    [
        (400, {"message": "bad seed", "param": "seed", "code": "x"}, 400, "x", "bad seed"),
        (422, {"message": "bad seed"}, 400, None, "bad seed"),
        (400, {"message": "too long", "code": "context_length_exceeded"}, 400, "context_length_exceeded", "too long"),
        (400, {"message": "request (9 tokens) exceeds the available context size (4 tokens)",
               "type": "exceed_context_size_error"}, 400, "context_length_exceeded", "exceeds"),
        (400, {"message": "This model's maximum context length is 4 tokens."}, 400, "context_length_exceeded", "is 4"),
        (401, {"message": "who?"}, 502, None, "upstream_key"),
        (404, {"message": "The model `theirs` does not exist."}, 502, None, "?model="),
        (413, {"message": "huge"}, 413, None, "huge"),
        (429, {"message": "queue full"}, 429, "rate_limit_exceeded", "queue full"),
        (500, {"message": "CUDA error at 10.0.0.5"}, 502, None, "status 500"),
        (501, {"message": "no chats here"}, 400, "unsupported_parameter", "no chats here"),
        (503, {"message": "Loading model"}, 503, None, "Loading model"),
    ],
)  # fmt: skip
def test_what_the_engine_refuses_is_refused_in_our_shape(
    engine, url, form, status, fields, ours, code, says
):
    engine.answer = refused(status, **fields)
    error = assert_error(post(url, **FORMS[form]), ours)
    assert says in error["message"]
    assert error["code"] == code
    assert "10.0.0.5" not in error["message"]
    if fields.get("param"):
        assert error["param"] == "seed"
    asked = [path for path, _, _ in engine.asked if path.endswith("completions")]
    assert len(asked) == 1, "what was sent is not sent again"


def events(response: httpx.Response) -> list[str]:
    return [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ([chunk(content="Once"), CUT], "broke off"),
        ([chunk(content="Once")], "broke off"),
        ([chunk(content="Once"), "[DONE]"], "without an end"),
        ([chunk(content="Once"), {"error": {"message": "CUDA"}}], "in the middle"),
        ([chunk(content="Once"), "no JSON"], "no OpenAI-compatible engine"),
        ([chunk(content="Once"), {"choices": [{"index": 7, "delta": {}}]}], "choice 7"),
        ([chunk(content="Once"), chunk("stop"), chunk(content="more"), "[DONE]"], "has ended"),
        (
            [chunk(content="Once"), chunk(tool_calls=[{"index": 0, "function": {}}])],
            "without a name",
        ),
        ([chunk(content="Once"), FOREVER], "silent"),
    ],
)
def test_a_stream_that_goes_wrong_ends_with_an_error_event_and_no_done(engine, url, broken, says):
    engine.answer = lambda body: broken
    response = post(url, stream=True)
    assert response.status_code == 200
    sent = events(response)
    assert "Once" in response.text
    error = json.loads(sent[-1])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert "[DONE]" not in sent


def test_an_answer_that_is_none_is_an_error(engine, url):
    engine.answer = lambda body: Response("<html>", media_type="text/html")
    assert "no OpenAI-compatible engine" in assert_error(post(url), 502)["message"]
    engine.answer = lambda body: [chunk(content="x"), CUT]
    assert "broke off" in assert_error(post(url), 502)["message"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("fields", "message", "says"),
    [
        ({"response_format": JSON_FORM}, {"content": "Sure!"}, "the text is no JSON"),
        ({"response_format": JSON_FORM}, {"content": '{"a": "1"}'}, "$.a of the text"),
        ({"response_format": JSON_FORM}, {"content": '{"a": 1, "b": 2}'}, "the text"),
        ({"tools": [TOOL], "tool_choice": "required"}, {"content": "No."}, "no tool is called"),
        ({"tools": [TOOL]}, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "add", "arguments": "{"}}]},
         "arguments of 'add'"),
        ({"tools": [TOOL]}, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "sub", "arguments": "{}"}}]},
         "none of the tools"),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_an_error_not_an_answer(
    engine, url, form, fields, message, says
):
    def answer(body: dict[str, Any]) -> Any:
        if body.get("stream"):
            return [chunk(**message), chunk("stop"), "[DONE]"]
        return json_response(whole(**message))

    engine.answer = answer
    response = post(url, **fields, **FORMS[form])
    if form == "stream":
        assert response.status_code == 200
        error = json.loads(events(response)[-1])["error"]
    else:
        error = assert_error(response, 502)
    assert says in error["message"]


def test_an_answer_that_the_limit_cut_need_not_have_the_form(engine, url):
    engine.answer = lambda body: json_response(whole("length", content='{"a'))
    assert post(url, response_format=JSON_FORM).json()["choices"][0]["finish_reason"] == "length"


def test_calls_come_as_the_contract_has_them_however_the_engine_cuts_them(engine, url):
    def call(index: int, name: str | None, arguments: str, call_id: str | None = None) -> Any:
        function = {"name": name, "arguments": arguments}
        return chunk(tool_calls=[{"index": index, "id": call_id, "function": function}])

    engine.answer = lambda body: [
        chunk(content="Adding."),
        call(3, "add", '{"a"', "theirs"),
        call(3, "add", ": 1}", "theirs"),
        call(4, "add", '{"a": 2}'),
        chunk("stop"),
        "[DONE]",
    ]
    with make_client(url) as client:
        stream = client.chat.completions.create(**CHAT, tools=[TOOL], stream=True)
        parts = [chunk.choices[0] for chunk in stream if chunk.choices]
    pieces = [
        call.model_dump(exclude_none=True) for p in parts for call in p.delta.tool_calls or ()
    ]
    assert [piece["index"] for piece in pieces] == [0, 0, 0, 1, 1]
    assert pieces[0]["id"] == "theirs"
    assert pieces[3]["id"].startswith("call_")
    assert all("id" not in pieces[n] for n in (1, 2, 4))
    assert "".join(p["function"]["arguments"] for p in pieces[:3]) == '{"a": 1}'
    assert parts[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("form", FORMS)
def test_a_client_that_leaves_ends_the_request_at_the_engine(form):
    with fake_engine() as (engine, base_url), behind(base_url) as (url, _):
        engine.answer = lambda body: [chunk(content="Once"), FOREVER]
        with abandoned(url, {**CHAT, **FORMS[form]}):
            wait_for(lambda: any(path.endswith("completions") for path, _, _ in engine.asked))
        wait_for(lambda: engine.num_left == 1)


def test_closing_the_model_ends_what_runs_with_an_error_that_clients_can_read():
    with fake_engine() as (engine, base_url), behind(base_url) as (url, served):
        engine.answer = lambda body: [chunk(content="Once"), FOREVER]
        with make_client(url) as client:
            stream = iter(client.chat.completions.create(**CHAT, stream=True))
            while not next(stream).choices[0].delta.content:
                pass
            served.close()
            with pytest.raises(openai.APIError, match="stopped"):
                list(stream)
        wait_for(lambda: engine.num_left == 1)
        assert_error(post(url), 503)
        assert httpx.get(f"{url}/readyz").status_code == 503


def test_the_engine_is_asked_in_full_and_with_its_key(monkeypatch):
    monkeypatch.setenv("THEIR_KEY", "k-1")
    spec = {"key_variable": "THEIR_KEY"}
    with fake_engine() as (engine, base_url), behind(base_url, spec=spec) as (url, _):
        engine.answer = lambda body: whole_or_stream(body, "Hi")
        post(url, prediction={"type": "content", "content": "Hi"}, user="ann", metadata={"a": "b"})
        path, headers, body = engine.asked[-1]
    assert headers["authorization"] == "Bearer k-1"
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "theirs",
        "messages": CHAT["messages"],
        "temperature": 1.0,
        "top_p": 1.0,
    }


def test_functions_of_the_older_kind_are_tools_to_the_engine(engine, url):
    called = {"tool_calls": [{"id": "c", "function": {"name": "add", "arguments": '{"a": 1}'}}]}
    engine.answer = lambda body: json_response(whole("tool_calls", **called))
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}},
        {"role": "function", "name": "add", "content": "3"},
    ]
    function = {"name": "add", "parameters": SCHEMA}
    answer = post(url, messages=messages, functions=[function]).json()["choices"][0]
    assert answer["message"]["function_call"] == {"name": "add", "arguments": '{"a": 1}'}
    assert answer["finish_reason"] == "function_call"
    sent = engine.asked[-1][2]
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert sent["parallel_tool_calls"] is False
    call_id = sent["messages"][1]["tool_calls"][0]["id"]
    assert sent["messages"][2] == {
        "role": "tool",
        "content": "3",
        "tool_call_id": call_id,
        "name": "add",
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"x_evermini": {"reading": "sweep"}}, "x_evermini.reading"),
        ({"x_evermini": {"reading": "recall"}}, "x_evermini.reading"),
        ({"x_evermini": {"regex": "a+"}}, "x_evermini.regex"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"max_completion_tokens": 40_000}, "max_completion_tokens"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}},
         "response_format"),
    ],
)  # fmt: skip
def test_what_no_engine_could_do_is_refused_without_asking_it(engine, url, fields, param):
    assert assert_error(post(url, **fields), 400)["param"] == param
    assert not any(path.endswith("completions") for path, _, _ in engine.asked)
