"""What answers of the fine-tuning API look like; see `evermini.service.shapes`."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from evermini.service.shapes import EXACT, Metadata


@with_config(EXACT)
class TuningError(TypedDict):
    """Why a fine-tuning job failed."""

    code: str
    message: str
    param: str | None


@with_config(EXACT)
class TuningAnswer(TypedDict):
    """A fine-tuning job; hyperparameters are ``auto`` until its files have been checked."""

    id: str
    object: Literal["fine_tuning.job"]
    model: str
    created_at: int
    finished_at: int | None
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    validation_file: str | None
    training_file: str
    hyperparameters: dict[str, Any]
    trained_tokens: int | None
    error: TuningError | None
    user_provided_suffix: str | None
    seed: int
    estimated_finish: int | None
    integrations: list[dict[str, Any]]
    metadata: Metadata | None
    method: dict[str, Any]
    x_evermini: NotRequired[dict[str, Any]]


@with_config(EXACT)
class TuningEventAnswer(TypedDict):
    """Something that happened to a fine-tuning job; metrics have a step's in ``data``."""

    object: Literal["fine_tuning.job.event"]
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any]
    type: Literal["message", "metrics"]


@with_config(EXACT)
class TuningCheckpointAnswer(TypedDict):
    """An epoch's weights, which can be used as a model."""

    object: Literal["fine_tuning.job.checkpoint"]
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


@with_config(EXACT)
class PermissionAnswer(TypedDict):
    """A project that a fine-tuned model is shared with."""

    object: Literal["checkpoint.permission"]
    id: str
    created_at: int
    project_id: str
