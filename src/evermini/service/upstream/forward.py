"""Images for a model that looks at them behind an upstream engine: checked here, and passed on as data URLs.

What an engine gets is upright, in a format that all of them open, without transparency, and no larger than OpenAI's
models see it: engines differ in what they do about the rest, and heed no `detail`.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from evermini.errors import EngineStoppedError, UnsupportedParameterError
from evermini.service.attachments import Detail, Perceived
from evermini.service.image_tokens import image_cost
from evermini.service.messages import Message
from evermini.service.schemas import ChatRequest
from evermini.service.sight import longest_side
from evermini.text.chat import IMAGE_MARK
from evermini.vision.images import as_png, open_image, shrunk

_AS_IT_IS = {"PNG": "image/png", "JPEG": "image/jpeg"}
_DETAILS = {"original": "high"}
"""What engines do not know of `detail`, in words that they do."""


class Forwarder:
    """Gets images ready to be passed on, in threads of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, "evermini-forward")
        self._is_closed = False

    async def perceive(self, data: bytes, detail: Detail) -> Perceived:
        """Return an image as it is passed on.

        Args:
            data: The file: PNG, JPEG, WebP or GIF.
            detail: ``low`` sends it in 512 pixels.

        Raises:
            InvalidRequestError: It is no image that is taken, or damaged.
            UnsupportedParameterError: The package that opens images is not installed.
            EngineStoppedError: This was closed.
        """
        if self._is_closed:
            raise EngineStoppedError("The server is shutting down. Try another server, or later.")
        if find_spec("PIL") is None:
            raise UnsupportedParameterError(
                "This server cannot read images: they need the extra 'vision' (pip install 'evermini[vision]')."
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _perceived, data, detail)

    def check(self, images: Sequence[Perceived]) -> None:
        """Leave it to the engine how many it takes."""

    def close(self) -> None:
        """Accept nothing any more."""
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


def _perceived(data: bytes, detail: Detail) -> Perceived:
    picture = open_image(data)
    longest = longest_side(picture.size, is_low=detail == "low")
    mime = _AS_IT_IS.get(picture.format)
    is_good = picture.mode in ("RGB", "L") and not picture.is_turned
    if mime is None or not is_good or max(picture.size) > longest:
        data, mime = as_png(shrunk(picture.image, longest)), "image/png"
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return Perceived(IMAGE_MARK, picture.size, detail, passed_on=url)


def images_in(messages: Iterable[Message]) -> list[Perceived]:
    """Return the images that are passed on, in order."""
    return [
        part.perceived
        for message in messages
        for part in message.content or ()
        if part.perceived is not None and part.perceived.passed_on is not None
    ]


def count_passed_on(request: ChatRequest, model: str) -> int:
    """Return the tokens of the images that are passed on, as OpenAI counts them: what an engine counts, it tells."""
    return sum(
        image_cost(*image.size, image.detail, model)
        for image in images_in(request.messages)
        if image.size is not None
    )


def with_images(text: str, images: Sequence[Perceived]) -> list[dict[str, Any]]:
    """Return a message's text as parts, with its images where they stood."""
    parts: list[dict[str, Any]] = []
    pieces = text.split(IMAGE_MARK)
    assert len(pieces) == len(images) + 1, "each image has its mark"
    for number, piece in enumerate(pieces):
        if number:
            image = images[number - 1]
            shown = {"url": image.passed_on}
            if image.detail != "auto":
                shown["detail"] = _DETAILS.get(image.detail, image.detail)
            parts.append({"type": "image_url", "image_url": shown})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
