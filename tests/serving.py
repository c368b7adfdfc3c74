"""Runs the application under uvicorn on a free loopback port, for tests that talk HTTP."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import uvicorn
from starlette.types import ASGIApp

from evermini.api.app import create_app
from evermini.api.connections import server_config
from evermini.config import Settings
from evermini.service.model_info import ModelInfo
from evermini.service.reading import LongReader
from evermini.service.runtime import Runtime, ServedModel, start_worker
from evermini.storage.database import Database
from tests.fakes import TinyModel, tiny_config

HELLO = [{"role": "user", "content": "Hello!"}]
CHAT = {"model": "gpt-4.1-nano", "messages": HELLO, "max_tokens": 2}
ERROR_KEYS = {"message", "type", "param", "code"}


@contextmanager
def serving(
    runtime: Runtime, settings: Settings | None = None, database: Database | None = None
) -> Iterator[str]:
    """Serve ``runtime`` and yield the server's root URL; the runtime stays open.

    Without settings or a database given, what is stored goes with the server.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evermini-test-")))
        if database is None:
            database = stack.enter_context(Database.open(Settings(home=folder)))
        app = create_app(runtime, database, settings or Settings(home=folder))
        yield stack.enter_context(serve_app(app, lifespan="on"))


@contextmanager
def serve_app(
    app: ASGIApp, *, lifespan: Literal["on", "off"] = "off", port: int = 0
) -> Iterator[str]:
    """Serve any application and yield its root URL."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        config = server_config(
            app, log_level="warning", lifespan=lifespan, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"


@contextmanager
def abandoned(url: str, body: dict[str, Any]) -> Iterator[None]:
    """Ask for a chat; the client leaves when the block ends, whatever it has got by then."""
    parsed, content = httpx.URL(url), json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parsed.host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    assert parsed.port
    with socket.create_connection((parsed.host, parsed.port)) as connection:
        connection.sendall(head.encode() + content)
        yield


def make_client(base_url: str, **options: Any) -> openai.OpenAI:
    defaults = {"api_key": "unused", "max_retries": 0, "timeout": 60}
    return openai.OpenAI(base_url=f"{base_url}/v1", **{**defaults, **options})


def assert_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check what every failed request promises, and return the error object."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["openai-version"] == "2020-10-01"
    assert int(response.headers["openai-processing-ms"]) >= 0
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == ERROR_KEYS
    return body["error"]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look until it is so: often at first, then less, because looking takes from what is waited for."""
    deadline, pause = time.monotonic() + seconds, 0.005
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(pause)
        pause = min(0.05, 1.3 * pause)


@contextmanager
def reading(nano: ServedModel, home: Path, **options: Any) -> Iterator[ServedModel]:
    """Nano with an index of its own in ``home``, read as ``options`` of `LongReader` say."""
    assert nano.reader is not None
    reader = LongReader(nano.reader.indexer, nano.tokenizer, nano.template, home=home, **options)
    yield replace(nano, reader=reader)
    reader.close()


def tiny_served(like: ServedModel, model: TinyModel, settings: Settings) -> ServedModel:
    """A served model with random weights and the tokenizer of ``like``, whose failures tests can plan."""
    worker = start_worker(model, settings)
    info = ModelInfo("org/tiny", (), 0, worker.max_model_len, "fp_tiny")
    return ServedModel(info, worker, like.tokenizer, like.template, like.grammars)


def tiny_model(like: ServedModel, max_position: int = 256) -> TinyModel:
    return TinyModel(tiny_config(like.tokenizer.vocab_size, max_position))
