"""The database: migrations, durability, and what the stores promise, on SQLite and on PostgreSQL where present."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import URL, Engine, create_engine, inspect, text

from evermini import storage
from evermini.config import Settings
from evermini.errors import ConfigError, InvalidRequestError, StorageError
from evermini.storage import database as database_module
from evermini.storage import migrate as migrate_module
from evermini.storage.chats import ChatStore
from evermini.storage.conversations import ConversationStore
from evermini.storage.database import Database, database_url
from evermini.storage.files import FileStore, Piece, StoredFile
from evermini.storage.jobs import Job, JobStore, LeaseLostError, enqueue
from evermini.storage.keys import KeyStore
from evermini.storage.responses import JOB as RESPONSE_JOB
from evermini.storage.responses import Addition, ResponseStore, StoredResponse
from evermini.storage.schema import Base, Cursor
from evermini.storage.usage import Filter, UsageStore, Used
from tests.databases import empty_database, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[URL]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield URL.create("sqlite", database=str(tmp_path / "evermini.db"))
        return
    with empty_database(request.getfixturevalue("postgres")) as url:
        yield url


@pytest.fixture
def database(url: URL) -> Iterator[Database]:
    with Database(url) as database:
        yield database


def chat_body(completion_id: str, model: str = "m") -> dict[str, Any]:
    return {"id": completion_id, "object": "chat.completion", "model": model, "choices": []}


def response(
    response_id: str, *, status: str = "completed", previous: str | None = None, **fields: Any
) -> StoredResponse:
    body = {"id": response_id, "status": status, "previous_response_id": previous, "output": []}
    defaults: dict[str, Any] = {"items": [{"id": f"msg_{response_id}"}], "request": {"model": "m"}}
    return StoredResponse(body, **{**defaults, **fields})


class TestDatabase:
    def test_the_tables_are_those_of_the_models(self, database: Database, url: URL) -> None:
        for module in pkgutil.iter_modules(storage.__path__):  # each has the tables of a domain
            importlib.import_module(f"{storage.__name__}.{module.name}")
        with database.reading() as session:
            context = MigrationContext.configure(
                session.connection(), opts={"compare_type": True, "compare_server_default": True}
            )
            assert compare_metadata(context, Base.metadata) == []

    def test_opening_again_changes_nothing(self, url: URL) -> None:
        for _ in range(2):
            with Database(url) as database:
                store = ChatStore(database)
                if store.get("chatcmpl-1") is None:
                    store.add(chat_body("chatcmpl-1"), [], {})
        with Database(url) as database:
            assert ChatStore(database).get("chatcmpl-1")

    def test_many_may_open_an_empty_one_at_once(self, url: URL) -> None:
        with ThreadPoolExecutor(6) as pool:
            for opened in pool.map(lambda _: Database(url), range(6)):
                opened.close()

    def test_one_of_a_newer_version_is_refused(self, url: URL) -> None:
        with Database(url) as database, database.writing() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(StorageError, match=r"newer version of Evermini.*9999.*Upgrade"):
            Database(url)

    def test_a_failed_revision_leaves_everything_as_it_was(self, url: URL, tmp_path: Path) -> None:
        scripts = newer_scripts(
            tmp_path, "op.execute('CREATE TABLE half (x INTEGER)'); raise RuntimeError('planned')"
        )
        with Database(url) as database:
            engine = database._engine
            with pytest.raises(RuntimeError, match="planned"):
                migrate_module.migrate(engine, scripts)
            assert "half" not in inspect(engine).get_table_names()
            migrate_module.migrate(engine)  # nothing to do: still the revision it was

    def test_a_session_that_fails_changes_nothing(self, database: Database) -> None:
        store = ChatStore(database)
        store.add(chat_body("chatcmpl-1"), [], {"a": "1"})

        def half_done() -> None:
            with database.writing() as session:
                session.execute(text("DELETE FROM chat_completions"))
                raise RuntimeError

        with pytest.raises(RuntimeError):
            half_done()
        assert store.get("chatcmpl-1")

    def test_writers_take_turns(self, database: Database) -> None:
        """Reading, then writing, in many threads at once: no update is lost, none is refused as busy."""
        store = ConversationStore(database)
        store.add("conv_1", {}, [])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: store.append("conv_1", [{"id": "msg_x", "n": n}]), range(40)))
        items = store.items("conv_1") or []
        assert sorted(item["n"] for item in items) == list(range(40))
        assert len({item["id"] for item in items}) == 40

    def test_a_lock_that_does_not_end(self, url: URL, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.5)
        with Database(url) as database, Database(url) as other:
            with other.writing() as session:
                if url.drivername != "sqlite":
                    session.execute(text("LOCK TABLE chat_completions"))
                else:
                    session.execute(text("SELECT 1"))
                with pytest.raises(StorageError, match="cannot be used at the moment") as refused:
                    ChatStore(database).add(chat_body("chatcmpl-1"), [], {})
                assert not refused.value.may_be_stored
            ChatStore(database).add(chat_body("chatcmpl-1"), [], {})

    def test_work_is_done_off_the_event_loop(self, database: Database) -> None:
        async def ask() -> str:
            return await database.run(lambda: threading.current_thread().name)

        assert asyncio.run(ask()).startswith("evermini-database")

    def test_nul_characters_are_kept_or_refused(self, database: Database) -> None:
        store = ChatStore(database)
        store.add(chat_body("chatcmpl-1"), [{"content": "a\x00b"}], {})
        stored = store.get("chatcmpl-1")
        assert stored
        assert stored.messages == [{"content": "a\x00b"}]
        if database.url.drivername == "sqlite":
            assert store.get("a\x00b") is None
        else:
            with pytest.raises(InvalidRequestError, match="NUL"):
                store.get("a\x00b")


class TestSqlite:
    def test_the_file_is_copied_before_it_is_changed(self, tmp_path: Path) -> None:
        scripts = newer_scripts(tmp_path, "op.execute('DELETE FROM chat_completions')")
        path = tmp_path / "evermini.db"
        with Database(URL.create("sqlite", database=str(path))) as database:
            assert not list(tmp_path.glob("*.before-*"))  # there was nothing to lose
            ChatStore(database).add(chat_body("chatcmpl-1"), [], {})
            migrate_module.migrate(database._engine, scripts)
            assert ChatStore(database).get("chatcmpl-1") is None
        with closing(sqlite3.connect(f"{path}.before-0099")) as copy:
            assert copy.execute("SELECT id FROM chat_completions").fetchall() == [("chatcmpl-1",)]

    def test_settings_of_the_connection(self, tmp_path: Path) -> None:
        with (
            Database(URL.create("sqlite", database=str(tmp_path / "x.db"))) as database,
            database.reading() as session,
        ):
            wanted = {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}
            for name, value in wanted.items():
                assert session.scalar(text(f"PRAGMA {name}")) == value

    def test_a_lock_that_stays_is_a_clear_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.05)
        path = tmp_path / "x.db"
        with (
            Database(URL.create("sqlite", database=str(path))) as database,
            closing(sqlite3.connect(path, isolation_level=None)) as other,
        ):
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageError, match="locked"):
                ChatStore(database).add(chat_body("chatcmpl-1"), [], {})
            assert ChatStore(database).get("chatcmpl-1") is None  # readers go on
            other.execute("ROLLBACK")
            ChatStore(database).add(chat_body("chatcmpl-1"), [], {})

    def test_what_was_stored_survives_a_killed_process(self, tmp_path: Path) -> None:
        path = tmp_path / "x.db"
        code = (
            "import os, signal, sys; from sqlalchemy import URL\n"
            "from evermini.storage.database import Database\n"
            "from evermini.storage.chats import ChatStore\n"
            f"store = ChatStore(Database(URL.create('sqlite', database={str(path)!r})))\n"
            "store.add({'id': 'chatcmpl-1', 'model': 'm'}, [], {'a': 'b'})\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        subprocess.run([sys.executable, "-c", code], check=False)
        with Database(URL.create("sqlite", database=str(path))) as database:
            stored = ChatStore(database).get("chatcmpl-1")
        assert stored
        assert stored.body["metadata"] == {"a": "b"}


class TestUrl:
    def test_the_default_is_a_file_in_the_home_folder(self, tmp_path: Path) -> None:
        url = database_url(Settings(home=tmp_path))
        assert (url.drivername, url.database) == ("sqlite", str(tmp_path / "evermini.db"))

    @pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
    def test_postgresql_goes_through_psycopg(self, scheme: str) -> None:
        url = database_url(Settings(database_url=f"{scheme}://u:p@h/d"))
        assert url.drivername == "postgresql+psycopg"

    @pytest.mark.parametrize(
        "given", ["nonsense", "mysql://u:p@h/d", "sqlite://", "sqlite:///:memory:"]
    )
    def test_others_are_refused(self, given: str) -> None:
        with pytest.raises(ConfigError, match="database_url cannot be used") as caught:
            database_url(Settings(database_url=given))
        assert ":p@" not in caught.value.message

    def test_an_unreachable_server_is_a_clear_error(self, tmp_path: Path) -> None:
        pytest.importorskip("psycopg")
        with pytest.raises(StorageError, match="cannot be used"):
            Database.open(Settings(database_url=f"postgresql://u:p@/d?host={tmp_path}"))


class TestChats:
    def test_listing_filters_sorts_and_pages(self, database: Database) -> None:
        store = ChatStore(database)
        for number in range(7):
            metadata = {"parity": "odd" if number % 2 else "even", 'we"ird': f"{number}"}
            model = "a" if number < 5 else "b"
            store.add(chat_body(f"chatcmpl-{number}", model), [], metadata)

        def ids(cursor: Cursor, **filters: Any) -> list[str]:
            found = store.list(cursor, **{"model": None, "metadata": {}, **filters})
            assert found is not None
            return [chat.body["id"][-1] for chat in found.rows] + ["+"] * found.has_more

        assert ids(Cursor()) == list("0123456")
        assert ids(Cursor(limit=3)) == list("012+")
        assert ids(Cursor(limit=3, after="chatcmpl-2")) == list("345+")
        assert ids(Cursor(limit=3, after="chatcmpl-3")) == list("456")
        assert ids(Cursor(order="desc", limit=2, after="chatcmpl-5")) == list("43+")
        assert ids(Cursor(), model="b") == list("56")
        assert ids(Cursor(), metadata={"parity": "odd"}) == list("135")
        assert ids(Cursor(), model="a", metadata={"parity": "odd", 'we"ird': "3"}) == ["3"]
        assert ids(Cursor(), metadata={"parity": "' OR 1=1 --"}) == []
        assert store.list(Cursor(after="nobody"), model=None, metadata={}) is None

    def test_metadata_is_replaced_and_found_again(self, database: Database) -> None:
        store = ChatStore(database)
        store.add(chat_body("chatcmpl-1"), [{"id": "chatcmpl-1-0"}], {"a": "1", "b": "2"})
        changed = store.update("chatcmpl-1", {"b": "3", "c": "4"})
        assert changed
        assert changed.body["metadata"] == {"b": "3", "c": "4"}
        assert changed == store.get("chatcmpl-1")
        found = store.list(Cursor(), model=None, metadata={"a": "1"})
        assert found
        assert not found.rows
        assert store.update("nobody", {}) is None

    def test_deletion_takes_the_metadata_along(self, database: Database) -> None:
        store = ChatStore(database)
        store.add(chat_body("chatcmpl-1"), [], {"a": "1"})
        assert store.delete("chatcmpl-1")
        assert not store.delete("chatcmpl-1")
        with database.reading() as session:
            assert session.scalar(text("SELECT count(*) FROM chat_completion_metadata")) == 0


class TestConversations:
    def test_items_in_order_and_by_page(self, database: Database) -> None:
        store = ConversationStore(database)
        store.add("conv_1", {"topic": "x"}, [{"id": "msg_0"}])
        store.append("conv_1", [{"id": f"msg_{n}"} for n in range(1, 5)])
        assert [item["id"] for item in store.items("conv_1") or ()] == [
            f"msg_{n}" for n in range(5)
        ]
        found = store.list("conv_1", Cursor(order="desc", limit=2, after="msg_3"))
        assert found
        assert [item["id"] for item in found.rows] == ["msg_2", "msg_1"]
        assert found.has_more
        with pytest.raises(KeyError):
            store.list("conv_1", Cursor(after="msg_9"))

    def test_a_taken_id_is_replaced_within_the_conversation_only(self, database: Database) -> None:
        store = ConversationStore(database)
        for name in ("conv_1", "conv_2"):
            store.add(name, {}, [{"id": "msg_0"}])
        (again,) = store.append("conv_1", [{"id": "msg_0", "text": "x"}]) or ()
        assert again["id"].startswith("msg_")
        assert again["id"] != "msg_0"
        assert store.get_item("conv_1", again["id"]) == again
        assert store.get_item("conv_2", "msg_0") == {"id": "msg_0"}

    def test_deletion(self, database: Database) -> None:
        store = ConversationStore(database)
        store.add("conv_1", {}, [{"id": "msg_0"}, {"id": "msg_1"}])
        kept = store.delete_item("conv_1", "msg_0")
        assert kept
        assert kept.id == "conv_1"
        assert store.get_item("conv_1", "msg_0") is None
        with pytest.raises(KeyError):
            store.delete_item("conv_1", "msg_0")
        assert store.delete("conv_1")
        assert not store.delete("conv_1")
        assert store.items("conv_1") is None
        assert store.append("conv_1", []) is None
        with database.reading() as session:
            assert session.scalar(text("SELECT count(*) FROM conversation_items")) == 0


class TestResponses:
    def test_a_chain_is_oldest_first_and_ends_where_one_is_gone(self, database: Database) -> None:
        store = ResponseStore(database)
        for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("other", "b"), ("d", "c")):
            store.add(response(name, previous=previous))
        assert [link.id for link in store.chain("d")] == ["a", "b", "c", "d"]
        store.delete("b")
        assert [link.id for link in store.chain("d")] == ["c", "d"]
        assert store.chain("nobody") == []

    def test_the_owner_of_the_job_finishes_it_once(self, database: Database) -> None:
        store, conversations = ResponseStore(database), ConversationStore(database)
        conversations.add("conv_1", {}, [])
        events = [{"sequence_number": n, "type": "x"} for n in range(6)]
        store.submit(response("r", status="queued", is_resumable=True), events[:1])
        job = JobStore(database).claim("me", [RESPONSE_JOB], 60)
        assert job
        other = replace(job, owner="you")
        body = response("r", status="in_progress").body
        store.save(body, job, events[1:3])
        store.append_events("r", job, events[3:5])
        with pytest.raises(LeaseLostError):
            store.append_events("r", other, events[5:])
        done = response("r").body
        addition = Addition("conv_1", [{"id": "msg_1"}])
        with pytest.raises(LeaseLostError):
            store.save(done, other, events[5:], addition)
        store.save(done, job, events[5:], addition)
        with pytest.raises(LeaseLostError):
            store.save(body, job, [])
        stored = store.get("r")
        assert stored
        assert stored.is_finished
        assert store.events("r", -1, 100) == events
        assert store.events("r", 1, 2) == events[2:4]
        assert conversations.items("conv_1") == [{"id": "msg_1"}]
        assert JobStore(database).claim("me", [RESPONSE_JOB], 60) is None

    def test_a_response_outlives_its_conversation(self, database: Database) -> None:
        store = ResponseStore(database)
        store.add(response("r"), addition=Addition("conv_gone", [{"id": "msg_1"}]))
        assert store.get("r")

    def test_cancelling_ends_the_owners_say(self, database: Database) -> None:
        store = ResponseStore(database)
        store.submit(response("r", status="queued"), [])
        job = JobStore(database).claim("me", [RESPONSE_JOB], 60)
        assert job
        cancelled = store.cancel("r")
        assert cancelled
        assert cancelled.body["status"] == "cancelled"
        with pytest.raises(LeaseLostError):
            store.save(response("r").body, job, [])
        with pytest.raises(LeaseLostError):
            JobStore(database).renew(job, 60)
        store.add(response("done"))
        finished = store.cancel("done")
        assert finished
        assert finished.body["status"] == "completed"
        assert store.cancel("nobody") is None

    def test_deletion_takes_the_events_and_the_job_along(self, database: Database) -> None:
        store = ResponseStore(database)
        store.submit(response("r", status="queued"), [{"sequence_number": 0}])
        job = JobStore(database).claim("me", [RESPONSE_JOB], 60)
        assert job
        assert store.delete("r")
        assert not store.delete("r")
        assert store.events("r", -1, 10) == []
        with pytest.raises(LeaseLostError):
            store.save(response("r").body, job, [])


def test_jobs_are_claimed_once_until_their_lease_runs_out(database: Database) -> None:
    jobs = JobStore(database)
    with database.writing() as session:
        for number in range(7):
            enqueue(session, "kind", f"job{number}")
        enqueue(session, "other", "else")
    live = jobs.claim("a", ["kind"], 60)
    assert live == Job("kind", "job0", 1, "a")
    assert jobs.claim("a", ["kind"], 0) == Job("kind", "job1", 1, "a")  # runs out at once
    with ThreadPoolExecutor(4) as pool:
        claims = pool.map(lambda who: jobs.claim(who, ["kind"], 60), "wxyz")
        claimed = [job for job in claims if job]
    while job := jobs.claim("v", ["kind"], 60):
        claimed.append(job)
    assert sorted(job.subject for job in claimed) == [f"job{n}" for n in range(1, 7)]
    jobs.renew(live, 90)
    jobs.retry(live, 60)
    with pytest.raises(LeaseLostError):
        jobs.renew(live, 90)
    assert jobs.claim("v", ["kind"], 9) is None  # not due yet
    jobs.retry(claimed[0], 0)
    assert jobs.claim("v", ["kind"], 9) == replace(
        claimed[0], owner="v", attempt=claimed[0].attempt + 1
    )


def migrated_until(version: str, url: URL, tmp_path: Path) -> Engine:
    """Return a database as an earlier version of the program left it."""
    scripts = tmp_path / f"until-{version}"
    shutil.copytree(migrate_module.SCRIPTS, scripts)
    for path in (scripts / "versions").glob("0*.py"):
        if path.name[:4] > version:
            path.unlink()
    engine = create_engine(url)
    migrate_module.migrate(engine, scripts)
    return engine


def test_unfinished_responses_of_earlier_versions_become_jobs(url: URL, tmp_path: Path) -> None:
    engine = migrated_until("0006", url, tmp_path)
    columns = "id, status, body, items, request, is_resumable, owner, lease_expires, num_attempts"
    with engine.begin() as connection:
        for name, status, expires, attempts in (
            ("done", "completed", "NULL", 1),
            ("orphan", "in_progress", "5", 2),
            ("new", "queued", "1e12", 1),
        ):
            connection.execute(
                text(
                    f"INSERT INTO responses ({columns}) VALUES ('{name}', '{status}', "
                    f"'{{\"id\": \"{name}\"}}', '[]', '{{}}', {False}, 'me', {expires}, {attempts})"
                )
            )
    engine.dispose()
    with Database(url) as database:
        jobs = JobStore(database)
        found = [jobs.claim("me", [RESPONSE_JOB], 60) for _ in range(3)]
        assert found == [
            Job("response", "orphan", 3, "me"),
            Job("response", "new", 2, "me"),
            None,
        ]
        stored = ResponseStore(database).get("orphan")
        assert stored
        assert (stored.body, stored.caller) == ({"id": "orphan"}, None)


def test_what_was_stored_before_projects_goes_where_it_belongs(url: URL, tmp_path: Path) -> None:
    engine = migrated_until("0009", url, tmp_path)

    def add(table: str, **values: Any) -> None:
        with engine.begin() as connection:
            names = ", ".join(f":{name}" for name in values)
            insert = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({names})"
            connection.execute(text(insert), values)

    for name in ("input", "output", "training", "results", "nobodys"):
        columns: dict[str, Any] = {"id": name, "filename": "a", "purpose": "batch"}
        add("files", **columns, num_bytes=0, created_at=0)
    body = (
        '{"id": "b", "status": "completed", "input_file_id": "input", "output_file_id": "output"}'
    )
    add("batches", id="b", status="completed", body=body, project="acme")
    body = '{"training_file": "training", "validation_file": null, "result_files": ["results"]}'
    add("fine_tuning_jobs", id="t", status="succeeded", body=body, spec="{}", project="acme")
    for name, caller in (("acmes", '{"project": "acme"}'), ("nobodys", "null")):
        body = f'{{"id": "{name}", "status": "completed"}}'
        columns = {"id": name, "status": "completed", "body": body, "items": "[]", "request": "{}"}
        add("responses", **columns, is_resumable=False, caller=caller)
    engine.dispose()
    with Database(url) as database:
        listed = FileStore(database, "acme").list(Cursor(), purpose=None, now=0)
        assert listed
        assert [file.id for file in listed.rows] == ["input", "output", "training", "results"]
        assert FileStore(database, "default").get("nobodys", 0)
        responses = ResponseStore(database, "acme")
        assert responses.get("acmes")
        assert responses.get("nobodys") is None
        assert ResponseStore(database, "default").get("nobodys")


def newer_scripts(folder: Path, change: str) -> Path:
    """The shipped revisions and one more."""
    scripts = folder / "migrations"
    shutil.copytree(migrate_module.SCRIPTS, scripts)
    head = max(path.name[:4] for path in (scripts / "versions").glob("0*.py"))
    (scripts / "versions" / "0099_test.py").write_text(
        f"from alembic import op\nrevision = '0099'\ndown_revision = {head!r}\n"
        f"def upgrade():\n    {change}\n"
    )
    return scripts


class TestFiles:
    def test_a_file_counts_only_until_it_expires(self, database: Database) -> None:
        files = FileStore(database)
        file = StoredFile("file-1", "a.txt", "user_data", 5, 100, 200, (Piece("blob", 5),))
        files.add(file)
        assert files.get("file-1", 199.9) == file
        assert files.get("file-1", 200) is None
        assert files.delete("file-1", 200) is None
        assert files.used_blobs(["blob"]) == {"blob"}
        assert files.delete_expired(200) == ["blob"]
        assert files.used_blobs(["blob"]) == set()


class TestUsage:
    def test_sums_by_time_and_group(self, database: Database) -> None:
        store = UsageStore(database)
        used = [
            Used(at, "r", "/v1/responses", model, key, "p", batch, 10, 4, 2, 0, 0, 0.1)
            for at, model, key, batch in [
                (100, "a", "k", False),
                (119, "a", None, True),
                (120, "b", "k", False),
                (240, "b", "k", False),
            ]
        ]
        store.add(used, 100, 12.5)
        store.add([], 130, 1.5)
        by_time = store.totals(0, 240, width=60)
        assert [(t.start, t.num_requests, t.input_tokens) for t in by_time] == [
            (60, 2, 20),
            (120, 1, 10),
        ]
        by_model = store.totals(0, 300, group_by=("model", "is_batch"))
        assert [
            (t.group["model"], bool(t.group["is_batch"]), t.output_tokens) for t in by_model
        ] == [
            ("a", False, 2),
            ("a", True, 2),
            ("b", False, 4),
        ]
        only = Filter(keys=["k"], models=["b"], is_batch=False)
        assert [t.cached_tokens for t in store.totals(0, 300, only=only)] == [8]
        assert store.totals(300, 400) == []
        assert store.machine_seconds(0, 130) == 12.5
        assert store.machine_seconds(0, 131) == 14.0


def test_keys_are_stored_as_hashes_and_every_change_is_logged(database: Database, url: URL) -> None:
    from evermini.service.access import new_key

    store = KeyStore(database)
    secret, key = new_key("laptop", scopes=["inference"], monthly_budget=1.5)
    store.add(key)
    assert store.find(key.digest) == key
    assert store.any_valid(time.time())
    store.revoke(key.id, 7)
    store.revoke(key.id, 8)
    assert not store.any_valid(time.time())
    assert [entry.action for entry in store.audit_log(9)] == ["key.revoked", "key.created"]
    assert secret not in repr(store.list()) + repr(store.audit_log(9))
