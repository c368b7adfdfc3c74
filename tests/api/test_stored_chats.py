"""Stored chat completions, with the official client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from evermini.config import Settings
from evermini.service.runtime import Runtime
from evermini.storage.database import Database
from tests.serving import CHAT, assert_error, make_client, serving

MODEL = "gpt-4.1-nano"
SNAPSHOT = "gpt-4.1-nano-2025-04-14"


@pytest.fixture
def tag() -> str:
    """A metadata value of this test alone: other tests store into the same server."""
    return str(time.time_ns())


def store(client: openai.OpenAI, tag: str, **params: Any) -> ChatCompletion:
    metadata = {"tag": tag, **params.pop("metadata", {})}
    return client.chat.completions.create(**{**CHAT, **params}, store=True, metadata=metadata)


def test_a_stored_completion_is_returned_as_it_was_answered(
    client: openai.OpenAI, tag: str
) -> None:
    answer = store(client, tag, logprobs=True, n=2)
    assert client.chat.completions.retrieve(answer.id) == answer
    assert answer.metadata == {"tag": tag}


def test_without_store_nothing_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, store=False)
    with pytest.raises(openai.NotFoundError, match="store"):
        client.chat.completions.retrieve(answer.id)


def test_a_streamed_completion_is_stored_before_done(base_url: str, tag: str) -> None:
    body = {**CHAT, "stream": True, "store": True, "metadata": {"tag": tag}}
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body) as response:
        chunks = []
        for line in response.iter_lines():
            if line == "data: [DONE]":
                stored = httpx.get(f"{base_url}/v1/chat/completions/{chunks[0]['id']}").json()
            elif line:
                chunks.append(json.loads(line.removeprefix("data: ")))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    (choice,) = stored["choices"]
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"]
    assert stored["usage"]["completion_tokens"] == 2
    assert stored["metadata"] == {"tag": tag}


def test_listing_filters_and_pages_by_itself(client: openai.OpenAI, tag: str) -> None:
    made = [store(client, tag, metadata={"odd": str(number % 2)}).id for number in range(5)]

    def listed(**params: Any) -> list[str]:
        filters = {"tag": tag, **params.pop("metadata", {})}
        return [c.id for c in client.chat.completions.list(metadata=filters, **params)]

    assert listed() == made
    assert listed(limit=2) == made  # the client follows the pages
    assert listed(order="desc", limit=2) == made[::-1]
    assert listed(metadata={"odd": "1"}) == [made[1], made[3]]
    assert listed(model=SNAPSHOT) == made
    assert listed(model="another") == []
    page = client.chat.completions.list(metadata={"tag": tag}, limit=2, after=made[1])
    assert [c.id for c in page.data] == made[2:4]
    assert page.has_more


def test_metadata_can_be_replaced(client: openai.OpenAI, tag: str) -> None:
    answer = store(client, tag)
    changed = client.chat.completions.update(answer.id, metadata={"tag": tag, "topic": "greeting"})
    assert changed.metadata == {"tag": tag, "topic": "greeting"}
    assert changed.choices == answer.choices
    assert client.chat.completions.retrieve(answer.id) == changed
    assert client.chat.completions.update(answer.id, metadata=None).metadata == {}


def test_messages_are_listed_with_ids(client: openai.OpenAI, tag: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("How ", "so?")]},
    ]
    answer = store(client, tag, messages=messages)
    listed = list(client.chat.completions.messages.list(answer.id, limit=3))
    assert [m.id for m in listed] == [f"{answer.id}-{n}" for n in range(4)]
    assert [m.role for m in listed] == ["system", "user", "assistant", "user"]
    assert [m.content for m in listed] == ["Be brief.", "Hi", "Hello.", "How so?"]
    assert [len(m.content_parts or ()) for m in listed] == [0, 0, 0, 2]
    page = client.chat.completions.messages.list(answer.id, order="desc", limit=1)
    assert [m.content for m in page.data] == ["How so?"]
    assert page.has_more


def test_deletion(client: openai.OpenAI, tag: str) -> None:
    answer = store(client, tag)
    deleted = client.chat.completions.delete(answer.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (
        answer.id,
        True,
        "chat.completion.deleted",
    )
    for ask in (
        client.chat.completions.retrieve,
        client.chat.completions.delete,
        client.chat.completions.messages.list,
        lambda name: client.chat.completions.update(name, metadata={}),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(answer.id)
        assert caught.value.param == "completion_id"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
    ],
)
def test_a_malformed_query_is_named(base_url: str, query: str, param: str) -> None:
    response = httpx.get(f"{base_url}/v1/chat/completions?{query}")
    assert assert_error(response, 400)["param"] == param


def test_a_cursor_that_does_not_exist_is_named(base_url: str) -> None:
    response = httpx.get(f"{base_url}/v1/chat/completions?after=nobody")
    assert assert_error(response, 404)["param"] == "after"


@pytest.mark.parametrize(
    "body",
    [{}, {"metadata": {"k": 1}}, {"metadata": {str(n): "" for n in range(17)}}, {"model": "x"}],
)
def test_a_malformed_update_is_refused(base_url: str, body: dict[str, Any]) -> None:
    response = httpx.post(f"{base_url}/v1/chat/completions/chatcmpl-x", json=body)
    assert_error(response, 400)


class TestRestart:
    @pytest.fixture
    def settings(self, tmp_path: Any) -> Iterator[Settings]:
        return Settings(home=tmp_path)

    def test_what_was_stored_is_there_after_a_restart(
        self, runtime: Runtime, settings: Settings, tag: str
    ) -> None:
        with Database.open(settings) as database, serving(runtime, database=database) as url:
            answer = store(make_client(url), tag)
        with Database.open(settings) as database, serving(runtime, database=database) as url:
            assert make_client(url).chat.completions.retrieve(answer.id) == answer

    def test_a_database_that_is_locked_is_a_503_that_can_be_retried(
        self, runtime: Runtime, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import sqlite3

        monkeypatch.setattr("evermini.storage.database.BUSY_SECONDS", 0.05)
        with (
            Database.open(settings) as database,
            serving(runtime, database=database) as url,
        ):
            other = sqlite3.connect(str(database.url.database), isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            body = {**CHAT, "store": True}
            response = httpx.post(f"{url}/v1/chat/completions", json=body)
            error = assert_error(response, 503)
            assert "nothing was stored" in error["message"]
            assert response.headers["retry-after"]
            streamed = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True})
            assert "[DONE]" not in streamed.text
            assert "nothing was stored" in streamed.text
            other.execute("ROLLBACK")
            other.close()
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
