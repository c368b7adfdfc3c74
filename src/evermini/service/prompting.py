"""What the engine computes for a conversation: all of it, or what a long one is read down to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evermini.engine.request import Embedded, Emphasis
from evermini.errors import ContextLengthError, UnsupportedParameterError
from evermini.service import tracing
from evermini.service.assembly import least_room
from evermini.service.choosing import choose
from evermini.service.offload import tokenise
from evermini.service.reading import OnProgress, Recalled
from evermini.service.rendering import encode
from evermini.service.runtime import Served, ServedModel
from evermini.service.schemas import ChatRequest
from evermini.service.sight import Place, Sight, images_of, place
from evermini.service.sweep.asking import EngineAsker
from evermini.service.sweep.result import Swept
from evermini.service.sweep.run import Sweep
from evermini.service.upstream.forward import images_in
from evermini.service.upstream.model import UpstreamModel
from evermini.service.upstream.prompting import count_with_images

_SURELY_LONG = 8
"""With more characters per token of the window than this, a prompt is not tokenised as a whole to see if it fits."""


@dataclass(frozen=True)
class Prompt:
    """What the engine computes.

    Attributes:
        token_ids: The prompt.
        read: How it was made, if it is not all that was sent.
        embedded: The images in it.
        emphasis: Tokens of it that weigh more.
    """

    token_ids: Sequence[int]
    read: Recalled | Swept | None = None
    embedded: Embedded | None = None
    emphasis: Emphasis | None = None


async def make_prompt(
    served: ServedModel, request: ChatRequest, progress: OnProgress | None
) -> Prompt:
    """Return what the engine computes for a conversation.

    Raises:
        ContextLengthError: What must be read whole does not fit.
        UnsupportedParameterError: It is to be read in a way that this model, or a conversation with images, cannot be.
    """
    window, reader = served.worker.max_model_len, served.reader
    if reader is None and request.reading in ("recall", "sweep"):
        raise UnsupportedParameterError(
            "Recall is switched off for this model. Set x_evermini.reading to 'auto' or 'dense', or switch the setting "
            "'recall' on.",
            param="x_evermini.reading",
        )
    if images_of(request.messages):
        return await _prompt_with_images(served, request)
    if reader is None or request.reading == "dense":
        return Prompt(await whole_prompt(served, request))
    num_characters = sum(len(message.text()) for message in request.messages)
    prompt: Sequence[int] | None = None
    if request.reading == "auto" and num_characters <= _SURELY_LONG * window:
        prompt = await whole_prompt(served, request)
        if len(prompt) + (request.max_output or least_room(window)) <= window:
            return Prompt(prompt)
    counted = None if prompt is None else len(prompt)
    plan = await reader.plan(request, window=window, counted=counted)
    if plan is None:
        return Prompt(await whole_prompt(served, request) if prompt is None else prompt)
    chosen = choose(request.reading, plan, reader.sweep_limit)
    if chosen.is_sweep:
        with tracing.span("evermini.read", {"evermini.reading": "sweep"}):
            sweep = Sweep(EngineAsker(served), reader, request, plan, progress)
            swept = await sweep.run()
        return Prompt(swept.prompt, swept)
    with tracing.span("evermini.read", {"evermini.reading": "recall"}) as span:
        recalled = await reader.read(request, plan, progress)
        if span is not None:
            span.set_attribute("evermini.prompt_tokens", recalled.full_tokens)
            span.set_attribute("evermini.read_tokens", len(recalled.prompt))
            span.set_attribute("gen_ai.usage.cached_tokens", recalled.cached_tokens)
    return Prompt(recalled.prompt, replace(recalled, note=chosen.note), emphasis=recalled.emphasis)


async def _prompt_with_images(served: ServedModel, request: ChatRequest) -> Prompt:
    """Return the conversation with its images embedded; it must fit, for recall finds passages of text only."""
    assert served.sight is not None, "without sight, images are text"
    if request.reading in ("recall", "sweep"):
        raise UnsupportedParameterError(
            "A conversation with images that the model looks at is read whole. Set x_evermini.reading to 'auto' or "
            "'dense', or leave the images out.",
            param="x_evermini.reading",
        )
    token_ids, places = await _placed(served, served.sight, request)
    window, images = served.worker.max_model_len, sum(len(at.image.token_ids) for at in places)
    needed = len(token_ids) + (1 if request.max_output is None else request.max_output)
    if needed > window:  # found out before the images are computed
        raise ContextLengthError(
            f"This model's maximum context length is {window} tokens. However, you requested {needed} tokens "
            f"({images} in the images, {len(token_ids) - images} in the rest of the messages, "
            f"{needed - len(token_ids)} in the completion). A conversation with images is read whole: please reduce "
            "its length, send fewer images, or send them with detail 'low'.",
            param="messages",
        )
    return Prompt(token_ids, None, await served.sight.embed(token_ids, places))


async def _placed(
    served: ServedModel, sight: Sight, request: ChatRequest
) -> tuple[list[int], list[Place]]:
    """Return the conversation as token ids, and where its images are."""
    return place(
        await whole_prompt(served, request), sight.image_token_id, images_of(request.messages)
    )


async def whole_prompt(served: ServedModel, request: ChatRequest) -> Sequence[int]:
    """Return the conversation as token ids, whatever its length; an image is one token."""
    texts = [message.text() for message in request.messages]
    return await tokenise(sum(map(len, texts)), encode, served.template, request, texts)


async def count_tokens(served: Served, request: ChatRequest) -> int:
    """Return how many tokens the model would be sent; of an upstream engine's model, by the index model's tokenizer.

    Raises:
        UnsupportedParameterError: Nothing counts tokens: another engine runs the model, and recall is off.
    """
    if not isinstance(served, UpstreamModel):
        if served.sight is not None:
            return len((await _placed(served, served.sight, request))[0])
        return len(await whole_prompt(served, request))
    if served.reader is None:
        raise UnsupportedParameterError(
            "Tokens are not counted for this model, which another engine runs: that takes the setting 'recall'.",
            param="model",
        )
    if images_in(request.messages):
        return await count_with_images(served, request)
    texts = [message.text() for message in request.messages]
    return await tokenise(sum(map(len, texts)), served.reader.assembler.measure, request, texts)
