"""What an upstream engine is sent of a conversation: all of it, or, of a long one, what the question needs.

Tokens are counted with the tokenizer of the index model, which is not the engine's. So a prompt that seems to fit is
sent whole, and read in excerpts if the engine refuses it; and excerpts keep a distance from the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.errors import UnsupportedParameterError
from evermini.recall.scope import needs_whole
from evermini.service.assembly import least_room
from evermini.service.offload import tokenise
from evermini.service.reading import LongReader, OnProgress, Recalled
from evermini.service.schemas import ChatRequest
from evermini.service.upstream.model import CHARACTERS_PER_TOKEN, UpstreamModel

_SURELY_LONG = 8
"""With more characters per token of the window than this, a prompt is not tokenised as a whole to see if it fits."""
_SHARE = 0.8
"""Share of the window that excerpts, instructions and answer may fill by our count."""
_NO_SWEEP = (
    "This question seems to be about the whole text, but only excerpts of it were read: another engine runs this "
    "model, and sweeps need one that this server runs itself."
)


@dataclass(frozen=True)
class Prompt:
    """What is sent.

    Attributes:
        texts: Each message's text.
        num_tokens: Its tokens by our count; a guess without an index model.
        recalled: The excerpts it was read in; ``None``: it is whole.
    """

    texts: Sequence[str]
    num_tokens: int
    recalled: Recalled | None = None


async def make_prompt(
    served: UpstreamModel, request: ChatRequest, window: int | None, progress: OnProgress | None
) -> Prompt:
    """Return what the engine is sent.

    Args:
        served: The model.
        request: The conversation.
        window: Tokens the engine takes, the answer's included; ``None``: not known, so everything is sent.
        progress: Told how an ingest goes.

    Raises:
        ContextLengthError: The prompt is too long, or what must stay whole is.
        UnsupportedParameterError: Recall is asked for and off, or a sweep is asked for.
    """
    _check_reading(served, request, window)
    texts = [message.text() for message in request.messages]
    num_characters = sum(map(len, texts))
    reader = served.reader
    if reader is None or window is None or request.reading == "dense":
        return Prompt(texts, num_characters // CHARACTERS_PER_TOKEN)
    num_tokens = num_characters // CHARACTERS_PER_TOKEN
    if request.reading == "auto" and num_characters <= _SURELY_LONG * window:
        num_tokens = await tokenise(num_characters, reader.assembler.measure, request, texts)
        if num_tokens + (request.max_output or least_room(window)) <= window:
            return Prompt(texts, num_tokens)
    return await excerpts(reader, request, window, progress) or Prompt(texts, num_tokens)


async def excerpts(
    reader: LongReader, request: ChatRequest, window: int, progress: OnProgress | None
) -> Prompt | None:
    """Return a prompt with the excerpts that the question needs, or ``None`` if there is no long text in it.

    Args:
        reader: Finds them.
        request: The conversation.
        window: Tokens that the engine takes; a share of them is left free.
        progress: Told how an ingest goes.

    Raises:
        ContextLengthError: The prompt is too long, or what must stay whole is.
    """
    plan = await reader.plan(request, window=int(window * _SHARE))
    if plan is None:
        return None
    recalled = await reader.read(request, plan, progress)
    if request.reading == "auto" and needs_whole(plan.question):
        recalled = replace(recalled, note=_NO_SWEEP)
    return Prompt(recalled.texts, len(recalled.prompt), recalled)


def _check_reading(served: UpstreamModel, request: ChatRequest, window: int | None) -> None:
    if request.reading == "sweep":
        raise UnsupportedParameterError(
            "Sweeps need a model that this server runs itself; another engine runs this one. Set x_evermini.reading to "
            "'auto', 'recall' or 'dense'.",
            param="x_evermini.reading",
        )
    if request.reading == "recall" and (served.reader is None or window is None):
        missing = "Recall is not used" if served.reader is None else "The window is not known"
        raise UnsupportedParameterError(
            f"{missing} for this model. Set x_evermini.reading to 'auto' or 'dense', or have the operator switch the "
            "setting 'recall' on and say what the engine's window is (?window=TOKENS).",
            param="x_evermini.reading",
        )
