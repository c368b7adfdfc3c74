"""A real server on a free loopback port with the real nano model.

``EVERMINI_TEST_BASE_URL=http://host:port`` points the tests of `test_client.py` at a running server instead, e.g. from
an environment that has only pytest and an older `openai`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from evermini.service.runtime import Runtime, ServedModel

CLIENT_OPTIONS: dict[str, Any] = {"api_key": "unused", "max_retries": 0, "timeout": 60}


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with all tables and no rows."""
    from evermini.config import Settings
    from evermini.storage.database import FILE_NAME, Database

    home = tmp_path_factory.mktemp("migrated")
    Database.open(Settings(home=home)).close()
    return home / FILE_NAME


@pytest.fixture(scope="module", autouse=True)
def migrate_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let new databases begin as copies of one that was migrated; `tests/unit/test_storage.py` is about migrations."""
    if "EVERMINI_TEST_BASE_URL" in os.environ:
        yield
        return
    from evermini.storage import database

    template, migrate = request.getfixturevalue("migrated"), database.migrate

    def copy_and_migrate(engine: Engine) -> None:
        if engine.dialect.name == "sqlite" and not Path(str(engine.url.database)).exists():
            shutil.copyfile(template, str(engine.url.database))
        migrate(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "migrate", copy_and_migrate)
        yield


@pytest.fixture(scope="session")
def nano() -> Iterator[ServedModel]:
    from evermini.config import load_settings
    from evermini.service.runtime import load_tier

    settings = load_settings({"model": "nano", "kv_memory": "512MiB", "prompt_disk": 0}).settings
    served = load_tier("nano", settings)
    yield served
    served.close(timeout=1.0)


@pytest.fixture(scope="session")
def runtime(nano: ServedModel) -> Runtime:
    from evermini.service.runtime import Runtime

    return Runtime([nano])


@pytest.fixture(scope="session")
def base_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Root of the server that most tests share, without ``/v1``."""
    if given := os.environ.get("EVERMINI_TEST_BASE_URL"):
        yield given.rstrip("/")
        return
    from tests.serving import serving

    with serving(request.getfixturevalue("runtime")) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base_url}/v1", **CLIENT_OPTIONS) as client:
        yield client


@pytest.fixture
async def async_client(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", **CLIENT_OPTIONS) as client:
        yield client


@pytest.fixture
def httpx_requests(client: openai.OpenAI) -> list[httpx.Request]:
    """What the client sends from now on."""
    sent: list[httpx.Request] = []
    client._client.event_hooks["request"].append(sent.append)
    return sent
