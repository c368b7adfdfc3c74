"""Models that another engine runs, over real HTTP: an Evermini with the nano model is the engine.

What is asked through it is what it answers when it is asked directly: token for token, streamed or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from evermini import LLM
from evermini.backends.spec import UpstreamSpec
from evermini.config import Settings, load_settings
from evermini.errors import UnsupportedParameterError
from evermini.service.runtime import Runtime, ServedModel
from evermini.service.upstream.load import connect, load_upstream
from tests.long_texts import NEEDLES, story
from tests.serving import assert_error, make_client, reading, serving, wait_for

NAME = "behind"
START = int(time.time()) - 60
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


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "Once upon a time"},
    "several": {"prompt": ["One,", "Two,"], "n": 2, "seed": 3, "temperature": 0.9},
    "ids": {"prompt": [[338, 6330], [5345]]},
    "logprobs": {"prompt": "Once upon", "logprobs": 2},
    "scored": {"prompt": "Once upon", "echo": True, "logprobs": 1, "max_tokens": 0},
    "best_of": {"prompt": "Once upon", "best_of": 3, "seed": 5, "temperature": 1.2},
    "none": {"prompt": None, "stop": "."},
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_text_completion_is_that_of_the_engine(url, base_url, case):
    wanted = {"max_tokens": 8, "temperature": 0, **COMPLETIONS[case]}
    ours, theirs = (
        httpx.post(f"{root}/v1/completions", json={**wanted, "model": name}).json()
        for root, name in ((url, NAME), (base_url, "gpt-4.1-nano"))
    )
    assert cached(without_ids(ours)) == cached(without_ids(theirs))


@pytest.mark.parametrize("case", ["plain", "several", "logprobs", "scored"])
def test_a_streamed_text_completion_is_that_of_the_engine(behind, client, case):
    wanted = {"max_tokens": 8, "temperature": 0, **COMPLETIONS[case], "stream": True}

    def choices(source: openai.OpenAI, name: str) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {}
        for chunk in source.completions.create(model=name, **wanted):
            for part in chunk.choices:
                own = found.setdefault(part.index, ["", [], [], None])
                own[0] += part.text
                own[1] += part.logprobs.tokens if part.logprobs else []
                own[2] += part.logprobs.text_offset if part.logprobs else []
                own[3] = part.finish_reason
        return found

    assert choices(behind, NAME) == choices(client, "gpt-4.1-nano")


def test_embeddings_are_those_of_the_engine(behind, client):
    wanted: Any = {"input": ["a cat", "a dog", "tax law"], "dimensions": 64}
    ours = behind.embeddings.create(model=NAME, **wanted)
    theirs = client.embeddings.create(model="gpt-4.1-nano", **wanted)
    assert [row.embedding for row in ours.data] == [row.embedding for row in theirs.data]
    assert (ours.model, ours.usage) == (NAME, theirs.usage)


def test_what_the_engine_refuses_comes_with_its_reason_and_place(url):
    body = {"model": NAME, "messages": HELLO, "logit_bias": {"9999999": 1}}
    error = assert_error(httpx.post(f"{url}/v1/chat/completions", json=body), 400)
    assert error["param"] == "logit_bias"
    assert "token ids" in error["message"]


def test_responses_are_answered_by_the_engine(behind, client):
    wanted: Any = {"input": "Name a colour.", "max_output_tokens": 8, "temperature": 0}
    ours = behind.responses.create(model=NAME, **wanted)
    assert ours.output_text == client.responses.create(model="gpt-4.1-nano", **wanted).output_text
    assert behind.responses.retrieve(ours.id).output_text == ours.output_text
    kinds = [event.type for event in behind.responses.create(model=NAME, stream=True, **wanted)]
    assert kinds[-1] == "response.incomplete"
    with pytest.raises(openai.BadRequestError, match="not counted"):
        behind.responses.input_tokens.count(model=NAME, input="Hi")


def test_tokens_are_metered_as_the_engine_counts_them(url, behind):
    def total() -> int:
        buckets = httpx.get(f"{url}/v1/organization/usage/completions?start_time={START}").json()[
            "data"
        ]
        return sum(row["output_tokens"] for bucket in buckets for row in bucket["results"])

    before = total()
    answer = behind.chat.completions.create(model=NAME, messages=HELLO, max_completion_tokens=9)
    assert answer.usage is not None
    wait_for(lambda: total() == before + answer.usage.completion_tokens)
    assert (
        f'evermini_choices_total{{finished_reason="length",model_name="{NAME}"}}'
        in httpx.get(f"{url}/metrics").text
    )


# Prompts that are longer than the engine's window


@pytest.fixture(scope="module")
def short_engine(nano: ServedModel) -> Iterator[str]:
    """Nano as an engine that refuses what exceeds its window."""
    with serving(
        Runtime([replace(nano, reader=None, info=replace(nano.info, context_window=8192))])
    ) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def long_url(short_engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    spec = UpstreamSpec(NAME, short_engine, model="gpt-4.1-nano")
    served = load_upstream(spec, load_settings({"recall_index": "nano"}).settings)
    assert served.reader is not None
    served.reader.home = home  # not the index of who runs the tests
    with Runtime([served]) as runtime, serving(runtime) as url:
        yield url


def test_a_prompt_beyond_the_window_is_read_here_and_answered_there(long_url):
    text = story(seed=5, num_lines=700)
    _, question, answer = NEEDLES[150]
    content = [{"type": "text", "text": text}, {"type": "text", "text": question}]
    with make_client(long_url, timeout=300) as client:
        asked: Any = {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": 24,
            "temperature": 0,
            "extra_body": {"x_evermini": {"why": True}},
        }
        first = client.chat.completions.create(**asked)
        again = client.chat.completions.create(**asked)
        streamed = list(client.chat.completions.create(**asked, stream=True))
        counted = client.responses.input_tokens.count(model=NAME, input=text)
    assert answer in first.choices[0].message.content
    recall = first.x_evermini["recall"]
    assert any(span["lines"][0] <= 150 <= span["lines"][1] for span in recall["spans"])
    assert first.usage.prompt_tokens > 10_000
    assert abs(counted.input_tokens - first.usage.prompt_tokens) < 100
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert 0 < first.usage.prompt_tokens - again.usage.prompt_tokens_details.cached_tokens < 200
    assert (
        "".join(c.choices[0].delta.content or "" for c in streamed)
        == first.choices[0].message.content
    )


def test_a_prompt_that_fits_is_sent_whole_and_counted_by_the_engine(long_url, client):
    with make_client(long_url) as ours:
        wanted: Any = {"messages": HELLO, "max_completion_tokens": 8, "temperature": 0}
        answer = ours.chat.completions.create(
            model=NAME, **wanted, extra_body={"x_evermini": {"why": True}}
        )
        direct = client.chat.completions.create(model="gpt-4.1-nano", **wanted)
    assert answer.x_evermini["reading"] == "dense"
    assert answer.choices[0].message.content == direct.choices[0].message.content
    assert answer.usage.prompt_tokens == direct.usage.prompt_tokens


def test_what_seems_to_fit_and_does_not_is_read_in_excerpts(short_engine, nano, tmp_path):
    """The engine's window is said to be larger than it is, as where its tokens are more than ours."""
    spec = UpstreamSpec(NAME, short_engine, model="gpt-4.1-nano", window=30_000)
    served = connect(spec, Settings())
    _, question, answer = NEEDLES[150]
    content = [
        {"type": "text", "text": story(seed=6, num_lines=480)},
        {"type": "text", "text": question},
    ]
    with (
        reading(nano, tmp_path) as reader_of,
        Runtime([served]) as runtime,
        serving(runtime) as url,
        make_client(url, timeout=300) as client,
    ):
        served.reader = reader_of.reader
        read = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=24,
            temperature=0,
            extra_body={"x_evermini": {"why": True}},
        )
    assert read.x_evermini["reading"] == "recall"
    assert answer in read.choices[0].message.content
    assert 8192 < read.usage.prompt_tokens < 30_000


def test_the_python_api_and_its_answers_are_the_same(base_url, client):
    wanted: Any = {"max_completion_tokens": 8, "temperature": 0}
    with LLM(f"{NAME}={base_url}/v1?model=gpt-4.1-nano", recall=False) as llm:
        answer = llm.chat(HELLO, **wanted)
        pieces = [delta.text for delta in llm.chat(HELLO, stream=True, **wanted)]
        assert llm.native_window > 8192  # an Evermini reads what is longer itself
        with pytest.raises(UnsupportedParameterError):
            llm.count_tokens("Hi")
    direct = client.chat.completions.create(model="gpt-4.1-nano", messages=HELLO, **wanted)
    assert answer.text == "".join(pieces) == direct.choices[0].message.content
    assert answer.usage.completion_tokens == direct.usage.completion_tokens


def test_read_whole_because_it_is_asked_for_the_engine_refuses_it_with_its_counts(long_url):
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "word " * 9000}],
        "x_evermini": {"reading": "dense"},
    }
    error = assert_error(httpx.post(f"{long_url}/v1/chat/completions", json=body, timeout=60), 400)
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
