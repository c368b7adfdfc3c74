"""Images and files of requests to text that any model reads; images stay images for a model that can see.

    documents = Documents.open(settings, files)
    request = await documents.read(request, served.eyes)    # every image and file part has its text, or is seen
    document = await documents.document_of(stored)  # what a file part with this file's id shows the model

A document becomes `evermini.service.parts.wrap_document` of its name and text: a long text of that name, which recall
indexes as one segment, the same wherever it comes from.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import unquote, urlsplit

from evermini import vision
from evermini.config import Settings
from evermini.documents import Document, PageReader, kind_of, read_document
from evermini.errors import (
    EngineStoppedError,
    InvalidRequestError,
    NotFoundError,
    RequestError,
    UnsupportedParameterError,
)
from evermini.service.attachments import Detail, Eyes, FileSource, ImageSource, Perceived
from evermini.service.fetch import Fetcher
from evermini.service.file_requests import base_name
from evermini.service.files import FileService
from evermini.service.messages import ContentPart
from evermini.service.parts import wrap_document
from evermini.service.schemas import ChatRequest
from evermini.storage.files import StoredFile

T = TypeVar("T")

MAX_ATTACHMENTS = 500
"""Images and files in one request (gpt-4.1-mini's published limit on images)."""
MAX_IMAGE_BYTES = 50 << 20
MAX_DOCUMENT_BYTES = 256 << 20
_KEPT_CHARACTERS = 32 << 20
"""Texts of documents that are kept in memory for the next request."""
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)

Fetch = Callable[[str, int], Awaitable[bytes]]
"""(address, most bytes) -> what is there."""


class Perception(Protocol):
    """What sees images: `evermini.vision`. Its methods block."""

    def describe(self, data: bytes, detail: Detail) -> tuple[str, tuple[int, int]]:
        """Return what an image file shows, as text, and its width and height in pixels."""
        ...

    def read_page(self, image: Any, key: str) -> str:
        """Return the text on a page's image; ``key`` says which page it is."""
        ...


