"""What requests say about files: their form, and the names and lifetimes that are allowed."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from evermini.errors import InvalidRequestError
from evermini.service import validation
from evermini.service.validation import WireModel

MAX_UPLOAD_BYTES = 8 * 1024**3
"""Longest file that comes in parts."""
MAX_NAME = 1024
"""Longest name of a file, in characters."""
BATCH_SECONDS = 30 * 86_400
"""How long a batch's input lives if nobody says otherwise."""

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
Filename = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class ExpiresAfter(WireModel):
    """When a file expires."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class FileExtensions(WireModel):
    """``x_evermini``: the model to index the file for, before anybody asks about it."""

    ingest: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class FileCreate(WireModel):
    """What is said about a file that comes in one request."""

    purpose: Purpose
    expires_after: ExpiresAfter | None = None
    x_evermini: FileExtensions | None = None

    @property
    def ingest(self) -> str | None:
        """The model to index the file for."""
        return self.x_evermini.ingest if self.x_evermini else None


class UploadCreate(WireModel):
    """An upload that is announced."""

    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD_BYTES)]
    filename: Filename
    mime_type: str
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class UploadComplete(WireModel):
    """The parts of a complete upload, in order."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=16_384)]
    md5: str | None = None
    x_evermini: FileExtensions | None = None

    @property
    def ingest(self) -> str | None:
        """The model to index the file for."""
        return self.x_evermini.ingest if self.x_evermini else None


def parse_file_create(fields: dict[str, str]) -> FileCreate:
    """Return what the fields of a form say about a file.

    Raises:
        InvalidRequestError: They say nothing that can be honoured.
    """
    body: dict[str, object] = {}
    for name, value in fields.items():
        match = re.fullmatch(r"(expires_after|x_evermini)\[(\w+)\]", name)
        if match is None:
            body[name] = value
            continue
        is_number = match[2] == "seconds" and value.isascii() and value.isdigit()
        nested = body.setdefault(match[1], {})
        if isinstance(nested, dict):  # else it was sent as one field, too, and is refused
            nested[match[2]] = int(value[:12]) if is_number else value
    return validation.parse(FileCreate, body)


def parse_upload_create(body: object) -> UploadCreate:
    """Validate the body that announces an upload.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(UploadCreate, body)


def parse_upload_complete(body: object) -> UploadComplete:
    """Validate the body that completes an upload.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(UploadComplete, body)


def base_name(filename: str) -> str:
    """Return a file's name without folders and control characters. It is shown, and never used as a path."""
    last = re.split(r"[/\\]", filename)[-1]
    return "".join(c for c in last if c.isprintable()).strip() or "upload"


def check_name(filename: str, purpose: str) -> None:
    """Refuse names that are too long, and those that say that the file is not what its purpose needs.

    Raises:
        InvalidRequestError: It has more than `MAX_NAME` characters, or the purpose needs JSON Lines and it another
            ending.
    """
    if len(filename) > MAX_NAME:
        raise InvalidRequestError(
            f"The file's name has {len(filename)} characters; {MAX_NAME} are allowed. Shorten it.",
            param="file",
        )
    if purpose in ("batch", "fine-tune") and not filename.lower().endswith(".jsonl"):
        raise InvalidRequestError(
            f"Invalid file format for purpose '{purpose}': '{filename[:200]}'. Send a JSON Lines file whose name ends "
            "in .jsonl.",
            param="file",
        )


def lifetime(purpose: str, expires_after: ExpiresAfter | None) -> int | None:
    """Return for how many seconds a file is kept; ``None``: until it is deleted."""
    if expires_after is not None:
        return expires_after.seconds
    return BATCH_SECONDS if purpose == "batch" else None
