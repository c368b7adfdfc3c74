"""Files that are indexed before anybody asks (`x_evermini.ingest`), with the real nano model and OpenAI's client."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import FileObject
from sqlalchemy import func, select

from evermini.config import Settings
from evermini.recall.recall import Recall
from evermini.service import jobs
from evermini.service.reading import LongReader
from evermini.service.runtime import Runtime, ServedModel
from evermini.storage.database import Database
from evermini.storage.ingests import IngestRow, IngestSegmentRow
from evermini.storage.jobs import JobRow
from tests.long_texts import NEEDLES, story
from tests.pdf_files import make_pdf
from tests.serving import make_client, serving, wait_for

LINES = 520
"""A story of so many lines is a little longer than nano's window."""
INGEST = {"x_evermini": {"ingest": "nano"}}
_, QUESTION, ANSWER = NEEDLES[150]


@contextmanager
def server(nano: ServedModel, home: Path) -> Iterator[tuple[openai.OpenAI, ServedModel, Database]]:
    """Nano with an index of its own under ``home``, where the database is, too."""
    assert nano.reader is not None
    reader = LongReader(
        nano.reader.indexer, nano.tokenizer, nano.template, home=home, policy=nano.reader.policy
    )
    served, settings = replace(nano, reader=reader), Settings(home=home, drain_timeout=0)
    with (
        Database.open(settings) as database,
        serving(Runtime([served]), settings, database) as url,
        make_client(url, timeout=300) as client,
    ):
        yield client, served, database
    reader.close()


def upload(client: openai.OpenAI, text: str, name: str = "story.txt", **options: Any) -> FileObject:
    return client.files.create(
        file=(name, text.encode()), purpose="user_data", **{"extra_body": INGEST, **options}
    )


def ingest_of(file: FileObject) -> dict[str, Any]:
    return file.x_evermini["ingest"]  # type: ignore[attr-defined,no-any-return]


def ended(client: openai.OpenAI, file: FileObject) -> dict[str, Any]:
    deadline = time.monotonic() + 300
    while (ingest := ingest_of(client.files.retrieve(file.id)))["status"] in (
        "queued",
        "in_progress",
    ):
        assert time.monotonic() < deadline, ingest
        time.sleep(0.05)
    return ingest


def segments(home: Path) -> set[str]:
    return {path.stem for path in home.glob("recall/*/*.keys")}


def count(database: Database, table: Any) -> int:
    with database.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def ask(client: openai.OpenAI, *parts: dict[str, Any]) -> Any:
    return client.chat.completions.create(
        model="gpt-4.1-nano",
        messages=[{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}],  # type: ignore[list-item,misc]
        max_tokens=20,
        temperature=0,
    )


def test_the_first_question_about_an_ingested_file_reads_nothing(
    nano: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = story(seed=31, num_lines=LINES)
    with server(nano, tmp_path) as (client, _, database):
        file = upload(client, text)
        first = ingest_of(file)
        assert first["model"] == "gpt-4.1-nano-2025-04-14"
        assert (first["status"], first["tokens_done"], first["error"]) == ("queued", 0, None)
        done = ended(client, file)
        assert done["status"] == "completed"
        assert done["tokens"] == done["tokens_done"] > 8192
        listed = {item.id: item for item in client.files.list()}
        assert ingest_of(listed[file.id]) == done
        monkeypatch.setattr(Recall, "_index_chunk", _refuse)
        by_id = ask(client, {"type": "file", "file": {"file_id": file.id}})
        assert ANSWER in by_id.choices[0].message.content
        assert by_id.usage.prompt_tokens_details.cached_tokens >= done["tokens"]
        in_text = f'<document name="other.txt">\n{text}\n</document>\n'
        same = ask(client, {"type": "text", "text": in_text})
        assert same.usage.prompt_tokens_details.cached_tokens >= done["tokens"]
        response = client.responses.create(
            model="gpt-4.1-nano",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_file", "file_id": file.id},
                        {"type": "input_text", "text": QUESTION},
                    ],
                }
            ],
            max_output_tokens=20,
            temperature=0,
        )
        assert ANSWER in response.output_text
        assert response.usage
        assert response.usage.input_tokens_details.cached_tokens >= done["tokens"]
        assert count(database, JobRow) == 0


def _refuse(*args: object) -> None:
    raise AssertionError("it was read again")


def test_in_parts_and_as_a_pdf(nano: ServedModel, tmp_path: Path) -> None:
    data = make_pdf(["The code is 4711.", "Page two."])
    with server(nano, tmp_path) as (client, _, _database):
        created = client.uploads.create(
            bytes=len(data), filename="a.pdf", mime_type="application/pdf", purpose="user_data"
        )
        part = client.uploads.parts.create(created.id, data=data)
        done = client.uploads.complete(created.id, part_ids=[part.id], extra_body=INGEST)
        assert done.file
        assert ended(client, done.file)["status"] == "completed"


