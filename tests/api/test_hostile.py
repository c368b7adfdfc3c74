"""Input that means harm: refused with an error that says so, in bounded time and memory, while others are served."""

from __future__ import annotations

import hmac
import itertools
import json
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import psutil
import pytest

from evermini.api import connections
from evermini.api.connections import BoundedProtocol
from evermini.config import Settings
from evermini.service.batches import lines as batch_lines
from evermini.service.runtime import Runtime
from evermini.storage.database import Database
from tests.serving import CHAT, ERROR_KEYS, assert_error, make_client, serving, wait_for

BOUNDARY = "b0undary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def url(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    with Database.open(settings) as database, serving(runtime, settings, database) as url:
        yield url


def address(url: str) -> tuple[str, int]:
    parsed = httpx.URL(url)
    assert parsed.port
    return parsed.host, parsed.port


def send(url: str, raw: bytes, seconds: float = 20) -> bytes:
    """Send bytes and return everything that comes back until the server closes the connection."""
    with socket.create_connection(address(url), timeout=seconds) as connection:
        connection.sendall(raw)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionError:
        pass
    return received


def assert_refused(answer: bytes, status: int) -> dict[str, Any]:
    """Check a refusal that was written straight to the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:500]
    error = json.loads(body)["error"]
    assert error.keys() == ERROR_KEYS
    return error


def part(name: str, value: str, filename: str | None = None) -> bytes:
    named = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return f"{head}{value}\r\n".encode()


END = f"--{BOUNDARY}--\r\n".encode()


class TestNames:
    @pytest.mark.parametrize(
        ("name", "shown"),
        [
            ("/etc/shadow", "shadow"),
            ("..", ".."),
            ("....//....//x.txt", "x.txt"),
            ("C:\\windows\\system.ini", "system.ini"),
            ("a\0b.txt", "ab.txt"),
            ("\u202etxt.exe", "txt.exe"),
            ("~root", "~root"),
            ("$(reboot).txt", "$(reboot).txt"),
            ("%2e%2e%2fx", "%2e%2e%2fx"),
            ("日本語" * 100 + ".txt", "日本語" * 100 + ".txt"),
        ],
    )
    def test_names_are_only_shown(self, url: str, name: str, shown: str) -> None:
        body = part("purpose", "user_data") + part("file", "hello", name) + END
        stored = httpx.post(f"{url}/v1/files", content=body, headers=FORM)
        assert stored.status_code == 200, stored.text
        assert stored.json()["filename"] == shown
        content = httpx.get(f"{url}/v1/files/{stored.json()['id']}/content")
        assert content.content == b"hello"
        upload = {"bytes": 1, "filename": name, "mime_type": "text/plain", "purpose": "user_data"}
        assert httpx.post(f"{url}/v1/uploads", json=upload).json()["filename"] == shown

    def test_a_name_without_end(self, url: str) -> None:
        body = part("purpose", "user_data") + part("file", "x", "n" * 2000) + END
        error = assert_error(httpx.post(f"{url}/v1/files", content=body, headers=FORM), 400)
        assert "2000 characters" in error["message"]

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/files/%0d%0aset-cookie:%20a=b",
            "/v1/files/%00/content",
            "/v1/files/..%2f..%2fetc%2fpasswd/content",
            "/v1/batches/%0d%0ax",
            "/v1/models/%0d%0aset-cookie:%20a=b",
            "/v1/responses/%ff%fe",
            "/v1/conversations/%00",
            "/v1/chat/completions/%0a%0d",
            "/v1/uploads/%00/cancel",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/v1/../../etc/passwd",
        ],
    )
    def test_ids_do_not_reach_headers_or_folders(self, url: str, path: str) -> None:
        method = "POST" if path.endswith("cancel") else "GET"
        answer = send(
            url, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 4"), answer
        assert b"set-cookie" not in head.lower()
        assert b"root:" not in body


class TestHeads:
    @pytest.mark.parametrize(
        "raw",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: b\nc\r\n : d\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
    )
    def test_what_is_no_http(self, url: str, raw: bytes) -> None:
        assert_refused(send(url, raw), 400)

    @pytest.mark.parametrize(
        "raw",
        [
            b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n",
            b"GET / HTTP/1.1\r\nX-A: " + b"a" * 300_000,
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 100_000,
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
            + b"X-A: b\r\n" * 100_000,
        ],
        ids=["url", "header", "headers", "trailers"],
    )
    def test_heads_without_end(self, url: str, raw: bytes) -> None:
        with socket.create_connection(address(url), timeout=20) as connection:
            threading.Thread(target=send_slowly, args=(connection, raw), daemon=True).start()
            assert_refused(read_all(connection), 431)

    def test_two_keys(self, runtime: Runtime) -> None:
        with serving(runtime, Settings(api_key="good")) as url:
            headers = [("authorization", "Bearer good"), ("authorization", "Bearer other")]
            error = assert_error(httpx.get(f"{url}/v1/models", headers=headers), 401)
            assert "several Authorization headers" in error["message"]

    def test_many_requests_on_one_connection(self, url: str) -> None:
        """What bounds a head must not add up over requests."""
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 2000 + b"\r\n\r\n"
        with socket.create_connection(address(url), timeout=20) as connection:
            for _ in range(100):
                connection.sendall(request)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def send_slowly(connection: socket.socket, raw: bytes) -> None:
    """Send in pieces: what comes at once may be taken at once."""
    try:
        for at in range(0, len(raw), 16384):
            connection.sendall(raw[at : at + 16384])
            time.sleep(0.001)
    except OSError:
        pass


@contextmanager
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "HEAD_SECONDS": 1.0,
        "BODY_SECONDS": 1.0,
        "WRITE_SECONDS": 1.0,
        "CHECK_SECONDS": 0.1,
    }.items():
        monkeypatch.setattr(connections, name, value)
    yield


class TestSlowClients:
    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with impatient(monkeypatch):
            yield

    @pytest.mark.parametrize(
        "start",
        [
            b"",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"model"',
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        ],
        ids=["silence", "head", "body", "chunks"],
    )
    def test_trickles_end_and_others_are_served(self, url: str, start: bytes) -> None:
        with ExitStack() as stack:
            slow = [
                stack.enter_context(socket.create_connection(address(url), timeout=30))
                for _ in range(40)
            ]
            for connection in slow:
                connection.sendall(start)
            with make_client(url) as client:
                assert client.chat.completions.create(**CHAT).choices
            for connection in slow:
                error = assert_refused(read_all(connection), 408)
                assert "did not arrive" in error["message"]

    def test_a_slow_and_steady_body_is_taken(self, url: str) -> None:
        body = json.dumps({**CHAT, "metadata": {}}).encode().ljust(20_000)

        def steady() -> Iterator[bytes]:
            for at in range(0, len(body), 1000):
                time.sleep(0.1)
                yield body[at : at + 1000]

        answer = httpx.post(
            f"{url}/v1/chat/completions", content=steady(), headers=JSON, timeout=60
        )
        assert answer.status_code == 200

    def test_empty_lines_between_requests(self, url: str) -> None:
        with socket.create_connection(address(url), timeout=30) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"\r\n")
            assert read_all(connection) == b""

    def test_who_does_not_read_is_cut_off(self, url: str) -> None:
        with make_client(url) as client:
            file = client.files.create(file=("a.bin", b"x" * 30_000_000), purpose="user_data")
        with socket.create_connection(address(url), timeout=30) as connection:
            connection.sendall(
                f"GET /v1/files/{file.id}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            )
            time.sleep(3)
            assert len(read_all(connection)) < 30_000_000

    def test_connections_are_bounded(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "HEAD_SECONDS", 60.0)
        monkeypatch.setattr(BoundedProtocol, "limit", 10)
        with ExitStack() as stack:
            idle = [
                stack.enter_context(socket.create_connection(address(url), timeout=30))
                for _ in range(30)
            ]
            with make_client(url) as client:
                assert client.chat.completions.create(**CHAT).choices
            error = assert_refused(read_all(idle[0]), 429)
            assert "too many connections" in error["message"]


class TestBodies:
    def test_a_gigabyte_is_refused_before_it_is_sent(self, url: str) -> None:
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        began = time.monotonic()
        head += b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n"
        error = assert_refused(send(url, head), 413)
        assert "larger than" in error["message"]
        assert time.monotonic() - began < connections.HEAD_SECONDS

    def test_a_gigabyte_in_chunks_is_never_in_memory(self, url: str) -> None:
        chunk = b"%x\r\n" % (1 << 20) + b"[" * (1 << 20) + b"\r\n"
        process, peak, over = psutil.Process(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.01):
                peak = max(peak, process.memory_info().rss)

        before = process.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with socket.create_connection(address(url), timeout=60) as connection:
                connection.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n"
                )
                received = b""
                try:
                    for _ in range(1000):
                        connection.sendall(chunk)
                    received = read_all(connection)
                except OSError:  # it was closed in the middle
                    connection.settimeout(1)
                    received = read_all(connection)
        finally:
            over.set()
            watcher.join()
        assert peak - before < 256 * 1024**2
        if received:
            assert b" 413 " in received[:40]

    @pytest.mark.parametrize(
        "body",
        [
            b"[" + b"[]," * 3_000_000 + b"[]]",
            b"[" + b"0," * 17_000_000 + b"0]",
            b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
            b"1" * 1_000_000,
            b'{"model":"x","messages":' + b"9" * 5000 + b"}",
        ],
        ids=["arrays", "numbers", "nesting", "digits", "number"],
    )
    def test_json_bombs(self, url: str, body: bytes) -> None:
        process = psutil.Process()
        before = process.memory_info().rss
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=JSON, timeout=60)
        assert_error(answer, 400)
        assert process.memory_info().rss - before < 256 * 1024**2

    def test_many_large_bodies_at_once(
        self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("evermini.api.body.MIN_TOTAL_BYTES", 3_000_000)
        with serving(runtime, Settings(max_request_bytes=1_000_000)) as url, ExitStack() as stack:
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 900000\r\n\r\n"
            )
            held = [
                stack.enter_context(socket.create_connection(address(url), timeout=30))
                for _ in range(8)
            ]
            for connection in held:
                connection.sendall(head + b" " * 890_000)
            time.sleep(1)
            refused, _, _ = select.select(held, [], [], 0)
            assert 3 <= len(refused) <= 5
            for connection in refused:
                answer = connection.recv(65536)
                assert b" 429 " in answer[:40], answer
                assert b"retry-after" in answer
            for connection in held:
                connection.close()

            def works() -> bool:
                content = json.dumps(CHAT).encode().ljust(900_000)
                answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=JSON)
                return answer.status_code == 200

            wait_for(works)  # what was given up counts no more

    @pytest.mark.parametrize(
        "change",
        [
            {"max_tokens": 10**400},
            {"max_tokens": 2**63},
            {"n": 10**30},
            {"seed": 2**200},
            {"seed": -(2**63) - 1},
            {"temperature": 10**400},
            {"top_logprobs": 2**70, "logprobs": True},
            {"logit_bias": {"9" * 40: 1}},
            {"logit_bias": {"-1": 1}},
            {"metadata": {"a": "b" * 100_000}},
            {"stop": ["x"] * 100_000},
            {"messages": [{"role": "user", "content": "x"}] * 1, "user": "u" * 10_000_000},
        ],
        ids=lambda change: ",".join(change),
    )
    def test_numbers_and_lists_beyond_measure(self, url: str, change: dict[str, Any]) -> None:
        answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **change}, timeout=60)
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert_error(answer, 400)

    @pytest.mark.parametrize("name", ["response_format", "tools"])
    def test_deep_schemas(self, url: str, name: str) -> None:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(60):
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        value: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        if name == "tools":
            value = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, name: value}, timeout=60)
        assert answer.status_code in (200, 400), answer.text

    @pytest.mark.parametrize(
        "query",
        [
            "/v1/files?limit=99999999999999999999999",
            "/v1/files?limit=-1",
            "/v1/files?after=%00",
            "/v1/batches?limit=1e9",
            "/v1/chat/completions?limit=99999999999999999999",
            "/v1/chat/completions?metadata[%00]=x",
            "/v1/organization/usage/completions?start_time=99999999999999999999999",
            "/v1/organization/usage/completions?start_time=-99999999999999999999999",
            "/v1/organization/usage/completions?start_time=1&end_time=9223372036854775807",
            "/v1/organization/costs?start_time=9223372036854775807",
            "/v1/organization/usage/completions?start_time=1&page=" + "A" * 5000,
            "/v1/responses/resp_1?stream=true&starting_after=99999999999999999999999",
        ],
    )
    def test_queries_beyond_measure(self, url: str, query: str) -> None:
        answer = httpx.get(url + query, timeout=60)
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            assert_error(answer, answer.status_code)


class TestForms:
    def test_thousands_of_fields(self, url: str) -> None:
        for body in (
            part("a", "b") * 5000 + END,
            f"--{BOUNDARY}\r\n\r\n\r\n".encode() * 100_000 + END,
        ):
            error = assert_error(
                httpx.post(f"{url}/v1/files", content=body, headers=FORM, timeout=60), 400
            )
            assert "more than 64 fields" in error["message"]

    def test_compressed_forms_are_not_unpacked(self, url: str) -> None:
        body = part("purpose", "user_data") + part("file", "x", "a.txt") + END
        headers = {**FORM, "content-encoding": "gzip"}
        assert_error(httpx.post(f"{url}/v1/files", content=body, headers=headers), 415)

    @pytest.mark.parametrize(
        "kind",
        [
            "multipart/form-data",
            "multipart/form-data; boundary=",
            f"multipart/form-data; boundary={'b' * 60_000}",
            "multipart/form-data; boundary=" + "\\" * 20_000,
            "multipart/form-data" + "; a=b" * 10_000,
            "multipart/form-data" + "; boundary*0=a" * 2000,
        ],
        ids=["none", "empty", "long", "backslashes", "options", "pieces"],
    )
    def test_boundaries(self, url: str, kind: str) -> None:
        began = time.monotonic()
        answer = httpx.post(
            f"{url}/v1/files", content=b"--x\r\n" * 100, headers={"content-type": kind}, timeout=60
        )
        assert answer.status_code in (400, 415), answer.text
        assert time.monotonic() - began < 30

    def test_a_form_of_headers(self, url: str) -> None:
        body = f"--{BOUNDARY}\r\n".encode() + b"X-A: b\r\n" * 50_000
        assert_error(httpx.post(f"{url}/v1/files", content=body, headers=FORM, timeout=60), 400)


class TestBatchFiles:
    def batch(self, client: openai.OpenAI, content: bytes) -> Any:
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        deadline = time.monotonic() + 120
        while batch.status not in ("failed", "completed"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
            batch = client.batches.retrieve(batch.id)
        return batch

    @pytest.mark.slow
    def test_a_million_lines(self, url: str) -> None:
        line = '{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{}}\n'
        content = b"".join((line % number).encode() for number in range(1_000_000))
        with make_client(url) as client:
            failed = self.batch(client, content)
        assert [error.code for error in failed.errors.data] == ["too_many_requests"]

    def test_a_million_empty_objects(self, url: str) -> None:
        with make_client(url) as client:
            failed = self.batch(client, b"{}\n" * 1_000_000)
        assert failed.status == "failed"
        assert len(failed.errors.data) == batch_lines.MAX_ERRORS

    def test_a_line_without_end(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 1_000_000)
        with make_client(url) as client:
            failed = self.batch(client, b"[" * 5_000_000)
        assert [error.code for error in failed.errors.data] == ["line_too_long"]


class TestKeys:
    def test_every_key_is_compared_in_constant_time(
        self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compared: list[tuple[bytes, bytes]] = []
        original = hmac.compare_digest

        def recording(given: bytes, known: bytes) -> bool:
            compared.append((given, known))
            return original(given, known)

        monkeypatch.setattr("evermini.service.access.hmac.compare_digest", recording)
        with serving(runtime, Settings(api_key="key-one,key-two")) as url:
            for given, status in [
                ("key-one", 200), ("key-two", 200), ("key-on", 401), ("k", 401), ("x" * 5000, 401),
            ]:  # fmt: skip
                compared.clear()
                headers = {"authorization": f"Bearer {given}"}
                assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
                assert [known for _, known in compared] == [b"key-one", b"key-two"]

    def test_no_key_is_in_any_log(
        self, runtime: Runtime, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with serving(runtime, Settings(api_key="sk-the-right-one")) as url:
            for key in ("sk-the-right-one", "sk-a-wrong-one"):
                headers = {"authorization": f"Bearer {key}", "x-client-request-id": "mine"}
                httpx.get(f"{url}/v1/models", headers=headers)
                httpx.post(f"{url}/v1/files", headers=headers, content=b"x")
                httpx.post(f"{url}/v1/chat/completions", headers=headers, json={"model": "none"})
        written = caplog.text + "".join(capfd.readouterr())
        assert "sk-the-right-one" not in written
        assert "sk-a-wrong-one" not in written


def test_garbage_on_many_connections(url: str) -> None:
    for seed in itertools.islice(itertools.count(), 50):
        raw = b"".join(struct.pack("<Q", hash((seed, n)) & (2**64 - 1)) for n in range(64))
        with socket.create_connection(address(url), timeout=20) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            read_all(connection)
    with make_client(url) as client:
        assert client.chat.completions.create(**CHAT).choices


def test_nothing_is_left_behind(url: str) -> None:
    """After all of the above, the server answers as before."""
    with make_client(url) as client:
        assert client.chat.completions.create(**CHAT).choices
    assert httpx.get(f"{url}/readyz").status_code == 200
