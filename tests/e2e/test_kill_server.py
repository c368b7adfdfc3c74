"""``kill -9`` of servers at random, during batches, uploads and background responses: what was acknowledged is there.

    pytest tests/e2e/test_kill_server.py -m slow -s       20 kills on SQLite, 20 on PostgreSQL with two servers

Afterwards every line of every batch is in its output or error file exactly once, every acknowledged file has the bytes
that were sent, every background response has ended, and `evermini gc` leaves no byte that belongs to nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import create_engine, text

from evermini.config import Settings
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database, database_url
from evermini.storage.files import FileStore
from tests.databases import postgres_server
from tests.processes import Server, evermini, new_home

MODEL = "gpt-4.1-nano"
CHAT = "/v1/chat/completions"
LINES = 30
ENDED = ("failed", "completed", "expired", "cancelled", "incomplete")
AWAY = (openai.APIConnectionError, openai.InternalServerError)
"""What a client may see while its server dies and comes back."""


@pytest.mark.parametrize(
    ("num_kills", "database"),
    [
        (3, "sqlite"),
        pytest.param(20, "sqlite", marks=pytest.mark.slow),
        pytest.param(20, "postgresql", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random(tmp_path: Path, nano_path: Path, num_kills: int, database: str) -> None:
    began = time.monotonic()
    choose = random.Random(num_kills)
    home = new_home(tmp_path / "home")
    with ExitStack() as stack:
        env, num_servers = {}, 1
        if database == "postgresql":
            env, num_servers = {"EVERMINI_DATABASE_URL": stack.enter_context(postgres_server())}, 2
        servers = [Server(home, env=env) for _ in range(num_servers)]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        for server in servers:
            server.wait()
        ledger = Ledger()
        with working(servers, ledger, choose):
            for _ in range(num_kills):
                time.sleep(choose.uniform(0.2, 4.0))
                for server in choose.sample(servers, choose.randint(1, len(servers))):
                    server.kill()
                    time.sleep(choose.uniform(0.0, 0.5))
                    server.start()
                for server in servers:
                    server.wait()
            time.sleep(2)
        with servers[0].client() as client:
            lines = check_batches(client, ledger)
            files = check_files(client, ledger)
            responses = check_responses(client, ledger)
        assert [server.stop() for server in servers] == [0] * len(servers)
        settings = Settings(home=home, database_url=env.get("EVERMINI_DATABASE_URL"))
        orphans = check_blobs(home, settings, env)
        check_database(settings)
    print(
        f"\n{database}, {num_servers} servers, {num_kills} kills in {time.monotonic() - began:.0f} s: "
        f"{len(ledger.batches)} batches, lines {dict(lines)}; files {dict(files)}; responses {dict(responses)}; "
        f"{orphans} orphans deleted; clients saw {dict(ledger.seen)}"
    )
    assert ledger.batches
    assert files["intact"]
    assert responses["incomplete"] + responses["completed"], "all responses failed"


@dataclass
class Ledger:
    """What the server has acknowledged."""

    batches: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Id -> SHA-256."""
    perhaps_deleted: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    responses: set[str] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def working(servers: list[Server], ledger: Ledger, choose: random.Random) -> Iterator[None]:
    """Keep the servers busy meanwhile."""
    over = threading.Event()
    jobs: list[Callable[[openai.OpenAI, Ledger, random.Random], None]] = [
        *(make_batch, upload, upload, upload_in_parts, delete, respond, respond)
    ]

    def work(job: Callable[[openai.OpenAI, Ledger, random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        with ExitStack() as stack:
            clients = [stack.enter_context(server.client()) for server in servers]
            while not over.is_set():
                try:
                    job(rng.choice(clients), ledger, rng)
                except AWAY as error:
                    ledger.seen[type(error).__name__] += 1
                    time.sleep(0.1)
                except BaseException as error:
                    ledger.failures.append(error)
                    return
                time.sleep(rng.uniform(0, 0.3))

    threads = [threading.Thread(target=work, args=(job, choose.randrange(2**32))) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    if ledger.failures:
        raise ledger.failures[0]


def make_batch(client: openai.OpenAI, ledger: Ledger, rng: random.Random) -> None:
    """Keep two batches under way."""
    known = [client.batches.retrieve(batch_id) for batch_id in list(ledger.batches)[-2:]]
    if sum(batch.status not in ENDED for batch in known) == 2:
        return
    lines = [line(number, rng) for number in range(LINES)]
    data = b"".join(json.dumps(one).encode() + b"\n" for one in lines)
    file = client.files.create(file=("lines.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"is": "ours"}
    )
    ledger.batches[batch.id] = lines


def line(number: int, rng: random.Random) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
        "max_tokens": rng.choice([1, 8, 24]),
    }
    name = "good"
    if number % 10 == 3:
        name, body = "bad", {**body, "temperature": 3}
    elif number % 10 == 7:
        name, body = "bad", {**body, "model": "gpt-17"}
    return {"custom_id": f"{name}-{number}", "method": "POST", "url": CHAT, "body": body}


def upload(client: openai.OpenAI, ledger: Ledger, rng: random.Random) -> None:
    content = rng.randbytes(rng.choice([0, 10, 100_000, 3_000_000]))
    file = client.files.create(file=("data.bin", content), purpose="user_data")
    ledger.files[file.id] = hashlib.sha256(content).hexdigest()


def upload_in_parts(client: openai.OpenAI, ledger: Ledger, rng: random.Random) -> None:
    content = rng.randbytes(900_000)
    done = client.uploads.upload_file_chunked(
        file=content,
        filename="parts.bin",
        bytes=len(content),
        mime_type="application/octet-stream",
        purpose="user_data",
        part_size=250_000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert done.file is not None
    ledger.files[done.file.id] = hashlib.sha256(content).hexdigest()


def delete(client: openai.OpenAI, ledger: Ledger, rng: random.Random) -> None:
    time.sleep(1)
    left = sorted(ledger.files.keys() - ledger.perhaps_deleted)
    if len(left) > 3:
        chosen = rng.choice(left)
        ledger.perhaps_deleted.add(chosen)
        client.files.delete(chosen)
        ledger.deleted.add(chosen)


def respond(client: openai.OpenAI, ledger: Ledger, rng: random.Random) -> None:
    made = client.responses.create(
        model=MODEL,
        input="Tell me a story.",
        background=True,
        max_output_tokens=rng.choice([1, 20, 60]),
        stream=rng.random() < 0.3,
    )
    if isinstance(made, openai.Stream):
        with made as events:
            for event in events:
                ledger.responses.add(event.response.id)  # type: ignore[union-attr]
                break
    else:
        ledger.responses.add(made.id)
    time.sleep(0.5)


def wait_until_ended(look: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while (found := look()).status not in ENDED:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def check_batches(client: openai.OpenAI, ledger: Ledger) -> Counter[str]:
    """Every batch ends, those included that were stored without their sender hearing of it."""
    found: Counter[str] = Counter()
    batches = list(client.batches.list())
    assert ledger.batches.keys() <= {batch.id for batch in batches}
    for listed in batches:
        batch = wait_until_ended(lambda listed=listed: client.batches.retrieve(listed.id))
        assert batch.status == "completed", batch
        good, bad = (
            [
                json.loads(one)
                for one in (client.files.content(file_id).text.splitlines() if file_id else [])
            ]
            for file_id in (batch.output_file_id, batch.error_file_id)
        )
        ids = [one["custom_id"] for one in (*good, *bad)]
        assert len(ids) == len(set(ids)) == LINES
        assert all(one["custom_id"].startswith("good") for one in good)
        assert {one["response"]["status_code"] for one in bad} == {400, 404}
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (LINES, len(good), len(bad))
        found.update(output=len(good), error=len(bad))
    return found


def check_files(client: openai.OpenAI, ledger: Ledger) -> Counter[str]:
    found: Counter[str] = Counter()
    for file_id, digest in ledger.files.items():
        try:
            content = client.files.content(file_id).read()
        except openai.NotFoundError:
            assert file_id in ledger.perhaps_deleted
            found["deleted"] += 1
        else:
            assert file_id not in ledger.deleted
            assert hashlib.sha256(content).hexdigest() == digest
            found["intact"] += 1
    for file in client.files.list():  # whatever is listed can be read, acknowledged or not
        assert len(client.files.content(file.id).read()) == file.bytes
        found["listed"] += 1
    return found


def check_responses(client: openai.OpenAI, ledger: Ledger) -> Counter[str]:
    found: Counter[str] = Counter()
    for response_id in ledger.responses:
        ended = wait_until_ended(lambda name=response_id: client.responses.retrieve(name))
        found[ended.status] += 1
        if ended.status == "completed":
            assert ended.usage is not None
    return found


def check_blobs(home: Path, settings: Settings, env: dict[str, str]) -> int:
    """Return how many blobs belonged to nothing, which `gc` has deleted."""
    with Database.open(settings) as database:
        blobs, used = BlobStore.open(settings), FileStore(database).used_blobs
        before = blobs.orphans(used, grace=-60)
        evermini(home, "gc", "--grace", "0", **env)
        assert blobs.orphans(used, grace=-60) == []
        names = set(blobs.orphans(lambda names: set(), grace=-60))
        assert used(names) == names
    return len(before)


def check_database(settings: Settings) -> None:
    engine = create_engine(database_url(settings))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM jobs")) == 0, "a job is left"
        if engine.dialect.name == "sqlite":
            assert connection.execute(text("PRAGMA integrity_check")).all() == [("ok",)]
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    engine.dispose()
