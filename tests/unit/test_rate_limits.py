"""Limits per minute: of one process, and of several that share a PostgreSQL database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import URL, text

from evermini.errors import RateLimitError, StorageError
from evermini.service import rate_limits
from evermini.service.access import new_key
from evermini.service.rate_limits import SHARE, RateLimits
from evermini.storage.database import Database
from evermini.storage.keys import ApiKey
from evermini.storage.rate_limits import RateLimitStore
from tests.databases import empty_database, postgres_server
from tests.serving import wait_for

LIMIT = 60


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture
def url(server: str) -> Iterator[URL]:
    """An empty PostgreSQL database."""
    with empty_database(server) as url:
        yield url


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for a busy machine's database."""
    monkeypatch.setattr(rate_limits, "PATIENCE", 30.0)


def key_of(*, requests: int | None = None, tokens: int | None = None) -> ApiKey:
    _, key = new_key("test", requests_per_minute=requests, tokens_per_minute=tokens)
    return key


@asynccontextmanager
async def processes(url: URL, number: int) -> AsyncIterator[list[RateLimits]]:
    """The limits as several processes count them."""
    databases = [Database(url) for _ in range(number)]
    try:
        limits = [RateLimits(database) for database in databases]
        for one in limits:
            one.start()
        yield limits
        for one in limits:
            await one.stop()
    finally:
        for database in databases:
            database.close()


async def is_admitted(limits: RateLimits, key: ApiKey) -> bool:
    try:
        await limits.admit(key)
    except RateLimitError:
        return False
    return True


async def test_one_process_counts_exactly(tmp_path: Path) -> None:
    key = key_of(requests=LIMIT)
    async with processes(URL.create("sqlite", database=str(tmp_path / "db")), 1) as [limits]:
        began = time.monotonic()
        admitted = sum([await is_admitted(limits, key) for _ in range(3 * LIMIT)])
        assert LIMIT <= admitted <= LIMIT + time.monotonic() - began + 1  # one comes back a second
        assert limits.headers(key)["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.usefixtures("patient")
async def test_several_let_in_hardly_more_than_one(url: URL, at_once: bool) -> None:
    key, number = key_of(requests=LIMIT), 3
    async with processes(url, number) as several:
        began = time.monotonic()
        asked = [is_admitted(several[n % number], key) for n in range(4 * LIMIT)]
        outcomes = await asyncio.gather(*asked) if at_once else [await one for one in asked]
        admitted = sum(outcomes)
        refilled = time.monotonic() - began + 1
        assert LIMIT <= admitted <= LIMIT + number * SHARE * LIMIT + refilled
        for one in several:
            assert not await is_admitted(one, key)


@pytest.mark.usefixtures("patient")
async def test_who_comes_later_or_again_finds_what_is_left(url: URL) -> None:
    key = key_of(requests=LIMIT)
    async with processes(url, 1) as [first]:
        for _ in range(LIMIT // 2):
            await first.admit(key)
    async with processes(url, 1) as [second]:  # the first has told the rest when it stopped
        await second.admit(key)
        left = int(second.headers(key)["x-ratelimit-remaining-requests"])
        assert left < LIMIT - 1


@pytest.mark.usefixtures("patient")
async def test_tokens_spent_in_one_are_gone_in_all(url: URL) -> None:
    key = key_of(tokens=1000)
    async with processes(url, 2) as [here, there]:
        assert await is_admitted(here, key)
        assert await is_admitted(there, key)
        here.spend(
            key.id, 5000
        )  # at once known there, and a minute's worth is not enough to pay it back
        deadline = time.monotonic() + 10
        while await is_admitted(there, key):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("patient")
async def test_a_changed_limit_counts(url: URL) -> None:
    key = key_of(requests=LIMIT)
    async with processes(url, 1) as [limits]:
        await limits.admit(key)
    smaller = replace(key, requests_per_minute=10)
    async with processes(url, 1) as [limits]:
        assert sum([await is_admitted(limits, smaller) for _ in range(20)]) <= 11


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_without_the_database_each_counts_alone(
    url: URL, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(requests=LIMIT)
    take = RateLimitStore.take
    hanging = 20.0

    def broken(self: RateLimitStore, *args: object) -> dict[str, float]:
        if how == "fails":
            raise StorageError("planned")
        deadline = time.monotonic() + hanging
        while hanging and time.monotonic() < deadline:
            time.sleep(0.01)
        return take(self, *args)  # type: ignore[arg-type]

    async with processes(url, 2) as [here, there]:
        monkeypatch.setattr(RateLimitStore, "take", broken)
        monkeypatch.setattr(rate_limits, "PATIENCE", 0.001)
        for _ in range(LIMIT):
            await here.admit(key)
        assert not await is_admitted(here, key)
        monkeypatch.setattr(RateLimitStore, "take", take)
        monkeypatch.setattr(rate_limits, "PATIENCE", 30.0)
        hanging = 0.0
        # It tells by itself, so the other one has nothing left to give.
        deadline = time.monotonic() + 20
        await asyncio.sleep(2 * rate_limits.AGREE_SECONDS)
        while True:
            before = await is_admitted(there, key)
            left = int(there.headers(key)["x-ratelimit-remaining-requests"])
            if not before or left < LIMIT // 4:
                break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)


def test_sqlite_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RateLimitStore, "take", lambda *args: pytest.fail("asked"))

    async def work() -> None:
        key = key_of(requests=LIMIT, tokens=1000)
        async with processes(URL.create("sqlite", database=str(tmp_path / "db")), 1) as [limits]:
            for _ in range(LIMIT):
                await limits.admit(key)
                limits.spend(key.id, 1)
            await asyncio.sleep(1.5 * rate_limits.AGREE_SECONDS)

    asyncio.run(work())


def test_the_store_fills_evenly_and_never_beyond_a_minutes_worth(url: URL) -> None:
    with Database(url) as database:
        store = RateLimitStore(database)
        assert store.take("a", {"requests": (6000, 0), "tokens": (10, 25)}) == {
            "requests": 6000,
            "tokens": -15,
        }
        assert store.take("b", {"tokens": (10, 1)}) == {"tokens": 9}
        store.take("a", {"requests": (6000, 6000)})
        wait_for(lambda: store.take("a", {"requests": (6000, 0)})["requests"] > 20)
        with database.writing() as session:  # the clock is set back, then far ahead
            session.execute(text("UPDATE rate_limits SET at = at + 1e6 WHERE key_id = 'a'"))
        assert -15 <= store.take("a", {"tokens": (10, 0)})["tokens"] < 0
        with database.writing() as session:
            session.execute(text("UPDATE rate_limits SET at = 0 WHERE key_id = 'a'"))
        assert store.take("a", {"tokens": (10, 1)}) == {"tokens": 9}
