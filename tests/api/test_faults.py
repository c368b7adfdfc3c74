"""Disks that fill up, databases and blob stores that go away, clocks that are set: errors say so, and all recovers.

Nothing that was acknowledged is lost, nobody restarts the server, and `/healthz` answers throughout.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from evermini.config import Settings
from evermini.service import jobs, readiness
from evermini.service.runtime import Runtime, ServedModel
from evermini.storage import database as database_module
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from evermini.storage.files import FileStore
from evermini.storage.jobs import MAX_LEASE, JobStore, enqueue
from tests.databases import postgres
from tests.ports import free_port
from tests.recall_fakes import filler
from tests.serving import CHAT, make_client, serving, wait_for

LINES = 40
DAY = 86_400.0


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(readiness, "MAX_WAIT_SECONDS", 20.0)
    monkeypatch.setattr(jobs, "MAX_STORAGE_BACKOFF", 1.0)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own, which can be filled up."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no byte free; deleting what is returned makes room again."""
    filler_path = folder / "filler"
    with filler_path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler_path


@contextmanager
def served(runtime: Runtime, settings: Settings) -> Iterator[tuple[str, openai.OpenAI, Database]]:
    with (
        Database.open(settings) as database,
        serving(runtime, settings, database) as url,
        make_client(url) as client,
    ):
        yield url, client, database


def refused(call: Any, *statuses: int) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    error = caught.value
    assert error.status_code in statuses, error
    assert error.response.json()["error"].keys() == {"message", "type", "param", "code"}
    # Trying again helps once somebody has made room, or when the other side is back.
    if error.status_code == 507:
        assert error.response.headers["x-should-retry"] == "false"
    else:
        assert "retry-after" in error.response.headers
    return error


def state(url: str) -> tuple[int, str, str]:
    """(status of the readiness probe, database, files), with liveness as it has to be."""
    assert httpx.get(f"{url}/healthz").status_code == 200
    ready = httpx.get(f"{url}/readyz", timeout=30)
    checks = ready.json()["checks"]
    return ready.status_code, checks["database"], checks["files"]


def upload(client: openai.OpenAI, content: bytes) -> str:
    return client.files.create(file=("a.bin", content), purpose="user_data").id


