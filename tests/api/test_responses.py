"""The Responses API with the official client: what agent frameworks and chat clients rely on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel
from sqlalchemy import select

from evermini.config import Settings
from evermini.service.runtime import Runtime, ServedModel
from evermini.storage.database import Database
from evermini.storage.jobs import JobRow
from tests.serving import (
    assert_error,
    make_client,
    serving,
    tiny_model,
    tiny_served,
    wait_for,
)

MODEL = "gpt-4.1-nano"
SNAPSHOT = "gpt-4.1-nano-2025-04-14"
REQUIRED = {
    *("id", "object", "created_at", "error", "incomplete_details", "instructions", "model"),
    *("tools", "output", "parallel_tool_calls", "metadata", "tool_choice", "temperature"),
    *("top_p", "usage", "status", "text", "truncation", "store", "previous_response_id"),
}


def create(client: openai.OpenAI, **params: Any) -> Response:
    defaults = {"model": MODEL, "input": "Say hello.", "temperature": 0, "max_output_tokens": 8}
    return client.responses.create(**{**defaults, **params})


def stream(client: openai.OpenAI, **params: Any) -> list[Any]:
    return list(create(client, **params, stream=True))


def prompt_tokens(client: openai.OpenAI, **params: Any) -> int:
    return client.responses.input_tokens.count(model=MODEL, **params).input_tokens


def finished(client: openai.OpenAI, response_id: str) -> Response:
    """Wait for a background response."""
    deadline = time.monotonic() + 60
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response
        time.sleep(0.05)
    return response


class TestCreate:
    def test_every_required_key_is_there(self, base_url: str) -> None:
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 4}
        answer = httpx.post(f"{base_url}/v1/responses", json=body, timeout=60).json()
        assert answer.keys() >= REQUIRED
        assert answer["object"] == "response"
        assert answer["model"] == SNAPSHOT
        assert answer["store"] is True
        assert answer["metadata"] == {}
        assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
        usage = answer["usage"]
        assert usage["input_tokens_details"].keys() == {"cached_tokens", "cache_write_tokens"}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        (item,) = answer["output"]
        assert item["id"].startswith("msg_")
        (part,) = item["content"]
        assert part.keys() == {"type", "text", "annotations", "logprobs"}

    def test_the_answer_is_the_chat_completions(self, client: openai.OpenAI) -> None:
        """There is one way to generate: the same prompt, the same tokens, the same counts."""
        messages: list[Any] = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Name a colour."},
        ]
        chat = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_completion_tokens=8
        )
        answer = create(client, instructions="Be brief.", input="Name a colour.")
        items = create(client, input=messages)
        assert answer.output_text == items.output_text == chat.choices[0].message.content
        assert chat.usage
        assert answer.usage
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        assert answer.usage.output_tokens == chat.usage.completion_tokens

    def test_an_answer_that_is_cut_is_incomplete(self, client: openai.OpenAI) -> None:
        answer = create(client, input="Count from one to fifty.", max_output_tokens=3)
        assert answer.status == "incomplete"
        assert answer.incomplete_details
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
        assert answer.completed_at is None

    def test_an_answer_that_ends_by_itself_is_completed(self, client: openai.OpenAI) -> None:
        answer = create(client, max_output_tokens=200)
        assert (answer.status, answer.incomplete_details) == ("completed", None)
        assert answer.completed_at

    def test_what_was_asked_for_is_echoed(self, client: openai.OpenAI) -> None:
        params: dict[str, Any] = {
            "instructions": "Be brief.",
            "metadata": {"k": "v"},
            "user": "u",
            "safety_identifier": "s",
            "prompt_cache_key": "p",
            "max_tool_calls": 3,
            "top_p": 0.5,
            "truncation": "auto",
            "text": {"format": {"type": "text"}},
        }
        answer = create(client, **params).model_dump()
        expected = {**params, "text": {**params["text"], "verbosity": "medium"}}
        assert {name: answer[name] for name in params} == expected

    def test_log_probabilities(self, client: openai.OpenAI) -> None:
        params: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        part = create(client, **params).output[0].content[0]  # type: ignore[union-attr]
        assert "".join(score.token for score in part.logprobs) == part.text
        assert all(len(score.top_logprobs) == 2 for score in part.logprobs)
        deltas = [e for e in stream(client, **params) if e.type == "response.output_text.delta"]
        assert [s.logprob for e in deltas for s in e.logprobs] == [s.logprob for s in part.logprobs]

    def test_an_answer_can_be_sent_back_as_it_came(self, client: openai.OpenAI) -> None:
        first = create(client)
        again = create(
            client,
            input=[
                {"role": "user", "content": "Say hello."},
                *first.output,
                {"role": "user", "content": "Again."},
            ],
            store=False,
        )
        chained = create(client, previous_response_id=first.id, input="Again.")
        assert again.usage
        assert chained.usage
        assert again.output_text == chained.output_text
        assert again.usage.input_tokens == chained.usage.input_tokens


class TestStream:
    def test_events_come_in_the_contracts_order(self, client: openai.OpenAI) -> None:
        events = stream(client)
        kinds = [event.type for event in events]
        deltas = kinds.count("response.output_text.delta")
        assert deltas > 1
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * deltas,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            kinds[-1],
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))

    def test_snapshots_do_not_know_what_comes_later(self, client: openai.OpenAI) -> None:
        events = stream(client)
        created, progressing, added, *_, done, last = events
        for event in (created, progressing):
            assert event.response.status == "in_progress"
            assert event.response.output == []
            assert event.response.usage is None
        assert added.item.status == "in_progress"
        assert added.item.content == []
        assert last.response.output == [done.item]
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert last.response.output_text == text == create(client).output_text
        assert last.response.usage.output_tokens == 8

    def test_the_last_event_says_how_it_ended(self, client: openai.OpenAI) -> None:
        assert stream(client, max_output_tokens=2)[-1].type == "response.incomplete"
        assert stream(client, max_output_tokens=200)[-1].type == "response.completed"

    def test_events_have_names_and_there_is_no_done_mark(self, base_url: str) -> None:
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 2, "stream": True}
        lines = httpx.post(f"{base_url}/v1/responses", json=body, timeout=60).text.split("\n\n")
        assert lines.pop() == ""
        for line in lines:
            name, _, data = line.partition("\n")
            assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"

    def test_the_clients_own_accumulator(self, client: openai.OpenAI) -> None:
        with client.responses.stream(model=MODEL, input="Say hello.", temperature=0) as events:
            text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
            final = events.get_final_response()
        assert final.output_text == text
        assert final.status == "completed"

    def test_it_is_stored_when_the_last_event_comes(self, base_url: str) -> None:
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 2, "stream": True}
        with httpx.stream("POST", f"{base_url}/v1/responses", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if event["type"] == "response.incomplete":
                        last = event["response"]
                        stored = httpx.get(f"{base_url}/v1/responses/{last['id']}").json()
        assert stored == last

    def test_a_failure_is_an_event_and_a_stored_state(
        self, nano: ServedModel, tmp_path: Path
    ) -> None:
        model = tiny_model(nano)
        model.fail_on = 4
        settings = Settings(kv_memory=64 * 1024**2)
        with (
            Runtime([tiny_served(nano, model, settings)]) as runtime,
            serving(runtime) as url,
        ):
            client = make_client(url)
            params: dict[str, Any] = {"model": "org/tiny", "max_output_tokens": 30}
            *_, error, last = stream(client, **params)
            assert error.type == "error"
            assert error.code == "server_error"
            assert "injected" not in error.message
            assert last.type == "response.failed"
            assert last.response.error.code == "server_error"
            assert client.responses.retrieve(last.response.id).status == "failed"
            model.fail_on = len(model.batches) + 3
            with pytest.raises(openai.InternalServerError):
                create(client, **params)


class TestStored:
    def test_retrieve_input_items_and_delete(self, client: openai.OpenAI) -> None:
        given: list[Any] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "How are you?"},
        ]
        answer = create(client, input=given)
        assert client.responses.retrieve(answer.id) == answer
        items = list(client.responses.input_items.list(answer.id, order="asc", limit=3))
        assert [item.role for item in items] == ["system", "user", "assistant", "user"]
        assert [item.content[0].text for item in items] == [
            "Be brief.",
            "Hi",
            "Hello.",
            "How are you?",
        ]
        assert [item.content[0].type for item in items][1:3] == ["input_text", "output_text"]
        newest = client.responses.input_items.list(answer.id, limit=1)
        assert newest.data == items[-1:]
        assert newest.has_more
        client.responses.delete(answer.id)
        for ask in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError, match=answer.id):
                ask(answer.id)

    def test_store_false_keeps_nothing(self, client: openai.OpenAI) -> None:
        answer = create(client, store=False)
        assert answer.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(answer.id)

    def test_only_background_responses_can_be_cancelled_or_resumed(
        self, client: openai.OpenAI
    ) -> None:
        answer = create(client)
        with pytest.raises(openai.BadRequestError, match="synchronous"):
            client.responses.cancel(answer.id)
        with pytest.raises(openai.BadRequestError, match="background=true") as caught:
            client.responses.retrieve(answer.id, stream=True)
        assert caught.value.param == "stream"


@pytest.fixture(scope="module")
def small(nano: ServedModel) -> Iterator[openai.OpenAI]:
    settings = Settings(kv_memory=64 * 1024**2)
    served = tiny_served(nano, tiny_model(nano), settings)
    with Runtime([served]) as runtime, serving(runtime) as url:
        yield make_client(url)


class TestTruncation:
    """A model with a window of 256 tokens and nothing that reads beyond it."""

    def items(self) -> list[Any]:
        roles = ("user", "assistant")
        return [
            {"role": roles[n % 2], "content": f"Number {n}: " + "word " * 30} for n in range(13)
        ]

    def test_too_much_is_refused_unless_it_may_be_dropped(self, small: openai.OpenAI) -> None:
        params: dict[str, Any] = {"model": "org/tiny", "input": self.items()}
        with pytest.raises(openai.BadRequestError) as caught:
            create(small, **params)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "input"

    def test_the_oldest_turns_are_dropped_and_named(self, small: openai.OpenAI) -> None:
        params: dict[str, Any] = {"model": "org/tiny", "instructions": "Be brief."}
        answer = create(small, **params, input=self.items(), truncation="auto")
        said = answer.model_dump()["x_evermini"]["truncation"]
        number = said["dropped_items"]
        assert number % 2 == 0, "whole turns"
        stored = small.responses.input_items.list(answer.id, order="asc").data
        assert [item.id for item in stored[:number]] == said["dropped_item_ids"]
        # As few as possible: what is left is what fits, and one turn more would not.
        left = self.items()[number:]
        assert answer.usage
        same = create(small, **params, input=left)
        assert same.usage
        assert same.usage.input_tokens == answer.usage.input_tokens
        assert "x_evermini" not in same.model_dump()
        with pytest.raises(openai.BadRequestError):
            create(small, **params, input=self.items()[number - 2 :])

    def test_one_turn_that_is_too_long_is_refused(self, small: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            create(small, model="org/tiny", input="word " * 400, truncation="auto")
        assert caught.value.code == "context_length_exceeded"


class TestChains:
    def test_a_chain_is_the_conversation_without_its_instructions(
        self, client: openai.OpenAI
    ) -> None:
        first = create(client, input="My name is Ann.", instructions="Answer in French.")
        second = create(client, input="What is my name?", previous_response_id=first.id)
        third = create(client, input="And yours?", previous_response_id=second.id)
        assert third.previous_response_id == second.id
        assert third.usage
        history: list[Any] = [
            {"role": "user", "content": "My name is Ann."},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "What is my name?"},
            {"role": "assistant", "content": second.output_text},
            {"role": "user", "content": "And yours?"},
        ]
        assert third.usage.input_tokens == prompt_tokens(client, input=history)
        assert third.usage.input_tokens == prompt_tokens(
            client, input="And yours?", previous_response_id=second.id
        )
        assert third.output_text == create(client, input=history).output_text

    def test_a_chain_that_is_broken_is_refused(self, client: openai.OpenAI) -> None:
        first = create(client)
        second = create(client, previous_response_id=first.id)
        client.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError, match=first.id) as caught:
            create(client, previous_response_id=second.id)
        assert caught.value.code == "previous_response_not_found"
        assert caught.value.param == "previous_response_id"

    def test_an_item_can_be_referred_to(self, client: openai.OpenAI) -> None:
        first = create(client)
        reference: Any = {"type": "item_reference", "id": first.output[0].id}
        answer = create(client, input=[reference, {"role": "user", "content": "Again."}])
        items = client.responses.input_items.list(answer.id, order="asc").data
        assert items[0].id == first.output[0].id
        assert items[0].content[0].text == first.output_text  # type: ignore[union-attr]
        with pytest.raises(openai.NotFoundError, match="msg_nobody"):
            create(client, input=[{"type": "item_reference", "id": "msg_nobody"}])


class TestConversations:
    def test_a_response_reads_and_extends_its_conversation(self, client: openai.OpenAI) -> None:
        conversation = client.conversations.create(
            items=[{"role": "user", "content": "My name is Ann."}], metadata={"topic": "names"}
        )
        first = create(client, input="Hello.", conversation=conversation.id)
        assert first.conversation
        assert first.conversation.id == conversation.id
        create(client, input="Bye.", conversation={"id": conversation.id}, store=False)
        stream(client, input="Really bye.", conversation=conversation.id)
        items = list(client.conversations.items.list(conversation.id, order="asc", limit=4))
        assert [item.role for item in items] == [
            "user",
            "user",
            *["assistant", "user"] * 2,
            "assistant",
        ]  # type: ignore[union-attr]
        assert items[2].id == first.output[0].id
        answer = create(client, conversation=conversation.id, input="One more.")
        assert answer.usage
        history = [item.model_dump(exclude_none=True) for item in items]
        same = [*history, {"role": "user", "content": "One more."}]
        assert answer.usage.input_tokens == prompt_tokens(client, input=same)

    def test_conversations_can_be_kept_without_a_response(self, client: openai.OpenAI) -> None:
        made = client.conversations.create()
        assert (made.object, made.metadata) == ("conversation", {})
        changed = client.conversations.update(made.id, metadata={"a": "b"})
        assert changed == client.conversations.retrieve(made.id)
        added = client.conversations.items.create(
            made.id,
            items=[
                {"role": "user", "content": "Weather?"},
                {"type": "function_call", "call_id": "call_1", "name": "w", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_1", "output": "Sunny"},
            ],
        )
        assert [item.type for item in added.data] == [
            "message",
            "function_call",
            "function_call_output",
        ]
        call = client.conversations.items.retrieve(added.data[1].id, conversation_id=made.id)
        assert call == added.data[1]
        left = client.conversations.items.delete(added.data[2].id, conversation_id=made.id)
        assert left.id == made.id
        with pytest.raises(openai.NotFoundError):
            client.conversations.items.retrieve(added.data[2].id, conversation_id=made.id)
        assert len(client.conversations.items.list(made.id).data) == 2
        assert client.conversations.delete(made.id).deleted
        with pytest.raises(openai.NotFoundError, match=made.id):
            client.conversations.retrieve(made.id)
        with pytest.raises(openai.NotFoundError, match=made.id):
            create(client, conversation=made.id)

    def test_a_failed_request_adds_nothing(self, client: openai.OpenAI) -> None:
        conversation = client.conversations.create()
        with pytest.raises(openai.BadRequestError):
            create(client, conversation=conversation.id, max_output_tokens=40_000)
        assert client.conversations.items.list(conversation.id).data == []


LONG = {"input": "Write a long story about a lighthouse keeper.", "max_output_tokens": 400}


class TestBackground:
    def test_it_is_worked_on_without_a_client(self, client: openai.OpenAI) -> None:
        queued = create(client, background=True)
        assert (queued.status, queued.background, queued.output) == ("queued", True, [])
        done = finished(client, queued.id)
        assert done.output_text == create(client).output_text
        assert done.usage
        chained = create(client, previous_response_id=queued.id)
        assert chained.status

    def test_it_must_be_stored(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="store=true"):
            create(client, background=True, store=False)

    def test_a_stream_can_be_left_and_resumed(self, client: openai.OpenAI) -> None:
        events = create(client, **{**LONG, "max_output_tokens": 40}, background=True, stream=True)
        first = []
        for event in events:
            first.append(event)
            if len(first) == 8:
                events.response.close()
                break
        response_id = first[0].response.id
        assert [event.type for event in first[:3]] == [
            "response.created",
            "response.queued",
            "response.in_progress",
        ]
        rest = list(client.responses.retrieve(response_id, stream=True, starting_after=7))
        numbers = [event.sequence_number for event in (*first, *rest)]
        assert numbers == list(range(len(numbers)))
        text = "".join(e.delta for e in (*first, *rest) if e.type == "response.output_text.delta")
        assert rest[-1].response.output_text == text
        assert client.responses.retrieve(response_id) == rest[-1].response
        again = list(client.responses.retrieve(response_id, stream=True))
        assert [e.sequence_number for e in again] == numbers

    def test_the_clients_own_resumption(self, client: openai.OpenAI) -> None:
        queued = create(client, background=True, stream=True)
        response_id = next(iter(queued)).response.id
        queued.response.close()
        with client.responses.stream(response_id=response_id, starting_after=2) as events:
            kinds = [event.type for event in events]
        assert kinds[0] == "response.output_item.added"

    def test_cancelling(self, client: openai.OpenAI, nano: ServedModel) -> None:
        queued = create(client, **LONG, background=True)
        wait_for(lambda: client.responses.retrieve(queued.id).status == "in_progress")
        cancelled = client.responses.cancel(queued.id)
        assert cancelled.status == "cancelled"
        assert client.responses.cancel(queued.id) == cancelled
        wait_for(lambda: nano.worker.stats().running == 0)
        assert client.responses.retrieve(queued.id) == cancelled

    def test_a_stream_ends_when_its_response_is_cancelled(self, client: openai.OpenAI) -> None:
        events = create(client, **LONG, background=True, stream=True)
        response_id = next(iter(events)).response.id
        client.responses.cancel(response_id)
        kinds = {event.type for event in events}
        assert not kinds & {"response.completed", "response.incomplete", "response.failed"}

    def test_deleting_ends_it(self, client: openai.OpenAI, nano: ServedModel) -> None:
        queued = create(client, **LONG, background=True)
        client.responses.delete(queued.id)
        wait_for(lambda: nano.worker.stats().running == 0)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(queued.id)

    def test_what_is_wrong_is_said_at_once_or_in_the_response(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            create(client, background=True, temperature=3)
        queued = create(client, background=True, max_output_tokens=32_000)
        failed = finished(client, queued.id)
        assert failed.status == "failed"
        assert failed.error
        assert failed.error.code == "invalid_prompt"
        assert "maximum context length" in failed.error.message


@contextmanager
def server(runtime: Runtime, settings: Settings) -> Iterator[tuple[openai.OpenAI, Database]]:
    with (
        Database.open(settings) as database,
        serving(runtime, settings, database) as url,
        make_client(url) as client,
    ):
        yield client, database


class TestRestart:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Iterator[Settings]:
        return Settings(home=tmp_path, drain_timeout=0)

    def test_everything_is_there_after_a_restart(
        self, runtime: Runtime, settings: Settings
    ) -> None:
        with server(runtime, settings) as (client, _):
            first = create(client)
            conversation = client.conversations.create(items=[{"role": "user", "content": "Hi"}])
        with server(runtime, settings) as (client, _):
            assert client.responses.retrieve(first.id) == first
            assert create(client, previous_response_id=first.id).output_text
            assert client.conversations.retrieve(conversation.id) == conversation

    def test_a_background_response_is_finished_by_the_next_server(
        self, runtime: Runtime, settings: Settings
    ) -> None:
        from evermini.storage.responses import ResponseStore

        story = {
            "type": "string",
            "minLength": 4000,
        }  # so that it cannot end before the server does
        schema = {"type": "object", "properties": {"story": story}, "required": ["story"]}
        form = {"format": {"type": "json_schema", "name": "story", "schema": schema}}
        options = {**LONG, "text": form, "max_output_tokens": 200}
        with Database.open(settings) as database:
            with serving(runtime, settings, database) as url, make_client(url) as client:
                queued = create(client, **options, background=True)
            stored = ResponseStore(database).get(queued.id)
            assert stored
            assert not stored.is_finished
            with serving(runtime, settings, database) as url, make_client(url) as client:
                answer = finished(client, queued.id)
            assert answer.status == "incomplete", answer
            assert answer.usage
            assert answer.usage.output_tokens == 200
            assert database_is_idle(database)

    def test_a_stream_that_was_read_ends_as_failed(
        self, runtime: Runtime, settings: Settings
    ) -> None:
        with server(runtime, settings) as (client, _):
            events = create(client, **LONG, background=True, stream=True)
            for event in events:
                if event.type == "response.created":
                    response_id = event.response.id
                if event.type == "response.output_text.delta":
                    last = event.sequence_number
                    break
            events.response.close()
        with server(runtime, settings) as (client, _):
            rest = list(client.responses.retrieve(response_id, stream=True, starting_after=last))
            assert [event.type for event in rest][-2:] == ["error", "response.failed"]
            numbers = [event.sequence_number for event in rest]
            assert numbers == list(range(last + 1, last + 1 + len(rest)))
            assert "stopped before it was complete" in rest[-1].response.error.message

    def test_a_server_that_was_killed_leaves_its_work_to_another(
        self, runtime: Runtime, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its lease runs out; the other server, which shares the database, takes over."""
        from evermini.service import jobs
        from evermini.storage.jobs import JobStore
        from evermini.storage.responses import JOB, ResponseStore, StoredResponse

        monkeypatch.setattr(jobs, "POLL_SECONDS", 0.1)
        with Database.open(settings) as database:
            with serving(runtime, settings, database) as url, make_client(url) as client:
                template = create(client).model_dump(mode="json")
            body = {**template, "status": "in_progress", "background": True, "output": []}
            request = {"model": MODEL, "input": "Hi", "background": True, "max_output_tokens": 4}
            items = [
                {
                    "id": "msg_1",
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "Hi"}],
                }
            ]
            store, job_store = ResponseStore(database), JobStore(database)
            for name in ("resp_worn", "resp_orphan"):
                store.submit(StoredResponse({**body, "id": name}, items, request), [])
            for _ in range(3):
                assert job_store.claim("a dead one", [JOB], -1)  # the oldest, three times
            with serving(runtime, settings, database) as url, make_client(url) as client:
                error = finished(client, "resp_worn").error
                assert error
                assert error.code == "server_error"
                assert finished(client, "resp_orphan").status == "incomplete"
            assert database_is_idle(database)

    def test_what_waits_for_a_place_is_queued_and_cancelled_there(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        settings = Settings(home=tmp_path, drain_timeout=0, max_num_seqs=1)
        with server(runtime, settings) as (client, database):
            first, second, third = (create(client, **LONG, background=True) for _ in range(3))
            wait_for(lambda: client.responses.retrieve(first.id).status == "in_progress")
            assert client.responses.retrieve(second.id).status == "queued"
            assert client.responses.cancel(second.id).status == "cancelled"
            client.responses.cancel(first.id)
            wait_for(lambda: client.responses.retrieve(third.id).status == "in_progress")
            client.responses.delete(third.id)
            assert client.responses.retrieve(second.id).status == "cancelled"
            assert database_is_idle(database)

    def test_the_tokens_count_for_who_asked_whichever_server_answers(
        self, runtime: Runtime, settings: Settings
    ) -> None:
        from evermini.service.access import new_key
        from evermini.storage.keys import KeyStore
        from evermini.storage.usage import UsageStore

        secret, key = new_key("laptop")
        with Database.open(settings) as database:
            KeyStore(database).add(key)
            with (
                serving(runtime, settings, database) as url,
                make_client(url, api_key=secret) as client,
            ):
                options = {**LONG, "max_output_tokens": 300}
                queued = create(client, **options, background=True)
            with (
                serving(runtime, settings, database) as url,
                make_client(url, api_key=secret) as client,
            ):
                finished(client, queued.id)
            totals = UsageStore(database).totals(0, int(time.time()) + 60, group_by=("key_id",))
            assert [total.group["key_id"] for total in totals] == [key.id]


def database_is_idle(database: Database) -> bool:
    """Whether no job is left in it."""
    with database.reading() as session:
        return not session.scalars(select(JobRow)).all()


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}
DIGITS = {
    "type": "custom",
    "name": "count",
    "description": "Writes digits",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]{3}"},
}


