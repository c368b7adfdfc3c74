"""``/v1/files`` and ``/v1/uploads``: files in one request or in parts, and their content back, in ranges."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, get_args
from urllib.parse import quote

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from evermini.api.body import read_request
from evermini.api.description import Media, PageOf, Parameter, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import page_object, read_cursor
from evermini.api.multipart import Form, read_form
from evermini.api.services import services
from evermini.errors import RangeError
from evermini.service.file_requests import (
    Purpose,
    UploadComplete,
    UploadCreate,
    base_name,
    parse_file_create,
    parse_upload_complete,
    parse_upload_create,
)
from evermini.service.files import MAX_FILE_BYTES
from evermini.service.ingests import ingest_object
from evermini.service.shapes import Deleted, FileAnswer, UploadAnswer, UploadPartAnswer
from evermini.service.uploads import MAX_PART_BYTES
from evermini.storage.blobs import BlobWriter
from evermini.storage.files import StoredFile, StoredUpload
from evermini.storage.ingests import StoredIngest

T = TypeVar("T")

router = APIRouter()

MAX_FILES = 10_000
"""Longest page of the list of files, and the default one."""
FORM_BYTES = 1 << 20
"""What a form has beside the file at most."""
BODY_LIMITS = (
    (re.compile(r"/v1/files"), MAX_FILE_BYTES + FORM_BYTES),
    (re.compile(r"/v1/uploads/[^/]+/parts"), MAX_PART_BYTES + FORM_BYTES),
)
"""Longest bodies by path; other endpoints have one limit for all."""

_BINARY = {"type": "string", "format": "binary"}
_FILE_FORM = {
    "type": "object",
    "properties": {
        "file": _BINARY,
        "purpose": {"enum": get_args(Purpose)},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
        "x_evermini[ingest]": {"type": "string", "minLength": 1, "maxLength": 256},
    },
    "required": ["file", "purpose"],
}
_PART_FORM = {"type": "object", "properties": {"data": _BINARY}, "required": ["data"]}
_FILE_LISTING = [
    *cursor("desc", MAX_FILES, MAX_FILES),
    Parameter("purpose", {"type": "string"}, "Those of this purpose alone."),
]


@router.post("/v1/files")
@described(form=_FILE_FORM, answer=FileAnswer)
async def create_file(request: Request) -> Response:
    """Store a file."""
    files, ingests = services(request).files, services(request).ingests

    async def store(writer: BlobWriter, form: Form) -> tuple[StoredFile, StoredIngest | None]:
        wanted = parse_file_create(form.fields)
        model = ingests.check(wanted.ingest, wanted.purpose)
        file = await files.finish(writer, base_name(form.filename or ""), wanted)
        return file, await ingests.begin(file.id, model) if model else None

    file, ingest = await _receive(request, "file", MAX_FILE_BYTES, store)
    await ingests.follow_deletions()  # some may have expired
    return JsonResponse(file_object(file, ingest))


@router.get("/v1/files")
@described(query=_FILE_LISTING, answer=PageOf(FileAnswer))
async def list_files(request: Request) -> Response:
    """List files, the newest first."""
    cursor = read_cursor(request, order="desc", limit=MAX_FILES, max_limit=MAX_FILES)
    found = await services(request).files.list(cursor, request.query_params.get("purpose") or None)
    ingests = await services(request).ingests.of([file.id for file in found.rows] if found else [])
    return JsonResponse(
        page_object(found, cursor, lambda file: file_object(file, ingests.get(file.id)))
    )


@router.get("/v1/files/{file_id}")
@described(answer=FileAnswer)
async def retrieve_file(request: Request, file_id: str) -> Response:
    """Return what is known of a file."""
    file = await services(request).files.get(file_id)
    ingests = await services(request).ingests.of([file.id])
    return JsonResponse(file_object(file, ingests.get(file.id)))


@router.delete("/v1/files/{file_id}")
@described(answer=Deleted)
async def delete_file(request: Request, file_id: str) -> Response:
    """Delete a file, and what was made of it."""
    await services(request).files.delete(file_id)
    await services(request).ingests.follow_deletions()
    return JsonResponse({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content")
@described(answer=Media("application/octet-stream"), statuses=(200, 206))
async def retrieve_file_content(request: Request, file_id: str) -> Response:
    """Return a file's bytes, or a range of them."""
    files = services(request).files
    file = await files.get(file_id)
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    start, end, status = 0, file.num_bytes, 200
    if wanted := _range(request.headers.get("range", ""), file.num_bytes):
        start, end = wanted
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.num_bytes}"
    headers["content-length"] = str(end - start)
    return StreamingResponse(
        files.read(file, start, end),
        status,
        headers=headers,
        media_type="application/octet-stream",
    )


