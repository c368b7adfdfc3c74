"""Creating, reading and steering fine-tuning jobs. Free of HTTP; `evermini.service.fine_tuning.worker` does them.

tunings = FineTuning(database, files, adapters, settings)
job = await tunings.create(parse_tuning({"model": "gpt-4.1-mini", "training_file": "file-..."}))
await tunings.pause(job.id)
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from evermini.backends.spec import parse_upstream
from evermini.config import Settings
from evermini.errors import InvalidRequestError, NotFoundError
from evermini.models import catalogue
from evermini.service.adapters import AdapterStore, FineTunedName
from evermini.service.caller import current_caller
from evermini.service.files import FileService, random_token
from evermini.service.fine_tuning.schemas import TuningCreate
from evermini.service.fine_tuning.spec import JobSpec, TuningOptions
from evermini.service.loading import what_to_serve
from evermini.service.seen import Seen
from evermini.storage.database import Database
from evermini.storage.files import StoredFile
from evermini.storage.fine_tuning import FINAL, StoredTuning, TuningStore
from evermini.storage.schema import Cursor, Page
from evermini.storage.tuning_history import Event, Level, TuningCheckpoint

NEEDED = ("trl", "peft", "transformers", "accelerate", "datasets")
"""Packages of the extra `tune`."""


def missing_packages() -> list[str]:
    """Return which packages of the extra `tune` are not installed: with any, nothing can be trained."""
    return [name for name in NEEDED if find_spec(name) is None]


@dataclass(frozen=True)
class Base:
    """What a job trains on.

    Attributes:
        id: The model's full name.
        tier: The tier under whose names it goes.
        adapter: A fine-tuned model that is trained further.
    """

    id: str
    tier: str
    adapter: str | None = None


class FineTuning:
    """The fine-tuning jobs of a database.

    Args:
        database: Where they are.
        files: Where their files are.
        adapters: Where fine-tuned models are.
        settings: Which models there are, and how they run.
    """

    def __init__(
        self, database: Database, files: FileService, adapters: AdapterStore, settings: Settings
    ) -> None:
        self._database = database
        self._files = files
        self._adapters = adapters
        self._settings = settings
        self._store = TuningStore(database)
        self._seen = Seen(database, TuningStore, _no_such_tuning)

    async def create(self, wanted: TuningCreate) -> StoredTuning:
        """Store a job; its files are checked, and then it waits for its turn.

        Raises:
            InvalidRequestError: The model cannot be fine-tuned here, a file is not one for it, or the method or an
                option is not supported.
        """
        if missing := missing_packages():
            raise InvalidRequestError(
                f"This server cannot train: {', '.join(missing)} is not installed. Install the extra: pip install "
                "'evermini[tune]'."
            )
        method, options = wanted.method_type, wanted.x_evermini or TuningOptions()
        caller = current_caller.get()
        base = await self._database.run(self._find_base, wanted.model, caller.sees)
        await self._check_file(wanted.training_file, "training_file")
        if wanted.validation_file is not None:
            await self._check_file(wanted.validation_file, "validation_file")
        elif options.early_stopping_patience is not None:
            raise InvalidRequestError(
                "Missing required parameter: 'validation_file'. Early stopping needs a validation loss.",
                param="validation_file",
                code="missing_required_parameter",
            )
        now = int(time.time())
        settings = self._settings
        seed = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
        spec = JobSpec(
            method=method,
            hyperparameters=wanted.wanted,
            seed=seed,
            options=options,
            has_validation=wanted.validation_file is not None,
            adapter=base.adapter,
        )
        shown = shown_hyperparameters(spec)
        integrations = [one.model_dump(exclude_none=True) for one in wanted.integrations or ()]
        body = {
            "id": f"ftjob-{random_token(24)}",
            "object": "fine_tuning.job",
            "model": base.adapter or base.id,
            "created_at": now,
            "finished_at": None,
            "fine_tuned_model": None,
            "organization_id": f"org-{settings.organization}",
            "result_files": [],
            "status": "validating_files",
            "validation_file": wanted.validation_file,
            "training_file": wanted.training_file,
            "hyperparameters": {key: value for key, value in shown.items() if key != "beta"},
            "trained_tokens": None,
            "error": None,
            "user_provided_suffix": wanted.suffix,
            "seed": seed,
            "estimated_finish": None,
            "integrations": integrations,
            "metadata": wanted.metadata,
            "method": {"type": method, method: {"hyperparameters": shown}},
        }
        if wanted.x_evermini is not None:
            body["x_evermini"] = options.model_dump()
        tuning = StoredTuning(
            body,
            {**spec.model_dump(), "tier": base.tier, "base": base.id},
            caller.key_id,
            caller.project,
        )
        events = [
            new_event(f"Created fine-tuning job: {tuning.id}"),
            new_event(f"Validating training file: {wanted.training_file}"),
        ]
        if wanted.validation_file is not None:
            events.append(new_event(f"Validating validation file: {wanted.validation_file}"))
        if integrations:
            events.append(
                new_event(
                    "Weights & Biases is not told of this job: this server sends no data elsewhere. The metrics are in "
                    "the events, in the result file and in TensorBoard's format.",
                    "warn",
                )
            )
        await self._database.run(self._store.add, tuning, events)
        return tuning

    async def get(self, tuning_id: str) -> StoredTuning:
        """Return a job.

        Raises:
            NotFoundError: There is none of that id.
        """
        return await self._seen.find(tuning_id, TuningStore.get)

    async def list(
        self, cursor: Cursor, metadata: Mapping[str, str] | None = None, *, bare: bool = False
    ) -> Page[StoredTuning] | None:
        """Return a page of jobs, as `TuningStore.list` does."""
        return await self._seen.ask(TuningStore.list, cursor, metadata, bare=bare)

    async def cancel(self, tuning_id: str) -> StoredTuning:
        """End a job; one that is cancelled already stays so.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It has ended.
        """
        event = new_event("The job was cancelled")
        tuning = await self._seen.find(tuning_id, TuningStore.cancel, event)
        return _steered(tuning, "cancel", ("cancelled",))

    async def pause(self, tuning_id: str) -> StoredTuning:
        """Let a job wait until it is resumed; what is trained is kept.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It has ended, or its files are still being checked.
        """
        event = new_event("The job was paused")
        tuning = await self._seen.find(tuning_id, TuningStore.pause, event)
        return _steered(tuning, "pause", ("paused",))

    async def resume(self, tuning_id: str) -> StoredTuning:
        """Let a paused job go on from where it was; one that is not paused is left alone.

        Raises:
            NotFoundError: There is none of that id.
            InvalidRequestError: It has ended.
        """
        event = new_event("The job was resumed")
        tuning = await self._seen.find(tuning_id, TuningStore.resume, event)
        return _steered(tuning, "resume", ("validating_files", "queued", "running"))

    async def events(self, tuning_id: str, cursor: Cursor) -> Page[Event] | None:
        """Return a page of a job's events; ``None`` if there is no event ``cursor.after``.

        Raises:
            NotFoundError: There is no such job.
        """
        await self.get(tuning_id)
        return await self._seen.ask(TuningStore.events, tuning_id, cursor)

    async def checkpoints(self, tuning_id: str, cursor: Cursor) -> Page[TuningCheckpoint] | None:
        """Return a page of a job's checkpoints; ``None`` if there is no checkpoint ``cursor.after``.

        Raises:
            NotFoundError: There is no such job.
        """
        await self.get(tuning_id)
        return await self._seen.ask(TuningStore.checkpoints, tuning_id, cursor)

    async def _check_file(self, file_id: str, param: str) -> StoredFile:
        try:
            file = await self._files.get(file_id)
        except NotFoundError:
            raise InvalidRequestError(
                f"invalid {param}: {file_id[:200]}. There is no such file; upload it with the purpose 'fine-tune'.",
                param=param,
            ) from None
        if file.purpose != "fine-tune":
            raise InvalidRequestError(
                f"invalid {param}: the file {file.id} has the purpose '{file.purpose}'. Upload it again with the "
                "purpose 'fine-tune'.",
                param=param,
            )
        return file

    def _find_base(self, name: str, project: str | None) -> Base:
        """Return what a job of a project for ``model`` trains on."""
        adapter = None
        found = self._adapters.get(name) if name.startswith("ft:") else None
        if found is not None and found.exists_for(project):
            adapter, name = found.name, found.tier
        names: list[str] = []
        for model in self._settings.models:
            entry, _ = what_to_serve(model)
            if entry is None or parse_upstream(model) is not None:
                continue
            names += [entry.tier, *entry.aliases]
            if name in names or self._settings.conformance_fixtures:
                return Base(entry.aliases[-1], entry.tier, adapter)
        raise InvalidRequestError(
            f"Model {name[:200]} is not available for fine-tuning or does not exist. Available are: "
            f"{', '.join(names) or 'none: serve a model under a tier (mini=PATH)'}.",
            param="model",
            code="model_not_available",
        )


def shown_hyperparameters(spec: JobSpec) -> dict[str, Any]:
    """Return a job's hyperparameters as clients see them."""
    shown = spec.hyperparameters.model_dump()
    if spec.method != "dpo":
        del shown["beta"]
    return shown