class TestTools:
    def ask(self, client: openai.OpenAI, **params: Any) -> Any:
        defaults: dict[str, Any] = {
            "input": "What is the weather in Paris?",
            "tools": [WEATHER, DIGITS],
            "max_output_tokens": 200,
            "parallel_tool_calls": False,
        }
        return create(client, **{**defaults, **params})

    def test_a_call_and_its_output(self, client: openai.OpenAI) -> None:
        choice = {"type": "function", "name": "get_weather"}
        answer = self.ask(client, tool_choice=choice)
        assert answer.tool_choice.model_dump() == choice
        (call,) = answer.output
        assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
        assert json.loads(call.arguments).keys() == {"city"}
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
        chained = self.ask(
            client, input=[output], previous_response_id=answer.id, tool_choice="none"
        )
        assert chained.output_text
        question = {"role": "user", "content": "What is the weather in Paris?"}
        again = self.ask(client, input=[question, *answer.output, output], tool_choice="none")
        assert again.usage.input_tokens == chained.usage.input_tokens
        with pytest.raises(openai.BadRequestError, match="No tool output found for function call"):
            self.ask(client, input="And now?", previous_response_id=answer.id)

    def test_a_streamed_call(self, client: openai.OpenAI) -> None:
        events = list(self.ask(client, tool_choice="required", stream=True))
        kinds = [event.type for event in events]
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert len(deltas) > 1
        assert kinds == [
            *("response.created", "response.in_progress", "response.output_item.added"),
            *["response.function_call_arguments.delta"] * len(deltas),
            *("response.function_call_arguments.done", "response.output_item.done"),
            "response.completed",
        ]
        (call,) = events[-1].response.output
        assert "".join(deltas) == call.arguments == events[-3].arguments
        assert events[2].item.arguments == ""
        assert events[2].item.call_id == call.call_id

    def test_a_custom_tool(self, client: openai.OpenAI) -> None:
        events = list(
            self.ask(client, tool_choice={"type": "custom", "name": "count"}, stream=True)
        )
        (call,) = events[-1].response.output
        assert call.type == "custom_tool_call"
        assert call.input.isdecimal()
        assert len(call.input) == 3
        done = next(e for e in events if e.type == "response.custom_tool_call_input.done")
        assert done.input == call.input

    def test_the_clients_parser(self, client: openai.OpenAI) -> None:
        class Answer(BaseModel):
            is_large: bool

        answer = client.responses.parse(
            model=MODEL, input="Is Paris a large city?", text_format=Answer, temperature=0
        )
        assert isinstance(answer.output_parsed, Answer)
        assert answer.text
        assert answer.text.format
        assert answer.text.format.type == "json_schema"


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}


