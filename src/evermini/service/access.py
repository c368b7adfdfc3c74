"""Who may ask, for what, how often, and for how much.

    access = Access(database, settings.api_keys)
    key = await access.identify(header)      # 401
    access.check_scope(key, path)            # 403
    await access.admit(key)                  # 429

Keys lie hashed in the database; a lookup is remembered for `MEMORY_SECONDS`, so a revoked key works that long at most.
Requests and tokens per minute are counted by `evermini.service.rate_limits`. Budgets hold for all processes together:
each counts its own requests at once, and those of the others every `BUDGET_SECONDS`.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import get_args

from evermini.errors import (
    AuthenticationError,
    InvalidRequestError,
    PermissionDeniedError,
    QuotaError,
)
from evermini.service.metering import Meter
from evermini.service.prices import price_of
from evermini.service.rate_limits import RateLimits
from evermini.storage.database import Database
from evermini.storage.keys import ApiKey, KeyStore
from evermini.storage.schema import Scope
from evermini.storage.usage import Used

MEMORY_SECONDS = 10.0
BUDGET_SECONDS = 60.0
"""How long a sum that only this process adds to is believed."""
_MEMORY_KEYS = 4096
PREFIX = "sk-evermini-"
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("inference", "files")
_FILE_PATHS = ("/v1/files", "/v1/uploads", "/v1/batches", "/v1/fine_tuning")
_ADMIN_PATHS = ("/v1/organization", "/v1/fine_tuning/checkpoints")


@dataclass
class _Spending:
    dollars: float | None = None
    """In ``month``; ``None``: not asked for yet."""
    month: int = 0
    asked_at: float = -math.inf


class Access:
    """Decides about requests, for one server process.

    Args:
        database: Where keys are.
        static_keys: Keys of the settings, which may do everything and have no limits.
        meter: Tells what requests use.
    """

    def __init__(self, database: Database, static_keys: Sequence[str], meter: Meter) -> None:
        self._database = database
        self._store = KeyStore(database)
        self._static = [key.encode() for key in static_keys]
        self._meter = meter
        self._known: OrderedDict[str, tuple[float, ApiKey | None]] = OrderedDict()
        self._limits = RateLimits(database)
        self._spending: dict[str, _Spending] = {}
        self._asks = bool(static_keys)
        self._looked = -math.inf
        meter.observers.append(self._spend)

    def start(self) -> None:
        """Begin to agree with other processes. Needs the event loop."""
        self._limits.start()

    async def stop(self) -> None:
        """Tell other processes what is left to tell."""
        await self._limits.stop()

    async def identify(self, header: str) -> ApiKey | None:
        """Return the key of a request; ``None``: it is one of the settings', or no key is asked for.

        Args:
            header: The request's Authorization header.

        Raises:
            AuthenticationError: There is none, or it is not accepted.
        """
        if not await self._is_asked():
            return None
        scheme, _, rest = header.partition(" ")
        given = rest.strip()
        if scheme.lower() != "bearer" or not given:
            raise AuthenticationError(
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
        # All static keys are compared, each in constant time; the others are looked up by a hash that an attacker
        # cannot steer: how long a refusal takes tells nothing.
        matches = [hmac.compare_digest(given.encode(), known) for known in self._static]
        if any(matches):
            return None
        key = await self._find(digest_of(given))
        if key is None:
            raise AuthenticationError(
                "Incorrect API key provided. This server's operator hands out the keys (`evermini keys create`, or "
                "EVERMINI_API_KEY)."
            )
        if not key.is_valid(time.time()):
            why = "revoked" if key.revoked_at is not None else "expired"
            raise AuthenticationError(
                f"The API key {key.shown} has {'been ' if why == 'revoked' else ''}{why}."
            )
        return key

    def check_scope(self, key: ApiKey | None, path: str, method: str = "GET") -> None:
        """Refuse what a key may not do.

        Raises:
            PermissionDeniedError: Its scopes do not cover the path.
        """
        if key is None:
            return
        needed = scope_of(path, method)
        if needed not in key.scopes:
            raise PermissionDeniedError(
                f"You have insufficient permissions for this operation. Missing scope: {needed}. Ask for a key with "
                "that scope (`evermini keys create --scope`).",
                code="missing_scope",
            )

    async def admit(self, key: ApiKey | None) -> None:
        """Count a request against its key's limits.

        Raises:
            RateLimitError: There were too many in the last minute, or too many tokens.
            QuotaError: The month's budget is spent.
        """
        if key is None:
            return
        if key.monthly_budget is not None:
            spent = await self._spent(key, self._spending.setdefault(key.id, _Spending()))
            if spent >= key.monthly_budget:
                raise QuotaError(
                    f"You exceeded your current quota: the key {key.shown} has spent ${spent:.2f} of its "
                    f"${key.monthly_budget:.2f} this month. Ask this server's operator for more."
                )
        await self._limits.admit(key)

    def headers(self, key: ApiKey | None) -> dict[str, str]:
        """Return the ``x-ratelimit-*`` headers of a response."""
        return {} if key is None else self._limits.headers(key)

    async def _is_asked(self) -> bool:
        """Return whether requests need a key: from the first key that exists on, even if all are revoked by now."""
        if not self._asks and time.monotonic() - self._looked > MEMORY_SECONDS:
            self._asks = await self._database.run(self._store.count) > 0
            self._looked = time.monotonic()
        return self._asks

    async def _find(self, digest: str) -> ApiKey | None:
        now = time.monotonic()
        looked, key = self._known.get(digest, (-math.inf, None))
        if now - looked > MEMORY_SECONDS:
            key = await self._database.run(self._store.find, digest)
            self._known[digest] = now, key
            if len(self._known) > _MEMORY_KEYS:
                self._known.popitem(last=False)
        return key

    async def _spent(self, key: ApiKey, spending: _Spending) -> float:
        start = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        month = int(start.timestamp())
        now = time.monotonic()
        if (
            spending.dollars is None
            or spending.month != month
            or now - spending.asked_at > BUDGET_SECONDS
        ):
            await self._meter.flush()
            spending.dollars = await self._meter.cost_since(key.id, month)
            spending.month, spending.asked_at = month, now
        return spending.dollars

    def _spend(self, used: Used) -> None:
        if used.key_id is None:
            return
        self._limits.spend(used.key_id, used.input_tokens + used.output_tokens)
        spending = self._spending.get(used.key_id)
        if spending is not None and spending.dollars is not None:
            spending.dollars += price_of(used.model).cost(
                used.input_tokens, used.cached_tokens, used.output_tokens, is_batch=used.is_batch
            )


def new_key(
    name: str,
    *,
    project: str = "default",
    scopes: Sequence[str] = DEFAULT_SCOPES,
    expires_at: int | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    monthly_budget: float | None = None,
) -> tuple[str, ApiKey]:
    """Return a new key, which is not stored anywhere, and what is stored of it.

    Raises:
        InvalidRequestError: There is no such scope, or none is given.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidRequestError(
            f"There is no scope {unknown[0]!r}." if unknown else "A key needs a scope.",
            param="scope",
        )
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=f"key_{secrets.token_hex(12)}",
        digest=digest_of(secret),
        shown=f"{secret[: len(PREFIX) + 3]}...{secret[-4:]}",
        name=name,
        project=project,
        scopes=tuple(scopes),
        created_at=int(time.time()),
        expires_at=expires_at,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        monthly_budget=monthly_budget,
    )
    return secret, key


def digest_of(secret: str) -> str:
    """Return what is stored of a key. It has 256 random bits, so a fast hash is as good as a slow one."""
    return hashlib.sha256(secret.encode()).hexdigest()


def scope_of(path: str, method: str = "GET") -> Scope:
    """Return the scope that a request needs. Deleting a fine-tuned model takes what making one takes."""
    if path.startswith(_ADMIN_PATHS):
        return "admin"
    if method == "DELETE" and path.startswith("/v1/models"):
        return "files"
    return "files" if path.startswith(_FILE_PATHS) else "inference"
