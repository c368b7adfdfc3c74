"""Images of training examples: within OpenAI's limits, opened once, and for a training embedded once and kept on disk.

    reader = ImageReader(checkpoint, tokenizer)
    row = reader.read(row)      # its images have their tokens; or what is wrong with them

The vision tower is frozen, so what it makes of an image is the same in every epoch and after every interruption. It is
computed while the file is read, before the language model is loaded: the two are never in memory together.

FOLDER/KEY.safetensors    `values` (tokens, hidden_size), with the tokens that stand in the prompt as metadata
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evermini.errors import ConfigError, EngineStoppedError, InvalidRequestError
from evermini.models.checkpoint import Checkpoint
from evermini.service.attachments import ImageSource, Perceived
from evermini.service.documents import Fetch, decode_data
from evermini.service.fetch import Fetcher
from evermini.service.messages import Message
from evermini.service.sight import Seen, image_ids, prepare
from evermini.text.chat import IMAGE_MARK
from evermini.text.tokenizer import Tokenizer
from evermini.tuning.rows import Row, RowError, SupervisedRow
from evermini.vision.images import Picture, open_image
from evermini.vision.tower import TowerInput, VisionTower, load_tower

MAX_IMAGE_BYTES = 10 << 20
MAX_EXAMPLES = 50_000
"""Examples with images in a file."""
FORMATS = ("JPEG", "PNG", "WEBP")
MODES = ("RGB", "RGBA")
_KEPT = 4096
"""Images whose tokens are remembered while a file is read: the same ones are often in many examples."""


class ImageStore:
    """Embeddings in a folder, a file for each image, written whole or not at all.

    Args:
        folder: Where; made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: bytes) -> Seen | None:
        """Return an image that was embedded before, without its values."""
        path = self._path(key.hex())
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            known = json.loads(file.metadata()["image"])
        grid = known["grid"] and tuple(known["grid"])
        return Seen(key, b"", False, tuple(known["size"]), tuple(known["token_ids"]), grid, None)

    def keep(self, seen: Seen, values: Tensor) -> None:
        """Write an image's embeddings.

        Raises:
            ConfigError: There is no room for them.
        """
        known = {"size": seen.size, "token_ids": seen.token_ids, "grid": seen.grid}
        path = self._path(seen.key.hex())
        part = path.with_suffix(".part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({"values": values.contiguous()}, part, {"image": json.dumps(known)})
            part.replace(path)
        except OSError as error:
            raise ConfigError(
                f"The embeddings of the training file's images cannot be written to {self._folder}: {error}. Make room "
                "there, or send images with detail 'low'."
            ) from error

    def values(self, key: str) -> Tensor:
        """Return an image's embeddings, (tokens, hidden_size), by its key in hex."""
        with safe_open(self._path(key), framework="pt") as file:
            values: Tensor = file.get_tensor("values")
        return values

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


class ImageReader:
    """Looks at the images of examples for one vision-language model.

    Args:
        checkpoint: The model's weights; its tower is loaded when the first image comes.
        tokenizer: Its tokenizer.
        allow_remote: Images are fetched from the addresses that examples name, within the bounds of `Fetcher`.
        device: Where the tower computes...
        precision: ...and how precisely, as for `evermini.vision.tower.load_tower`.
        home: Folder of all caches, where its packed weights are kept.
        store: Where embeddings are kept; ``None``: images are opened and counted only.
        is_told_to_stop: Asked before each piece of the tower's work.
        progress: Told, before an image is embedded, how many were before it.
        fetch: Gets what is at an address; default `Fetcher`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        allow_remote: bool = False,
        device: torch.device | str = "cpu",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        home: Path | None = None,
        store: ImageStore | None = None,
        is_told_to_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda done: None,
        fetch: Fetch | None = None,
    ) -> None:
        self.sees = checkpoint.vision is not None
        self.image_token_id = -1 if checkpoint.vision is None else checkpoint.vision.image_token_id
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._fetch = fetch or (Fetcher() if allow_remote else None)
        self._device = torch.device(device)
        self._precision = precision
        self._home = home
        self._store = store
        self._is_told_to_stop = is_told_to_stop
        self._progress = progress
        self._num_embedded = 0
        self._num_opened_tokens = 0
        self._sample: tuple[TowerInput, int] | None = None
        self._tower: VisionTower | None = None
        self._known: OrderedDict[bytes, Seen] = OrderedDict()

    def read(self, row: Row) -> Row | list[RowError]:
        """Return a row with what the model is shown of its images, or what is wrong with them.

        Raises:
            ConfigError: A package that this takes is not installed, or the embeddings cannot be written.
            DamagedCheckpointError: The vision tower cannot be loaded.
            EngineStoppedError: It was told to stop.
        """
        prefix = "messages" if isinstance(row, SupervisedRow) else "input.messages"
        problems: list[RowError] = []
        messages = [
            self._message(message, row.line, f"{prefix}[{number}]", problems)
            for number, message in enumerate(row.messages)
        ]
        return problems or replace(row, messages=tuple(messages))

    def seconds(self) -> float:
        """Return about how long the images that were opened take to embed: by the smallest, which is embedded now."""
        if self._sample is None or self._tower is None:
            return 0.0
        image, num_tokens = self._sample
        began = time.perf_counter()
        self._tower.encode(image, self._is_told_to_stop)
        return (time.perf_counter() - began) / num_tokens * self._num_opened_tokens

    def _message(self, message: Message, line: int, path: str, problems: list[RowError]) -> Message:
        if not message.attached_parts():
            return message
        parts = list(message.content or ())
        for number in message.attached_parts():
            source = parts[number].image_url
            assert source is not None, "other attachments are refused before"
            try:
                parts[number] = parts[number].with_perceived(self._look(source))
            except InvalidRequestError as error:
                where = f"{path}.content[{number}].image_url.url"
                problems.append(RowError(line, where, error.message))
        return message.model_copy(update={"content": parts})

    def _look(self, source: ImageSource) -> Perceived:
        detail, url = source.detail or "auto", source.url
        assert url is not None, "checked before"
        is_low = detail == "low"
        is_data = url[:5].lower() == "data:"
        data = decode_data(url, MAX_IMAGE_BYTES) if is_data else b""
        # An address stands for what is there when the job begins: once embedded, it is not asked again.
        content = data if is_data else url.encode()
        head = f"{self._checkpoint.fingerprint} {is_low:d} {is_data:d}\0".encode()
        key = hashlib.sha256(head + content).digest()
        if (seen := self._known.get(key)) is None:
            seen = self._store.find(key) if self._store is not None else None
        if seen is None:
            seen = self._open(key, data or self._fetched(url), is_low)
        self._known[key] = seen
        self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return Perceived(IMAGE_MARK, seen.size, detail, seen)

    def _open(self, key: bytes, data: bytes, is_low: bool) -> Seen:
        picture = open_image(data)
        _check(picture)
        if self._tower is None:
            self._tower = load_tower(
                self._checkpoint, device=self._device, precision=self._precision, home=self._home
            )
            assert self._tower is not None, "the model sees"
        image = prepare(self._tower, picture, is_low=is_low)
        token_ids = image_ids(self._tokenizer, image)
        seen = Seen(key, b"", is_low, picture.size, token_ids, image.grid, None)
        self._num_opened_tokens += len(token_ids)
        if self._sample is None or len(token_ids) < self._sample[1]:
            self._sample = image, len(token_ids)
        if self._store is not None and _is_mine(key):
            if self._is_told_to_stop():
                raise EngineStoppedError("The training was told to stop.")
            self._progress(self._num_embedded)
            values = self._tower.encode(image, self._is_told_to_stop)
            self._num_embedded += 1
            # A GPU's are of bf16, if nobody wants them otherwise: nothing is lost, and half of the room is saved.
            is_bf16 = self._device.type != "cpu" and self._precision != "fp32"
            self._store.keep(seen, values.bfloat16() if is_bf16 else values)
        return seen

    def _fetched(self, url: str) -> bytes:
        if self._fetch is None:
            raise InvalidRequestError(
                "This server does not fetch images from other servers. Put the bytes in as a data URL, or have it "
                "started with --allow-remote-images."
            )
        fetch = self._fetch

        async def get() -> bytes:
            return await fetch(url, MAX_IMAGE_BYTES)

        return asyncio.run(get())


def _check(picture: Picture) -> None:
    """Check that a training file may hold an image of this kind.

    Raises:
        InvalidRequestError: It may not.
    """
    if picture.format not in FORMATS:
        raise InvalidRequestError(
            f"Training images are JPEG, PNG or WEBP, and this one is {picture.format}. Convert it."
        )
    if picture.mode not in MODES:
        raise InvalidRequestError(
            f"Training images are RGB or RGBA, and this one's mode is {picture.mode}. Convert it to RGB."
        )


def _is_mine(key: bytes) -> bool:
    """Return whether this process embeds an image: of several that train together, one does."""
    world, rank = (
        int(os.environ.get(name, at)) for name, at in (("WORLD_SIZE", "1"), ("RANK", "0"))
    )
    return int.from_bytes(key[:8]) % world == rank
