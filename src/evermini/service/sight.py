"""Images as a vision-language model reads them: embeddings in the place of tokens, kept by the image's hash.

    seen = await sight.look(data, "auto")             # opened, resized, cut; nothing is computed yet
    ids, places = place(ids, sight.image_token_id, [seen])    # the prompt with all tokens that each image takes
    embedded = await sight.embed(ids, places)         # what the engine reads at these tokens

Two threads do it. One opens images, so what cannot be read is refused and what is known is found while another image
is computed. The other computes them, one after the other, so equal images that come at once are computed once; it steps
back behind the engine, and what nobody waits for any more ends after the piece in work. Embeddings are kept in memory,
the least recently used go first. The engine's prefix cache knows an image by the same hash, so a conversation that goes
on finds it computed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import ParamSpec, TypeVar

import numpy as np
from torch import Tensor

from evermini.engine.request import Embedded, EmbeddedRun
from evermini.errors import (
    ContextLengthError,
    DamagedCheckpointError,
    EngineError,
    EngineStoppedError,
    InvalidRequestError,
)
from evermini.service import tracing
from evermini.service.attachments import Detail, Perceived
from evermini.service.image_tokens import LOW_PIXELS, MAX_PATCHES, PATCH
from evermini.service.messages import Message
from evermini.service.offload import step_back
from evermini.text.chat import IMAGE_MARK
from evermini.text.tokenizer import Tokenizer
from evermini.vision.images import Picture, open_image, shrunk
from evermini.vision.tower import TowerInput, VisionTower

P = ParamSpec("P")
T = TypeVar("T")

KEPT_BYTES = 256 << 20
"""Embeddings, and images that wait to be embedded, in memory: 64 images of 1,000 tokens for a width of 1,024."""
MAX_PIXELS = MAX_PATCHES * PATCH * PATCH
"""A larger image is shrunk to so many, as OpenAI's models see it; then the checkpoint's preprocessor has its way."""


@dataclass(eq=False)
class Seen:
    """An image that a model can be shown.

    Attributes:
        key: Hash of the image file and of how it is looked at.
        data: The file, until it was computed.
        is_low: It is looked at in 512 pixels.
        size: Width and height in pixels, upright, as it was sent.
        token_ids: What stands in the prompt in its place.
        grid: Rows and columns of its tokens' positions, for models whose positions have three axes.
        waiting: What the tower takes, if it is at hand.
        values: (tokens, hidden_size) float32, once it was computed.
    """

    key: bytes
    data: bytes
    is_low: bool
    size: tuple[int, int]
    token_ids: tuple[int, ...]
    grid: tuple[int, int] | None
    waiting: TowerInput | None
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        waiting = 0 if self.waiting is None else self.waiting.num_bytes
        values = 0 if self.values is None else self.values.nbytes
        return len(self.data) + waiting + values


@dataclass(frozen=True)
class Place:
    """Where an image's tokens begin in a prompt."""

    start: int
    image: Seen


