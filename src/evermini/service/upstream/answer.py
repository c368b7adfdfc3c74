"""What an upstream engine writes, whatever it was asked for: read to its end, counted, and ended from either side."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from evermini.errors import UpstreamError
from evermini.service.generation import Usage
from evermini.service.metrics import RequestTimer
from evermini.service.upstream.exchange import Exchange
from evermini.service.upstream.replies import UsageReply

DeltaT = TypeVar("DeltaT")


class UpstreamWriting(Generic[DeltaT]):
    """An answer on its way: base of those of chats and of text completions.

    Args:
        exchange: The request in flight, accepted by the engine.
        timer: Told of every piece and every end.
        num_choices: Choices that the engine writes.
        num_prompt: Tokens of the prompt by our own count, for requests that end before the engine has told its own.
    """

    def __init__(
        self, exchange: Exchange, timer: RequestTimer, num_choices: int, num_prompt: int = 0
    ) -> None:
        self._exchange = exchange
        self._timer = timer
        self._num_prompt = num_prompt
        self._open = set(range(num_choices))
        self._num_pieces = 0
        self._usage: Usage | None = None

    @abstractmethod
    def _read(self, body: dict[str, Any]) -> AsyncGenerator[DeltaT, None]:
        """Yield the deltas of one reply."""

    async def deltas(self) -> AsyncGenerator[DeltaT, None]:
        """Yield the choices' deltas as they come; leaving early ends the request at the engine.

        Raises:
            UpstreamError: The engine failed, broke off, or did not keep to what was asked.
            EngineStoppedError: The model was closed.
        """
        try:
            async with aclosing(self._exchange.replies()) as replies:
                async for body in replies:
                    async with aclosing(self._read(body)) as deltas:
                        async for delta in deltas:
                            yield delta
            if self._open:
                raise UpstreamError(
                    "The engine behind this model ended its answer without an end. Send the request again."
                )
            self._timer.completed()
        except Exception:
            self._end_open("error")
            raise
        finally:
            self.abort()

    def _count(self, usage: UsageReply | None) -> None:
        if usage is not None:
            self._usage = usage.tokens()

    def _gained(self, index: int) -> None:
        """A piece of a choice has come."""
        self._num_pieces += 1
        self._timer.token(index)

    @property
    def usage(self) -> Usage:
        """Tokens, as the engine counts them; of an answer that was ended early, as far as we know."""
        return self._usage or Usage(self._num_prompt, self._num_pieces, 0)

    @property
    def has_begun(self) -> bool:
        """The engine has computed something."""
        return bool(self._num_pieces) or self._usage is not None

    def abort(self) -> None:
        """End the request at the engine if it still runs."""
        self._exchange.close()
        self._end_open("abort")

    def _end_open(self, reason: str) -> None:
        for _ in self._open:
            self._timer.choice_ended(reason)
        self._open.clear()
