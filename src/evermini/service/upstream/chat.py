"""Chat completions by an upstream engine: its chunks, or its whole answer, as our deltas."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from evermini.errors import ContextLengthError, UpstreamError
from evermini.service.answer import (
    ChatChoice,
    ChatDelta,
    FinishReason,
    ToolCallDelta,
    finish_reason,
)
from evermini.service.metrics import RequestTimer
from evermini.service.reading import OnProgress, Recalled
from evermini.service.schemas import ChatRequest
from evermini.service.sweep.result import Swept
from evermini.service.upstream.answer import UpstreamWriting
from evermini.service.upstream.checks import FormCheck
from evermini.service.upstream.exchange import Exchange
from evermini.service.upstream.forward import images_in
from evermini.service.upstream.model import UpstreamModel
from evermini.service.upstream.prompting import Prompt, leaves_reading, make_prompt, read_down
from evermini.service.upstream.replies import CallPiece, ChatPart, ChatReply, read
from evermini.service.upstream.requests import chat_body

PATH = "/chat/completions"


class UpstreamAnswer(UpstreamWriting[ChatDelta]):
    """What an upstream engine writes.

    Args:
        served: The model.
        request: What is asked.
        exchange: The request in flight, accepted by the engine.
        check: Looks at finished choices.
        num_prompt: Tokens of the prompt by our own count, for requests that end before the engine has told its own.
        timer: Told of every piece and every end.
    """

    def __init__(
        self,
        served: UpstreamModel,
        request: ChatRequest,
        exchange: Exchange,
        check: FormCheck,
        num_prompt: int,
        timer: RequestTimer,
    ) -> None:
        super().__init__(exchange, timer, request.num_choices, num_prompt)
        self.told: dict[str, Any] | None = None
        self._url = served.client.url
        self._toolset = request.toolset
        self._check = check
        self._choices = [ChatChoice(index) for index in range(request.num_choices)]
        self._calls: list[dict[int, int]] = [{} for _ in self._choices]

    async def _read(self, body: dict[str, Any]) -> AsyncGenerator[ChatDelta, None]:
        reply = read(ChatReply, body, self._url)
        self._count(reply.usage)
        self.told = reply.x_evermini or self.told
        for part in reply.choices:
            delta = await self._delta(part)
            if delta is not None:
                yield delta

    async def _delta(self, part: ChatPart) -> ChatDelta | None:
        message = part.message
        text = (message.content or "") + (message.refusal or "")
        if part.index not in self._open:
            if part.index < len(self._choices) and not (text or message.tool_calls):
                return None  # some engines have a last word about a choice that has ended
            raise UpstreamError(
                f"The engine behind this model wrote to choice {part.index}, which is none or has ended."
            )
        choice = self._choices[part.index]
        calls = tuple(
            piece
            for number, call in enumerate(message.tool_calls or ())
            for piece in self._call(choice.index, number, call)
        )
        tokens = part.logprobs.tokens() if part.logprobs is not None else ()
        if text or calls or tokens:
            self._gained(choice.index)
        elif part.finish_reason is None:
            return None
        delta = ChatDelta(choice.index, text, calls, tokens)
        choice.add(delta)
        if part.finish_reason is None:
            return delta
        return ChatDelta(
            choice.index, text, calls, tokens, await self._end(choice, part.finish_reason)
        )

    def _call(self, choice: int, number: int, call: CallPiece) -> list[ToolCallDelta]:
        """Return what a call gained: its head once, however often the engine repeats it, then its arguments."""
        own, known = call.index if call.index is not None else number, self._calls[choice]
        pieces: list[ToolCallDelta] = []
        if own not in known:
            if call.name is None:
                raise UpstreamError("The engine behind this model began a call without a name.")
            known[own] = len(known)
            call_id = call.id or f"call_{uuid.uuid4().hex[:24]}"
            pieces.append(ToolCallDelta(known[own], call.kind, call_id, call.name))
        if call.arguments:
            pieces.append(ToolCallDelta(known[own], call.kind, arguments=call.arguments))
        return pieces

    async def _end(self, choice: ChatChoice, said: str) -> FinishReason:
        """Return why a choice has ended, and see to it that it is what was asked for."""
        self._open.remove(choice.index)
        if said == "content_filter":
            reason: FinishReason = "content_filter"
        elif said == "length":
            reason = "length"
        else:
            await asyncio.to_thread(self._check.check, choice)
            reason = finish_reason(self._toolset, has_called=bool(choice.tool_calls), reason="stop")
        self._timer.choice_ended("length" if reason == "length" else "stop")
        return reason


async def start(
    served: UpstreamModel, request: ChatRequest, timer: RequestTimer, progress: OnProgress | None
) -> tuple[UpstreamAnswer, Recalled | Swept | None]:
    """Read what does not fit the engine's window, and hand the request to the engine.

    Args:
        served: The model.
        request: What is asked.
        timer: Told of latencies.
        progress: Told, from any thread, how reading a long text goes.

    Raises:
        ContextLengthError: The prompt does not fit, and recall is off or cannot help.
        UnsupportedParameterError: The request needs what only a model of our own can do.
        InvalidRequestError: The engine refuses it.
        UpstreamError: The engine cannot be reached, or fails.
    """
    FormCheck(request)  # a schema that is none is refused before anything is read
    found = await served.found()
    prompt = await make_prompt(served, request, found, timer, progress)

    async def ask(prompt: Prompt) -> UpstreamAnswer:
        body = chat_body(request, prompt.texts, found.model)
        swept = prompt.read if isinstance(prompt.read, Swept) else None
        reads_there = leaves_reading(served, found)
        if reads_there:
            body["x_evermini"] = {
                "reading": request.reading,
                "why": request.wants_why,
                "progress": bool(request.stream) and progress is not None,
            }
        exchange = Exchange(served, PATH, body, progress if reads_there else None)
        try:
            await exchange.start()
        except BaseException:
            if swept is not None and swept.spent is not None:
                timer.used(swept.spent)
            raise
        figures = swept.figures if swept is not None else ()
        check = FormCheck(request, figures)
        return UpstreamAnswer(served, request, exchange, check, prompt.num_tokens, timer)

    try:
        return await ask(prompt), prompt.read
    except ContextLengthError as error:
        served.forget()  # it may have been restarted with another window
        is_whole = prompt.read is None and not images_in(request.messages)
        if not is_whole or served.reader is None or request.reading != "auto":
            raise
        # By our tokens it fitted, by the engine's it does not: so the window is shorter than the prompt.
        shorter = await read_down(served, request, prompt.num_tokens, timer, progress)
        if shorter is None:
            raise error
        return await ask(shorter), shorter.read