class Sight:
    """Looks at images for one vision-language model.

    Args:
        tower: The model's vision tower.
        tokenizer: The model's tokenizer.
        window: Tokens that the engine takes.
        max_bytes: Memory of what is kept.

    Raises:
        DamagedCheckpointError: The tokenizer and the tower do not fit together.
    """

    def __init__(
        self,
        tower: VisionTower,
        tokenizer: Tokenizer,
        *,
        window: int,
        max_bytes: int = KEPT_BYTES,
    ) -> None:
        if tower.image_token_id not in tokenizer.special_ids:
            raise DamagedCheckpointError(
                f"The checkpoint's image token {tower.image_token_id} is none of its tokenizer's special tokens. "
                "Fetch config.json and tokenizer.json again."
            )
        self._window = window
        self.image_token_id = tower.image_token_id
        self._tower = tower
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._known: OrderedDict[bytes, Seen] = OrderedDict()
        self._lock = threading.Lock()  # of what is known
        self._looking = ThreadPoolExecutor(1, "evermini-look")
        self._computing = ThreadPoolExecutor(1, "evermini-sight", initializer=step_back)
        self._is_closed = False

    async def look(self, data: bytes, detail: Detail) -> Seen:
        """Open an image and find out what it takes in a prompt.

        Args:
            data: The file: PNG, JPEG, WebP or GIF.
            detail: ``low`` looks at it in 512 pixels; everything else as closely as the model can.

        Raises:
            InvalidRequestError: It is no image that is taken, damaged, or of a shape that the model cannot look at.
            EngineStoppedError: This was closed.
        """
        return await self._in(self._looking, self._look, data, detail)

    async def perceive(self, data: bytes, detail: Detail) -> Perceived:
        """Return what stands for an image in a message; see `look`."""
        seen = await self.look(data, detail)
        return Perceived(IMAGE_MARK, seen.size, detail, seen)

    def check(self, images: Sequence[Perceived]) -> None:
        """Check that images alone do not exceed the window, before more of them are opened.

        Raises:
            ContextLengthError: They do.
        """
        seen = [image.seen for image in images if image.seen is not None]
        num_tokens = sum(len(image.token_ids) for image in seen)
        if num_tokens >= self._window:
            last = seen[-1]
            which = "first image" if len(seen) == 1 else f"first {len(seen)} images"
            raise ContextLengthError(
                f"This model's maximum context length is {self._window} tokens. However, the {which} of the messages "
                f"take {num_tokens} (the last of them, of {last.size[0]} x {last.size[1]} pixels, takes "
                f"{len(last.token_ids)}). Please send fewer or smaller images, or send them with detail 'low'.",
                param="messages",
            )

    async def embed(self, token_ids: Sequence[int], places: Sequence[Place]) -> Embedded:
        """Return what the engine reads where a prompt has images.

        Args:
            token_ids: The prompt, as `place` returns it.
            places: Its images, in order.

        Raises:
            EngineError: The vision tower failed.
            EngineStoppedError: This was closed.
        """
        with tracing.span("evermini.see", {"evermini.images": len(places)}):
            left = threading.Event()
            try:
                values = [await self._embedding(at.image, left) for at in places]
            finally:
                left.set()
        runs = [
            run
            for at, rows in zip(places, values, strict=True)
            for run in _runs(at, rows, self.image_token_id)
        ]
        grids = _grids(places)
        return Embedded(tuple(runs), axes_of(len(token_ids), grids) if grids else None)

    def close(self) -> None:
        """End what runs after the piece in work; nothing is accepted any more."""
        self._is_closed = True
        for pool in (self._looking, self._computing):
            pool.shutdown(cancel_futures=True)

    def _look(self, data: bytes, detail: Detail) -> Seen:
        is_low = detail == "low"
        key = hashlib.sha256(b"low" * is_low + b"\0" + data).digest()
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        size, waiting = self._prepare(data, is_low)
        token_ids = image_ids(self._tokenizer, waiting)
        seen = Seen(key, data, is_low, size, token_ids, waiting.grid, waiting)
        with self._lock:
            self._known[key] = seen
            self._trim()
        return seen

    def _prepare(self, data: bytes, is_low: bool) -> tuple[tuple[int, int], TowerInput]:
        """Return an image's size, and the image as the tower takes it."""
        picture = open_image(data)
        return picture.size, prepare(self._tower, picture, is_low=is_low)

    async def _embedding(self, seen: Seen, left: threading.Event) -> Tensor:
        """Return an image's embeddings, without waiting for others if they are known."""
        if seen.values is not None:
            return seen.values
        return await self._in(self._computing, self._values, seen, left)

    def _values(self, seen: Seen, left: threading.Event) -> Tensor:
        """Return an image's embeddings, computed at most once; ends when whoever waits has ``left``."""
        if seen.values is None:
            waiting = seen.waiting or self._prepare(seen.data, seen.is_low)[1]
            try:
                seen.values = self._tower.encode(waiting, lambda: left.is_set() or self._is_closed)
            except RuntimeError as error:
                raise EngineError(
                    f"The model failed while looking at an image ({error}). The server goes on; send the request "
                    "again, or a smaller image if memory ran out."
                ) from error
            with self._lock:
                seen.waiting, seen.data = None, b""
                self._trim()
        return seen.values

    def _trim(self) -> None:
        """Forget the oldest (under the lock); a request that still has one of them prepares it anew at its turn."""
        size = sum(seen.num_bytes for seen in self._known.values())
        while size > self._max_bytes:
            _, oldest = self._known.popitem(last=False)
            size -= oldest.num_bytes
            oldest.waiting = None

    async def _in(
        self, pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._is_closed:
            raise EngineStoppedError("The server is shutting down. Try another server, or later.")
        call = partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(pool, call)


def prepare(tower: VisionTower, picture: Picture, *, is_low: bool) -> TowerInput:
    """Return an image as a tower takes it; ``is_low``: looked at in 512 pixels.

    Raises:
        InvalidRequestError: It is of a shape that the model cannot look at.
    """
    longest = longest_side(picture.size, is_low=is_low)
    return tower.prepare(shrunk(picture.image, longest), is_low=is_low)


def longest_side(size: tuple[int, int], *, is_low: bool) -> int:
    """Return what an image's longer side is shrunk to, as OpenAI's models see it."""
    width, height = size
    if is_low:
        return LOW_PIXELS
    fit = min(1.0, math.sqrt(MAX_PIXELS / (width * height)))
    return max(1, math.floor(max(width, height) * fit))


def image_ids(tokenizer: Tokenizer, image: TowerInput) -> tuple[int, ...]:
    """Return what stands in a prompt in an image's place, as token ids."""
    split = tokenizer.split_special
    parts = (p for s in image.segments for p in ([s] if isinstance(s, int) else split(s)))
    return tuple(tokenizer.encode_segments(("", *parts)))


def images_of(messages: Iterable[Message]) -> list[Seen]:
    """Return the images that a model looks at, in order."""
    return [
        part.perceived.seen
        for message in messages
        for part in message.content or ()
        if part.perceived is not None and part.perceived.seen is not None
    ]


def place(
    token_ids: Sequence[int], image_token_id: int, images: Sequence[Seen]
) -> tuple[list[int], list[Place]]:
    """Return a prompt with all tokens that its images take, and where each begins.

    Args:
        token_ids: The prompt as the chat template writes it, with one token for each image.
        image_token_id: That token.
        images: In their order.

    Raises:
        InvalidRequestError: The template wrote another number of images.
    """
    at = [index for index, token_id in enumerate(token_ids) if token_id == image_token_id]
    if len(at) != len(images):
        raise InvalidRequestError(
            f"This model's chat template shows {len(at)} of the conversation's {len(images)} images. "
            "Put images into messages of the user.",
            param="messages",
        )
    ids: list[int] = []
    places: list[Place] = []
    done = 0
    for index, image in zip(at, images, strict=True):
        ids += token_ids[done:index]
        places.append(Place(len(ids), image))
        ids += image.token_ids
        done = index + 1
    return [*ids, *token_ids[done:]], places


def _runs(at: Place, values: Tensor, image_token_id: int) -> list[EmbeddedRun]:
    """Return an image's rows as runs of neighbouring tokens: one, or one for each tile."""
    is_row = np.array([0, *(i == image_token_id for i in at.image.token_ids), 0], dtype=np.int8)
    edges = np.flatnonzero(
        np.diff(is_row)
    ).tolist()  # a run's start, its end, the next one's start, ...
    runs: list[EmbeddedRun] = []
    used = 0
    for number, start, end in zip(count(), edges[::2], edges[1::2], strict=False):
        key = hashlib.sha256(at.image.key + number.to_bytes(4)).digest()
        runs.append(EmbeddedRun(at.start + start, values[used : used + end - start], key))
        used += end - start
    assert used == len(values), f"{len(values)} rows for {used} tokens of an image"
    return runs


def _grids(places: Sequence[Place]) -> list[tuple[int, tuple[int, int]]]:
    """Return where each image begins, with its grid."""
    found = [(at.start, at.image.grid) for at in places]
    return [(start, grid) for start, grid in found if grid is not None]


def axes_of(num_tokens: int, grids: Iterable[tuple[int, tuple[int, int]]]) -> np.ndarray:
    """Return the positions of a prompt on three axes (M-RoPE): time, height and width; (3, num_tokens) int64.

    A text's tokens have the same position on all three. An image's have one in time, and their row and column in its
    grid, counted from the position of its first token; what follows goes on after the largest.

    Args:
        num_tokens: Of the prompt.
        grids: Where each image's tokens begin, and their rows and columns, in order.
    """
    axes = np.empty((3, num_tokens), np.int64)
    token = position = 0
    for start, (rows, columns) in grids:
        text = start - token
        axes[:, token:start] = np.arange(position, position + text)
        position += text
        end = start + rows * columns
        axes[0, start:end] = position
        axes[1, start:end] = position + np.repeat(np.arange(rows), columns)
        axes[2, start:end] = position + np.tile(np.arange(columns), rows)
        token, position = end, position + max(rows, columns)
    axes[:, token:] = np.arange(position, position + num_tokens - token)
    return axes