def new_event(
    message: str, level: Level = "info", *, step: int | None = None, data: Any = None
) -> Event:
    """Return an event that happens now."""
    return Event(f"ftevent-{random_token(24)}", int(time.time()), message, level, step, data)


def event_object(event: Event) -> dict[str, Any]:
    """Return an event as clients see it."""
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "data": event.data or {},
        "type": "message" if event.step is None else "metrics",
    }


def tuning_object(tuning: StoredTuning) -> dict[str, Any]:
    """Return a job as clients see it: the contract has no status for one that is paused, but calls it queued."""
    if tuning.status != "paused":
        return tuning.body
    options = {**tuning.body.get("x_evermini", {}), "is_paused": True}
    return {**tuning.body, "status": "queued", "x_evermini": options}


def checkpoint_object(tuning_id: str, checkpoint: TuningCheckpoint) -> dict[str, Any]:
    """Return a checkpoint as clients see it."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": tuning_id,
        "metrics": checkpoint.metrics,
        "step_number": checkpoint.step,
    }


def model_name(tuning: StoredTuning, step: int | None = None) -> FineTunedName:
    """Return what a job's model, or its checkpoint after ``step``, is called.

    It is the same each time and on every server, so a job that was killed does not name its model twice.
    """
    suffix = tuning.body["user_provided_suffix"] or ""
    suffix = re.sub(r"[^A-Za-z0-9_.-]+", "-", suffix)
    base = tuning.spec["base"]
    assert catalogue.find(base), "checked when the job was made"
    organization = tuning.body["organization_id"].removeprefix("org-")
    return FineTunedName(base, organization, suffix, tuning.id.removeprefix("ftjob-")[:8], step)


def _steered(tuning: StoredTuning, what: str, fine: tuple[str, ...]) -> StoredTuning:
    """Return a job if what was asked of it has been done.

    Raises:
        InvalidRequestError: It could not be.
    """
    if tuning.status in fine:
        return tuning
    if tuning.status in FINAL:
        raise InvalidRequestError(
            f"Job has already ended with the status '{tuning.status}': {tuning.id}"
        )
    raise InvalidRequestError(
        f"Cannot {what} a job with status '{tuning.status}': {tuning.id}. Try again in a moment."
    )


def _no_such_tuning(tuning_id: str) -> NotFoundError:
    return NotFoundError(
        f"Could not find fine tune: {tuning_id[:200]}",
        param="fine_tune_id",
        code="fine_tune_not_found",
    )
