"""Adapters in memory: loaded when first asked for, kept while somebody uses them, and then while there is room.

    cache = AdapterCache(max_bytes)
    lease = await cache.lease(key, load)     # off the event loop and the engine's thread
    engine.add(..., adapter=lease.adapter)
    lease.release()

The least recently used ones go first, and only those that nobody has a lease for. Who needs one that does not fit
beside those in use waits for a lease to end; adapters are loaded one after the other, first come, first served.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from evermini.errors import AdapterError, EngineStoppedError
from evermini.models.batch import Adapter


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that requests can run with.

    Attributes:
        key: Hash of its content (at most 64 bytes). What is computed with it shares KV memory with its like alone.
        weights: What the model made of it.
    """

    key: bytes
    weights: Adapter


class _Entry:
    """An adapter that is loaded or about to be; ``num_bytes`` is 0 until then."""

    ready: Future[LoadedAdapter | None]

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.users = 0
        self.num_bytes = 0


class Lease:
    """Keeps an adapter in memory until `release`."""

    def __init__(self, cache: AdapterCache, entry: _Entry) -> None:
        self._cache = cache
        self._entry: _Entry | None = entry

    @property
    def adapter(self) -> LoadedAdapter:
        """The adapter."""
        assert self._entry is not None, "the lease has ended"
        adapter = self._entry.ready.result(timeout=0)
        assert adapter is not None, "somebody waited for it, so it was loaded"
        return adapter

    def release(self) -> None:
        """End it; does nothing the second time. Safe from any thread."""
        if self._entry is not None:
            self._cache._release(self._entry)
            self._entry = None


class AdapterCache:
    """See the module docstring. Safe from any thread and event loop.

    Args:
        max_bytes: Memory for all of them together; one that is being loaded may come on top for a moment.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_loads = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._changed = threading.Condition()
        self._loader = ThreadPoolExecutor(1, "evermini-adapters")
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Memory that the loaded ones take."""
        with self._changed:
            return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def keys(self) -> list[bytes]:
        """Those in memory, the least recently used first."""
        with self._changed:
            return [key for key, entry in self._entries.items() if entry.num_bytes]

    async def lease(self, key: bytes, load: Callable[[], Adapter]) -> Lease:
        """Return a lease for an adapter, once it is in memory.

        Args:
            key: Of its content.
            load: Called in the loader's thread if it is not in memory.

        Raises:
            AdapterError: It is larger than all the memory for adapters.
            EngineStoppedError: The cache is closed.
            EverminiError: What ``load`` raises.
        """
        with self._changed:
            if self._closed:
                raise _stopped()
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(key)
                entry.ready = self._loader.submit(self._load, entry, load)
            entry.users += 1
            self._entries.move_to_end(key)
        lease = Lease(self, entry)
        try:
            if not entry.ready.done():
                # Shielded: others may wait for the same one.
                await asyncio.shield(asyncio.wrap_future(entry.ready))
            entry.ready.result(timeout=0)
        except BaseException:
            lease.release()
            raise
        return lease

    def close(self) -> None:
        """Load nothing more; who waits gets an error. Leases stay good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._loader.shutdown(wait=False)

    def _load(self, entry: _Entry, load: Callable[[], Adapter]) -> LoadedAdapter | None:
        """Load an adapter and make room for it; ``None`` if nobody waits for it any more."""
        try:
            if self._is_unwanted(entry):
                return None
            weights = load()
            size = weights.num_bytes
            if size > self.max_bytes:
                raise AdapterError(
                    f"This adapter takes {size / 1e6:.1f} MB of memory, all adapters together may take "
                    f"{self.max_bytes / 1e6:.1f} MB. Raise adapter_memory."
                )
            with self._changed:
                while not self._make_room(size):
                    if self._is_unwanted(entry):
                        return None
                    self._changed.wait()
                entry.num_bytes = size
                self.num_loads += 1
            return LoadedAdapter(entry.key, weights)
        except BaseException:
            self._forget(entry)
            raise

    def _is_unwanted(self, entry: _Entry) -> bool:
        """Return whether everybody who waited for an adapter has left; it is then forgotten."""
        with self._changed:
            if self._closed:
                raise _stopped()
            if entry.users:
                return False
            self._forget(entry)
            return True

    def _forget(self, entry: _Entry) -> None:
        with self._changed:
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]

    def _make_room(self, size: int) -> bool:
        """Drop unused adapters until ``size`` bytes fit; ``False``: too much is in use."""
        used = sum(entry.num_bytes for entry in self._entries.values())
        for entry in list(self._entries.values()):
            if used + size <= self.max_bytes:
                break
            if entry.num_bytes and not entry.users:
                used -= entry.num_bytes
                del self._entries[entry.key]
        return used + size <= self.max_bytes

    def _release(self, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            self._changed.notify_all()


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("The engine is shutting down. Try another server, or later.")