class Documents:
    """Reads what requests attach.

    Args:
        files: Where uploaded files are; ``None``: there are none.
        perception: What sees images; ``None``: they are refused.
        fetch: What gets images and files from other servers; ``None``: they are refused.
    """

    def __init__(
        self,
        files: FileService | None = None,
        *,
        perception: Perception | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        self._files, self._perception, self._fetch = files, perception, fetch
        self._pool = ThreadPoolExecutor(2, "evermini-documents")
        self._closed = threading.Event()
        self._known: OrderedDict[str, Document] = OrderedDict()

    @classmethod
    def open(cls, settings: Settings, files: FileService | None) -> Self:
        """Return what reads attachments as the settings have it.

        Args:
            settings: Folders, threads, and whether other servers may be asked.
            files: Where uploaded files are.
        """
        perception = None
        if vision.is_installed():
            perception = vision.Perception(
                settings.home, threads=settings.threads or 0, weights_dir=settings.weights_dir
            )
        fetch = Fetcher() if settings.allow_remote_images else None
        return cls(files, perception=perception, fetch=fetch)

    def close(self) -> None:
        """End what runs after the page in work."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    async def read(
        self, request: ChatRequest, find_eyes: Callable[[], Awaitable[Eyes | None]]
    ) -> ChatRequest:
        """Return the request with the text of every image and file in it.

        Args:
            request: The request.
            find_eyes: Asked, if there is something to read, what looks at images for the model that answers; ``None``:
                nothing, it reads text only.

        Raises:
            InvalidRequestError: One cannot be read; ``param`` is its path.
            UnsupportedParameterError: It is of a kind that this server does not take.
            StorageError: An uploaded file cannot be read.
            EngineStoppedError: This was closed.
            UpstreamError: The engine that runs the model cannot be asked what it takes.
        """
        places = [
            (number, place, part)
            for number, message in enumerate(request.messages)
            for place, part in enumerate(message.content or ())
            if part.attachment is not None and part.perceived is None
        ]
        if not places:
            return request
        if len(places) > MAX_ATTACHMENTS:
            raise InvalidRequestError(
                f"Too many images and files: {len(places)}. One request may have {MAX_ATTACHMENTS}.",
                param="messages",
                code="array_above_max_length",
            )
        parts = [list(message.content or ()) for message in request.messages]
        eyes = await find_eyes()
        looked_at: list[Perceived] = []
        for order, (number, place, part) in enumerate(places, start=1):
            path = f"messages[{number}].content[{place}].{part.type}"
            perceived = await self._perceive(part, path, order, eyes)
            parts[number][place] = part.with_perceived(perceived)
            if eyes is not None and perceived.size is not None:
                looked_at.append(perceived)
                eyes.check(looked_at)
        messages = [
            message.model_copy(update={"content": content}) if content else message
            for message, content in zip(request.messages, parts, strict=True)
        ]
        return request.model_copy(update={"messages": messages})

    async def document_of(self, file: StoredFile) -> Document:
        """Return an uploaded file's text, as a file part shows it.

        Raises:
            InvalidRequestError: It is an image, or nothing that can be read.
            StorageError: It cannot be read.
        """
        return await self._document(await self._stored(file, MAX_DOCUMENT_BYTES), file.filename)

    async def _perceive(
        self, part: ContentPart, path: str, order: int, eyes: Eyes | None
    ) -> Perceived:
        """Return what a part shows; ``order`` is its number among the request's attachments."""
        source = part.attachment
        field = next(
            name
            for name in ("url", "file_data", "file_url", "file_id")
            if getattr(source, name, None)
        )
        try:
            if isinstance(source, ImageSource):
                data, _ = await self._bytes(source.url, source.file_id, MAX_IMAGE_BYTES)
                return await self._image(data, source.detail or "auto", order, eyes)
            assert isinstance(source, FileSource), "of the two kinds"
            data, name = await self._file(source)
            if kind_of(data) == "image":
                return await self._image(data, "auto", order, eyes)
            document = await self._document(data, name or f"file {order}")
            return Perceived(wrap_document(document.name, document.text))
        except RequestError as error:
            if error.param is None:
                error.param = f"{path}.{field}"
            raise

    # Bytes

    async def _file(self, source: FileSource) -> tuple[bytes, str | None]:
        name = None if source.filename is None else base_name(source.filename)
        if source.file_data is not None:
            return await asyncio.to_thread(decode_data, source.file_data, MAX_DOCUMENT_BYTES), name
        data, found = await self._bytes(source.file_url, source.file_id, MAX_DOCUMENT_BYTES)
        return data, name or found

    async def _bytes(
        self, url: str | None, file_id: str | None, limit: int
    ) -> tuple[bytes, str | None]:
        """Return the bytes at an address or of an uploaded file, and their name."""
        if url is None:
            assert file_id is not None, "checked before"
            stored = await self._get(file_id)
            return await self._stored(stored, limit), stored.filename
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(decode_data, url, limit), None
        if urlsplit(url[:20]).scheme not in ("http", "https"):
            raise InvalidRequestError(
                "Expected a data URL (data:image/png;base64,...) or an address that begins with https://.",
                code="invalid_value",
            )
        if self._fetch is None:
            raise UnsupportedParameterError(
                "This server does not fetch from other servers. Send the bytes themselves as a data URL, upload them "
                "(POST /v1/files) and name the file, or have the server started with --allow-remote-images.",
            )
        return await self._fetch(url, limit), base_name(unquote(urlsplit(url).path))

    async def _get(self, file_id: str) -> StoredFile:
        if self._files is not None:
            try:
                return await self._files.get(file_id)
            except NotFoundError:
                pass
        raise InvalidRequestError(
            f"No such File object: {file_id}. Upload it first (POST /v1/files), or send it in the request.",
            code="file_not_found",
        )

    async def _stored(self, file: StoredFile, limit: int) -> bytes:
        if file.num_bytes > limit:
            raise _too_large(file.num_bytes, limit)
        files = self._files
        assert files is not None, "there is a stored file"
        return await asyncio.to_thread(lambda: b"".join(files.read(file)))

    # What they say

    async def _image(self, data: bytes, detail: Detail, order: int, eyes: Eyes | None) -> Perceived:
        if eyes is not None:
            return await eyes.perceive(data, detail)
        perception = self._needed()
        text, size = await self._in_pool(perception.describe, data, detail)
        return Perceived(mark_image(text, order), size, detail)

    async def _document(self, data: bytes, name: str) -> Document:
        digest = hashlib.sha256(data).hexdigest()
        if (known := self._known.get(digest)) is not None:
            self._known.move_to_end(digest)
        else:
            left = threading.Event()
            reading = partial(
                read_document, data, name, read_page=self._pages(digest, left), render_html=True
            )
            try:
                known = await self._in_pool(reading)
            finally:
                left.set()
            self._known[digest] = known
            while sum(len(kept.text) for kept in self._known.values()) > _KEPT_CHARACTERS:
                self._known.popitem(last=False)
        return Document(name, known.text, known.num_pages, known.blank_pages)

    def _pages(self, digest: str, left: threading.Event) -> PageReader | None:
        """Return what reads scanned pages; it ends when whoever waits has ``left``."""
        perception = self._perception
        if perception is None:
            return None

        def read_page(image: Any, number: int) -> str:
            if self._closed.is_set() or left.is_set():
                raise _stopped()
            return perception.read_page(image, f"{digest}-{number}")

        return read_page

    def _needed(self) -> Perception:
        if self._perception is None:
            raise UnsupportedParameterError(
                "This server cannot read images: they need the extra 'vision' (pip install 'evermini[vision]').",
            )
        return self._perception

    async def _in_pool(self, work: Callable[..., T], *args: object) -> T:
        if self._closed.is_set():
            raise _stopped()
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args))


