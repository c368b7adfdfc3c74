"""Work in the background that the server cannot do: it ends as failed and says so, after some tries."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import func, select

from evermini.config import Settings
from evermini.errors import StorageError
from evermini.service import jobs
from evermini.service.adapters import AdapterStore
from evermini.service.batches import worker as batch_worker
from evermini.service.batches.worker import BatchWorker
from evermini.service.documents import Documents
from evermini.service.files import FileService
from evermini.service.fine_tuning.worker import FOLDER, TuningWorker
from evermini.service.jobs import FAILED, MAX_FAILURES, JobRunner
from evermini.service.responses.background import Background
from evermini.service.runtime import Runtime
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from evermini.storage.fine_tuning import CHECK, TRAIN, StoredTuning, TuningStore
from evermini.storage.jobs import JobRow, enqueue
from tests.serving import make_client, serving, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are tried again soon."""
    monkeypatch.setattr(jobs, "MAX_BACKOFF", 0.01)
    monkeypatch.setattr(jobs, "MAX_STORAGE_BACKOFF", 0.01)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    with Database.open(settings) as database:
        yield database


@pytest.fixture
def client(runtime: Runtime, settings: Settings, database: Database) -> Iterator[openai.OpenAI]:
    with serving(runtime, settings, database) as url, make_client(url) as client:
        yield client


@dataclass
class Failing:
    """Stands for a method: raises an error in so many calls, then does the work."""

    work: Callable[..., Any]
    error: Exception
    times: int = 10**9
    calls: int = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.work(*args)


def fail(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, error: Exception, times: int = 10**9
) -> Failing:
    failing = Failing(getattr(place, name), error, times)
    monkeypatch.setattr(place, name, lambda *args: failing(*args))
    return failing


def num_jobs(database: Database) -> int:
    with database.reading() as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


