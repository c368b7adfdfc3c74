"""Batches with the official client: every line exactly once, whatever happens in between."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from evermini.config import Settings
from evermini.service import jobs
from evermini.service.batches import worker
from evermini.service.runtime import Runtime
from evermini.storage.batches import BatchStore
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from evermini.storage.files import FileStore
from tests.serving import make_client, serving, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, batch_requests=8)


@pytest.fixture
def client(runtime: Runtime, settings: Settings) -> Iterator[openai.OpenAI]:
    with (
        Database.open(settings) as database,
        serving(runtime, settings, database) as url,
        make_client(url) as client,
    ):
        yield client


def chat(number: int, **changes: Any) -> dict[str, Any]:
    body = {
        "model": "gpt-4.1-nano",
        "messages": [{"role": "user", "content": f"Say {number}."}],
        "max_tokens": 3,
        "temperature": 0,
        **changes,
    }
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}


def submit(
    client: openai.OpenAI, lines: list[dict[str, Any]] | bytes, endpoint: str = CHAT, **more: Any
) -> Batch:
    if isinstance(lines, list):
        lines = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    file = client.files.create(file=("in.jsonl", lines), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        **more,
    )


def ended(client: openai.OpenAI, batch: Batch, seconds: float = 120) -> Batch:
    deadline = time.monotonic() + seconds
    while batch.status not in ("failed", "completed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of an output or error file by custom_id; none of them may be there twice."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


class TestBatches:
    def test_good_and_bad_lines(self, client: openai.OpenAI) -> None:
        lines = [chat(n) for n in range(40)]
        lines[7] = chat(7, temperature=3)
        lines[8] = chat(8, model="gpt-17")
        batch = submit(client, lines, metadata={"job": "nightly"})
        assert (batch.status, batch.metadata) == ("validating", {"job": "nightly"})
        done = ended(client, batch)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.model_dump() == {"total": 40, "completed": 38, "failed": 2}
        good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
        assert list(good) == [f"line-{n}" for n in range(40) if n not in (7, 8)]
        assert bad["line-7"]["response"]["status_code"] == 400
        assert bad["line-7"]["response"]["body"]["error"]["param"] == "temperature"
        assert bad["line-8"]["response"]["status_code"] == 404
        usage = 0
        for line in good.values():
            assert line["error"] is None
            answer = line["response"]["body"]
            assert line["response"]["request_id"].startswith("req_")
            usage += answer["usage"]["total_tokens"]
        assert done.usage is not None
        assert done.usage.total_tokens == usage
        times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
        assert all(times)
        assert times == sorted(times)  # type: ignore[type-var]

    def test_answers_are_those_of_single_requests(self, client: openai.OpenAI) -> None:
        done = ended(client, submit(client, [chat(n, max_tokens=8) for n in range(6)]))
        for name, line in read(client, done.output_file_id).items():
            alone = client.chat.completions.create(**chat(int(name[5:]), max_tokens=8)["body"])
            text = line["response"]["body"]["choices"][0]["message"]["content"]
            assert text == alone.choices[0].message.content

    def test_text_completions(self, client: openai.OpenAI) -> None:
        line = {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "gpt-4.1-nano", "prompt": "One two", "max_tokens": 2},
        }
        done = ended(client, submit(client, [line], "/v1/completions"))
        assert read(client, done.output_file_id)["a"]["response"]["body"]["choices"][0]["text"]

    def test_every_broken_line_is_named(self, client: openai.OpenAI) -> None:
        lines = [
            b"{nonsense",
            json.dumps(chat(1)).encode(),
            json.dumps(chat(1)).encode(),
            b"",
            json.dumps({**chat(2), "url": "/v1/embeddings"}).encode(),
            json.dumps({**chat(3), "method": "GET"}).encode(),
            json.dumps({"custom_id": "x", "method": "POST", "url": CHAT}).encode(),
            json.dumps(chat(4, stream=True)).encode(),
            b"[]",
        ]
        done = ended(client, submit(client, b"\n".join(lines)))
        assert done.status == "failed"
        assert done.errors is not None
        assert [(error.line, error.code) for error in done.errors.data or []] == [
            (1, "invalid_json_line"),
            (3, "duplicate_custom_id"),
            (5, "invalid_url"),
            (6, "invalid_method"),
            (7, "missing_required_parameter"),
            (8, "invalid_value"),
            (9, "invalid_json_line"),
        ]
        assert done.output_file_id is None

    def test_an_empty_file(self, client: openai.OpenAI) -> None:
        done = ended(client, submit(client, b"\n\n"))
        assert done.errors is not None
        assert done.errors.data is not None
        assert done.errors.data[0].code == "empty_file"

    def test_cancelled_half_way(self, client: openai.OpenAI) -> None:
        batch = submit(client, [chat(n, max_tokens=60) for n in range(120)])
        wait_for(lambda: counts(client, batch).completed >= 5, 60)
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = ended(client, batch)
        assert done.status == "cancelled"
        good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
        assert len(good) >= 5
        assert good.keys().isdisjoint(bad)
        assert good.keys() | bad.keys() == {f"line-{n}" for n in range(120)}
        assert {line["error"]["code"] for line in bad.values()} == {"batch_cancelled"}
        assert client.batches.cancel(batch.id).status == "cancelled"

    def test_listing(self, client: openai.OpenAI) -> None:
        made = [submit(client, [chat(n)]).id for n in range(3)]
        assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]

    def test_refusals(self, client: openai.OpenAI) -> None:
        file = client.files.create(file=("a.txt", b"x"), purpose="user_data")
        for changes, match in [
            ({"input_file_id": "file-none"}, "No such File"),
            ({"input_file_id": file.id}, "purpose"),
            ({"completion_window": "1h"}, "Supported values"),
            ({"endpoint": "/v1/videos"}, "Supported values"),
        ]:
            wanted = {
                "input_file_id": file.id,
                "endpoint": CHAT,
                "completion_window": "24h",
                **changes,
            }
            with pytest.raises(openai.APIStatusError, match=match) as caught:
                client.batches.create(**wanted)  # type: ignore[arg-type]
            assert caught.value.param == next(iter(changes))
        with pytest.raises(openai.NotFoundError, match="No batch found"):
            client.batches.retrieve("batch_none")
        done = ended(client, submit(client, [chat(1)]))
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            client.batches.cancel(done.id)

    def test_the_input_is_gone(
        self, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held = threading.Event()
        original = worker.BatchWorker._read

        async def later(self: worker.BatchWorker, *args: Any) -> Any:
            while not held.is_set():
                await worker.asyncio.sleep(0.01)
            return await original(self, *args)

        monkeypatch.setattr(worker.BatchWorker, "_read", later)
        batch = submit(client, [chat(1)])
        client.files.delete(batch.input_file_id)
        held.set()
        done = ended(client, batch)
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert done.errors.data[0].code == "file_not_found"


def counts(client: openai.OpenAI, batch: Batch) -> Any:
    return client.batches.retrieve(batch.id).request_counts


def test_a_batch_goes_on_after_a_restart(runtime: Runtime, settings: Settings) -> None:
    with Database.open(settings) as database:
        with serving(runtime, settings, database) as url, make_client(url) as client:
            batch = submit(client, [chat(n, max_tokens=30) for n in range(60)])
            wait_for(lambda: counts(client, batch).completed >= 10, 60)
        stored = BatchStore(database).get(batch.id)
        assert stored is not None
        assert stored.status == "in_progress"
        before = BatchStore(database).done_lines(batch.id)
        assert 10 <= len(before) < 60
        with serving(runtime, settings, database) as url, make_client(url) as client:
            done = ended(client, batch)
            assert done.status == "completed"
            assert len(read(client, done.output_file_id)) == 60
        used = FileStore(database).used_blobs
        assert BlobStore.open(settings).orphans(used, grace=-60) == []


def test_two_servers_share_the_work_and_a_dead_one_is_replaced(
    runtime: Runtime, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server's job runner stops in its tracks, without giving anything back, as if killed."""
    monkeypatch.setattr(jobs, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(jobs, "RENEW_SECONDS", 0.5)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.2)
    with Database.open(settings) as first, Database.open(settings) as second:
        with serving(runtime, settings, first) as url, make_client(url) as client:
            batch = submit(client, [chat(n, max_tokens=30) for n in range(60)])
            wait_for(lambda: counts(client, batch).completed >= 5, 60)
            monkeypatch.setattr(jobs.JobRunner, "_give_back", _nothing)
        with serving(runtime, settings, second) as url, make_client(url) as client:
            done = ended(client, batch)
            assert len(read(client, done.output_file_id)) == 60


