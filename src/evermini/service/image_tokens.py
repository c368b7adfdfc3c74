"""What an image costs in tokens, as OpenAI counts it; what the model really reads of it is another matter.

gpt-4.1-mini, gpt-4.1-nano   patches of 32 x 32 pixels, at most 1,536 of a shrunk image, times a factor
gpt-4.1                      85 tokens, and 170 for each tile of 512 x 512 pixels of a shrunk image
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from evermini.service.attachments import Detail, Perceived
from evermini.service.generation import Usage
from evermini.service.offload import tokenise
from evermini.service.schemas import ChatRequest

PATCH = 32
MAX_PATCHES = 1536
TILE = 512
LOW_PIXELS = 512
"""``detail: low`` fits an image into a square with this side."""
_FACTORS = (("nano", 2.46), ("mini", 1.62))
_TILED = "gpt-4.1"
"""Counts tiles, unless it is one of the above; anything else counts as mini does. So do models made from them."""


@dataclass(frozen=True)
class ImageTokens:
    """The images of a prompt in tokens.

    Attributes:
        counted: As OpenAI counts them.
        read: What the model reads in their place.
    """

    counted: int = 0
    read: int = 0

    def apply(self, used: Usage) -> Usage:
        """Return the usage with the images as OpenAI counts them; cached tokens keep their share of the prompt."""
        if not self.counted:
            return used
        prompt_tokens = max(0, used.prompt_tokens - self.read) + self.counted
        cached = used.cached_tokens * prompt_tokens // max(1, used.prompt_tokens)
        return replace(
            used, prompt_tokens=prompt_tokens, cached_tokens=cached, image_tokens=self.counted
        )


async def count_images(
    request: ChatRequest, model: str, count: Callable[[str], int]
) -> ImageTokens:
    """Return the tokens of a request's images, which must have been read; those passed on are the engine's to count.

    Args:
        request: The conversation.
        model: Id of the model that answers.
        count: Counts the tokens of a text.
    """
    seen = [
        part.perceived
        for message in request.messages
        for part in message.content or ()
        if part.perceived is not None
        and part.perceived.size is not None
        and part.perceived.passed_on is None
    ]
    if not seen:
        return ImageTokens()
    texts = [perceived.text for perceived in seen if perceived.seen is None]
    read = await tokenise(sum(map(len, texts)), lambda: sum(map(count, texts)))
    read += sum(len(perceived.seen.token_ids) for perceived in seen if perceived.seen is not None)
    return ImageTokens(sum(_cost(perceived, model) for perceived in seen), read)


def _cost(perceived: Perceived, model: str) -> int:
    assert perceived.size is not None, "an image has a size"
    return image_cost(*perceived.size, perceived.detail, model)


def image_cost(width: int, height: int, detail: Detail, model: str) -> int:
    """Return an image's tokens.

    Args:
        width: In pixels.
        height: In pixels.
        detail: How closely it is looked at.
        model: Id of the model.
    """
    factor = next((factor for name, factor in _FACTORS if name in model), None)
    if factor is None and _TILED in model:
        return 85 if detail == "low" else 85 + 170 * _num_tiles(width, height)
    if detail == "low":
        shrink = min(1.0, LOW_PIXELS / max(width, height))
        width, height = max(1, round(width * shrink)), max(1, round(height * shrink))
    return math.ceil(round(_num_patches(width, height) * (factor or 1.62), 6))


def _num_patches(width: int, height: int) -> int:
    patches = math.ceil(width / PATCH) * math.ceil(height / PATCH)
    if patches <= MAX_PATCHES:
        return patches
    # Shrunk to the area of that many patches, then so that one side is whole patches.
    shrink = math.sqrt(PATCH * PATCH * MAX_PATCHES / (width * height))
    columns, rows = width * shrink / PATCH, height * shrink / PATCH
    shrink = min(math.floor(columns) / columns or 1.0, math.floor(rows) / rows or 1.0)
    found = math.ceil(round(columns * shrink, 6)) * math.ceil(round(rows * shrink, 6))
    return min(found, MAX_PATCHES)


def _num_tiles(width: int, height: int) -> int:
    fit = min(1.0, 2048 / max(width, height))
    fit = min(fit, 768 / min(width, height))
    columns, rows = (math.ceil(round(side * fit, 6) / TILE) for side in (width, height))
    return columns * rows
