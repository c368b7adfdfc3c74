"""What routes call: one object that the application keeps, whatever route asks.

services(request).files.get(file_id)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.requests import Request

from evermini.config import Settings
from evermini.service.batches.requests import BatchService
from evermini.service.directory import Directory
from evermini.service.documents import Documents
from evermini.service.files import FileService
from evermini.service.fine_tuning.service import FineTuning
from evermini.service.ingests import IngestService
from evermini.service.jobs import JobRunner
from evermini.service.metrics import Metrics
from evermini.service.permissions import Permissions
from evermini.service.readiness import Readiness
from evermini.service.responses.service import Responses
from evermini.service.uploads import UploadService
from evermini.storage.database import Database

if TYPE_CHECKING:
    from evermini.api.body import Bodies


@dataclass(frozen=True)
class Services:
    """The services of one application."""

    settings: Settings
    database: Database
    metrics: Metrics
    readiness: Readiness
    bodies: Bodies
    directory: Directory
    documents: Documents
    responses: Responses
    files: FileService
    uploads: UploadService
    ingests: IngestService
    batches: BatchService
    fine_tuning: FineTuning
    permissions: Permissions
    jobs: JobRunner

    def attach(self, app: FastAPI) -> None:
        """Have the application's routes find these."""
        app.state.services = self


def services(request: Request) -> Services:
    """Return the services of the application that a request came to."""
    return of_app(request.app)


def of_app(app: FastAPI) -> Services:
    """Return an application's services."""
    found: Services = app.state.services
    return found
