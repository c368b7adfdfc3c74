"""Fine-tuned models over HTTP: answered by their adapters, listed, priced, deleted; unknown ones say how to import."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from evermini import LLM
from evermini.backends.spec import UpstreamSpec
from evermini.config import Settings
from evermini.engine.adapters import AdapterCache
from evermini.models.checkpoint import open_checkpoint
from evermini.service.access import new_key
from evermini.service.adapters import AdapterStore
from evermini.service.prices import price_of
from evermini.service.runtime import Runtime, ServedModel
from evermini.service.upstream.load import connect
from evermini.storage.adapters import AdapterRow
from evermini.storage.database import Database
from evermini.storage.fine_tuning import StoredTuning, TuningStore
from evermini.storage.keys import KeyStore
from evermini.storage.usage import UsageStore
from tests.adapters import write_adapter
from tests.long_texts import NEEDLES, story
from tests.serving import HELLO, assert_error, make_client, serving, wait_for

FIRST = "ft:gpt-4.1-nano-2025-04-14:acme:one:aaaa1111"
SECOND = "ft:gpt-4.1-nano-2025-04-14:acme:two:bbbb2222"
OLD = "ft:gpt-4o-mini-2024-07-18:acme::old00000"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(Settings(home=tmp_path)) as database:
        yield database


@pytest.fixture
def store(tmp_path: Path, nano_path: Path, database: Database) -> AdapterStore:
    store = AdapterStore.open(Settings(home=tmp_path), database)
    config = open_checkpoint(nano_path).config
    for seed, name in enumerate((FIRST, SECOND)):
        folder = write_adapter(tmp_path / f"adapter{seed}", config, seed=seed, rank=4)
        store.add(folder, name=name, tier="nano", base=config)
    return store


@pytest.fixture
def url(runtime: Runtime, tmp_path: Path, database: Database, store: AdapterStore) -> Iterator[str]:
    with serving(runtime, Settings(home=tmp_path), database) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with make_client(url) as client:
        yield client


def ask(client: openai.OpenAI, model: str, **changes: Any) -> Any:
    options: dict[str, Any] = {"messages": HELLO, "max_tokens": 12, "temperature": 0, **changes}
    return client.chat.completions.create(model=model, **options)


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_each_name_is_answered_by_its_adapter(client: openai.OpenAI):
    base = ask(client, "gpt-4.1-nano")
    answers = {name: ask(client, name) for name in (FIRST, SECOND)}
    assert {answer.model for answer in answers.values()} == {FIRST, SECOND}
    assert len({text_of(base), *map(text_of, answers.values())}) == 3
    prints = {base.system_fingerprint, *(a.system_fingerprint for a in answers.values())}
    assert len(prints) == 3
    again = ask(client, FIRST)
    assert text_of(again) == text_of(answers[FIRST])
    assert text_of(ask(client, "gpt-4.1-nano")) == text_of(base)


def test_all_at_once_answer_as_alone(client: openai.OpenAI):
    names = [FIRST, "gpt-4.1-nano", SECOND] * 3
    alone = {name: text_of(ask(client, name)) for name in set(names)}
    found: list[str | None] = [None] * len(names)

    def work(number: int) -> None:
        found[number] = text_of(ask(client, names[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone[name] for name in names]


def test_prompts_are_cached_per_adapter(client: openai.OpenAI):
    long = [{"role": "user", "content": "The quick brown fox. " * 60}]
    for name in (FIRST, SECOND, "gpt-4.1-nano"):
        details = [
            ask(client, name, messages=long, max_tokens=1).usage.prompt_tokens_details
            for _ in range(2)
        ]
        assert details[0].cached_tokens == 0, f"{name} shared another model's memory"
        assert details[1].cached_tokens > 200


def test_every_endpoint_takes_them(client: openai.OpenAI):
    text = client.completions.create(model=FIRST, prompt="Once", max_tokens=8, temperature=0)
    base = client.completions.create(
        model="gpt-4.1-nano", prompt="Once", max_tokens=8, temperature=0
    )
    assert text.model == FIRST
    assert text.choices[0].text != base.choices[0].text
    response = client.responses.create(
        model=FIRST, input="Hello!", max_output_tokens=12, temperature=0
    )
    assert response.model == FIRST
    assert response.output_text == text_of(ask(client, FIRST))
    background = client.responses.create(
        model=FIRST, input="Hello!", max_output_tokens=12, temperature=0, background=True
    )
    wait_for(lambda: client.responses.retrieve(background.id).status in ("completed", "incomplete"))
    assert client.responses.retrieve(background.id).output_text == response.output_text
    stream = ask(client, FIRST, stream=True)
    chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {FIRST}
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == response.output_text
    with pytest.raises(openai.BadRequestError, match="fine-tuned to write"):
        client.embeddings.create(model=FIRST, input="x")


def test_long_prompts_are_found_in_by_the_base_and_answered_with_the_adapter(
    client: openai.OpenAI,
):
    _, question, _ = NEEDLES[150]
    messages = [{"role": "user", "content": f"{story(41, 480)}\n\n{question}"}]
    base, tuned = (
        ask(client, name, messages=messages, extra_body={"x_evermini": {"why": True}})
        for name in ("gpt-4.1-nano", FIRST)
    )
    recalled = [answer.x_evermini["recall"] for answer in (base, tuned)]
    assert recalled[0]["spans"] == recalled[1]["spans"]
    assert any(span["lines"][0] <= 150 <= span["lines"][1] for span in recalled[1]["spans"])
    assert recalled[1]["ingest_seconds"] < max(recalled[0]["ingest_seconds"], 0.5), "one index"
    assert tuned.usage.prompt_tokens == base.usage.prompt_tokens > 8192
    assert text_of(tuned) != text_of(base)


def test_several_choices_share_an_adapter(client: openai.OpenAI):
    answer = ask(client, FIRST, n=3, logprobs=True, top_logprobs=1)
    assert {choice.message.content for choice in answer.choices} == {text_of(ask(client, FIRST))}


def test_they_are_listed_and_retrieved(client: openai.OpenAI, store: AdapterStore):
    store.set_alias(OLD, FIRST)
    listed = {model.id: model for model in client.models.list()}
    assert {"gpt-4.1-nano", "nano", FIRST, SECOND, OLD} <= listed.keys()
    assert listed[FIRST].owned_by == listed[OLD].owned_by == "acme"
    assert listed["nano"].owned_by == "evermini"
    stored = store.get(FIRST)
    assert stored is not None
    assert client.models.retrieve(FIRST).created == stored.created_at
    assert client.models.retrieve(OLD).id == OLD


def test_an_alias_goes_on_answering(client: openai.OpenAI, store: AdapterStore):
    with pytest.raises(openai.NotFoundError):
        ask(client, OLD)
    store.set_alias(OLD, FIRST)
    answer = ask(client, OLD)
    assert answer.model == FIRST
    assert text_of(answer) == text_of(ask(client, FIRST))
    store.set_alias(OLD, "nano")
    assert ask(client, OLD).model == "gpt-4.1-nano-2025-04-14"


def test_an_unknown_one_says_how_to_import(url: str, client: openai.OpenAI):
    for path, body in (
        ("chat/completions", {"messages": HELLO}),
        ("responses", {"input": "x"}),
        ("completions", {"prompt": "x"}),
    ):
        error = assert_error(httpx.post(f"{url}/v1/{path}", json={"model": OLD, **body}), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        assert f"evermini tune import FOLDER --as {OLD}" in error["message"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(OLD)


def test_a_tier_that_is_not_run_here(
    client: openai.OpenAI, store: AdapterStore, tmp_path: Path, nano_path: Path
):
    name = "ft:gpt-4.1-2025-04-14:acme::cccc3333"
    folder = write_adapter(tmp_path / "full", open_checkpoint(nano_path).config)
    store.add(folder, name=name, tier="full")
    with pytest.raises(openai.NotFoundError, match="evermini serve --model full"):
        ask(client, name)
    assert name not in {model.id for model in client.models.list()}


def test_one_whose_tier_an_upstream_engine_runs_says_what_to_do_about_it(
    url: str, database: Database, store: AdapterStore, tmp_path: Path
):
    spec = UpstreamSpec("nano", f"{url}/v1")
    with (
        Runtime([connect(spec, Settings())]) as front,
        serving(front, Settings(home=tmp_path, model=f"nano={url}/v1"), database) as front_url,
        make_client(front_url) as client,
    ):
        assert text_of(ask(client, "gpt-4.1-nano"))
        with pytest.raises(openai.BadRequestError, match="not available for fine-tuning"):
            client.fine_tuning.jobs.create(model="gpt-4.1-nano", training_file="file-1")
        with pytest.raises(
            openai.NotFoundError, match="another engine runs for this server"
        ) as caught:
            ask(client, FIRST)
        assert f"--model '{FIRST}=URL" in str(caught.value)
        assert FIRST not in {model.id for model in client.models.list()}


def test_one_that_an_upstream_engine_has_is_answered_by_it_under_its_name(
    url: str, client: openai.OpenAI, database: Database, tmp_path: Path
):
    direct = text_of(ask(client, FIRST))
    specs = [UpstreamSpec("nano", f"{url}/v1"), UpstreamSpec(FIRST, f"{url}/v1")]
    with (
        Runtime([connect(spec, Settings()) for spec in specs]) as front,
        serving(front, Settings(home=tmp_path), database) as front_url,
        make_client(front_url) as through,
    ):
        answer = ask(through, FIRST)
        assert (answer.model, text_of(answer)) == (FIRST, direct)
        assert [model.id for model in through.models.list()].count(FIRST) == 1
        with pytest.raises(openai.PermissionDeniedError, match="was started with"):
            through.models.delete(FIRST)
    with LLM(f"{FIRST}={url}/v1", recall=False) as llm:
        assert llm.chat(HELLO, max_tokens=12, temperature=0).text == direct


def test_one_that_does_not_fit_is_an_error_that_says_so(
    client: openai.OpenAI, store: AdapterStore, tmp_path: Path, nano_path: Path
):
    wider = replace(open_checkpoint(nano_path).config, hidden_size=640)
    name = "ft:gpt-4.1-nano-2025-04-14:acme::dddd4444"
    store.add(write_adapter(tmp_path / "wide", wider, layers=[0]), name=name, tier="nano")
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="trained on another model"):
            ask(client, name)
    assert text_of(ask(client, FIRST)), "the engine lives"


def test_one_trained_on_other_weights_is_warned_of_once(
    client: openai.OpenAI,
    store: AdapterStore,
    tmp_path: Path,
    nano: ServedModel,
    nano_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    config = open_checkpoint(nano_path).config
    for weights, seed in ((nano.weights, 8), ("0" * 64, 9)):
        folder = write_adapter(tmp_path / f"trained{seed}", config, seed=seed, rank=4)
        name = f"ft:gpt-4.1-nano-2025-04-14:acme::trained{seed}"
        store.add(folder, name=name, tier="nano", base_weights=weights)
        for _ in range(2):
            ask(client, name, max_tokens=1)
    warned = [one.getMessage() for one in caplog.records if "other weights" in one.getMessage()]
    assert len(warned) == 1
    assert "trained9 was trained on other weights" in warned[0]


def test_deleting(client: openai.OpenAI, store: AdapterStore, tmp_path: Path):
    ask(client, FIRST)
    store.set_alias(OLD, SECOND)
    deleted = client.models.delete(FIRST)
    assert (deleted.id, deleted.object, deleted.deleted) == (FIRST, "model", True)
    with pytest.raises(openai.NotFoundError):
        ask(client, FIRST)
    with pytest.raises(openai.NotFoundError):
        client.models.delete(FIRST)
    assert client.models.delete(OLD).deleted
    assert store.get(SECOND) is not None, "only the alias is gone"
    for name in ("gpt-4.1-nano", "nano"):
        with pytest.raises(openai.PermissionDeniedError, match="was started with"):
            client.models.delete(name)


def test_deleting_takes_the_scope_of_training(url: str, database: Database, store: AdapterStore):
    secrets = {}
    for scope in ("inference", "files"):
        secret, key = new_key("test", scopes=[scope])
        KeyStore(database).add(key)
        secrets[scope] = secret
    with make_client(url, api_key=secrets["inference"]) as client:
        assert text_of(ask(client, FIRST))
        with pytest.raises(openai.PermissionDeniedError, match="Missing scope: files"):
            client.models.delete(FIRST)
    with make_client(url, api_key=secrets["files"]) as client:
        assert client.models.delete(FIRST).deleted


def test_tokens_are_counted_under_its_name_and_price(client: openai.OpenAI, database: Database):
    used = ask(client, FIRST).usage
    rows: list[Any] = []

    def counted() -> bool:
        rows[:] = UsageStore(database).totals(0, 2**40, group_by=("model",))
        return bool(rows)

    wait_for(counted)
    (row,) = rows
    assert row.group["model"] == FIRST
    assert (row.input_tokens, row.output_tokens) == (used.prompt_tokens, used.completion_tokens)
    assert price_of(FIRST).output == 2 * price_of("gpt-4.1-nano").output
    assert price_of("ft:gpt-4.1-mini-2025-04-14:acme::x").input == 0.80


def test_adapters_come_and_go_under_load(
    nano: ServedModel, tmp_path: Path, nano_path: Path, database: Database, store: AdapterStore
):
    """Room for two of five: all are loaded on demand and dropped, while each goes on answering as it does alone."""
    config = open_checkpoint(nano_path).config
    names = [FIRST, SECOND]
    for seed in (5, 6, 7):
        name = f"ft:gpt-4.1-nano-2025-04-14:acme::extra{seed}"
        folder = write_adapter(tmp_path / f"extra{seed}", config, seed=seed, rank=4, strength=1.0)
        store.add(folder, name=name, tier="nano")
        names.append(name)
    cache = AdapterCache(2 * 2_500_000)
    with (
        serving(Runtime([replace(nano, adapters=cache)]), Settings(home=tmp_path), database) as url,
        make_client(url) as client,
    ):
        alone = {name: text_of(ask(client, name)) for name in names}
        assert len(set(alone.values())) == len(names)
        assert cache.num_loads == 5
        wrong: list[str] = []

        def work(start: int) -> None:
            for step in range(6):
                name = names[(start + 2 * step) % len(names)]
                if text_of(ask(client, name)) != alone[name]:
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert cache.num_loads > 5
        assert 0 < cache.num_bytes <= cache.max_bytes
    cache.close()


class TestPermissions:
    """A model that a project trained: others find it once it is shared with them."""

    @pytest.fixture
    def keys(self, database: Database, store: AdapterStore) -> dict[str, str]:
        """Keys of three projects and an administrator; the first has trained the model FIRST."""
        secrets = {}
        for project in ("red", "green", "blue", "admin"):
            scopes = ["admin"] if project == "admin" else ["inference", "files"]
            secret, key = new_key("test", project=project, scopes=scopes)
            KeyStore(database).add(key)
            secrets[project] = secret
            if project == "red":
                trained(database, FIRST, key.id, project)
        return secrets

    @pytest.fixture
    def stack(self) -> Iterator[ExitStack]:
        with ExitStack() as stack:
            yield stack

    def test_a_model_is_found_where_it_was_trained_or_shared(
        self, url: str, keys: dict[str, str], stack: ExitStack
    ) -> None:
        red, green, blue, admin = (
            stack.enter_context(make_client(url, api_key=key)) for key in keys.values()
        )
        permissions = admin.fine_tuning.checkpoints.permissions
        assert text_of(ask(red, FIRST))
        assert {text_of(ask(client, SECOND)) for client in (red, green)}
        for client in (green, blue):
            with pytest.raises(openai.NotFoundError, match="do not have access") as failed:
                ask(client, FIRST)
            assert_error(failed.value.response, 404)
            assert FIRST not in {model.id for model in client.models.list()}
        (made,) = permissions.create(FIRST, project_ids=["green", "green"]).data
        assert (made.object, made.project_id) == ("checkpoint.permission", "green")
        assert text_of(ask(green, FIRST)) == text_of(ask(red, FIRST))
        assert FIRST in {model.id for model in green.models.list()}
        with pytest.raises(openai.NotFoundError):
            ask(blue, FIRST)
        with pytest.raises(openai.NotFoundError):
            green.models.delete(FIRST)
        (again,) = permissions.create(FIRST, project_ids=["green"]).data
        assert again == made
        gone = permissions.delete(made.id, fine_tuned_model_checkpoint=FIRST)
        assert (gone.id, gone.deleted) == (made.id, True)
        with pytest.raises(openai.NotFoundError):
            ask(green, FIRST)
        assert red.models.delete(FIRST).deleted

    def test_an_alias_does_not_lead_around_it(
        self, url: str, keys: dict[str, str], store: AdapterStore
    ) -> None:
        store.set_alias("support", FIRST)
        with make_client(url, api_key=keys["red"]) as client:
            assert text_of(ask(client, "support"))
        with make_client(url, api_key=keys["blue"]) as client:
            with pytest.raises(openai.NotFoundError):
                ask(client, "support")
            assert "support" not in {model.id for model in client.models.list()}

    def test_nor_does_training_on_it(self, url: str, keys: dict[str, str]) -> None:
        with (
            make_client(url, api_key=keys["blue"]) as client,
            pytest.raises(openai.BadRequestError, match="not available for fine-tuning"),
        ):
            client.fine_tuning.jobs.create(model=FIRST, training_file="file-1")

    def test_pages_and_projects(self, url: str, keys: dict[str, str]) -> None:
        with make_client(url, api_key=keys["admin"]) as admin:
            permissions = admin.fine_tuning.checkpoints.permissions
            projects = [f"p{number}" for number in range(5)]
            permissions.create(FIRST, project_ids=projects)
            found = [one.project_id for one in permissions.list(FIRST, limit=2)]
            assert found == projects[::-1]
            page = permissions.list(FIRST, limit=2, order="ascending")
            assert ([one.project_id for one in page.data], page.has_more) == (["p0", "p1"], True)
            (one,) = permissions.list(FIRST, project_id="p3").data
            assert one.project_id == "p3"

    def test_refusals(self, url: str, keys: dict[str, str]) -> None:
        with (
            make_client(url, api_key=keys["red"]) as red,
            pytest.raises(openai.PermissionDeniedError, match="Missing scope: admin"),
        ):
            red.fine_tuning.checkpoints.permissions.create(FIRST, project_ids=["red"])
        with make_client(url, api_key=keys["admin"]) as admin:
            permissions = admin.fine_tuning.checkpoints.permissions
            with pytest.raises(openai.BadRequestError, match="open to every project"):
                permissions.create(SECOND, project_ids=["green"])
            with pytest.raises(openai.NotFoundError, match="not a fine-tuned one"):
                permissions.create("gpt-4.1-nano", project_ids=["green"])
            with pytest.raises(openai.BadRequestError) as failed:
                permissions.create(FIRST, project_ids=[])
            assert failed.value.param == "project_ids"
            with pytest.raises(openai.NotFoundError, match="No permission found"):
                permissions.delete("cp_1", fine_tuned_model_checkpoint=FIRST)
            with pytest.raises(openai.BadRequestError, match="'ascending' and 'descending'"):
                permissions.list(FIRST, extra_query={"order": "asc"})

    def test_graders_are_refused(self, url: str, store: AdapterStore) -> None:
        grader: Any = {"type": "string_check", "name": "n", "operation": "eq", "input": "a"}
        with make_client(url) as client:
            with pytest.raises(openai.NotFoundError, match="no graders") as failed:
                client.fine_tuning.alpha.graders.validate(grader={**grader, "reference": "b"})
            assert failed.value.code == "unsupported_endpoint"


def trained(database: Database, model: str, key_id: str, project: str) -> None:
    """Make a model that of a job, which was created with a key."""
    with database.writing() as session:
        row = session.query(AdapterRow).filter_by(name=model).one()
        row.job_id = "ftjob-1"
    body = {"id": "ftjob-1", "status": "succeeded", "metadata": None}
    TuningStore(database).restore(StoredTuning(body, {}, key_id, project), [], [])
