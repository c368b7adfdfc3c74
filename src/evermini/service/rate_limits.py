"""Requests and tokens per minute of keys, in buckets that fill evenly and hold one minute's worth.

    limits = RateLimits(database)
    await limits.admit(key)          # 429
    limits.spend(key.id, tokens)     # what a request used is known at its end, so tokens may be overdrawn

With SQLite, the buckets are this process's. With PostgreSQL, all processes take from one bucket, each of them first
from its own copy: it tells the database what it has taken, and learns what is left, before it lets in more than
`SHARE` of a limit, and when its copy is `AGREE_SECONDS` old. So N processes together let in at most N times that share
too much, and mostly ask the database once a second for each key in use. Where it does not answer, they count alone, and
tell later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field

from evermini.errors import RateLimitError, StorageError
from evermini.storage.database import Database
from evermini.storage.keys import ApiKey
from evermini.storage.rate_limits import RateLimitStore

log = logging.getLogger(__name__)

SHARE = 0.05
"""Part of a limit that a process takes before it tells the others; at least one request."""
AGREE_SECONDS = 1.0
"""How old a copy may be."""
PATIENCE = 0.1
"""How long, in seconds, a request waits for the database to say what is left."""


@dataclass
class _Bucket:
    """Fills by ``per_minute`` a minute, up to one minute's worth; may be overdrawn, and then has to fill up again.

    Attributes:
        untold: What was taken and the others do not know of.
    """

    unit: str
    per_minute: int
    level: float = 0.0
    at: float = field(default_factory=time.monotonic)
    untold: float = 0.0

    def __post_init__(self) -> None:
        self.level = float(self.per_minute)

    def now(self) -> float:
        now = time.monotonic()
        self.level = min(
            float(self.per_minute), self.level + (now - self.at) * self.per_minute / 60
        )
        self.at = now
        return self.level

    def take(self, amount: float) -> None:
        self.level = self.now() - amount
        self.untold += amount

    def learn(self, level: float, told: float) -> None:
        """Note what is left of the common bucket, now that it knows of ``told``."""
        self.untold -= told
        self.level, self.at = level - self.untold, time.monotonic()

    def check(self) -> None:
        """Raise if it has too little for a request."""
        needed = 1.0 if self.unit == "requests" else 0.0
        if self.now() < needed or self.level <= 0:
            wait = self.seconds_until(max(needed, 1.0))
            used = math.ceil(self.per_minute - self.level)
            raise RateLimitError(
                f"Rate limit reached for {self.unit} per min: Limit {self.per_minute}, Used {used}. Please try again "
                f"in {wait:.3f}s.",
                retry_after=wait,
            )

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.now()) * 60 / self.per_minute)

    def headers(self) -> dict[str, str]:
        return {
            f"x-ratelimit-limit-{self.unit}": str(self.per_minute),
            f"x-ratelimit-remaining-{self.unit}": str(max(0, math.floor(self.now()))),
            f"x-ratelimit-reset-{self.unit}": f"{self.seconds_until(self.per_minute):.3f}s",
        }


@dataclass
class _Account:
    key_id: str
    buckets: dict[str, _Bucket]
    agreed_at: float = -math.inf
    talk: asyncio.Task[None] | None = None

    @property
    def is_due(self) -> bool:
        """Return whether the copies are too old, or too much was taken from them."""
        return self.has_much_to_tell or time.monotonic() - self.agreed_at > AGREE_SECONDS

    @property
    def has_much_to_tell(self) -> bool:
        return any(b.untold >= max(1.0, SHARE * b.per_minute) for b in self.buckets.values())


class RateLimits:
    """The limits of keys, as one server process counts them.

    Args:
        database: Shared with other processes, if it is PostgreSQL.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        is_shared = database.url.drivername != "sqlite"
        self._store = RateLimitStore(database) if is_shared else None
        self._accounts: dict[str, _Account] = {}
        self._silent_until = -math.inf
        self._teller: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to tell other processes from time to time. Needs the event loop."""
        if self._store is not None:
            self._teller = asyncio.create_task(self._tell())

    async def stop(self) -> None:
        """Tell what is left to tell."""
        if self._teller is not None:
            self._teller.cancel()
            await asyncio.gather(self._teller, return_exceptions=True)
            await asyncio.gather(*(self._talk(account) for account in self._accounts.values()))

    async def admit(self, key: ApiKey) -> None:
        """Count a request.

        Raises:
            RateLimitError: There were too many in the last minute, or too many tokens.
        """
        account = self._account(key)
        self._check(account)  # before others are asked: they have only taken more
        if self._store is not None and account.buckets:
            await self._agree(account)
            self._check(account)
        if "requests" in account.buckets:
            account.buckets["requests"].take(1)

    def spend(self, key_id: str, num_tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        account = self._accounts.get(key_id)
        if account is not None and "tokens" in account.buckets:
            account.buckets["tokens"].take(num_tokens)

    def headers(self, key: ApiKey) -> dict[str, str]:
        """Return the ``x-ratelimit-*`` headers of a response, if it has been counted."""
        account = self._accounts.get(key.id)
        found: dict[str, str] = {}
        for bucket in account.buckets.values() if account else ():
            found |= bucket.headers()
        return found

    def _account(self, key: ApiKey) -> _Account:
        account = self._accounts.get(key.id)
        if account is None:
            limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
            buckets = {unit: _Bucket(unit, size) for unit, size in limits.items() if size}
            account = self._accounts[key.id] = _Account(key.id, buckets)
        return account

    @staticmethod
    def _check(account: _Account) -> None:
        for unit in ("tokens", "requests"):
            if unit in account.buckets:
                account.buckets[unit].check()

    # With other processes

    async def _agree(self, account: _Account) -> None:
        """Return when the copies can be gone by, or the database has taken too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                # Of many that wait for the same answer, each looks again whether those before it have used it up.
                while account.is_due and time.monotonic() > self._silent_until:
                    await asyncio.shield(self._talk(account))

    def _talk(self, account: _Account) -> asyncio.Task[None]:
        """Return the task that tells the database what was taken; at most one of a key at a time."""
        if account.talk is None or account.talk.done():
            account.talk = asyncio.create_task(self._exchange(account))
        return account.talk

    async def _exchange(self, account: _Account) -> None:
        assert self._store is not None
        told = {unit: bucket.untold for unit, bucket in account.buckets.items()}
        taken = {unit: (account.buckets[unit].per_minute, told[unit]) for unit in told}
        try:
            levels = await self._database.run(self._store.take, account.key_id, taken)
        except StorageError as error:  # what was not told is told later
            log.warning("limits are counted by this process alone: %s", error.message)
            self._silent_until = time.monotonic() + AGREE_SECONDS
            return
        account.agreed_at = time.monotonic()
        for unit, level in levels.items():
            account.buckets[unit].learn(level, told[unit])

    async def _tell(self) -> None:
        """Tell what requests have used whose key asks for no more."""
        while True:
            await asyncio.sleep(AGREE_SECONDS)
            for account in self._accounts.values():
                if any(bucket.untold for bucket in account.buckets.values()):
                    self._talk(account)
