"""The HTTP application.

    runtime = Runtime([load_tier("mini", settings)])
    database = Database.open(settings)
    uvicorn.run(create_app(runtime, database, settings), host=settings.host, port=settings.port)

Runtime and database belong to the caller, who closes them after the server has ended.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from evermini import __version__
from evermini.api import chat, completions, errors, files, models, monitoring, stored_chats
from evermini.api.middleware import EXPOSED_HEADERS, Authentication, BodyLimit, RequestContext
from evermini.config import Settings
from evermini.service.files import FileService
from evermini.service.runtime import Runtime
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database


def create_app(runtime: Runtime, database: Database, settings: Settings) -> FastAPI:
    """Return the application that serves ``runtime``'s models.

    Args:
        runtime: The loaded models; not closed by the application.
        database: Where answers are stored; not closed either.
        settings: Keys, origins, limits, and where files are stored.
    """
    middleware = [Middleware(RequestContext, metrics=runtime.metrics)]
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
    if settings.api_keys:
        middleware.append(Middleware(Authentication, keys=settings.api_keys))
    middleware.append(
        Middleware(BodyLimit, limit=settings.max_request_bytes, by_path=files.BODY_LIMITS)
    )
    app = FastAPI(
        title="Evermini",
        version=__version__,
        middleware=middleware,
        redirect_slashes=False,
        openapi_url=None,  # the contract is OpenAI's; their description of it is the reference
    )
    app.state.runtime = runtime
    app.state.settings = settings
    app.state.database = database
    app.state.files = FileService(database, BlobStore.open(settings))
    for module in (chat, stored_chats, completions, files, models, monitoring):
        app.include_router(module.router)
    errors.install(app)
    return app
