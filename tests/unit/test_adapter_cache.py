"""Adapters in memory: loaded once, kept while in use, dropped oldest first, never more than the limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from evermini.engine.adapters import AdapterCache, Lease
from evermini.errors import AdapterError, EngineStoppedError


@dataclass(frozen=True)
class Weights:
    num_bytes: int


@pytest.fixture
def cache() -> Iterator[AdapterCache]:
    cache = AdapterCache(max_bytes=100)
    yield cache
    cache.close()


def loader(size: int, loads: list[int] | None = None) -> Callable[[], Weights]:
    def load() -> Weights:
        if loads is not None:
            loads.append(size)
        return Weights(size)

    return load


async def leased(cache: AdapterCache, key: bytes, size: int = 40) -> Lease:
    return await cache.lease(key, loader(size))


async def test_it_is_loaded_once_for_many(cache: AdapterCache):
    loads: list[int] = []
    leases = await asyncio.gather(*(cache.lease(b"a", loader(40, loads)) for _ in range(5)))
    assert loads == [40]
    assert len({id(lease.adapter) for lease in leases}) == 1
    assert cache.num_bytes == 40
    for lease in leases:
        lease.release()
        lease.release()
    again = await cache.lease(b"a", loader(40, loads))
    assert loads == [40]
    assert again.adapter.key == b"a"


async def test_the_least_recently_used_goes_first(cache: AdapterCache):
    for key in (b"a", b"b", b"a"):
        (await leased(cache, key)).release()
    (await leased(cache, b"c")).release()
    assert cache.keys == [b"a", b"c"]
    assert cache.num_bytes == 80


async def test_what_is_in_use_stays_and_others_wait(cache: AdapterCache):
    a, b = await leased(cache, b"a"), await leased(cache, b"b")
    waiting = asyncio.create_task(leased(cache, b"c"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert cache.keys == [b"a", b"b"]
    hit = await leased(cache, b"b")
    a.release()
    c = await asyncio.wait_for(waiting, 5)
    assert set(cache.keys) == {b"b", b"c"}
    assert cache.num_bytes <= cache.max_bytes
    for lease in (b, c, hit):
        lease.release()


async def test_who_leaves_does_not_block_those_behind(cache: AdapterCache):
    a, b = await leased(cache, b"a"), await leased(cache, b"b")
    leaving = asyncio.create_task(leased(cache, b"c"))
    staying = asyncio.create_task(leased(cache, b"d", size=10))
    await asyncio.sleep(0.05)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    lease = await asyncio.wait_for(staying, 5)
    assert lease.adapter.weights.num_bytes == 10
    assert b"c" not in cache.keys
    for one in (a, b, lease):
        one.release()


async def test_one_that_leaves_does_not_take_it_from_the_others(cache: AdapterCache):
    gate = threading.Event()

    def slow() -> Weights:
        assert gate.wait(5)
        return Weights(40)

    first = asyncio.create_task(cache.lease(b"a", slow))
    second = asyncio.create_task(cache.lease(b"a", slow))
    await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.sleep(0.02)
    gate.set()
    assert (await asyncio.wait_for(second, 5)).adapter.key == b"a"


async def test_a_failed_load_is_tried_again(cache: AdapterCache):
    def broken() -> Weights:
        raise AdapterError("damaged")

    with pytest.raises(AdapterError, match="damaged"):
        await cache.lease(b"a", broken)
    assert (await leased(cache, b"a")).adapter.key == b"a"


async def test_one_that_can_never_fit_is_refused(cache: AdapterCache):
    (await leased(cache, b"a")).release()
    with pytest.raises(AdapterError, match="adapter_memory"):
        await leased(cache, b"b", size=101)
    assert cache.keys == [b"a"]


async def test_closing_ends_those_who_wait(cache: AdapterCache):
    lease = await leased(cache, b"a", size=100)
    waiting = asyncio.create_task(leased(cache, b"b"))
    await asyncio.sleep(0.05)
    cache.close()
    with pytest.raises(EngineStoppedError):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(EngineStoppedError):
        await leased(cache, b"c")
    assert lease.adapter.key == b"a"
    lease.release()
