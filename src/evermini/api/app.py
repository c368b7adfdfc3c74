"""The HTTP application.

    runtime = Runtime([load_tier("mini", settings)])
    database = Database.open(settings)
    uvicorn.run(create_app(runtime, database, settings), host=settings.host, port=settings.port)

Runtime and database belong to the caller, who closes them after the server has ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from evermini import __version__
from evermini.api import (
    batches,
    chat,
    completions,
    conversations,
    description,
    embeddings,
    errors,
    files,
    fine_tuning,
    models,
    moderations,
    monitoring,
    responses,
    stored_chats,
    usage,
)
from evermini.api.body import Bodies
from evermini.api.conformance import ConformanceFixtures
from evermini.api.middleware import (
    EXPOSED_HEADERS,
    Authentication,
    BodyLimit,
    Draining,
    RequestContext,
)
from evermini.api.services import Services, of_app
from evermini.config import Settings
from evermini.service.access import Access
from evermini.service.adapters import AdapterStore
from evermini.service.batches.requests import BatchService
from evermini.service.batches.worker import BatchWorker
from evermini.service.directory import Directory
from evermini.service.documents import Documents
from evermini.service.files import FileService
from evermini.service.fine_tuning.service import FineTuning, missing_packages
from evermini.service.fine_tuning.worker import TuningWorker
from evermini.service.ingests import IngestService
from evermini.service.jobs import JobRunner
from evermini.service.metering import Meter
from evermini.service.permissions import Permissions
from evermini.service.readiness import Readiness
from evermini.service.responses.service import Responses
from evermini.service.runtime import Runtime
from evermini.service.uploads import UploadService
from evermini.storage.batches import JOB as BATCH_JOB
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from evermini.storage.fine_tuning import CHECK as CHECK_JOB
from evermini.storage.fine_tuning import TRAIN as TRAINING_JOB
from evermini.storage.responses import JOB as RESPONSE_JOB

NUM_BATCHES = 4
"""Batches that a process works on at the same time."""


def drain(app: FastAPI) -> None:
    """Take no new requests, and give work back that can go on elsewhere; call this in the event loop.

    What runs goes on: requests, and background responses until the application ends.
    """
    mine = of_app(app)
    mine.readiness.is_draining = True
    mine.jobs.drain()


ROUTERS = tuple(
    module.router
    for module in (
        chat,
        stored_chats,
        responses,
        conversations,
        completions,
        embeddings,
        files,
        batches,
        fine_tuning,
        usage,
        models,
        moderations,
        monitoring,
    )
)
"""All endpoints."""


def create_app(runtime: Runtime, database: Database, settings: Settings) -> FastAPI:
    """Return the application that serves ``runtime``'s models.

    Args:
        runtime: The loaded models; not closed by the application.
        database: Where answers are stored; not closed either.
        settings: Keys, origins, limits, and where files are stored.
    """
    blobs = BlobStore.open(settings)
    readiness = Readiness(runtime, database, blobs)
    middleware = [
        Middleware(RequestContext, metrics=runtime.metrics),
        Middleware(Draining, readiness=readiness),
    ]
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        )
    meter = Meter(database)
    runtime.metrics.meter = meter
    access = Access(database, settings.api_keys, meter)
    middleware.append(Middleware(Authentication, access=access))
    middleware.append(
        Middleware(BodyLimit, limit=settings.max_request_bytes, by_path=files.BODY_LIMITS)
    )
    if settings.conformance_fixtures:
        middleware.append(Middleware(ConformanceFixtures, database=database, blobs=blobs))
    stored = FileService(database, blobs)
    documents = Documents.open(settings, stored)
    jobs = JobRunner(database)
    adapters = AdapterStore(database, blobs, settings.home)
    directory = Directory(runtime, adapters, database)
    service = Responses(directory, runtime.metrics, database, documents, jobs)
    ingests = IngestService(runtime, database, stored, documents, jobs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        meter.start()
        access.start()
        jobs.start()
        await ingests.follow_deletions()
        yield
        await jobs.stop(settings.drain_timeout)
        await ingests.stop()
        await access.stop()
        await meter.stop()
        documents.close()

    app = FastAPI(
        title="Evermini",
        version=__version__,
        lifespan=lifespan,
        middleware=middleware,
        redirect_slashes=False,
        openapi_url=None,  # routes read their requests themselves: see `description`
    )
    Services(
        settings=settings,
        database=database,
        metrics=runtime.metrics,
        readiness=readiness,
        bodies=Bodies(settings.max_request_bytes),
        directory=directory,
        documents=documents,
        responses=service,
        files=stored,
        uploads=UploadService(database, stored),
        ingests=ingests,
        batches=BatchService(database, stored),
        fine_tuning=FineTuning(database, stored, adapters, settings),
        permissions=Permissions(database, adapters),
        jobs=jobs,
    ).attach(app)
    worker = BatchWorker(
        database, stored, batches.executor(app), num_requests=settings.batch_requests
    )
    jobs.handle(BATCH_JOB, worker, give_up=worker.give_up, num_slots=NUM_BATCHES)
    jobs.handle(
        RESPONSE_JOB,
        service.background,
        give_up=service.background.give_up,
        num_slots=settings.max_num_seqs,
        finishes=True,
    )
    tuning = TuningWorker(database, stored, adapters, settings, runtime.metrics.tuning)
    # Jobs of conformance fixtures have no real files; those of a shared database are left to servers that can train.
    if not settings.conformance_fixtures and not missing_packages():
        jobs.handle(CHECK_JOB, tuning.check, give_up=tuning.give_up, num_slots=1)
        jobs.handle(TRAINING_JOB, tuning.train, give_up=tuning.give_up, num_slots=1)
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app, ROUTERS)
    description.install(app, ROUTERS)
    return app