async def _nothing(*args: object) -> None:
    pass


def test_lines_not_done_in_time_are_listed(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermini.service.batches.requests.WINDOW_SECONDS", 2)
    batch = submit(client, [chat(n, max_tokens=100) for n in range(200)])
    done = ended(client, batch)
    assert done.status == "expired"
    good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
    assert len(good) + len(bad) == 200
    assert {line["error"]["code"] for line in bad.values()} == {"batch_expired"}


def test_batches_need_no_key_inside(runtime: Runtime, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, api_key="secret-key")
    with (
        Database.open(settings) as database,
        serving(runtime, settings, database) as url,
        make_client(url, api_key="secret-key") as client,
    ):
        done = ended(client, submit(client, [chat(1)]))
        assert done.request_counts is not None
        assert done.request_counts.completed == 1


def test_failures_that_pass_are_tried_again(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evermini.errors import OverloadedError
    from evermini.service import chat as chat_service

    start, failures = chat_service.start, 0

    async def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if failures < 2:
            failures += 1
            raise OverloadedError("full")
        return await start(*args, **kwargs)

    monkeypatch.setattr(chat_service, "start", failing)
    began = time.monotonic()
    done = ended(client, submit(client, [chat(1)]))
    assert done.request_counts is not None
    assert (done.request_counts.completed, failures) == (1, 2)
    assert time.monotonic() - began < 30