def page_reader(settings: Settings) -> PageReader | None:
    """Return what reads scanned pages; ``None`` without the extra ``vision``."""
    if not vision.is_installed():
        return None
    perception = vision.Perception(settings.home, threads=settings.threads or 0)

    def read_page(image: Any, number: int) -> str:
        return perception.read_page(image, hashlib.sha256(image.tobytes()).hexdigest())

    return read_page


def mark_image(text: str, order: int) -> str:
    """Return what an image shows between marks, the second of which the text itself cannot write."""
    end = f"[end of image {order}]"
    while end in text:
        end = f"[{end}]"
    return f"\n[image {order}]\n{text}\n{end}\n"


def decode_data(text: str, limit: int) -> bytes:
    """Return the bytes of a data URL or of plain base64.

    Args:
        text: What was sent.
        limit: More bytes than this are refused.

    Raises:
        InvalidRequestError: It is neither, or too long.
    """
    start = 0
    if text[:5].lower() == "data:":
        head = _DATA_URL.match(text)
        if head is None:
            raise InvalidRequestError(
                "Invalid data URL: expected data:MIME/TYPE;base64, and the bytes in base64.",
                code="invalid_value",
            )
        start = head.end()
    if (len(text) - start) * 3 // 4 > limit + 2:
        raise _too_large((len(text) - start) * 3 // 4, limit)
    body = re.sub(r"\s+", "", text[start:])
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(
            f"Invalid base64: {error}. Send the file's bytes in base64.", code="invalid_base64"
        ) from error
    if not data:
        raise InvalidRequestError(
            "There are no bytes in it. Send the file's.", code="invalid_value"
        )
    return data


def _too_large(num_bytes: int, limit: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"Too large: {num_bytes:,} bytes, more than {limit:,}. Send a smaller one.",
        code="invalid_value",
    )


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("The server is shutting down. Try another server, or later.")
