"""Text completions by an upstream engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from evermini.errors import UpstreamError
from evermini.service.generation import FinishReason
from evermini.service.metrics import RequestTimer
from evermini.service.schemas import CompletionRequest
from evermini.service.text_answer import TextDelta, TextToken
from evermini.service.upstream.answer import UpstreamWriting
from evermini.service.upstream.exchange import Exchange
from evermini.service.upstream.model import UpstreamModel
from evermini.service.upstream.replies import TextLogprobs, TextPart, TextReply, read
from evermini.service.upstream.requests import completion_body

PATH = "/completions"


class UpstreamCompletion(UpstreamWriting[TextDelta]):
    """What an upstream engine writes.

    Args:
        served: The model.
        request: What is asked.
        exchange: The request in flight, accepted by the engine.
        timer: Told of every piece and every end.
    """

    def __init__(
        self,
        served: UpstreamModel,
        request: CompletionRequest,
        exchange: Exchange,
        timer: RequestTimer,
    ) -> None:
        self._prompts = request.prompt or [""]
        self._per_prompt = request.num_candidates
        super().__init__(exchange, timer, len(self._prompts) * self._per_prompt)
        self._url = served.client.url
        self._echoes = bool(request.echo)
        self._ends: dict[int, int] = {}

    async def _read(self, body: dict[str, Any]) -> AsyncGenerator[TextDelta, None]:
        reply = read(TextReply, body, self._url)
        self._count(reply.usage)
        for part in reply.choices:
            yield self._delta(part)

    def _delta(self, part: TextPart) -> TextDelta:
        if part.index not in self._open:
            raise UpstreamError(
                f"The engine behind this model wrote to choice {part.index}, which is none or has ended."
            )
        if part.text:
            self._gained(part.index)
        start = self._ends.get(part.index, 0)
        self._ends[part.index] = start + len(part.text)
        tokens = _tokens(part.logprobs, start) if part.logprobs is not None else []
        prompt = self._prompts[part.index // self._per_prompt]
        num_echoed = 0
        if self._echoes:
            num_echoed = sum(
                token.logprob is None or (isinstance(prompt, str) and token.offset < len(prompt))
                for token in tokens
            )
        reason: FinishReason | None = None
        if part.finish_reason is not None:
            reason = "length" if part.finish_reason == "length" else "stop"
            self._open.remove(part.index)
            self._timer.choice_ended(reason)
        return TextDelta(part.index, part.text, tokens[:num_echoed], tokens[num_echoed:], reason)


async def start(
    served: UpstreamModel, request: CompletionRequest, timer: RequestTimer
) -> UpstreamCompletion:
    """Hand a request to the engine.

    Raises:
        InvalidRequestError: The engine refuses it.
        UpstreamError: The engine cannot be reached, or fails.
    """
    found = await served.found()
    exchange = Exchange(served, PATH, completion_body(request, found.model))
    await exchange.start()
    return UpstreamCompletion(served, request, exchange, timer)


def _tokens(scores: TextLogprobs, start: int) -> list[TextToken]:
    """Return the tokens of a piece of text that begins at character ``start``."""
    if scores.content is not None:
        texts: Sequence[str] = [token.token for token in scores.content]
        logprobs: Sequence[float | None] = [token.logprob for token in scores.content]
        tops: Sequence[dict[str, float] | None] = [
            {best.token: best.logprob for best in token.top_logprobs or ()}
            for token in scores.content
        ]
    else:
        texts = scores.tokens or []
        logprobs = scores.token_logprobs or [None] * len(texts)
        tops = scores.top_logprobs or [None] * len(texts)
    offsets = scores.text_offset
    if offsets is None:
        offsets = []
        for text in texts:
            offsets.append(start)
            start += len(text)
    if not len(texts) == len(logprobs) == len(tops) == len(offsets):
        raise UpstreamError(
            "The engine behind this model gives tokens and log-probabilities that differ in number."
        )
    return [
        TextToken(text, offset, logprob, top)
        for text, offset, logprob, top in zip(texts, offsets, logprobs, tops, strict=True)
    ]
