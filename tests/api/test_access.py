"""Keys, limits, budgets and the bill, as clients and operators meet them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import make_url

from evermini.config import Settings
from evermini.service import access, rate_limits
from evermini.service.access import new_key
from evermini.service.runtime import Runtime
from evermini.storage.database import Database
from evermini.storage.keys import KeyStore
from tests.databases import postgres_server
from tests.serving import CHAT, HELLO, assert_error, make_client, serving, wait_for

MODEL = "gpt-4.1-nano"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(Settings(home=tmp_path)) as database:
        yield database


@pytest.fixture
def url(runtime: Runtime, tmp_path: Path, database: Database) -> Iterator[str]:
    with serving(runtime, Settings(home=tmp_path), database) as url:
        yield url


def add_key(database: Database, **options: Any) -> str:
    secret, key = new_key("test", **options)
    KeyStore(database).add(key)
    return secret


def ask(client: openai.OpenAI, **changes: Any) -> Any:
    options: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 2, **changes}
    return client.chat.completions.create(**options)


class TestKeys:
    def test_from_the_first_key_on_one_is_needed(
        self, url: str, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(access, "MEMORY_SECONDS", 0.0)
        with make_client(url) as client:
            ask(client)
            secret = add_key(database)
            with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
                ask(client)
        with make_client(url, api_key=secret) as client:
            ask(client)
            assert client.models.list().data
            key = KeyStore(database).list()[0]
            KeyStore(database).revoke(key.id, int(time.time()))
            with pytest.raises(openai.AuthenticationError, match="has been revoked"):
                ask(client)
        with make_client(url) as client, pytest.raises(openai.AuthenticationError):
            ask(client)  # the last key is revoked: nobody gets in, rather than everybody

    def test_keys_expire(self, url: str, database: Database) -> None:
        secret = add_key(database, expires_at=int(time.time()) - 1)
        with (
            make_client(url, api_key=secret) as client,
            pytest.raises(openai.AuthenticationError, match="expired"),
        ):
            ask(client)

    def test_scopes(self, url: str, database: Database) -> None:
        paths = {
            "inference": "/v1/models",
            "files": "/v1/files",
            "admin": "/v1/organization/costs?start_time=1",
        }
        for scope in paths:
            secret = add_key(database, scopes=[scope])
            for other, path in paths.items():
                answer = httpx.get(url + path, headers={"authorization": f"Bearer {secret}"})
                if other == scope:
                    assert answer.status_code == 200, answer.text
                else:
                    assert f"Missing scope: {other}" in assert_error(answer, 403)["message"]

    def test_keys_are_not_logged(
        self, url: str, database: Database, capsys: pytest.CaptureFixture[str]
    ) -> None:
        secret = add_key(database)
        with make_client(url, api_key=secret) as client:
            ask(client)
        with make_client(url, api_key=secret[:-1]) as client, pytest.raises(openai.APIError) as no:
            ask(client)
        assert secret[:-1] not in no.value.message
        output = capsys.readouterr()
        assert secret[12:-1] not in output.out + output.err


class TestLimits:
    def test_requests_per_minute(self, url: str, database: Database) -> None:
        secret = add_key(database, requests_per_minute=2)
        with make_client(url, api_key=secret) as client:
            first = client.chat.completions.with_raw_response.create(**CHAT)
            assert first.headers["x-ratelimit-limit-requests"] == "2"
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            ask(client)
            with pytest.raises(openai.RateLimitError, match="requests per min") as refused:
                ask(client)
            assert refused.value.code == "rate_limit_exceeded"
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
            client.models.list()  # reading is free
        with make_client(url, api_key=add_key(database)) as client:
            ask(client)  # another key has limits of its own

    def test_the_client_waits_and_gets_through(self, url: str, database: Database) -> None:
        secret = add_key(database, requests_per_minute=60)
        with make_client(url, api_key=secret, max_retries=2) as client:
            for _ in range(62):
                ask(client, max_tokens=1)

    def test_tokens_per_minute(self, url: str, database: Database) -> None:
        secret = add_key(database, tokens_per_minute=20)
        with make_client(url, api_key=secret) as client:
            ask(client, max_tokens=30)
            with pytest.raises(openai.RateLimitError, match="tokens per min"):
                ask(client)

    def test_a_spent_budget_is_not_retried(self, url: str, database: Database) -> None:
        secret = add_key(database, monthly_budget=0.000001)
        with make_client(url, api_key=secret, max_retries=3) as client:
            ask(client)
            with pytest.raises(openai.RateLimitError, match="exceeded your current quota") as no:
                ask(client)
            assert no.value.code == "insufficient_quota"
            assert no.value.response.headers["x-should-retry"] == "false"

    def test_a_budget_holds_for_all_servers(
        self, runtime: Runtime, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(access, "BUDGET_SECONDS", 0.0)
        secret = add_key(database, monthly_budget=0.00003)
        with (
            serving(runtime, database=database) as first,
            serving(runtime, database=database) as second,
            make_client(first, api_key=secret) as here,
            make_client(second, api_key=secret) as there,
        ):
            ask(there)

            def is_refused(client: openai.OpenAI) -> bool:
                try:
                    ask(client)
                except openai.RateLimitError as error:
                    return "exceeded your current quota" in error.message
                return False

            wait_for(lambda: is_refused(here), 60)
            wait_for(lambda: is_refused(there))  # counts are written twice a second

    def test_servers_of_one_database_share_them(
        self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rate_limits, "PATIENCE", 30.0)  # a busy machine's database is slow
        limit, began = 20, time.monotonic()
        with postgres_server() as url, ExitStack() as stack:
            opened = [
                stack.enter_context(Database(make_url(url).set(drivername="postgresql+psycopg")))
                for _ in range(2)
            ]
            secret = add_key(opened[0], requests_per_minute=limit)
            servers = [stack.enter_context(serving(runtime, database=one)) for one in opened]
            headers = {"authorization": f"Bearer {secret}"}

            def is_counted(server: str) -> bool:  # also a request that is malformed
                answer = httpx.post(f"{server}/v1/chat/completions", headers=headers, json={})
                assert answer.status_code in (400, 429), answer.text
                return answer.status_code == 400

            counted = sum(is_counted(servers[n % 2]) for n in range(3 * limit))
            refilled = (time.monotonic() - began) * limit / 60 + 1
            assert limit <= counted <= limit + 2 + refilled


class TestUsage:
    def test_the_bill_is_what_the_answers_said(self, url: str, database: Database) -> None:
        admin = add_key(database, scopes=["admin"])
        secret = add_key(database, project="web")
        began = int(time.time())
        sent = got = cached = 0
        with make_client(url, api_key=secret) as client:
            for stream in (False, False, True):
                extra = {"stream_options": {"include_usage": True}} if stream else {}
                answer = ask(client, stream=stream, max_tokens=5, **extra)
                usage = list(answer)[-1].usage if stream else answer.usage
                sent += usage.prompt_tokens
                got += usage.completion_tokens
                cached += usage.prompt_tokens_details.cached_tokens
            written = client.completions.create(model=MODEL, prompt="One", max_tokens=2).usage
            assert written is not None
            sent, got = sent + written.prompt_tokens, got + written.completion_tokens
        headers = {"authorization": f"Bearer {admin}"}

        def read(path: str, **params: Any) -> Any:
            params = {"start_time": began, **params}
            answer = httpx.get(f"{url}/v1/organization/{path}", params=params, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer.json()

        page = read("usage/completions", **{"group_by[]": ["project_id", "model"]})
        (result,) = [one for bucket in page["data"] for one in bucket["results"]]
        assert result["project_id"] == "web"
        assert result["model"].startswith("gpt-4.1-nano")
        assert result["num_model_requests"] == 4
        assert result["input_tokens"] == sent
        assert result["output_tokens"] == got
        assert result["input_cached_tokens"] >= cached
        costs = [one for bucket in read("costs")["data"] for one in bucket["results"]]
        uncached = sent - result["input_cached_tokens"]
        dollars = (uncached * 0.10 + result["input_cached_tokens"] * 0.025 + got * 0.40) / 1e6
        assert sum(one["amount"]["value"] for one in costs) == pytest.approx(dollars)
        minutes = read("usage/completions", bucket_width="1m", limit=1)
        assert len(minutes["data"]) == 1
        assert read("usage/completions", models="gpt-17")["data"][0]["results"] == []

    def test_the_admin_client_reads_it(self, url: str, database: Database) -> None:
        admin = add_key(database, scopes=["admin", "inference"])
        with make_client(url, api_key=admin, admin_api_key=admin) as client:
            ask(client)
            page = client.admin.organization.usage.completions(start_time=int(time.time()) - 60)
            (result,) = [one for bucket in page.data for one in bucket.results]
            assert result.object == "organization.usage.completions.result"

    def test_embeddings_are_counted(self, url: str) -> None:
        with make_client(url) as client:
            sent = client.embeddings.create(model=MODEL, input=["One", "two"]).usage.prompt_tokens
        params = {"start_time": int(time.time()) - 60}
        page = httpx.get(f"{url}/v1/organization/usage/embeddings", params=params).json()
        results = [one for bucket in page["data"] for one in bucket["results"]]
        assert sum(one["input_tokens"] for one in results) == sent

    def test_batches_are_counted_at_half_price_for_their_key(
        self, url: str, database: Database
    ) -> None:
        secret = add_key(database, project="nightly")
        line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
        with make_client(url, api_key=secret) as client:
            file = client.files.create(
                file=("in.jsonl", json.dumps(line).encode()), purpose="batch"
            )
            batch = client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
            wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
            ask(client)
        admin = add_key(database, scopes=["admin"])
        params = {"start_time": 1, "group_by": ["batch", "project_id"], "limit": 31}
        params["start_time"] = int(time.time()) - 60
        headers = {"authorization": f"Bearer {admin}"}
        page = httpx.get(f"{url}/v1/organization/usage/completions", params=params, headers=headers)
        results = [one for bucket in page.json()["data"] for one in bucket["results"]]
        assert [(one["batch"], one["project_id"]) for one in results] == [
            (False, "nightly"),
            (True, "nightly"),
        ]

    @pytest.mark.parametrize(
        ("params", "name"),
        [
            ({}, "start_time"),
            ({"start_time": "x"}, "start_time"),
            ({"start_time": 1, "bucket_width": "2d"}, "bucket_width"),
            ({"start_time": 1, "limit": 0}, "limit"),
            ({"start_time": 1, "group_by": "colour"}, "group_by"),
            ({"start_time": 1, "page": "x"}, "page"),
        ],
    )
    def test_malformed_questions(self, url: str, params: dict[str, Any], name: str) -> None:
        answer = httpx.get(f"{url}/v1/organization/usage/completions", params=params)
        assert assert_error(answer, 400)["param"] == name
