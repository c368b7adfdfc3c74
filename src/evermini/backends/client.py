"""Asks an upstream engine over HTTP, and turns whatever goes wrong into an error with cause and remedy.

    client = UpstreamClient("http://127.0.0.1:8080/v1", key=None, timeout=600)
    body = await client.post("/chat/completions", {...})
    async with client.stream("/chat/completions", {...}) as events: ...

A connection that cannot be made is tried again, twice: nothing was sent. What was sent is never sent again. Leaving a
call closes its connection, which ends the request on the other side. Connections are not kept: one that the other side
closes at the wrong moment would fail a request that need not fail, and a new one takes a round trip.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from evermini.backends.refusals import failure_in_stream, refusal
from evermini.backends.sse import DONE, events
from evermini.errors import EverminiError, UpstreamError, UpstreamUnavailableError

log = logging.getLogger(__name__)

Json = dict[str, Any]

CONNECT_SECONDS = 5.0
CONNECT_RETRIES = 2
_QUICK = httpx.Timeout(10.0, connect=CONNECT_SECONDS)
"""Patience for what needs no computing, such as the list of models."""
_NO_KEEPING = httpx.Limits(max_connections=None, max_keepalive_connections=0)


class UpstreamClient:
    """An upstream engine.

    Args:
        url: Base URL, without a slash at the end.
        key: API key it asks for.
        timeout: Seconds without a sign of life after which a request has failed: for the whole answer, or between two
            pieces of a stream.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {key}"} if key else {}
        patience = httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None)
        # An engine is asked directly: a transport of its own leaves the environment's proxies aside.
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=patience,
            transport=httpx.AsyncHTTPTransport(retries=CONNECT_RETRIES, limits=_NO_KEEPING),
        )

    async def look(
        self, path: str, *, root: bool = False, asking: Json | None = None
    ) -> Json | None:
        """Return what a ``GET`` answers, or ``None`` if that is no JSON object.

        Args:
            path: Below the base URL.
            root: Below the server's root instead, where engines have what is not OpenAI's.
            asking: ``POST`` this instead.

        Raises:
            UpstreamError: It cannot be reached, is not ready, or refuses the key.
        """
        base = self.url.removesuffix("/v1") if root else self.url
        try:
            method = "GET" if asking is None else "POST"
            response = await self._http.request(method, base + path, json=asking, timeout=_QUICK)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code in (401, 403, 503):
            raise self._refused(response, path)
        try:
            body = response.json() if response.is_success else None
        except ValueError:
            return None
        return body if isinstance(body, dict) else None

    async def post(self, path: str, body: Json) -> Json:
        """Return the response to a request that is answered whole.

        Raises:
            EverminiError: What `evermini.backends.refusals.refusal` says; or it broke off, or was silent too long.
        """
        try:
            response = await self._http.post(self.url + path, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise self._refused(response, path)
        return self._parsed(response.content)

    @asynccontextmanager
    async def stream(self, path: str, body: Json) -> AsyncIterator[AsyncGenerator[Json, None]]:
        """Send a request, and yield an iterator over the events of its answer, up to ``[DONE]``.

        Raises:
            EverminiError: As for `post`; or the stream tells of an error, or ends before its end.
        """
        try:
            async with self._http.stream("POST", self.url + path, json=body) as response:
                if not response.is_success:
                    await response.aread()
                    raise self._refused(response, path)
                yield self._events(response)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _events(self, response: httpx.Response) -> AsyncGenerator[Json, None]:
        async for data in events(response.aiter_bytes()):
            if data.strip() == DONE:
                return
            event = self._parsed(data)
            if failure := failure_in_stream(event):
                log.error("%s: error in a stream: %s", self.url, data[:2000])
                raise failure
            yield event
        log.error("%s: a stream ended before its end", self.url)
        raise UpstreamError(
            "The engine behind this model broke off its answer. Send the request again."
        )

    def _parsed(self, content: bytes | str) -> Json:
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise not_compatible(self.url)
        return body

    def _refused(self, response: httpx.Response, path: str) -> EverminiError:
        shown = response.text[:2000]
        log.warning("%s%s answers %s: %s", self.url, path, response.status_code, shown)
        return refusal(response.status_code, response.content, path=path)

    def _unreachable(self, error: httpx.HTTPError) -> UpstreamError:
        cause = str(error) or type(error).__name__
        log.error("%s: %s", self.url, cause)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UpstreamUnavailableError(
                f"The engine behind this model cannot be reached: {cause}. Try again later; its operator checks it "
                "with `evermini doctor`."
            )
        if isinstance(error, httpx.TimeoutException):
            return UpstreamUnavailableError(
                "The engine behind this model has been silent for too long (upstream_timeout). Try again later."
            )
        return UpstreamError(
            f"The engine behind this model broke off its answer: {cause}. Send the request again."
        )


def not_compatible(url: str) -> UpstreamError:
    """Return the error for a server that answers something else than OpenAI's API."""
    log.error("%s does not answer like an OpenAI-compatible server", url)
    return UpstreamError(
        "What answers behind this model is no OpenAI-compatible engine. Its base URL usually ends in /v1."
    )
