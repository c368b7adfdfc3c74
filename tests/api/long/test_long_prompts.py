"""Prompts several times as long as nano's window, over HTTP with OpenAI's client."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from evermini.engine.request import Emphasis, PromptDone, SamplingParams, TokenOutput
from evermini.errors import EngineStoppedError
from evermini.recall.calibration import find_calibration
from evermini.service.prompting import make_prompt
from evermini.service.reading import LongReader
from evermini.service.runtime import Runtime, ServedModel
from evermini.service.schemas import parse_chat
from tests.long_texts import NEEDLES, story
from tests.serving import abandoned, assert_error, reading, serving, wait_for

LIMIT = 80_000
STORY = story(seed=1)


@pytest.fixture(scope="module")
def served(nano: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """Nano with an index of its own and a lower limit, so that a prompt too long is still a short test."""
    assert nano.reader is not None
    home = tmp_path_factory.mktemp("home")
    with reading(nano, home, policy=nano.reader.policy, max_prompt_tokens=LIMIT) as served:
        yield served


@pytest.fixture(scope="module")
def book(client: openai.OpenAI) -> list[dict[str, str]]:
    """A document of some 10,000 tokens as content parts; read by two requests at once, which index it once."""
    parts = as_parts(story(seed=2, num_lines=600), NEEDLES[150][1])
    answers: list = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(client, parts))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cached = sorted(a.usage.prompt_tokens_details.cached_tokens for a in answers)
    assert cached[0] == 0
    assert cached[1] > 9000
    return parts


def as_parts(text: str, question: str) -> list[dict[str, str]]:
    document = f'<document name="notes/book.txt">\n{text}\n</document>\n'
    return [{"type": "text", "text": document}, {"type": "text", "text": f"\n{question}"}]


def ask(client: openai.OpenAI, content, **options):
    return client.chat.completions.create(
        model="gpt-4.1-nano",
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=24,
        temperature=0,
        **{"extra_body": {"x_evermini": {"why": True}}, **options},
    )


def post(url: str, content, timeout: float = 60, **fields) -> httpx.Response:
    body = {"model": "gpt-4.1-nano", "messages": [{"role": "user", "content": content}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout)


def has_read(why, line: int) -> bool:
    spans = why["recall"]["spans"]
    return any(s["lines"][0] <= line <= s["lines"][1] and s["included"] for s in spans)


def test_finds_needles_at_every_depth_and_reads_the_text_once(client):
    cached = []
    for line, (_, question, expected) in NEEDLES.items():
        answer = ask(client, f"{STORY}\n\n{question}")
        assert has_read(answer.x_evermini, line)
        assert expected in answer.choices[0].message.content
        assert 50_000 < answer.usage.prompt_tokens < LIMIT
        assert answer.x_evermini["recall"]["prompt_tokens_read"] < 5000
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert min(cached[1:]) > 50_000


def test_spans_of_a_document_name_its_file_and_lines(client, book):
    answer = ask(client, book)
    assert has_read(answer.x_evermini, 150)
    assert {span["source"] for span in answer.x_evermini["recall"]["spans"]} == {"notes/book.txt"}
    text = story(seed=2, num_lines=600)
    for span in answer.x_evermini["recall"]["spans"]:
        start, end = span["characters"]
        assert span["lines"] == [text.count("\n", 0, start) + 1, text.count("\n", 0, end - 1) + 1]


def test_a_stream_says_why_in_its_last_chunk_and_counts_what_was_sent(client, book):
    chunks = list(ask(client, book, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Biscuit" in text
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    assert has_read(last.x_evermini, 150)
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 9000


def test_the_limit_is_exact(url, client, book, served, monkeypatch):
    sent = ask(client, book).usage.prompt_tokens
    monkeypatch.setattr(served.reader, "max_prompt_tokens", sent)
    assert ask(client, book).usage.prompt_tokens == sent
    monkeypatch.setattr(served.reader, "max_prompt_tokens", sent - 1)
    error = assert_error(post(url, book), 400)
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {sent - 1} tokens" in error["message"]
    assert f"resulted in {sent} tokens" in error["message"]


def test_dense_refuses_what_does_not_fit(url, book):
    error = assert_error(post(url, book, x_evermini={"reading": "dense"}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 8192 tokens" in error["message"]


def test_calls_and_their_results_stay_whole_after_a_long_text(served):
    call = {"name": "look_up", "arguments": '{"city": "Lisbon"}'}
    turns = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Lisbon: 417, since Friday."},
        {"role": "user", "content": NEEDLES[150][1]},
    ]
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}

    def prompt_after(first: str) -> str:
        messages = [{"role": "user", "content": first}, *turns]
        request = parse_chat({"model": "gpt-4.1-nano", "messages": messages, "tools": [tool]})
        return served.tokenizer.decode(asyncio.run(make_prompt(served, request, None)).token_ids)

    later = prompt_after("The end.").split("The end.")[1]
    assert "Lisbon: 417, since Friday." in later
    long = prompt_after(f'<document name="book.txt">\n{story(seed=2, num_lines=600)}\n</document>')
    assert long.endswith(later)
    assert "Biscuit" in long
    assert len(long) < 20_000


@pytest.mark.parametrize("before", ["", "e\N{COMBINING ACUTE ACCENT}\uac00 "])
def test_attention_is_told_what_is_closest_to_the_question(served, before):
    """Whatever stands before it in the prompt; and it makes a difference to what comes next."""
    question = NEEDLES[150][1]
    parts = as_parts(story(seed=2, num_lines=600), f"{before}{question}")
    request = parse_chat({"model": "nano", "messages": [{"role": "user", "content": parts}]})
    prompt = asyncio.run(make_prompt(served, request, None))
    assert prompt.emphasis is not None
    told = [
        served.tokenizer.decode(prompt.token_ids[start:end])
        for start, end, _ in prompt.emphasis.ranges
    ]
    assert [text.strip() for text in told] == [NEEDLES[150][0]]
    assert all(0.2 <= bias <= 1 for *_, bias in prompt.emphasis.ranges)

    salt = os.urandom(8)  # other tests may have asked the same

    def first(emphasis: Emphasis | None) -> tuple[int, float]:
        params = SamplingParams(temperature=0, max_tokens=1, top_logprobs=0)
        events = list(
            served.worker.submit(prompt.token_ids, params, cache_salt=salt, emphasis=emphasis)
        )
        cached = next(event.cached_tokens for event in events if isinstance(event, PromptDone))
        token = next(event for event in events if isinstance(event, TokenOutput))
        assert token.logprob is not None
        return cached, token.logprob.logprob

    _, plain = first(None)
    cached, told_more = first(prompt.emphasis)
    assert plain != told_more
    assert cached <= prompt.emphasis.ranges[0][0]
    assert first(prompt.emphasis) == (len(prompt.token_ids) // 32 * 32, told_more)


def test_an_answer_longer_than_the_window_is_refused(url, book):
    error = assert_error(post(url, book, max_completion_tokens=8000), 400)
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]
    assert "8000" in error["message"]


def test_what_fits_is_read_whole_unless_asked_otherwise(client):
    text = story(seed=4, num_lines=200)
    asked = f"{text}\n\n{NEEDLES[150][1]}"
    whole = ask(client, asked)
    assert whole.x_evermini == {
        "reading": "dense",
        "recall": None,
        "sweep": None,
        "citations": [],
    }
    recalled = ask(client, asked, extra_body={"x_evermini": {"reading": "recall", "why": True}})
    assert has_read(recalled.x_evermini, 150)
    assert recalled.x_evermini["recall"]["prompt_tokens_read"] < whole.usage.prompt_tokens / 2
    assert "x_evermini" not in ask(client, "Hello!", extra_body={}).model_extra


@pytest.mark.parametrize(
    ("extension", "param", "code"),
    [
        ({"reading": "fast"}, "x_evermini.reading", "invalid_value"),
        ({"reading": 1}, "x_evermini.reading", "invalid_value"),
        ({"why": "yes"}, "x_evermini.why", "invalid_type"),
        ({"wy": True}, "x_evermini.wy", "unknown_parameter"),
        ([], "x_evermini", "invalid_type"),
    ],
)
def test_the_extension_is_checked(url, extension, param, code):
    error = assert_error(post(url, "Hello!", x_evermini=extension), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_recall_that_is_off_cannot_be_asked_for(nano):
    with serving(Runtime([replace(nano, reader=None)])) as url:
        error = assert_error(post(url, "Hello!", x_evermini={"reading": "recall"}), 400)
        assert error["code"] == "unsupported_parameter"
        error = assert_error(post(url, STORY), 400)
        assert error["code"] == "context_length_exceeded"


def test_a_client_that_leaves_ends_the_reading_which_holds_up_nobody(url, client, served):
    home = served.reader.home
    before = index_bytes(home)
    new = story(seed=5)
    question = [{"role": "user", "content": f"{new}\n\nWho?"}]
    waits = []
    with abandoned(url, {"model": "gpt-4.1-nano", "messages": question}):
        while len(waits) < 30 or index_bytes(home) == before:
            began = time.monotonic()
            assert httpx.get(f"{url}/healthz").status_code == 200
            waits.append(time.monotonic() - began)
    assert max(waits) < 2.0
    wait_for(lambda: is_still(home))
    grown = index_bytes(home) - before
    assert grown < 0.5 * complete_bytes(served, new)
    assert client.chat.completions.create(
        model="gpt-4.1-nano", messages=[{"role": "user", "content": "Hello!"}], max_tokens=4
    ).choices[0].message.content  # fmt: skip


def index_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in home.glob("recall/*/*.keys"))


def is_still(home: Path) -> bool:
    """Nothing was written for longer than a chunk takes."""
    size = index_bytes(home)
    time.sleep(3)
    return index_bytes(home) == size


def complete_bytes(served: ServedModel, text: str) -> int:
    calibration = find_calibration(served.reader.home, served.reader.indexer.weights)
    assert calibration is not None
    per_token = len(calibration.pairs) * (calibration.head_dim + 4)
    return len(served.tokenizer.encode(text)) * per_token


def test_models_promise_the_whole_length(nano):
    assert nano.info.context_window == 1_047_576
    assert nano.worker.max_model_len == 8192


def test_many_short_documents_count_with_their_tags(served):
    documents = "\n".join(
        f'<document name="notes/{i}.txt">\nBox {i} holds {i * 37 % 1009} nails.\n</document>'
        for i in range(60)
    )
    content = f"{documents}\n\nHow many nails does box 31 hold?"
    body = {"model": "nano", "messages": [{"role": "user", "content": content}]}
    request = parse_chat({**body, "max_completion_tokens": 16})
    assembler = served.reader.assembler
    whole = assembler.measure(request, [content])

    def plan(window, counted=None):
        return assembler.plan(request, window=window, limit=LIMIT, counted=counted)

    # Without the tags it is less than half, and a prompt that does not fit would be sent whole.
    planned = plan(whole - 200)
    assert planned is not None
    assert abs(planned.full_tokens - whole) <= len(planned.pieces)
    assert plan(2 * whole) is None
    assert plan(2 * whole, counted=2 * whole).full_tokens == 2 * whole


def test_an_end_does_not_wait_for_the_calibration_of_an_unknown_model(nano, tmp_path):
    unknown = "0" * 64
    reader = LongReader(
        replace(nano.reader.indexer, weights=unknown), nano.tokenizer, nano.template, home=tmp_path
    )
    told = []

    def report(now):
        told.append(now)
        reader.close()

    with pytest.raises(EngineStoppedError):
        reader.recall(report)
    assert [now.stage for now in told] == ["calibrate"]
    assert find_calibration(tmp_path, unknown) is None