class TestValidation:
    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type"),
            ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
            ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
            ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
            ({"reasoning": {"effort": "high"}}, "reasoning"),
            ({"prompt": {"id": "pmpt_1"}}, "prompt"),
            ({"text": {"verbosity": "low"}}, "text.verbosity"),
            ({"moderation": {"model": "m"}}, "moderation"),
            ({"context_management": [{"type": "compaction"}]}, "context_management"),
            ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input[0].type"),
            ({"input": [{"type": "computer_call_output", "call_id": "c"}]}, "input[0].type"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
                "input[0].content[0].type",
            ),
        ],
    )
    def test_what_is_not_acted_on_is_named(
        self, base_url: str, change: dict[str, Any], param: str
    ) -> None:
        body = {"model": MODEL, "input": "Hi", **change}
        error = assert_error(httpx.post(f"{base_url}/v1/responses", json=body), 400)
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"model": None}, "model"),
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": 5}, "input"),
            ({"input": ["Hi"]}, "input[0]"),
            ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
            ({"input": [{"role": "user"}]}, "input[0].content"),
            ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
            ({"input": [{"role": "user", "content": "x", "nme": "y"}]}, "input[0].nme"),
            ({"input": [{"type": "nonsense"}]}, "input[0].type"),
            (
                {"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]},
                "input[0].content[0].type",
            ),
            (
                {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
                "input[0].content[0].text",
            ),
            (
                {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
                "input",
            ),
            (
                {
                    "input": [
                        {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}
                    ]
                },
                "input",
            ),
            ({"previous_response_id": "resp_x", "conversation": "conv_x"}, "previous_response_id"),
            ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 40_000}, "max_output_tokens"),
            ({"temprature": 1}, "temprature"),
            ({"include": ["everything"]}, "include[0]"),
            ({"truncation": "middle"}, "truncation"),
            (
                {"tools": [{"type": "function", "name": "f", "format": {"type": "text"}}]},
                "tools[0].format",
            ),
            ({"metadata": {"k": 1}}, "metadata.k"),
            ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, base_url: str, change: dict[str, Any], param: str
    ) -> None:
        body = {"model": MODEL, "input": "Hi", **change}
        body = {name: value for name, value in body.items() if value is not None}
        error = assert_error(httpx.post(f"{base_url}/v1/responses", json=body), 400)
        assert error["param"] == param, error

    def test_compaction_is_refused(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="truncation"):
            client.responses.compact(model=MODEL, input="Hi")

    def test_too_many_items_for_one_addition(self, client: openai.OpenAI) -> None:
        items: Any = [{"role": "user", "content": "x"}] * 21
        with pytest.raises(openai.BadRequestError) as caught:
            client.conversations.create(items=items)
        assert caught.value.param == "items"
