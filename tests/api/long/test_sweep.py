"""Questions about all of a long text, over HTTP with OpenAI's client; nano reads, code counts."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest

from evermini.api import progress
from evermini.service.runtime import Runtime, ServedModel
from tests.long_texts import NEEDLES, story
from tests.serving import abandoned, assert_error, make_client, reading, serving, wait_for

SWEEP = {"reading": "sweep", "why": True}
REVIEWS = "\n".join(
    f"Review {i + 1}: {('It broke at once.', 'I love it.', 'Fine.')[i % 3]}" for i in range(24)
)


@pytest.fixture(scope="module")
def served(nano: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with reading(nano, tmp_path_factory.mktemp("home"), sweep_limit=40_000) as served:
        yield served


def as_document(text: str) -> str:
    return f'<document name="list.txt">\n{text}\n</document>\n\n'


def ask(client: openai.OpenAI, content: str, **options):
    return client.chat.completions.create(
        model="gpt-4.1-nano",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        **{"max_completion_tokens": 16, "extra_body": {"x_evermini": SWEEP}, **options},
    )


def test_each_record_is_asked_about_and_counted_in_code(client):
    answer = ask(client, as_document(REVIEWS) + "How many of the reviews are negative?")
    assert answer.x_evermini["reading"] == "sweep"
    swept = answer.x_evermini["sweep"]
    assert swept["task"] == "check"
    assert swept["windows"] == 24
    assert sum(swept["counts"].values()) == 24
    assert len(swept["items"]) == next(iter(swept["counts"].values()))
    assert all(item in REVIEWS.splitlines() for item in swept["items"])
    assert 200 < answer.usage.prompt_tokens < 600
    assert swept["tokens_read"] > 24 * 20


@pytest.mark.parametrize(
    ("question", "counts"),
    [
        ("Which two words are used most often?", {"ember": 4000, "flint": 2000}),
        ('How often does the word "rarely" occur?', {"rarely": 1}),
        ("How many words are in this text?", {"words": 6001}),
    ],
)
def test_words_are_counted_in_code_however_long_the_text_is(
    client, served, monkeypatch, question, counts
):
    monkeypatch.setattr(served.reader, "sweep_limit", 1000)
    text = "ember flint ember\n" * 1000 + "rarely\n" + "ember flint ember\n" * 1000
    answer = ask(client, as_document(text) + question, extra_body={"x_evermini": {"why": True}})
    assert answer.x_evermini["reading"] == "sweep"
    swept = answer.x_evermini["sweep"]
    assert (swept["task"], swept["counts"]) == ("tally", counts)
    assert (swept["windows"], swept["tokens_read"], swept["tokens_written"]) == (0, 0, 0)


def test_the_answer_states_the_figure_that_was_counted_and_no_other(client):
    answer = ask(
        client,
        as_document(REVIEWS) + "How many of the reviews are negative?",
        max_completion_tokens=64,
    )
    counts = list(answer.x_evermini["sweep"]["counts"].values())
    numbers = re.findall(r"\d+", answer.choices[0].message.content)
    assert numbers[0] == str(counts[0])
    assert {*numbers} <= {str(counts[0]), str(counts[1]), "24"}
    content = as_document("ab " * 12_345) + "How many words are in this text?"
    text = ask(client, content, max_completion_tokens=64).choices[0].message.content
    assert re.findall(r"\d[\d,]*\d", text)[0].replace(",", "") == "12345"


def test_a_list_is_collected_from_every_window_and_has_only_what_the_text_has(client):
    text = story(seed=3, num_lines=90)
    answer = ask(client, as_document(text) + "List every person that is named.")
    swept = answer.x_evermini["sweep"]
    assert swept["task"] == "collect"
    assert swept["windows"] > 1
    known = set(text.lower().replace(".", " ").replace("'", " ").split())
    for item in swept["items"]:
        words = item.lower().replace(".", " ").replace("'", " ").split()
        assert sum(word in known for word in words) * 2 >= len(words)


def test_a_summary_is_written_from_notes_on_all_windows_in_a_stream_that_tells_how_it_goes(
    client, monkeypatch
):
    # On a busy machine the first note may take the time until streams open, and all others end just after it.
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.01)
    text = story(seed=4, num_lines=400)
    stream = ask(
        client,
        as_document(text) + "Summarise the text.",
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"x_evermini": {**SWEEP, "progress": True}},
    )
    chunks = list(stream)
    told = [
        c.x_evermini["progress"]
        for c in chunks
        if c.model_extra.get("x_evermini", {}).get("progress")
    ]
    assert told
    assert all(report["stage"] == "sweep" for report in told)
    assert all(0 < report["done_tokens"] <= report["total_tokens"] for report in told)
    assert len({(c.id, c.created) for c in chunks}) == 1
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    swept = last.x_evermini["sweep"]
    assert swept["task"] == "note"
    assert swept["windows"] > 3
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    sent = chunks[-1].usage.prompt_tokens
    assert abs(sent - swept["tokens_read"]) < sent  # each window once, with what is said around it
    assert swept["tokens_read"] > 0.9 * sent


def test_a_summary_of_several_documents_has_a_line_on_each(client):
    texts = {f"{seed}.txt": story(seed=seed, num_lines=12) for seed in (11, 12)}
    documents = "".join(f'<document name="{n}">\n{t}\n</document>\n\n' for n, t in texts.items())
    answer = ask(client, documents + "Summarise these stories.", max_completion_tokens=512)
    assert answer.x_evermini["sweep"]["windows"] == 2
    assert answer.x_evermini["sweep"]["empty_windows"] == 0
    first, second = answer.choices[0].message.content.splitlines()
    assert first.startswith("- 11.txt: ")
    assert second.startswith("- 12.txt: ")
    shaped = ask(client, documents + "Summarise these stories in one sentence.")
    assert not shaped.choices[0].message.content.startswith("- 11.txt: ")


def test_auto_reads_all_of_a_text_if_the_question_is_about_all_and_it_is_not_too_long(
    client, served, monkeypatch
):
    content = as_document(story(seed=7, num_lines=500)) + "Summarise this text."
    auto = {"extra_body": {"x_evermini": {"why": True}}}
    assert ask(client, content, **auto).x_evermini["reading"] == "sweep"
    monkeypatch.setattr(served.reader, "sweep_limit", 5000)
    why = ask(client, content, **auto).x_evermini
    assert why["reading"] == "recall"
    assert "more than sweep_limit (5000)" in why["recall"]["note"]
    asked = ask(client, content.replace("Summarise this text.", NEEDLES[150][1]), **auto)
    assert asked.x_evermini["recall"]["note"] is None


@pytest.mark.parametrize("endpoint", ["chat/completions", "responses"])
def test_a_stream_comments_on_the_first_reading_and_then_answers(url, endpoint):
    seed = 8 + len(endpoint)  # each reads a text of its own for the first time
    content = as_document(story(seed=seed, num_lines=1200)) + NEEDLES[150][1]
    fields = {
        "chat/completions": {
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": 4,
        },
        "responses": {"input": content, "max_output_tokens": 4},
    }[endpoint]
    body = {"model": "gpt-4.1-nano", "stream": True, **fields}

    def lines() -> list[str]:
        with httpx.stream("POST", f"{url}/v1/{endpoint}", json=body, timeout=300) as response:
            assert response.status_code == 200
            return [line for line in response.iter_lines() if line]

    first = lines()
    reports = [line for line in first if line.startswith(":")]
    assert re.fullmatch(r": reading \d+ of \d+ tokens", reports[0])
    begun = next(i for i, line in enumerate(first) if line.startswith(("data", "event")))
    assert first.index(reports[-1]) < begun
    ended = {"chat/completions": "data: [DONE]", "responses": "event: response.incomplete"}
    assert ended[endpoint] in first[-2:]
    again = lines()
    assert not [line for line in again if line.startswith(":")]
    assert ended[endpoint] in again[-2:]


def test_a_stream_that_waits_for_others_is_not_silent(monkeypatch):
    monkeypatch.setattr(progress, "OPEN_SECONDS", 0.0)

    async def first_event() -> bytes:
        starting = asyncio.create_task(asyncio.sleep(60))
        events = progress.ReadingWatch().events(starting, None)
        try:
            return await anext(events)
        finally:
            starting.cancel()

    assert asyncio.run(first_event()) == b": waiting\n\n"


@pytest.mark.parametrize("stream", [False, True])
def test_an_index_without_room_is_an_error_that_is_not_retried(nano, tmp_path, stream):
    requests = []
    http = httpx.Client(event_hooks={"request": [requests.append]}, timeout=60)
    with (
        reading(nano, tmp_path, max_bytes=1000) as served,
        serving(Runtime([served])) as url,
        make_client(url, max_retries=2, http_client=http) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        ask(client, story(seed=9, num_lines=500) + "\n\nWho?", stream=stream, extra_body={})
    assert caught.value.status_code == 413
    assert caught.value.code == "recall_disk_exceeded"
    assert "raise recall_disk" in str(caught.value)
    assert len(requests) == 1


def test_a_question_that_follows_another_is_looked_up_with_it(client):
    document = as_document(story(seed=2, num_lines=600))
    answer = client.chat.completions.create(
        model="gpt-4.1-nano",
        messages=[
            {"role": "user", "content": document + "Does the captain have a parrot?"},
            {"role": "assistant", "content": "Yes, the captain has a parrot."},
            {"role": "user", "content": "What is it called?"},
        ],
        max_completion_tokens=16,
        temperature=0,
        extra_body={"x_evermini": {"why": True}},
    )
    assert "parrot" in answer.x_evermini["recall"]["question"]
    spans = answer.x_evermini["recall"]["spans"]
    assert any(s["lines"][0] <= 150 <= s["lines"][1] and s["included"] for s in spans)


def test_a_client_that_leaves_ends_the_sweep(url, client, served):
    text = story(seed=6, num_lines=1500)
    body = {
        "model": "gpt-4.1-nano",
        "messages": [{"role": "user", "content": as_document(text) + "Summarise the text."}],
        "x_evermini": SWEEP,
    }
    with abandoned(url, body):
        wait_for(lambda: served.worker.stats().running > 0)
    wait_for(lambda: served.worker.stats().running == 0)
    done = served.worker.stats().finished
    time.sleep(0.5)
    assert served.worker.stats().finished == done
    assert done["abort"] > 0


def test_a_sweep_needs_recall_and_a_long_text(nano, client):
    with serving(Runtime([replace(nano, reader=None)])) as url:
        response = httpx.post(
            f"{url}/v1/chat/completions",
            json={
                "model": "gpt-4.1-nano",
                "messages": [{"role": "user", "content": "Hello!"}],
                "x_evermini": SWEEP,
            },
        )
        assert assert_error(response, 400)["code"] == "unsupported_parameter"
    assert ask(client, "Hello!").x_evermini["reading"] == "dense"
