"""Images and files in messages: how requests name them, and what has been read of them.

A part of type ``image_url`` or ``file`` says where its bytes are; `evermini.service.documents` reads them. Beyond the
contract, an image may name an uploaded file and a file an URL, as in the Responses API, so that one form serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field

from evermini.errors import InvalidRequestError
from evermini.service.validation import WireModel

if TYPE_CHECKING:
    from evermini.service.sight import Seen

Detail = Literal["auto", "low", "high", "original"]
FileId = Annotated[str, Field(min_length=1, max_length=200)]


class ImageSource(WireModel):
    """Where an image's bytes are: a data URL or address, or an uploaded file.

    Attributes:
        detail: ``low`` looks at it in 512 x 512 pixels; everything else in full.
    """

    url: Annotated[str, Field(min_length=1)] | None = None
    detail: Detail | None = None
    file_id: FileId | None = None

    def check(self, path: str) -> None:
        """Check that there is one source.

        Raises:
            InvalidRequestError: There is none, or there are two.
        """
        check_one_source(path, {"url": self.url, "file_id": self.file_id})


class FileSource(WireModel):
    """Where a file's bytes are: an uploaded file, base64 (a data URL or plain) with a name, or an address."""

    file_id: FileId | None = None
    file_data: Annotated[str, Field(min_length=1)] | None = None
    filename: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    file_url: Annotated[str, Field(min_length=1)] | None = None

    def check(self, path: str) -> None:
        """Check that there is one source.

        Raises:
            InvalidRequestError: There is none, or there are two.
        """
        given = {"file_id": self.file_id, "file_data": self.file_data, "file_url": self.file_url}
        check_one_source(path, given)


@dataclass(frozen=True)
class Perceived:
    """What was read of an image or a file.

    Attributes:
        text: What the model is shown in its place; for an image that it looks at itself, `IMAGE_MARK`.
        size: Of an image, its pixels: width and height, upright. ``None`` for a document.
        detail: As the request has it.
        seen: The image, if the model looks at it itself.
        passed_on: A data URL of the image, if an upstream engine's model does.
    """

    text: str
    size: tuple[int, int] | None = None
    detail: Detail = "auto"
    seen: Seen | None = None
    passed_on: str | None = None


class Eyes(Protocol):
    """What looks at images for a model that takes more of them than their text."""

    async def perceive(self, data: bytes, detail: Detail) -> Perceived:
        """Open an image file, and return what stands for it in a message.

        Raises:
            InvalidRequestError: It is no image that is taken.
            EngineStoppedError: The model is closed.
        """
        ...

    def check(self, images: Sequence[Perceived]) -> None:
        """Check that a request may have so many images, before more of them are opened.

        Raises:
            ContextLengthError: It may not.
        """
        ...


def check_one_source(path: str, sources: dict[str, str | None]) -> None:
    """Check that exactly one of the fields that say where bytes are is given.

    Raises:
        InvalidRequestError: None is, or two are.
    """
    given = [name for name, value in sources.items() if value is not None]
    if not given:
        first = next(iter(sources))
        raise InvalidRequestError(
            f"Missing required parameter: '{path}.{first}'. Give one of: "
            f"{', '.join(repr(name) for name in sources)}.",
            param=f"{path}.{first}",
            code="missing_required_parameter",
        )
    if given[1:]:
        raise InvalidRequestError(
            f"Mutually exclusive parameters: '{path}.{given[0]}' and '{path}.{given[1]}'. Give one of them.",
            param=f"{path}.{given[1]}",
            code="mutually_exclusive_parameters",
        )