def upload_until_full(client: openai.OpenAI, files: list[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        files.append(upload(client, b"one more"))


def start_batch(client: openai.OpenAI) -> str:
    lines = [
        f'{{"custom_id":"{n}","method":"POST","url":"/v1/chat/completions","body":'
        f'{{"model":"gpt-4.1-nano","messages":[{{"role":"user","content":"Say {n}."}}],"max_tokens":12}}}}'
        for n in range(LINES)
    ]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id


def assert_batch_is_whole(client: openai.OpenAI, batch_id: str, seconds: float = 120) -> None:
    wait_for(lambda: client.batches.retrieve(batch_id).completed_at is not None, seconds)
    batch = client.batches.retrieve(batch_id)
    assert batch.output_file_id
    lines = client.files.content(batch.output_file_id).text.splitlines()
    assert (len(lines), batch.error_file_id) == (LINES, None)


def begun(client: openai.OpenAI, batch_id: str) -> bool:
    counts = client.batches.retrieve(batch_id).request_counts
    return counts is not None and counts.completed > 0


def no_orphans(settings: Settings, database: Database) -> bool:
    return not BlobStore.open(settings).orphans(FileStore(database).used_blobs, grace=-60)


def test_the_disk_of_the_files_is_full(runtime: Runtime, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 4 << 20) as disk:
        settings = Settings(home=tmp_path, blob_url=str(disk), batch_requests=4)
        with served(runtime, settings) as (url, client, database):
            kept = os.urandom(300_000)
            file = upload(client, kept)
            batch = start_batch(client)
            wait_for(lambda: begun(client, batch), 60)
            refused(lambda: upload(client, b"x" * (6 << 20)), 507)
            assert state(url) == (200, "ok", "ok")  # what did not fit was dropped
            in_the_way = fill(disk)
            assert state(url) == (503, "ok", "failing")
            error = refused(lambda: upload(client, b"x" * 100_000), 507)
            assert "disk is full" in error.message
            assert client.chat.completions.create(**CHAT).choices
            assert client.files.content(file).read() == kept
            time.sleep(2)
            in_the_way.unlink()
            assert state(url) == (200, "ok", "ok")
            assert client.files.content(upload(client, kept)).read() == kept
            assert_batch_is_whole(client, batch)
            wait_for(lambda: no_orphans(settings, database))


def test_the_disk_of_the_database_is_full(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.2)
    with small_disk(tmp_path / "small", 6 << 20) as disk:
        settings = Settings(home=disk, blob_url=str(tmp_path / "blobs"), batch_requests=4)
        with served(runtime, settings) as (url, client, database):
            file = upload(client, b"kept")
            made = client.responses.create(model="gpt-4.1-nano", input="Hi", max_output_tokens=16)
            batch = start_batch(client)
            wait_for(lambda: begun(client, batch), 60)
            in_the_way = fill(disk)
            # The write-ahead log may have room for a little more.
            files: list[str] = []
            error = refused(lambda: upload_until_full(client, files), 507)
            assert "disk of the server's database is full" in error.message
            assert state(url)[:2] == (503, "failing")
            ask: dict[str, Any] = {"model": "gpt-4.1-nano", "input": "Hi", "max_output_tokens": 16}
            refused(lambda: client.responses.create(**ask, background=True), 507)
            assert client.chat.completions.create(**CHAT).choices
            assert client.files.content(file).read() == b"kept"
            time.sleep(1)
            in_the_way.unlink()
            assert state(url) == (200, "ok", "ok")
            assert client.responses.create(**ask).output
            assert client.responses.retrieve(made.id).output
            for acknowledged in files:
                assert client.files.content(acknowledged).read() == b"one more"
            assert_batch_is_whole(client, batch)
            wait_for(lambda: no_orphans(settings, database))


def test_the_disk_of_the_index_is_full(
    nano: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nano.reader is not None
    with small_disk(tmp_path / "small", 1 << 20) as disk:
        monkeypatch.setattr(nano.reader, "home", disk)
        monkeypatch.setattr(nano.reader, "_recall", None)
        runtime = Runtime([replace(nano)])
        long = f"{filler(3000)}\nThe parrot is called Biscuit.\nWhat is the parrot called?"
        ask: dict[str, Any] = {**CHAT, "messages": [{"role": "user", "content": long}]}
        with served(runtime, Settings(home=tmp_path)) as (_, client, _database):
            in_the_way = fill(disk)
            client = client.with_options(timeout=300)
            error = refused(lambda: client.chat.completions.create(**ask), 507)
            assert "cannot be indexed" in error.message
            assert client.chat.completions.create(**CHAT).choices
            in_the_way.unlink()
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            assert client.chat.completions.create(**ask).choices
        assert not list(disk.rglob("*.tmp"))


def test_the_database_is_locked(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.5)
    settings = Settings(home=tmp_path, batch_requests=4)
    with served(runtime, settings) as (url, client, database):
        file = upload(client, b"kept")
        batch = start_batch(client)
        wait_for(lambda: begun(client, batch), 60)
        with closing(sqlite3.connect(tmp_path / "evermini.db", isolation_level=None)) as other:
            other.execute("PRAGMA busy_timeout = 10000")
            other.execute("BEGIN IMMEDIATE")
            error = refused(lambda: upload(client, b"lost"), 503)
            assert "storage cannot be used" in error.message
            assert state(url)[:2] == (503, "failing")
            assert client.files.content(file).read() == b"kept"
            assert client.chat.completions.create(**CHAT).choices
            time.sleep(2)
            other.execute("ROLLBACK")
        assert state(url) == (200, "ok", "ok")
        assert client.files.content(upload(client, b"new")).read() == b"new"
        assert_batch_is_whole(client, batch)
        wait_for(lambda: no_orphans(settings, database))


def test_postgresql_is_stopped_and_started(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.2)
    with postgres() as server:
        settings = Settings(home=tmp_path, database_url=server.url, batch_requests=4)
        with served(runtime, settings) as (url, client, database):
            file = upload(client, b"kept")
            batch = start_batch(client)
            wait_for(lambda: begun(client, batch), 60)
            for mode in ("fast", "immediate"):
                server.stop(mode)
                refused(lambda: upload(client, b"lost"), 503)
                assert state(url)[:2] == (503, "failing")
                server.start()
                wait_for(lambda: state(url) == (200, "ok", "ok"))
                assert client.files.content(file).read() == b"kept"
                assert client.files.content(upload(client, b"new")).read() == b"new"
            assert_batch_is_whole(client, batch)
            wait_for(lambda: no_orphans(settings, database))


def test_the_blob_store_goes_away(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer

    port = free_port()

    def start() -> ThreadedMotoServer:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        return server

    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # later each time: half a minute for each call
    store = start()
    try:
        bucket = f"evermini-{time.time_ns()}"
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
        s3fs.S3FileSystem.clear_instance_cache()
        settings = Settings(home=tmp_path, blob_url=f"s3://{bucket}/files", batch_requests=4)
        with served(runtime, settings) as (url, client, _):
            client = client.with_options(timeout=120)
            file = upload(client, b"kept")
            doomed = upload(client, b"doomed")
            batch = start_batch(client)
            wait_for(lambda: begun(client, batch), 60)
            store.stop()
            refused(lambda: upload(client, b"lost"), 503)
            assert state(url) == (503, "ok", "failing")
            assert client.files.delete(doomed).deleted  # its bytes are left to `gc`
            assert client.chat.completions.create(**CHAT).choices
            store = start()
            wait_for(lambda: state(url) == (200, "ok", "ok"), 60)
            assert client.files.content(file).read() == b"kept"
            assert client.files.content(upload(client, b"new")).read() == b"new"
            assert_batch_is_whole(client, batch)
    finally:
        store.stop()


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_the_clock_is_set(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.2)
    settings = Settings(home=tmp_path, batch_requests=4)
    with served(runtime, settings) as (url, client, _):
        soon = client.files.create(
            file=("a.txt", b"soon"),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        batch = start_batch(client)
        wait_for(lambda: begun(client, batch), 60)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        upload(client, b"sweeps what has expired")
        assert client.chat.completions.create(**CHAT).choices
        assert_batch_is_whole(client, batch)  # neither expired nor stuck
        assert_batch_is_whole(client, start_batch(client))
        assert state(url) == (200, "ok", "ok")
        monkeypatch.setattr(time, "time", real)
        assert client.files.content(soon.id).read() == b"soon"  # it was not deleted for good
        assert_batch_is_whole(client, start_batch(client))


def test_leases_of_a_dead_process_end_when_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Database.open(Settings(home=tmp_path)) as database:
        with database.writing() as session:
            enqueue(session, "batch", "batch_1")
        store = JobStore(database)
        dead = store.claim("dead", ["batch"], 30.0)
        assert dead is not None
        assert store.claim("other", ["batch"], 30.0) is None
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() - DAY)
        taken = store.claim("other", ["batch"], 30.0)
        assert taken is not None
        assert taken.attempt == 2
        monkeypatch.setattr(time, "time", lambda: real() - DAY - MAX_LEASE / 2)
        assert store.claim("third", ["batch"], 30.0) is None  # a little back is no reason
