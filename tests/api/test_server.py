"""The server's own duties: keys, limits, error shapes, disconnects, failures of the engine."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from evermini.api import sse
from evermini.config import Settings
from evermini.errors import StorageError
from evermini.service.directory import Directory
from evermini.service.runtime import Runtime, ServedModel
from evermini.storage.database import Database
from tests.fakes import TinyModel
from tests.serving import (
    CHAT,
    ERROR_KEYS,
    HELLO,
    assert_error,
    make_client,
    serving,
    tiny_model,
    tiny_served,
    wait_for,
)


@pytest.fixture(scope="module")
def locked_url(runtime: Runtime) -> Iterator[str]:
    with serving(runtime, Settings(api_key="first-key, second-key")) as url:
        yield url


@pytest.fixture(scope="module")
def limited_url(runtime: Runtime) -> Iterator[str]:
    with serving(runtime, Settings(max_request_bytes=100_000)) as url:
        yield url


class TestAuthentication:
    @pytest.mark.parametrize("key", ["first-key", "second-key"])
    def test_each_key_opens(self, locked_url: str, key: str) -> None:
        with make_client(locked_url, api_key=key) as client:
            assert client.models.list().data

    def test_a_wrong_key_is_not_echoed(self, locked_url: str) -> None:
        with (
            make_client(locked_url, api_key="guessed-key") as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.chat.completions.create(model="x", messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        assert "guessed-key" not in caught.value.response.text
        assert caught.value.response.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize("header", [None, "", "Bearer", "Basic first-key", "first-key"])
    @pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing"])
    def test_no_key(self, locked_url: str, header: str | None, path: str) -> None:
        headers = {} if header is None else {"authorization": header}
        error = assert_error(httpx.get(locked_url + path, headers=headers), 401)
        assert "Authorization: Bearer" in error["message"]

    def test_probes_need_no_key(self, locked_url: str) -> None:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert httpx.get(locked_url + path).status_code == 200


class TestErrorShape:
    def test_unknown_route(self, base_url: str) -> None:
        error = assert_error(httpx.post(f"{base_url}/v1/foo"), 404)
        assert error["message"] == "Invalid URL (POST /v1/foo)"
        assert error["type"] == "invalid_request_error"

    @pytest.mark.parametrize("path", ["chat/completions", "v1/v1/chat/completions"])
    def test_a_wrong_base_url_gets_a_hint(self, base_url: str, path: str) -> None:
        error = assert_error(httpx.post(f"{base_url}/{path}", json={}), 404)
        assert f"Invalid URL (POST /{path}). Did you mean /v1/chat/completions?" in error["message"]

    def test_wrong_method(self, base_url: str) -> None:
        response = httpx.get(f"{base_url}/v1/completions")
        error = assert_error(response, 405)
        assert error["message"].startswith("Not allowed to GET on /v1/completions.")
        assert response.headers["allow"] == "POST"

    @pytest.mark.parametrize(
        "body", [b"", b"{", b'{"a": NaN}', b"\xff\xfe", b'"\\ud800"', b"[" * 5000]
    )
    def test_no_json(self, base_url: str, body: bytes) -> None:
        response = httpx.post(
            f"{base_url}/v1/chat/completions",
            content=body,
            headers={"content-type": "application/json"},
        )
        error = assert_error(response, 400)
        assert error["message"].startswith("We could not parse the JSON body")

    @pytest.mark.parametrize(
        "headers",
        [{}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"},
         {"content-type": "application/json", "content-encoding": "gzip"}],
    )  # fmt: skip
    def test_other_content_types_are_refused(self, base_url: str, headers: dict[str, str]) -> None:
        response = httpx.post(
            f"{base_url}/v1/chat/completions", content=json.dumps(CHAT), headers=headers
        )
        assert assert_error(response, 415)["code"] == "unsupported_content_type"

    def test_unexpected_exceptions_show_nothing(
        self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(directory: Directory, name: str) -> None:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(Directory, "resolve", fail)
        with serving(runtime) as url:
            response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
            error = assert_error(response, 500)
            assert error["type"] == "server_error"
            assert "secret" not in response.text
            with make_client(url) as client, pytest.raises(openai.InternalServerError):
                client.chat.completions.create(**CHAT)


class TestBodyLimit:
    def test_with_a_content_length(self, limited_url: str) -> None:
        messages = [{"role": "user", "content": "x" * 3_000_000}]
        with make_client(limited_url) as client, pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="m", messages=messages)
        assert caught.value.status_code == 413
        assert "100000 bytes" in assert_error(caught.value.response, 413)["message"]

    def test_without_a_content_length(self, limited_url: str) -> None:
        def endless() -> Iterator[bytes]:
            yield b'{"model": "'
            for _ in range(100):
                yield b"x" * 65536

        response = httpx.post(
            f"{limited_url}/v1/chat/completions",
            content=endless(),
            headers={"content-type": "application/json"},
        )
        assert_error(response, 413)

    def test_up_to_the_limit(self, limited_url: str) -> None:
        body = json.dumps(CHAT).encode()
        padded = body + b" " * (100_000 - len(body))
        headers = {"content-type": "application/json"}
        for extra, status in ((b"", 200), (b" ", 413)):
            response = httpx.post(
                f"{limited_url}/v1/chat/completions", content=padded + extra, headers=headers
            )
            assert response.status_code == status


ORIGIN = {"origin": "https://app.example"}
PREFLIGHT = {**ORIGIN, "access-control-request-method": "POST"}


class TestCors:
    def test_off_by_default(self, base_url: str) -> None:
        response = httpx.get(f"{base_url}/v1/models", headers=ORIGIN)
        assert "access-control-allow-origin" not in response.headers
        preflight = httpx.options(f"{base_url}/v1/chat/completions", headers=PREFLIGHT)
        assert_error(preflight, 405)

    def test_configured_origins_only(self, runtime: Runtime) -> None:
        settings = Settings(cors_origins=("https://app.example",), api_key="k")
        with serving(runtime, settings) as url:
            preflight = httpx.options(f"{url}/v1/chat/completions", headers=PREFLIGHT)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == "https://app.example"
            refused = httpx.get(f"{url}/v1/models", headers=ORIGIN)
            assert_error(refused, 401)
            assert refused.headers["access-control-allow-origin"] == "https://app.example"
            assert "x-request-id" in refused.headers["access-control-expose-headers"]
            other = httpx.get(f"{url}/v1/models", headers={"origin": "https://evil.example"})
            assert "access-control-allow-origin" not in other.headers


class TestMonitoring:
    def test_health_and_readiness(self, base_url: str) -> None:
        assert httpx.get(f"{base_url}/healthz").json() == {"status": "ok"}
        ready = httpx.get(f"{base_url}/readyz")
        checks = {"engine": "ok", "database": "ok", "files": "ok"}
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "checks": checks})

    @pytest.mark.parametrize("what", ["database", "files"])
    def test_what_fails_makes_it_unready_not_dead(
        self, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        monkeypatch.setattr("evermini.service.readiness.CHECK_SECONDS", 0.0)
        settings = Settings(home=tmp_path)
        broken = True

        def refuse(*args: object) -> None:
            if broken:
                raise StorageError("secret-host is down")

        with Database.open(settings) as database, serving(runtime, settings, database) as url:
            assert httpx.get(f"{url}/readyz").status_code == 200
            target = {
                "database": "evermini.storage.database.Database.ping",
                "files": "evermini.storage.blobs.BlobStore.check",
            }
            monkeypatch.setattr(target[what], refuse)
            answer = httpx.get(f"{url}/readyz")
            assert answer.status_code == 503
            assert answer.json()["status"] == "unavailable"
            assert answer.json()["checks"][what] == "failing"
            assert "secret-host" not in answer.text
            assert httpx.get(f"{url}/healthz").status_code == 200
            broken = False
            assert httpx.get(f"{url}/readyz").status_code == 200

    def test_metrics(self, base_url: str) -> None:
        with make_client(base_url) as client:
            client.chat.completions.create(**{**CHAT, "max_tokens": 5})
        response = httpx.get(f"{base_url}/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        label = '{model_name="gpt-4.1-nano-2025-04-14"}'
        for name in (
            "time_to_first_token_seconds_count",
            "inter_token_latency_seconds_count",
            "e2e_request_latency_seconds_count",
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_ratio",
            "prefix_cache_hit_tokens_total",
            "prefix_cache_restored_tokens_total",
            "prefix_cache_disk_written_blocks_total",
            "prefix_cache_disk_damaged_blocks_total",
            "prefix_cache_disk_bytes",
            "prompt_tokens_total",
            "generation_tokens_total",
            "preemptions_total",
        ):
            assert f"evermini_{name}{label}" in response.text
        route = '{method="POST",route="/v1/chat/completions",status="200"}'
        assert f"evermini_http_requests_total{route}" in response.text

    def test_unknown_urls_are_one_time_series(self, base_url: str) -> None:
        for number in range(3):
            httpx.get(f"{base_url}/nowhere/{number}")
        text = httpx.get(f"{base_url}/metrics").text
        assert 'route="unmatched",status="404"' in text
        assert "nowhere" not in text


class TestModels:
    def test_names_may_hold_slashes(self, nano: ServedModel) -> None:
        served = tiny_served(nano, tiny_model(nano), Settings(kv_memory=16 * 1024**2))
        try:
            with serving(Runtime([nano, served])) as url, make_client(url) as client:
                assert client.models.retrieve("org/tiny").id == "org/tiny"
                listed = [model.id for model in client.models.list()]
                assert listed[0] == "gpt-4.1-nano-2025-04-14"
                assert listed[-1] == "org/tiny"
                answer = client.chat.completions.create(**TINY, max_tokens=2)
                assert answer.model == "org/tiny"
        finally:
            served.close(timeout=0)


@contextmanager
def tiny_server(
    nano: ServedModel, model: TinyModel | None = None, **settings: Any
) -> Iterator[tuple[str, ServedModel]]:
    """A server whose engine is so small that its failures can be planned."""
    limits = {"kv_memory": 16 * 1024**2, "max_num_seqs": 4, "max_batch_tokens": 64, **settings}
    served = tiny_served(nano, model or tiny_model(nano), Settings(**limits))
    try:
        with serving(Runtime([served])) as url:
            yield url, served
    finally:
        served.close(timeout=0)


TINY = {"model": "org/tiny", "messages": HELLO, "temperature": 0}
ENDLESS = {**TINY, "logit_bias": {"2": -100}, "max_tokens": 200}


class TestEngineFailures:
    def test_before_the_first_token(self, nano: ServedModel) -> None:
        model = tiny_model(nano)
        model.fail_on = 0
        with tiny_server(nano, model) as (url, _), make_client(url) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**ENDLESS)
            assert "injected" not in caught.value.response.text
            answer = client.chat.completions.create(**{**ENDLESS, "max_tokens": 3})
            assert answer.usage.completion_tokens == 3  # the server lives

    def test_in_the_middle_of_a_stream(self, nano: ServedModel) -> None:
        model = tiny_model(nano)
        model.fail_on = 6
        with tiny_server(nano, model) as (url, _), make_client(url) as client:
            events = client.chat.completions.create(**ENDLESS, stream=True)
            seen = []
            with pytest.raises(openai.APIError, match="failed while computing") as caught:
                seen.extend(events)
            assert len(seen) > 1
            assert caught.value.body.keys() == ERROR_KEYS
            assert caught.value.type == "server_error"
            model.fail_on = len(model.batches) + 5
            body = {**ENDLESS, "stream": True}
            text = httpx.post(f"{url}/v1/chat/completions", json=body).text
            last = text.rstrip("\n").split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: ")).keys() == {"error"}

    def test_one_choice_failing_ends_the_request(self, nano: ServedModel) -> None:
        model = tiny_model(nano)
        model.fail_on = 5
        with tiny_server(nano, model) as (url, served):
            with make_client(url) as client, pytest.raises(openai.InternalServerError):
                client.chat.completions.create(**ENDLESS, n=3)
            wait_for(lambda: served.worker.stats().running == 0)

    def test_a_full_queue(self, nano: ServedModel) -> None:
        limits = {"max_num_seqs": 1, "max_waiting": 0}
        with tiny_server(nano, **limits) as (url, _), make_client(url) as client:
            events = client.chat.completions.create(**ENDLESS, stream=True)
            next(iter(events))
            for streamed in (False, True):
                with pytest.raises(openai.RateLimitError) as caught:
                    client.chat.completions.create(**ENDLESS, stream=streamed)
                assert caught.value.code == "rate_limit_exceeded"
                assert int(caught.value.response.headers["retry-after"]) >= 1
            events.close()

    def test_a_request_larger_than_the_queue_is_served_in_turns(self, nano: ServedModel) -> None:
        limits = {"max_num_seqs": 1, "max_waiting": 1}
        with tiny_server(nano, **limits) as (url, _), make_client(url) as client:
            answer = client.chat.completions.create(**{**ENDLESS, "max_tokens": 3}, n=6)
            assert [choice.index for choice in answer.choices] == list(range(6))
            assert answer.usage.completion_tokens == 18

    def test_shutdown(self, nano: ServedModel) -> None:
        with tiny_server(nano) as (url, served), make_client(url) as client:
            events = client.chat.completions.create(**ENDLESS, stream=True)
            next(iter(events))
            served.worker.stop(timeout=0)
            with pytest.raises(openai.APIError, match="stopped"):
                list(events)
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**ENDLESS)
            assert caught.value.status_code == 503
            assert_error(caught.value.response, 503)
            assert httpx.get(f"{url}/readyz").status_code == 503
            assert httpx.get(f"{url}/healthz").status_code == 200


class SlowModel(TinyModel):
    """Waits before each step."""

    seconds = 0.0

    def forward(self, batch: Any, kv: Any) -> Any:
        time.sleep(self.seconds)
        return super().forward(batch, kv)


class TestDisconnects:
    @pytest.mark.parametrize("streamed", [False, True])
    def test_within_one_step_even_during_the_prompt(
        self, nano: ServedModel, streamed: bool
    ) -> None:
        model = SlowModel(tiny_model(nano).config)
        model.seconds = 0.2
        messages = [{"role": "user", "content": "word " * 200}]  # four steps of 64 tokens
        body = json.dumps({**ENDLESS, "messages": messages, "max_tokens": 5, "stream": streamed})
        with tiny_server(nano, model) as (url, served):
            address = ("127.0.0.1", httpx.URL(url).port)
            with socket.create_connection(address) as connection:
                head = (
                    "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n"
                )
                connection.sendall(f"{head}{body}".encode())
                wait_for(lambda: served.worker.stats().running == 1)
            left = len(model.batches)
            wait_for(lambda: served.worker.stats().running == 0)
            assert served.worker.stats().kv_blocks_used == 0
            assert served.worker.stats().finished == {"abort": 1}
            assert len(model.batches) <= left + 2  # the step under way, and one that was due

    def test_heartbeats_bridge_a_long_prompt(
        self, nano: ServedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sse, "HEARTBEAT_SECONDS", 0.05)
        model = SlowModel(tiny_model(nano).config)
        model.seconds = 0.2
        with tiny_server(nano, model) as (url, _):
            body = {**TINY, "max_tokens": 2, "stream": True, "logit_bias": {"2": -100}}
            text = httpx.post(f"{url}/v1/chat/completions", json=body).text
            assert text.count(": keep-alive\n\n") >= 2
            assert text.endswith("data: [DONE]\n\n")
            with make_client(url) as client:  # comments mean nothing to it
                chunks = list(client.chat.completions.create(**body))
            assert chunks[-1].choices[0].finish_reason == "length"


class TestResponsiveness:
    async def test_a_huge_prompt_does_not_hold_up_others(self, base_url: str) -> None:
        huge = {
            **CHAT,
            "messages": [{"role": "user", "content": "many words here " * 100_000}],
            "x_evermini": {"reading": "dense"},
        }
        async with httpx.AsyncClient(timeout=60) as client:
            await client.get(f"{base_url}/healthz")
            task = asyncio.create_task(client.post(f"{base_url}/v1/chat/completions", json=huge))
            waits, began = [], time.perf_counter()
            while not task.done():
                started = time.perf_counter()
                await client.get(f"{base_url}/healthz")
                waits.append(time.perf_counter() - started)
            response = await task
        error = assert_error(response, 400)
        assert error["code"] == "context_length_exceeded"
        assert len(waits) > 3
        assert max(waits) < max(0.5, (time.perf_counter() - began) / 4)

    def test_client_request_ids_reach_the_log(
        self, base_url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        headers = {"x-client-request-id": "trace-42"}
        response = httpx.get(f"{base_url}/v1/models", headers=headers)
        out = capsys.readouterr().out
        assert "trace-42" in out
        assert response.headers["x-request-id"] in out
