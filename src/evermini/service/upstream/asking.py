"""A sweep's questions to an upstream engine: see `evermini.service.sweep.asking`.

A form is asked for in words, with examples, as from our own engine: models answer best so (docs/log.md). A reply that
is not clear is asked for once more, as a JSON schema; of an engine that refuses the schema, in words again, with the
form said. If that is not clear either, the sweep fails. It never goes on without a part.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from evermini.errors import (
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
    UpstreamError,
    UpstreamUnavailableError,
)
from evermini.service.generation import Usage
from evermini.service.sweep.asking import ATTEMPTS, Messages, Reply
from evermini.service.sweep.forms import Form
from evermini.service.upstream.exchange import Exchange
from evermini.service.upstream.model import CHARACTERS_PER_TOKEN, UpstreamModel
from evermini.service.upstream.replies import ChatReply, UsageReply, read

log = logging.getLogger(__name__)

Json = dict[str, Any]

PATH = "/chat/completions"
BUSY_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between tries if the engine is too busy (429): a sweep is under way, and may itself be what keeps it busy."""
_LEAST_TOKENS = 16
"""Of a reply in free words."""
_BRACES = 32
"""Tokens that a form takes beyond its text when it is written as JSON."""
_SHOWN_CHARS = 200


class UpstreamAsker:
    """Asks an upstream engine: see `evermini.service.sweep.asking.Asker`.

    Args:
        served: The model.
        model: The engine's name for it.
        window: Tokens of prompt and reply that it takes, by our count.
    """

    def __init__(self, served: UpstreamModel, model: str, window: int) -> None:
        self.window = window
        self.tokens_read = self.tokens_cached = self.tokens_written = 0
        self._served = served
        self._model = model
        self._places = asyncio.Semaphore(served.parallel)

    @property
    def usage(self) -> Usage:
        """Tokens of all complete replies and their prompts, as the engine counts them."""
        return Usage(self.tokens_read, self.tokens_written, self.tokens_cached)

    async def ask(self, messages: Messages, *, max_tokens: int, form: Form | None = None) -> Reply:
        """See `Asker`.

        Raises:
            UpstreamError: The engine failed over it, more than once, cannot be reached, or did not keep to the form.
            InvalidRequestError: The engine refuses it.
            OverloadedError: The engine is too busy, for half a minute.
            EngineStoppedError: The model is closed.
        """
        async with self._places:
            if form is None:
                return await self._say(messages, max_tokens)
            reply = _read(form, await self._say(messages, max(max_tokens, _LEAST_TOKENS)))
            return reply or await self._again(messages, max_tokens, form)

    async def _again(self, messages: Messages, max_tokens: int, form: Form) -> Reply:
        """Return the reply to a question that was not answered clearly, asked in another way."""
        kind, said = type(form), None
        if kind not in self._served.plain_forms:
            shown = [_as_json(message, form) for message in messages]
            schema = {"name": kind.__name__.lower(), "strict": True, "schema": form.schema}
            asked = {"response_format": {"type": "json_schema", "json_schema": schema}}
            try:
                said = await self._say(shown, max_tokens * 3 // 2 + _BRACES, **asked)
            except ContextLengthError:
                raise
            except InvalidRequestError as error:
                log.info("%s takes no schema: %s", self._served.spec.name, error.message)
                self._served.plain_forms.add(kind)
        if said is None:
            wanted = [*messages[:-1], _with_rule(messages[-1], form)]
            said = await self._say(wanted, max(max_tokens, _LEAST_TOKENS))
        reply = _read(form, said)
        if reply is None:
            raise _shapeless(said.text)
        return reply

    async def _say(self, messages: Messages, max_tokens: int, **fields: Any) -> Reply:
        body = {
            "model": self._model,
            "messages": list(messages),
            "temperature": 0.0,
            "top_p": 1.0,
            "max_tokens": max_tokens,
            **fields,
        }
        failures, pauses = 0, iter(BUSY_PAUSES)
        while True:
            try:
                return await self._once(body)
            except OverloadedError:
                pause = next(pauses, None)
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            except UpstreamUnavailableError:
                raise
            except UpstreamError:
                failures += 1
                if failures == ATTEMPTS:
                    raise

    async def _once(self, body: Json) -> Reply:
        exchange = Exchange(self._served, PATH, body)
        await exchange.start()
        text, said = "", None
        async for answer in exchange.replies():
            whole = read(ChatReply, answer, self._served.client.url)
            if not whole.choices:
                raise UpstreamError("The engine behind this model answered without a choice.")
            text, said = whole.choices[0].message.content or "", whole.choices[0].finish_reason
            self._count(body, text, whole.usage)
        return Reply(text, said == "length")

    def _count(self, body: Json, text: str, told: UsageReply | None) -> None:
        if told is not None:
            usage = told.tokens()
        else:
            length = sum(len(message["content"]) for message in body["messages"])
            usage = Usage(length // CHARACTERS_PER_TOKEN, len(text) // CHARACTERS_PER_TOKEN, 0)
        self.tokens_read += usage.prompt_tokens
        self.tokens_cached += usage.cached_tokens
        self.tokens_written += usage.completion_tokens


def _read(form: Form, reply: Reply) -> Reply | None:
    text = form.read_cut(reply.text) if reply.is_cut else form.read(reply.text)
    return None if text is None else Reply(text, reply.is_cut)


def _as_json(message: Mapping[str, str], form: Form) -> Mapping[str, str]:
    """Return a message, an example of a reply written as an object."""
    if message["role"] != "assistant":
        return message
    return {**message, "content": json.dumps(form.to_json(message["content"]), ensure_ascii=False)}


def _with_rule(message: Mapping[str, str], form: Form) -> Mapping[str, str]:
    return {**message, "content": f"{message['content']}\n\n{form.rule}."}


def _shapeless(said: str) -> UpstreamError:
    shown = said.strip()[:_SHOWN_CHARS]
    what = f"it wrote {shown!r}" if shown else "it wrote nothing within the limit"
    return UpstreamError(
        f"The engine behind this model did not keep to the form that a sweep needs, twice: {what}. Use an engine that "
        "follows response_format (json_schema), switch off what it thinks before it answers, or set "
        "x_evermini.reading to 'recall'."
    )