def submit(client: openai.OpenAI, count: int) -> str:
    body = {
        "model": "gpt-4.1-nano",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
    }
    lines = [
        {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}
        for number in range(count)
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    wait_for(lambda: client.batches.retrieve(batch_id).status in ("failed", "completed"), 60)
    return client.batches.retrieve(batch_id)


def rows(client: openai.OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


BUG = RuntimeError("a bug")


class TestBatches:
    def test_one_whose_input_cannot_be_checked(
        self, client: openai.OpenAI, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing = fail(monkeypatch, batch_worker, "read_input", BUG)
        batch = ended(client, submit(client, 2))
        assert failing.calls == MAX_FAILURES
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.failed_at
        assert [(one.code, one.message) for one in batch.errors.data] == [("server_error", FAILED)]
        assert num_jobs(database) == 0

    def test_one_with_a_line_that_cannot_be_done(
        self, client: openai.OpenAI, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        do = BatchWorker._do

        async def broken(self: BatchWorker, batch: Any, line: Any, body: bytes) -> Any:
            if line.number == 1:
                raise BUG
            return await do(self, batch, line, body)

        monkeypatch.setattr(BatchWorker, "_do", broken)
        batch = ended(client, submit(client, 3))
        assert batch.status == "failed"
        assert [one.message for one in batch.errors.data] == [FAILED]
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        assert {row["custom_id"] for row in rows(client, batch.output_file_id)} == {"0", "2"}
        (error,) = rows(client, batch.error_file_id)
        assert (error["custom_id"], error["response"]) == ("1", None)
        assert error["error"] == {"code": "server_error", "message": FAILED}
        assert num_jobs(database) == 0

    def test_one_whose_files_cannot_be_written(
        self, client: openai.OpenAI, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail(monkeypatch, BatchWorker, "_write", BUG)
        batch = ended(client, submit(client, 1))
        assert (batch.status, batch.output_file_id) == ("failed", None)
        assert num_jobs(database) == 0

    def test_a_bug_that_passes_costs_nothing(
        self, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail(monkeypatch, batch_worker, "read_input", BUG, MAX_FAILURES - 1)
        batch = ended(client, submit(client, 2))
        assert (batch.status, batch.request_counts.completed) == ("completed", 2)

    def test_storage_is_waited_for(
        self, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = StorageError("planned")
        failing = fail(monkeypatch, FileService, "read", error, 3 * MAX_FAILURES)
        batch = ended(client, submit(client, 2))
        assert failing.calls > 3 * MAX_FAILURES
        assert (batch.status, batch.request_counts.completed) == ("completed", 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_background_response(
    client: openai.OpenAI, database: Database, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    failing = fail(monkeypatch, Background, "_work", BUG)
    made: Any = client.responses.create(
        model="gpt-4.1-nano", input="Hi", background=True, stream=stream
    )
    if stream:
        events = list(made)
        assert [event.type for event in events][-2:] == ["error", "response.failed"]
        response = events[-1].response
    else:
        wait_for(lambda: client.responses.retrieve(made.id).status == "failed", 60)
        response = client.responses.retrieve(made.id)
    assert failing.calls <= MAX_FAILURES
    assert response.error
    assert response.error.code == "server_error"
    assert num_jobs(database) == 0


def test_an_ingest(
    client: openai.OpenAI, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = fail(monkeypatch, Documents, "document_of", BUG)
    file = client.files.create(
        file=("a.txt", b"Some text."),
        purpose="user_data",
        extra_body={"x_evermini": {"ingest": "nano"}},
    )

    def ingest() -> dict[str, Any]:
        found: dict[str, Any] = client.files.retrieve(file.id).x_evermini["ingest"]  # type: ignore[attr-defined]
        return found

    wait_for(lambda: ingest()["status"] == "failed", 60)
    assert failing.calls == MAX_FAILURES
    assert ingest()["error"] == FAILED
    assert num_jobs(database) == 0
    assert client.files.content(file.id).text == "Some text."


@pytest.mark.parametrize("kind", [CHECK, TRAIN])
def test_a_fine_tuning_job(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    failing = fail(monkeypatch, TuningWorker, "_prepare", BUG)
    store = TuningStore(database)
    status = "validating_files" if kind == CHECK else "queued"
    body = {"id": "ftjob-1", "status": status, "error": None, "metadata": None}
    store.restore(StoredTuning(body, {}), [], [])
    with database.writing() as session:
        enqueue(session, kind, "ftjob-1")
    kept = settings.home / FOLDER / "ftjob-1" / "rows.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()

    async def work() -> None:
        blobs = BlobStore.open(settings)
        files, adapters = FileService(database, blobs), AdapterStore(database, blobs, settings.home)
        worker = TuningWorker(database, files, adapters, settings)
        runner = JobRunner(database)
        handler = worker.check if kind == CHECK else worker.train
        runner.handle(kind, handler, give_up=worker.give_up, num_slots=1)
        runner.start()
        deadline = time.monotonic() + 60
        while num_jobs(database):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        await runner.stop()

    asyncio.run(work())
    tuning = store.get("ftjob-1")
    assert tuning
    assert failing.calls == MAX_FAILURES
    assert tuning.status == "failed"
    assert tuning.body["error"] == {"code": "server_error", "message": FAILED, "param": None}
    assert not kept.exists()


def test_failures_count_over_restarts(
    runtime: Runtime, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also each server's own bug does not let a job be tried for ever."""
    failing = fail(monkeypatch, batch_worker, "read_input", BUG)
    monkeypatch.setattr(jobs, "MAX_BACKOFF", 0.5)
    with serving(runtime, settings, database) as url, make_client(url) as client:
        batch_id = submit(client, 1)
        wait_for(lambda: failing.calls >= 2)
    with serving(runtime, settings, database) as url, make_client(url) as client:
        assert ended(client, batch_id).status == "failed"
    assert failing.calls == MAX_FAILURES
