"""The fine-tuning jobs and models that OpenAI's client tests ask for; see `evermini.api.conformance`."""

from __future__ import annotations

import time
from dataclasses import replace

from evermini.storage.adapters import Adapter, AdapterTable
from evermini.storage.database import Database
from evermini.storage.files import FileStore, StoredFile
from evermini.storage.fine_tuning import StoredTuning, TuningStore
from evermini.storage.permissions import Permission, PermissionStore
from evermini.storage.tuning_history import Event, TuningCheckpoint

FILE = "file-abc123"
JOBS = ("after", "string", "ft-AF1WoRqd3aJAHsqc9NY7iL8F")
_EVENTS = ("after", "string")
"""And its checkpoints."""
MODELS = (JOBS[-1], "ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd")
"""What the tests of permissions share; to the first, they give a job's id."""
PERMISSIONS = ("after", "cp_zc4Q7MP6XxulcVzj4MZdwsAB")
_ADAPTER = Adapter(
    name="",
    tier="mini",
    owner="org",
    rank=16,
    sha256="",
    num_bytes=0,
    base_name=None,
    base_weights=None,
    job_id=JOBS[-1],
    created_at=0,
    config_blob="",
    weights_blob="",
)


def seed_tunings(database: Database) -> None:
    """Create the file and the jobs; a job that was steered is queued again. Nobody works on any."""
    files, store, now = FileStore(database), TuningStore(database), int(time.time())
    if files.get(FILE, now) is None:
        files.add(StoredFile(FILE, "file.jsonl", "fine-tune", 0, now, None))
    for tuning_id in JOBS:
        known = store.get(tuning_id)
        if known is None or known.status != "queued":
            is_asked_for = tuning_id == JOBS[-1]
            message = "Created fine-tuning job"
            store.restore(
                StoredTuning(_body(tuning_id, now), {}),
                [Event(name, now, message) for name in _EVENTS] if is_asked_for else [],
                [_checkpoint(step, now) for step in range(2)] if is_asked_for else [],
            )
    _seed_permissions(database, now)


def _seed_permissions(database: Database, now: int) -> None:
    """Create the models and, if they were deleted, their permissions."""
    adapters, permissions = AdapterTable(database), PermissionStore(database)
    for model, permission in zip(MODELS, PERMISSIONS, strict=True):
        adapters.add(
            replace(_ADAPTER, name=model, config_blob=f"{model}/config", weights_blob=model)
        )
        permissions.restore(model, Permission(permission, permission, now))


def _checkpoint(step: int, now: int) -> TuningCheckpoint:
    name = f"ft:model:personal::id:ckpt-step-{step}"
    return TuningCheckpoint(_EVENTS[step], step, now, name, {})


def _body(tuning_id: str, now: int) -> dict[str, object]:
    shown = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 2.0}
    return {
        "id": tuning_id,
        "object": "fine_tuning.job",
        "model": "model",
        "created_at": now,
        "finished_at": None,
        "fine_tuned_model": None,
        "organization_id": "org-personal",
        "result_files": [],
        "status": "queued",
        "validation_file": None,
        "training_file": FILE,
        "hyperparameters": shown,
        "trained_tokens": None,
        "error": None,
        "user_provided_suffix": None,
        "seed": 42,
        "estimated_finish": None,
        "integrations": [],
        "metadata": {"foo": "string"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": shown}},
    }
