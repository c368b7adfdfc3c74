"""What an upstream engine is sent of a conversation: all of it, or, of a long one, what the question needs.

Tokens are counted with the tokenizer of the index model, which is not the engine's. So a prompt that seems to fit is
sent whole, and read in excerpts if the engine refuses it; and excerpts keep a distance from the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.backends.discover import Found
from evermini.errors import UnsupportedParameterError
from evermini.service.assembly import Plan, least_room
from evermini.service.choosing import choose
from evermini.service.metrics import RequestTimer
from evermini.service.offload import tokenise
from evermini.service.reading import LongReader, OnProgress, Recalled
from evermini.service.schemas import ChatRequest
from evermini.service.sweep.result import Swept
from evermini.service.sweep.run import Sweep
from evermini.service.upstream.asking import UpstreamAsker
from evermini.service.upstream.forward import count_passed_on, images_in
from evermini.service.upstream.model import CHARACTERS_PER_TOKEN, UpstreamModel
from evermini.text.chat import IMAGE_MARK

_SURELY_LONG = 8
"""With more characters per token of the window than this, a prompt is not tokenised as a whole to see if it fits."""
_SHARE = 0.8
"""Share of the window that excerpts, instructions and answer may fill by our count."""


@dataclass(frozen=True)
class Prompt:
    """What is sent.

    Attributes:
        texts: Each message's text.
        num_tokens: Its tokens by our count; a guess without an index model.
        read: How it was made, if it is not all that was sent.
    """

    texts: Sequence[str]
    num_tokens: int
    read: Recalled | Swept | None = None


async def make_prompt(
    served: UpstreamModel,
    request: ChatRequest,
    found: Found,
    timer: RequestTimer,
    progress: OnProgress | None,
) -> Prompt:
    """Return what the engine is sent.

    Args:
        served: The model.
        request: The conversation.
        found: The engine; if its window is not known, everything is sent.
        timer: Told what the engine computed on the way, if it ends in an error.
        progress: Told how the reading of a long text goes.

    A conversation with images is sent whole, and the engine refuses what does not fit.

    Raises:
        ContextLengthError: The prompt is too long, or what must stay whole is.
        UnsupportedParameterError: Recall or a sweep is asked for, and recall is off or there are images.
        EverminiError: What `UpstreamAsker.ask` says.
    """
    window = found.window
    _check_reading(served, request, found)
    texts = [message.text() for message in request.messages]
    if images_in(request.messages):
        return Prompt(texts, await count_with_images(served, request))
    num_characters = sum(map(len, texts))
    reader = served.reader
    if reader is None or window is None or request.reading == "dense":
        return Prompt(texts, num_characters // CHARACTERS_PER_TOKEN)
    num_tokens = num_characters // CHARACTERS_PER_TOKEN
    if request.reading == "auto" and num_characters <= _SURELY_LONG * window:
        num_tokens = await tokenise(num_characters, reader.assembler.measure, request, texts)
        if num_tokens + (request.max_output or least_room(window)) <= window:
            return Prompt(texts, num_tokens)
    return await read_down(served, request, window, timer, progress) or Prompt(texts, num_tokens)


def leaves_reading(served: UpstreamModel, found: Found) -> bool:
    """Return whether the engine reads long prompts as we would, and is asked to."""
    return found.is_evermini and served.reader is None


async def count_with_images(served: UpstreamModel, request: ChatRequest) -> int:
    """Return the tokens of a conversation with images: its texts by our count, its images by OpenAI's."""
    texts = [message.text().replace(IMAGE_MARK, "") for message in request.messages]
    num_characters, reader = sum(map(len, texts)), served.reader
    in_images = count_passed_on(request, served.info.id)
    if reader is None:
        return in_images + num_characters // CHARACTERS_PER_TOKEN
    return in_images + await tokenise(num_characters, reader.assembler.measure, request, texts)


async def read_down(
    served: UpstreamModel,
    request: ChatRequest,
    window: int,
    timer: RequestTimer,
    progress: OnProgress | None,
) -> Prompt | None:
    """Return a prompt that fits: with the excerpts that the question needs, or with what a sweep found.

    Args:
        served: The model, which has a reader.
        request: The conversation.
        window: Tokens that the engine takes; a share of them is left free.
        timer: As for `make_prompt`.
        progress: As for `make_prompt`.

    Returns:
        The prompt; ``None`` if there is no long text in it.

    Raises:
        ContextLengthError: The prompt is too long, or what must stay whole is.
        EverminiError: What `UpstreamAsker.ask` says.
    """
    assert served.reader is not None
    reader, usable = served.reader, int(window * _SHARE)
    plan = await reader.plan(request, window=usable)
    if plan is None:
        return None
    chosen = choose(request.reading, plan, reader.sweep_limit)
    if chosen.is_sweep:
        return await _sweep(served, reader, request, plan, usable, timer, progress)
    recalled = replace(await reader.read(request, plan, progress), note=chosen.note)
    return Prompt(recalled.texts, len(recalled.prompt), recalled)


async def _sweep(
    served: UpstreamModel,
    reader: LongReader,
    request: ChatRequest,
    plan: Plan,
    window: int,
    timer: RequestTimer,
    progress: OnProgress | None,
) -> Prompt:
    """Have the engine read all of the long texts, and meter that however it ends."""
    asker = UpstreamAsker(served, (await served.found()).model, window)
    try:
        swept = await Sweep(asker, reader, request, plan, progress).run()
    except BaseException:
        if asker.tokens_read:
            timer.used(asker.usage)
        raise
    swept = replace(swept, spent=asker.usage)
    return Prompt(swept.texts, len(swept.prompt), swept)


def _check_reading(served: UpstreamModel, request: ChatRequest, found: Found) -> None:
    if request.reading in ("recall", "sweep") and images_in(request.messages):
        raise UnsupportedParameterError(
            "A conversation with images that the model looks at is read whole. Set x_evermini.reading to 'auto' or "
            "'dense', or leave the images out.",
            param="x_evermini.reading",
        )
    if leaves_reading(served, found):
        return
    if request.reading in ("recall", "sweep") and (served.reader is None or found.window is None):
        missing = "Recall is not used" if served.reader is None else "The window is not known"
        raise UnsupportedParameterError(
            f"{missing} for this model. Set x_evermini.reading to 'auto' or 'dense', or have the operator switch the "
            "setting 'recall' on and say what the engine's window is (?window=TOKENS).",
            param="x_evermini.reading",
        )
