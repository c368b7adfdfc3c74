"""Whether this process should get requests: engines, database and files work, and it is not about to end.

Probes come every few seconds and from anywhere, so what they cost is bounded: storage is asked at most every
`CHECK_SECONDS`, once for all who ask meanwhile. They learn what fails; the log tells why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from evermini.errors import EverminiError
from evermini.service.runtime import Runtime
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database

log = logging.getLogger(__name__)

CHECK_SECONDS = 5.0
"""How long the last look at the storage counts."""
MAX_WAIT_SECONDS = 5.0
"""Storage that has not answered by then does not work."""


class Readiness:
    """The state of one server process.

    Args:
        runtime: Its models.
        database: Its database.
        blobs: Where its files are.

    Attributes:
        is_draining: It is about to end, and takes no new requests.
    """

    def __init__(self, runtime: Runtime, database: Database, blobs: BlobStore) -> None:
        self.is_draining = False
        self._runtime = runtime
        self._database = database
        self._blobs = blobs
        self._failing: dict[str, bool] = {}
        self._checked_at = -CHECK_SECONDS
        self._checking = asyncio.Lock()

    async def check(self) -> dict[str, bool]:
        """Return what works, by name."""
        async with self._checking:
            if time.monotonic() >= self._checked_at + CHECK_SECONDS:
                await asyncio.gather(
                    self._try("database", self._database.ping),
                    self._try("files", self._blobs.check),
                )
                self._checked_at = time.monotonic()
        working = {name: not failing for name, failing in self._failing.items()}
        return {"engine": self._runtime.is_ready, **working}

    async def _try(self, name: str, work: Callable[[], None]) -> None:
        problem: str | None = None
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await asyncio.to_thread(work)
        except TimeoutError:
            problem = f"no answer within {MAX_WAIT_SECONDS:g} s"
        except EverminiError as error:
            problem = error.message
        if problem is not None:
            log.error("not ready: %s: %s", name, problem)
        elif self._failing.get(name):
            log.info("ready again: %s", name)
        self._failing[name] = problem is not None