def test_a_deleted_files_index_goes_unless_another_has_the_text(
    nano: ServedModel, tmp_path: Path
) -> None:
    text, other = story(seed=32, num_lines=50), story(seed=33, num_lines=50)
    with server(nano, tmp_path) as (client, _, database):
        first, second, third = (upload(client, content) for content in (text, text, other))
        for file in (first, second, third):
            assert ended(client, file)["status"] == "completed"
        assert len(segments(tmp_path)) == 2
        client.files.delete(first.id)
        assert len(segments(tmp_path)) == 2
        client.files.delete(third.id)
        assert len(segments(tmp_path)) == 1
        client.files.delete(second.id)
        assert segments(tmp_path) == set()
        assert not list(tmp_path.glob("recall/*/*.tokens"))
        assert (count(database, IngestRow), count(database, IngestSegmentRow)) == (0, 0)


def test_deleting_a_file_that_is_being_indexed(
    nano: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermini.service.ingests.RETRY_SECONDS", 0.1)
    started, go_on = _hold_first_chunk(monkeypatch)
    with server(nano, tmp_path) as (client, _, database):
        file = upload(client, story(seed=34, num_lines=300))
        assert started.wait(30)
        client.files.delete(file.id)
        go_on.set()
        wait_for(lambda: count(database, IngestRow) == 0, 60)
        assert segments(tmp_path) == set()
        assert count(database, JobRow) == 0


def test_it_goes_on_where_a_dead_process_stopped(
    nano: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, chunks = story(seed=35, num_lines=300), []
    started, go_on = _hold_first_chunk(monkeypatch)
    with monkeypatch.context() as dying:
        dying.setattr(jobs.JobRunner, "_give_back", _nothing)
        dying.setattr(jobs, "LEASE_SECONDS", 1.0)
        with server(nano, tmp_path) as (client, _, _database):
            file = upload(client, text)
            assert started.wait(30)
            timer = threading.Timer(0.5, go_on.set)  # while the server is stopping
            timer.start()
        timer.join()
    index_chunk = Recall._index_chunk

    def noted(self: Recall, segment: Any, chunk: int) -> None:
        chunks.append((segment.digest, chunk))
        index_chunk(self, segment, chunk)

    monkeypatch.setattr(Recall, "_index_chunk", noted)
    with server(nano, tmp_path) as (client, served, _database):
        done = ended(client, file)
        assert done["status"] == "completed"
        assert served.reader
        windows = served.reader.recall().calibration.windows
        assert 0 < len(chunks) < done["tokens"] / windows.chunk  # the first one was done before
        assert len(chunks) == len(set(chunks))


async def _nothing(*args: object) -> None:
    pass


def test_prompts_that_somebody_waits_for_are_read_first(
    nano: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    started, go_on = _hold_first_chunk(monkeypatch, order)
    with server(nano, tmp_path) as (client, served, _database):
        assert served.reader
        file = upload(client, story(seed=36, num_lines=300))
        assert started.wait(30)
        document = f'<document name="a">\n{story(seed=37, num_lines=LINES)}\n</document>\n'
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.append(ask(client, {"type": "text", "text": document}))
        )
        asking.start()
        wait_for(lambda: served.reader._num_urgent == 1, 60)  # type: ignore[union-attr]
        go_on.set()
        asking.join(300)
        assert ANSWER in answers[0].choices[0].message.content
        assert ended(client, file)["status"] == "completed"
    of_file = order[0]
    waited_for = [number for number, digest in enumerate(order) if digest != of_file]
    assert waited_for == list(range(1, len(waited_for) + 1))
    assert order.count(of_file) == len(order) - len(waited_for) > 1


def _hold_first_chunk(
    monkeypatch: pytest.MonkeyPatch, order: list[str] | None = None
) -> tuple[threading.Event, threading.Event]:
    """Make the first chunk of all wait, after it is written; return when it does, and what lets it go.

    ``order`` gets the segment of each chunk.
    """
    started, go_on = threading.Event(), threading.Event()
    index_chunk = Recall._index_chunk

    def held(self: Recall, segment: Any, chunk: int) -> None:
        index_chunk(self, segment, chunk)
        if order is not None:
            order.append(segment.digest)
        if not started.is_set():
            started.set()
            assert go_on.wait(60)

    monkeypatch.setattr(Recall, "_index_chunk", held)
    return started, go_on


def test_what_cannot_be_read_fails_with_the_reason(nano: ServedModel, tmp_path: Path) -> None:
    with server(nano, tmp_path) as (client, _, database):
        file = client.files.create(
            file=("a.bin", bytes(range(256)) * 50), purpose="user_data", extra_body=INGEST
        )
        failed = ended(client, file)
        assert failed["status"] == "failed"
        assert failed["error"]
        assert count(database, JobRow) == 0


@pytest.mark.parametrize(
    ("extra", "purpose", "error", "param"),
    [
        (INGEST, "batch", openai.BadRequestError, "x_evermini.ingest"),
        (
            {"x_evermini": {"ingest": "gpt-9"}},
            "user_data",
            openai.NotFoundError,
            "x_evermini.ingest",
        ),
        ({"x_evermini": {"wat": "1"}}, "user_data", openai.BadRequestError, "x_evermini.wat"),
        ({"x_evermini": "nano"}, "user_data", openai.BadRequestError, "x_evermini"),
    ],
)
def test_what_cannot_be_asked_for(
    client: openai.OpenAI, extra: Any, purpose: Any, error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.files.create(file=("a.jsonl", b"{}"), purpose=purpose, extra_body=extra)
    assert caught.value.param == param


def test_files_that_were_not_asked_for_have_no_extension(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.txt", b"text"), purpose="user_data")
    assert not hasattr(file, "x_evermini")