@router.post("/v1/uploads")
@described(body=UploadCreate, answer=UploadAnswer)
async def create_upload(request: Request) -> Response:
    """Announce a file that comes in parts."""
    wanted = await read_request(request, parse_upload_create)
    return JsonResponse(upload_object(await services(request).uploads.announce(wanted), None))


@router.post("/v1/uploads/{upload_id}/parts")
@described(form=_PART_FORM, answer=UploadPartAnswer)
async def create_upload_part(request: Request, upload_id: str) -> Response:
    """Store a part."""
    uploads = services(request).uploads
    await uploads.pending(upload_id)  # refused before its bytes are read
    part = await _receive(
        request, "data", MAX_PART_BYTES, lambda writer, form: uploads.add_part(upload_id, writer)
    )
    return JsonResponse(
        {
            "id": part.id,
            "object": "upload.part",
            "created_at": part.created_at,
            "upload_id": part.upload_id,
        }
    )


@router.post("/v1/uploads/{upload_id}/complete")
@described(body=UploadComplete, answer=UploadAnswer)
async def complete_upload(request: Request, upload_id: str) -> Response:
    """Make a file of an upload's parts."""
    wanted = await read_request(request, parse_upload_complete)
    uploads, ingests = services(request).uploads, services(request).ingests
    model = ingests.check(wanted.ingest, (await uploads.pending(upload_id)).purpose)
    upload, file = await uploads.complete(upload_id, wanted)
    ingest = await ingests.begin(file.id, model) if model else None
    return JsonResponse(upload_object(upload, file, ingest))


@router.post("/v1/uploads/{upload_id}/cancel")
@described(answer=UploadAnswer)
async def cancel_upload(request: Request, upload_id: str) -> Response:
    """Cancel an upload."""
    return JsonResponse(upload_object(await services(request).uploads.cancel(upload_id), None))


def file_object(file: StoredFile, ingest: StoredIngest | None = None) -> dict[str, Any]:
    """Return the contract's file object, with how far its ingest is, if it has one."""
    extensions = {"x_evermini": {"ingest": ingest_object(ingest)}} if ingest else {}
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        **extensions,
    }


def upload_object(
    upload: StoredUpload, file: StoredFile | None, ingest: StoredIngest | None = None
) -> dict[str, Any]:
    """Return the contract's upload object."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.num_bytes,
        "created_at": upload.created_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "expires_at": upload.expires_at,
        "file": None if file is None else file_object(file, ingest),
    }


async def _receive(
    request: Request,
    field: str,
    limit: int,
    store: Callable[[BlobWriter, Form], Awaitable[T]],
) -> T:
    """Store the form's file as a blob and return what ``store`` makes of it; if it cannot, the blob is dropped."""
    files = services(request).files
    async with files.incoming() as writer:
        form = await read_form(request, field, partial(files.write, writer, limit=limit))
        return await store(writer, form)


def _range(header: str, num_bytes: int) -> tuple[int, int] | None:
    """Return the first byte and the end of the range that is asked for; ``None``: everything.

    Ranges that are malformed, or several at once, may be ignored (RFC 9110, 14.2).

    Raises:
        RangeError: It lies beyond the end.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, num_bytes - int(match[2])), num_bytes
    else:
        start = int(match[1])
        end = min(num_bytes, int(match[2]) + 1) if match[2] else num_bytes
        if match[2] and int(match[2]) < start:
            return None
    if start >= num_bytes:
        raise RangeError(
            f"The range '{header[:100]}' lies beyond the end of the file, which has {num_bytes} bytes."
        )
    return start, end
