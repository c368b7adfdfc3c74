"""A served model whose answers another engine writes.

Everything else stays here: names, keys, limits, metering, stored answers, batches, and the reading of prompts that are
longer than the engine's window.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Protocol

from anyio.from_thread import start_blocking_portal

from evermini.backends.client import UpstreamClient
from evermini.backends.discover import Found, discover
from evermini.backends.spec import UpstreamSpec
from evermini.errors import EngineStoppedError, UpstreamError
from evermini.service.attachments import Eyes
from evermini.service.model_info import ModelInfo
from evermini.service.reading import LongReader
from evermini.service.sweep.forms import Form
from evermini.service.upstream.forward import Forwarder

log = logging.getLogger(__name__)


CHARACTERS_PER_TOKEN = 4
"""A guess where nothing counts tokens."""


class Call(Protocol):
    """A request in flight."""

    def end(self, error: Exception) -> None:
        """End it with an error. Called from any thread."""


class UpstreamModel:
    """A model that an upstream engine runs. Its owner closes it.

    Args:
        info: Its names here; the window is filled in when the engine has told it.
        spec: Where the engine is.
        client: Asks it.
        reader: Reads prompts longer than its window; ``None``: they are the engine's to refuse.
        parallel: Questions of one sweep that the engine is sent at the same time.

    Attributes:
        plain_forms: Forms of a sweep's replies whose schemas the engine has refused: they are asked for in words only.
    """

    def __init__(
        self,
        info: ModelInfo,
        spec: UpstreamSpec,
        client: UpstreamClient,
        reader: LongReader | None = None,
        *,
        parallel: int = 1,
    ) -> None:
        self.spec = spec
        self.client = client
        self.reader = reader
        self.parallel = parallel
        self.plain_forms: set[type[Form]] = set()
        self._info = info
        self._found: Found | None = None
        self._calls: set[Call] = set()
        self._is_closed = False
        self._forwarder = Forwarder()

    @property
    def info(self) -> ModelInfo:
        """What clients may know of it."""
        found = self._found
        info = replace(self._info, sees=found is not None and bool(found.sees))
        if self.reader is not None:
            return replace(info, context_window=self.reader.max_prompt_tokens)
        return replace(info, context_window=found.window if found else None)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken; the engine itself may be away for a while."""
        return not self._is_closed

    async def eyes(self) -> Eyes | None:
        """Return what passes images on; ``None``: the engine's model reads text only.

        Raises:
            UpstreamError: It cannot be reached, or does not have the model.
        """
        return self._forwarder if (await self.found()).sees else None

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a plain text has for the model that reads long prompts; without one, a guess."""
        if self.reader is None:
            return len(text) // CHARACTERS_PER_TOKEN
        return len(self.reader.tokenizer.encode(text))

    async def found(self) -> Found:
        """Return what the engine serves; it is asked until it has answered once.

        Raises:
            UpstreamError: It cannot be reached, or does not have the model.
        """
        if self._found is None:
            self._found = await discover(self.client, self.spec)
        return self._found

    def look(self) -> Found | None:
        """Return what the engine serves, or warn that it is not there yet. Blocks for some seconds at most."""
        try:
            with start_blocking_portal() as portal:
                return portal.call(self.found)
        except UpstreamError as error:
            log.warning("%s at %s: %s", self.spec.name, self.spec.url, error.message)
            return None

    def forget(self) -> None:
        """Ask the engine anew with the next request: it does not have what it had."""
        self._found = None
        self.plain_forms.clear()

    def add(self, call: Call) -> None:
        """Note a request in flight, to be ended with the model.

        Raises:
            EngineStoppedError: The model is closed.
        """
        if self._is_closed:
            raise stopped()
        self._calls.add(call)

    def remove(self, call: Call) -> None:
        """Note that a request has ended; does nothing the second time."""
        self._calls.discard(call)

    def close(self, timeout: float = 10.0) -> None:
        """Take no more requests, and end what runs."""
        del timeout  # what runs is the engine's: there is nothing here to wait for
        self._is_closed = True
        self._forwarder.close()
        if self.reader is not None:
            self.reader.close()
        for call in tuple(self._calls):
            call.end(stopped())


def stopped() -> EngineStoppedError:
    """Return the error of requests that the model's end has ended."""
    return EngineStoppedError(
        "The server was stopped before this request was complete. Send it again."
    )
