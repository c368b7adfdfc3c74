"""What a key's project has stored exists for its keys alone, whatever it is and whichever way it is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from evermini.config import Settings
from evermini.service.access import new_key
from evermini.service.runtime import Runtime
from evermini.storage.adapters import Adapter, AdapterTable
from evermini.storage.database import Database
from evermini.storage.fine_tuning import StoredTuning, TuningStore
from evermini.storage.keys import KeyStore
from evermini.storage.schema import Scope
from tests.serving import CHAT, assert_error, make_client, serving, wait_for

MODEL = "gpt-4.1-nano"
OPERATOR = "sk-of-the-settings"


@dataclass(frozen=True)
class Clients:
    """Clients of one server."""

    ours: openai.OpenAI
    ours_too: openai.OpenAI
    theirs: openai.OpenAI
    admin: openai.OpenAI
    operator: openai.OpenAI
    database: Database


@pytest.fixture(scope="module")
def clients(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), api_key=OPERATOR)
    with Database.open(settings) as database:

        def key(project: str, *scopes: Scope) -> str:
            secret, made = new_key("test", project=project, scopes=("inference", "files", *scopes))
            KeyStore(database).add(made)
            return secret

        with serving(runtime, settings, database) as url:
            keys = [key("ours"), key("ours"), key("theirs"), key("third", "admin"), OPERATOR]
            opened = [make_client(url, api_key=one) for one in keys]
            yield Clients(*opened, database)
            for client in opened:
                client.close()


def upload(client: openai.OpenAI, purpose: Any = "user_data", text: bytes = b"Some text.") -> str:
    name = "a.txt" if purpose == "user_data" else "a.jsonl"
    return client.files.create(file=(name, text), purpose=purpose).id


def new_upload(client: openai.OpenAI) -> str:
    return client.uploads.create(
        bytes=3, filename="a.txt", mime_type="text/plain", purpose="user_data"
    ).id


def new_batch(client: openai.OpenAI) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    return client.batches.create(
        input_file_id=upload(client, "batch", json.dumps(line).encode()),
        endpoint="/v1/chat/completions",
        completion_window="24h",
    ).id


def stored_chat(client: openai.OpenAI) -> str:
    options: Any = CHAT
    return client.chat.completions.create(**options, store=True).id


def respond(client: openai.OpenAI, **changes: Any) -> Any:
    options: dict[str, Any] = {"model": MODEL, "input": "Hi.", "max_output_tokens": 16, **changes}
    return client.responses.create(**options)


def conversation(client: openai.OpenAI) -> str:
    item: Any = {"type": "message", "role": "user", "content": "Remember the word heron."}
    return client.conversations.create(items=[item]).id


def only_item(client: openai.OpenAI, conversation_id: str) -> str:
    return client.conversations.items.list(conversation_id).data[0].id


def tuning_job(database: Database, project: str) -> str:
    """Store a job that nobody works on."""
    job_id = f"ftjob-{time.time_ns()}"
    body = {
        "id": job_id,
        "object": "fine_tuning.job",
        "status": "paused",
        "metadata": None,
        "model": MODEL,
        "created_at": 0,
    }
    TuningStore(database).restore(StoredTuning(body, {}, None, project), [], [])
    return job_id


@dataclass(frozen=True)
class Kind:
    """A kind of stored object: how one is made, everything that names one by its id, and its listing."""

    make: Callable[[Clients], str]
    calls: tuple[str, ...]
    listing: str | None = None


KINDS = {
    "file": Kind(
        lambda to: upload(to.ours),
        ("GET files/ID", "GET files/ID/content", "DELETE files/ID"),
        "files",
    ),
    "upload": Kind(
        lambda to: new_upload(to.ours),
        ("POST uploads/ID/parts", "POST uploads/ID/complete", "POST uploads/ID/cancel"),
    ),
    "batch": Kind(
        lambda to: new_batch(to.ours), ("GET batches/ID", "POST batches/ID/cancel"), "batches"
    ),
    "stored chat": Kind(
        lambda to: stored_chat(to.ours),
        (
            "GET chat/completions/ID",
            "GET chat/completions/ID/messages",
            "POST chat/completions/ID",
            "DELETE chat/completions/ID",
        ),
        "chat/completions",
    ),
    "response": Kind(
        lambda to: respond(to.ours).id,
        ("GET responses/ID", "GET responses/ID/input_items", "DELETE responses/ID"),
    ),
    "background response": Kind(
        lambda to: respond(to.ours, background=True).id,
        ("GET responses/ID", "GET responses/ID?stream=true", "POST responses/ID/cancel"),
    ),
    "conversation": Kind(
        lambda to: conversation(to.ours),
        (
            "GET conversations/ID",
            "GET conversations/ID/items",
            "POST conversations/ID/items",
            "POST conversations/ID",
            "DELETE conversations/ID",
        ),
    ),
    "fine-tuning job": Kind(
        lambda to: tuning_job(to.database, "ours"),
        (
            "GET fine_tuning/jobs/ID",
            "GET fine_tuning/jobs/ID/events",
            "GET fine_tuning/jobs/ID/events?stream=true",
            "GET fine_tuning/jobs/ID/checkpoints",
            "POST fine_tuning/jobs/ID/pause",
            "POST fine_tuning/jobs/ID/resume",
            "POST fine_tuning/jobs/ID/cancel",
        ),
        "fine_tuning/jobs",
    ),
}
BODIES: dict[str, Any] = {
    "complete": {"part_ids": ["part_none"]},
    "items": {"items": [{"type": "message", "role": "user", "content": "Hi."}]},
    "ID": {"metadata": {}},
}


def call(client: openai.OpenAI, what: str, object_id: str) -> httpx.Response:
    method, path = what.split(" ")
    options: dict[str, Any] = {}
    last = path.rpartition("/")[2]
    if last == "parts":
        options["files"] = {"data": b"abc"}
    elif method == "POST" and last in BODIES:
        options["json"] = BODIES[last]
    url = f"{client.base_url}{path.replace('ID', object_id)}"
    headers = {"authorization": f"Bearer {client.api_key}"}
    return httpx.request(method, url, headers=headers, timeout=60, **options)


@pytest.mark.parametrize("name", KINDS)
def test_another_projects_object_does_not_exist(clients: Clients, name: str) -> None:
    kind = KINDS[name]
    object_id = kind.make(clients)
    for what in kind.calls:
        refused = call(clients.theirs, what, object_id)
        assert_error(refused, 404)
        nothing = assert_error(call(clients.theirs, what, "nothing"), 404)
        message = refused.json()["error"]["message"]
        assert message.replace(object_id, "nothing") == nothing["message"]
    readable = [what for what in kind.calls if what.startswith("GET") and "?" not in what]
    for what in readable:  # nor was it touched
        assert call(clients.ours_too, what, object_id).status_code == 200
        assert call(clients.admin, what, object_id).status_code == 200
        assert call(clients.operator, what, object_id).status_code == 200


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.listing])
def test_listings_hold_ones_own(clients: Clients, name: str) -> None:
    kind = KINDS[name]
    object_id = kind.make(clients)

    def listed(client: openai.OpenAI, query: str = "") -> httpx.Response:
        return call(client, f"GET {kind.listing}?limit=100{query}", "")

    assert listed(clients.theirs).json()["data"] == []
    for client in (clients.ours, clients.ours_too, clients.admin, clients.operator):
        assert object_id in [one["id"] for one in listed(client).json()["data"]]
    after = assert_error(listed(clients.theirs, f"&after={object_id}"), 404)
    assert after == assert_error(listed(clients.theirs, "&after=nothing"), 404) | {
        "message": after["message"]
    }


class TestUse:
    def test_of_a_file_in_a_chat(self, clients: Clients) -> None:
        part: Any = {"type": "file", "file": {"file_id": upload(clients.ours)}}
        message: Any = {"role": "user", "content": [part]}
        ask: dict[str, Any] = {"model": MODEL, "messages": [message], "max_tokens": 2}
        assert clients.ours_too.chat.completions.create(**ask)
        with pytest.raises(openai.BadRequestError, match="No such File object") as caught:
            clients.theirs.chat.completions.create(**ask)
        assert caught.value.param == "messages[0].content[0].file.file_id"

    @pytest.mark.parametrize("kind", ["input_file", "input_image"])
    def test_of_a_file_in_a_response(self, clients: Clients, kind: str) -> None:
        part = {"type": kind, "file_id": upload(clients.ours)}
        wanted: Any = [{"role": "user", "content": [part]}]
        with pytest.raises(openai.BadRequestError, match="No such File object"):
            respond(clients.theirs, input=wanted)
        made = respond(clients.theirs, input=wanted, background=True)
        retrieve = clients.theirs.responses.retrieve
        wait_for(lambda: retrieve(made.id).status == "failed", 30)
        assert "No such File object" in retrieve(made.id).error.message

    def test_of_a_file_as_a_batchs_input(self, clients: Clients) -> None:
        input_file = clients.ours.batches.retrieve(new_batch(clients.ours)).input_file_id
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            clients.theirs.batches.create(
                input_file_id=input_file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )

    @pytest.mark.parametrize("field", ["training_file", "validation_file"])
    def test_of_a_file_for_training(self, clients: Clients, field: str) -> None:
        pytest.importorskip("trl")
        theirs = upload(clients.theirs, "fine-tune", b"{}")
        given = {"training_file": theirs, field: upload(clients.ours, "fine-tune", b"{}")}
        with pytest.raises(openai.BadRequestError, match="no such file"):
            clients.theirs.fine_tuning.jobs.create(model="mini", **given)

    def test_of_an_earlier_response(self, clients: Clients) -> None:
        first = respond(clients.ours)
        assert respond(clients.ours_too, previous_response_id=first.id)
        with pytest.raises(openai.BadRequestError, match=r"Previous response.*not found"):
            respond(clients.theirs, previous_response_id=first.id)

    def test_of_a_conversation(self, clients: Clients) -> None:
        ours = conversation(clients.ours)
        assert respond(clients.ours_too, conversation=ours)
        count = len(clients.ours.conversations.items.list(ours).data)
        for background in (False, True):
            with pytest.raises(openai.NotFoundError, match=r"Conversation.*not found"):
                respond(clients.theirs, conversation=ours, background=background)
        assert len(clients.ours.conversations.items.list(ours).data) == count

    def test_of_stored_items(self, clients: Clients) -> None:
        ours = conversation(clients.ours)
        for item_id in (respond(clients.ours).output[0].id, only_item(clients.ours, ours)):
            reference: Any = [{"type": "item_reference", "id": item_id}]
            assert respond(clients.ours_too, input=reference)
            with pytest.raises(openai.NotFoundError, match=r"Item.*not found"):
                respond(clients.theirs, input=reference)
            with pytest.raises(openai.NotFoundError, match=r"Item.*not found"):
                clients.theirs.conversations.create(items=reference)


def test_what_a_batch_writes_is_its_projects(clients: Clients) -> None:
    batch_id = new_batch(clients.ours)
    wait_for(lambda: clients.ours.batches.retrieve(batch_id).status == "completed", 60)
    output = clients.ours.batches.retrieve(batch_id).output_file_id
    assert output
    assert clients.ours_too.files.content(output).text
    with pytest.raises(openai.NotFoundError):
        clients.theirs.files.content(output)


def test_lines_of_a_batch_see_what_its_project_sees(clients: Clients) -> None:
    files = [upload(clients.ours), upload(clients.theirs)]
    lines = []
    for number, file_id in enumerate(files):
        message = {"role": "user", "content": [{"type": "file", "file": {"file_id": file_id}}]}
        body = {"model": MODEL, "messages": [message], "max_tokens": 2}
        lines.append(
            {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
        )
    batch = clients.ours.batches.create(
        input_file_id=upload(clients.ours, "batch", "\n".join(map(json.dumps, lines)).encode()),
        endpoint="/v1/chat/completions",
        completion_window="24h",
    )
    wait_for(lambda: clients.ours.batches.retrieve(batch.id).status == "completed", 60)
    counts = clients.ours.batches.retrieve(batch.id).request_counts
    assert counts
    assert (counts.completed, counts.failed) == (1, 1)


def test_a_file_made_of_an_upload_is_its_projects(clients: Clients) -> None:
    file = clients.ours.uploads.upload_file_chunked(
        file=b"abc", filename="a.txt", bytes=3, mime_type="text/plain", purpose="user_data"
    ).file
    assert file
    assert clients.ours_too.files.content(file.id).text == "abc"
    with pytest.raises(openai.NotFoundError):
        clients.theirs.files.retrieve(file.id)


def test_a_trained_model_is_its_projects_and_an_imported_one_everybodys(clients: Clients) -> None:
    table = AdapterTable(clients.database)
    job_id = tuning_job(clients.database, "ours")
    names = {}
    for what, of_job in (("trained", job_id), ("imported", None)):
        names[what] = f"ft:{MODEL}:acme:{what}:{time.time_ns()}"
        table.add(
            Adapter(
                names[what], "nano", "acme", 4, "0" * 64, 1, None, None, of_job, 0, f"{what}-c", f"{what}-w"
            )
        )  # fmt: skip
    for client, seen in (
        (clients.ours, {"trained", "imported"}),
        (clients.theirs, {"imported"}),
        (clients.admin, {"trained", "imported"}),
    ):
        listed = {model.id for model in client.models.list().data}
        assert {what for what, name in names.items() if name in listed} == seen
    trained = names["trained"]
    with pytest.raises(openai.NotFoundError):
        clients.theirs.models.retrieve(trained)
    ask: Any = {**CHAT, "model": trained}
    with pytest.raises(openai.NotFoundError):
        clients.theirs.chat.completions.create(**ask)
    with pytest.raises(openai.NotFoundError):
        clients.theirs.models.delete(trained)
    assert clients.ours.models.retrieve(trained).id == trained
    assert clients.ours.models.delete(trained).deleted


def test_without_keys_everything_is_one_project(runtime: Runtime, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with Database.open(settings) as database:
        with serving(runtime, settings, database) as url, make_client(url) as client:
            made = upload(client)
        secret, key = new_key("the first")
        KeyStore(database).add(key)
        with (
            serving(runtime, settings, database) as url,
            make_client(url, api_key=secret) as client,
        ):
            assert client.files.retrieve(made).id == made
