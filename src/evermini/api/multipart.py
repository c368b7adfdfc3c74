"""Forms with a file, parsed while they come in: the file's bytes go on at once and are never whole in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from evermini.api.services import services
from evermini.errors import InvalidRequestError, PermissionDeniedError, UnsupportedMediaTypeError

WRITE_BYTES = 1 << 20
"""Bytes of a file that are collected before they go on."""
MAX_FIELD_BYTES = 64 * 1024
"""What fields other than the file may have together, headers included."""

MAX_BOUNDARY = 70
"""Longest boundary that RFC 2046 allows."""
MAX_PARTS = 64
"""Fields and files of a form."""

Sink = Callable[[bytes], Awaitable[None]]
"""Takes the next bytes of the file."""


@dataclass
class Form:
    """A form that has been read.

    Attributes:
        fields: The values of the fields that are no files.
        filename: The file's name as sent; ``None``: there was no file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(request: Request, file_field: str, sink: Sink) -> Form:
    """Read the request's form.

    Args:
        request: The HTTP request.
        file_field: The field that holds the file.
        sink: Gets the file's bytes in order.

    Raises:
        UnsupportedMediaTypeError: The body is no form.
        PermissionDeniedError: A page of a foreign origin sends it.
        InvalidRequestError: It is malformed, or has no such file or more than one.
    """
    declared = request.headers.get("content-type", "")
    kind, options = parse_options_header(declared)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= MAX_BOUNDARY:
        raise UnsupportedMediaTypeError(
            f"Unsupported content type: '{declared[:100]}'. This endpoint only accepts 'multipart/form-data' requests "
            f"with a boundary of 1 to {MAX_BOUNDARY} characters.",
            code="unsupported_content_type",
        )
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaTypeError(
            "This endpoint takes forms without content encoding. Send the form as it is.",
            code="unsupported_content_type",
        )
    _refuse_foreign_pages(request)
    reader = _FormReader(boundary, file_field)
    async for data in _chunks(request):
        reader.feed(data)
        if len(reader.pending) >= WRITE_BYTES:
            await sink(reader.take())
    reader.end()
    if reader.pending:
        await sink(reader.take())
    if reader.form.filename is None:
        raise InvalidRequestError(
            f"Missing required parameter: '{file_field}'.",
            param=file_field,
            code="missing_required_parameter",
        )
    return reader.form


def _refuse_foreign_pages(request: Request) -> None:
    """A web page may send forms anywhere without asking first, unless it adds a header such as Authorization."""
    origin = request.headers.get("origin")
    allowed = services(request).settings.cors_origins
    if (
        origin
        and "authorization" not in request.headers
        and origin not in allowed
        and "*" not in allowed
    ):
        raise PermissionDeniedError(
            f"Pages of {origin[:200]} may not send files to this server. Its operator can allow them (cors_origins)."
        )


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for data in request.stream():
        if data:
            yield data


class _FormReader:
    """Sorts the bytes of a form into fields and the file."""

    def __init__(self, boundary: bytes, file_field: str) -> None:
        self.form = Form()
        self.pending = bytearray()
        self._file_field = file_field
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._is_file = False
        self._is_complete = False
        self._num_small = 0
        self._num_parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def end(self) -> None:
        """There are no more."""
        if not self._is_complete:
            raise _malformed("it ends before its last boundary")

    def take(self) -> bytes:
        """Return the file's bytes since the last call."""
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    def _on_part_begin(self) -> None:
        self._headers.clear()
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequestError(
                f"The form has more than {MAX_PARTS} fields. Send only those of this endpoint."
            )

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        self._is_file = filename is not None
        self._value.clear()
        if filename is None:
            return
        if self._name != self._file_field or self.form.filename is not None:
            raise InvalidRequestError(
                f"Unexpected file in the field '{self._name[:100]}'. Send one file, in the field "
                f"'{self._file_field}'.",
                param=self._name[:100],
            )
        self.form.filename = filename.decode("utf-8", "replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending += data[start:end]
        else:
            self._count(end - start)
            self._value += data[start:end]

    def _on_part_end(self) -> None:
        if not self._is_file:
            self.form.fields[self._name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._is_complete = True

    def _count(self, num_bytes: int) -> None:
        self._num_small += num_bytes
        if self._num_small > MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"The fields beside the file are longer than {MAX_FIELD_BYTES} bytes together. Shorten them."
            )


def _malformed(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"We could not parse the form in the body of your request: {reason}. (HINT: This likely means you aren't using "
        "your HTTP library correctly.)"
    )
