"""``/v1/fine_tuning``: jobs, their events and checkpoints, and who may use the models that they make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api import sse
from evermini.api.body import read_request
from evermini.api.description import PageOf, Parameter, cursor, described
from evermini.api.errors import JsonResponse
from evermini.api.listing import list_object, page_object, read_cursor, read_metadata
from evermini.api.services import services
from evermini.errors import NotFoundError
from evermini.service.fine_tuning.schemas import TuningCreate, parse_tuning
from evermini.service.fine_tuning.service import (
    FineTuning,
    checkpoint_object,
    event_object,
    tuning_object,
)
from evermini.service.fine_tuning.shapes import (
    PermissionAnswer,
    TuningAnswer,
    TuningCheckpointAnswer,
    TuningEventAnswer,
)
from evermini.service.permissions import (
    PermissionCreate,
    parse_permission,
    permission_object,
)
from evermini.service.shapes import Deleted
from evermini.storage.fine_tuning import FINAL
from evermini.storage.schema import Cursor

router = APIRouter(prefix="/v1/fine_tuning")

ORDERS = ("ascending", "descending")
"""What the orders of permissions are called."""
FOLLOW_SECONDS = 0.5
"""How often a stream of events looks for new ones."""


@router.post("/jobs")
@described(body=TuningCreate, answer=TuningAnswer)
async def create_fine_tuning_job(request: Request) -> Response:
    """Create a job."""
    wanted = await read_request(request, parse_tuning)
    tuning = await services(request).fine_tuning.create(wanted)
    services(request).jobs.poke()
    return JsonResponse(tuning_object(tuning))


@router.get("/jobs")
@described(
    query=[
        *cursor("desc"),
        Parameter(
            "metadata",
            {"type": "object", "additionalProperties": {"type": "string"}},
            "Only jobs with these pairs; `metadata=null`: only jobs without any.",
            style="deepObject",
        ),
    ],
    answer=PageOf(TuningAnswer),
)
async def list_fine_tuning_jobs(request: Request) -> Response:
    """List jobs, the newest first; ``metadata[key]=value`` and ``metadata=null`` choose among them."""
    cursor = read_cursor(request, order="desc")
    bare = request.query_params.get("metadata") == "null"
    found = await services(request).fine_tuning.list(cursor, read_metadata(request), bare=bare)
    return JsonResponse(page_object(found, cursor, tuning_object))


@router.get("/jobs/{tuning_id}")
@described(answer=TuningAnswer)
async def retrieve_fine_tuning_job(request: Request, tuning_id: str) -> Response:
    """Return a job."""
    return JsonResponse(tuning_object(await services(request).fine_tuning.get(tuning_id)))


@router.post("/jobs/{tuning_id}/cancel")
@described(answer=TuningAnswer)
async def cancel_fine_tuning_job(request: Request, tuning_id: str) -> Response:
    """End a job early."""
    return JsonResponse(tuning_object(await services(request).fine_tuning.cancel(tuning_id)))


@router.post("/jobs/{tuning_id}/pause")
@described(answer=TuningAnswer)
async def pause_fine_tuning_job(request: Request, tuning_id: str) -> Response:
    """Let a job wait; what is trained is kept."""
    return JsonResponse(tuning_object(await services(request).fine_tuning.pause(tuning_id)))


@router.post("/jobs/{tuning_id}/resume")
@described(answer=TuningAnswer)
async def resume_fine_tuning_job(request: Request, tuning_id: str) -> Response:
    """Let a paused job go on."""
    tuning = await services(request).fine_tuning.resume(tuning_id)
    services(request).jobs.poke()
    return JsonResponse(tuning_object(tuning))


@router.get("/jobs/{tuning_id}/events")
@described(
    query=[
        *cursor("desc"),
        Parameter("stream", {"type": "boolean"}, "Send events as they happen."),
    ],
    answer=PageOf(TuningEventAnswer),
    events=TuningEventAnswer,
)
async def list_fine_tuning_events(request: Request, tuning_id: str) -> Response:
    """List a job's events, the newest first; with ``stream=true`` as they happen, until the job has ended."""
    service = services(request).fine_tuning
    if request.query_params.get("stream") == "true":
        await service.get(tuning_id)
        return sse.EventStream(_follow(service, tuning_id), close=lambda: None)
    cursor = read_cursor(request, order="desc")
    found = await service.events(tuning_id, cursor)
    return JsonResponse(page_object(found, cursor, event_object))


@router.get("/jobs/{tuning_id}/checkpoints")
@described(query=cursor("desc", limit=10), answer=PageOf(TuningCheckpointAnswer))
async def list_fine_tuning_checkpoints(request: Request, tuning_id: str) -> Response:
    """List a job's checkpoints, the newest first."""
    cursor = read_cursor(request, order="desc", limit=10)
    found = await services(request).fine_tuning.checkpoints(tuning_id, cursor)
    return JsonResponse(page_object(found, cursor, partial(checkpoint_object, tuning_id)))


@router.post("/checkpoints/{model:path}/permissions")
@described(body=PermissionCreate, answer=PageOf(PermissionAnswer))
async def create_checkpoint_permissions(request: Request, model: str) -> Response:
    """Share a fine-tuned model with projects."""
    wanted = await read_request(request, parse_permission)
    made = await services(request).permissions.share(model, wanted.project_ids)
    return JsonResponse(list_object([permission_object(one) for one in made], has_more=False))


@router.get("/checkpoints/{model:path}/permissions")
@described(
    query=[
        *cursor("desc", limit=10, words=ORDERS),
        Parameter("project_id", {"type": "string"}, "Only this project's."),
    ],
    answer=PageOf(PermissionAnswer),
)
async def list_checkpoint_permissions(request: Request, model: str) -> Response:
    """List the projects that a fine-tuned model is shared with, the latest first."""
    cursor = read_cursor(request, order="desc", limit=10, words=ORDERS)
    project = request.query_params.get("project_id")
    found = await services(request).permissions.list(model, cursor, project)
    return JsonResponse(page_object(found, cursor, permission_object))


@router.delete("/checkpoints/{model:path}/permissions/{permission_id}")
@described(answer=Deleted)
async def delete_checkpoint_permission(
    request: Request, model: str, permission_id: str
) -> Response:
    """Stop sharing a fine-tuned model with a project."""
    await services(request).permissions.withdraw(model, permission_id)
    return JsonResponse({"id": permission_id, "object": "checkpoint.permission", "deleted": True})


@router.post("/alpha/graders/{action}")
async def use_grader(request: Request, action: str) -> Response:
    """Say that there are no graders: what they are for, reinforcement, is not done here."""
    raise NotFoundError(
        "This server has no graders: they belong to reinforcement fine-tuning, which it does not do. Use the methods "
        "'supervised' or 'dpo'.",
        code="unsupported_endpoint",
    )


async def _follow(service: FineTuning, tuning_id: str) -> AsyncGenerator[bytes, None]:
    after: str | None = None
    seen: set[str] = set()
    while True:
        tuning = await service.get(tuning_id)  # before its events: none of an ended job is missed
        while True:
            found = await service.events(tuning_id, Cursor(after, 100, "asc"))
            if found is None:  # forgotten: the job went on from an earlier step
                after = None
                continue
            for event in found.rows:
                after = event.id
                if after not in seen:
                    seen.add(after)
                    yield sse.data(event_object(event))
            if not found.has_more:
                break
        if tuning.status in FINAL:
            yield sse.DONE
            return
        await asyncio.sleep(FOLLOW_SECONDS)
