"""The request that creates a fine-tuning job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from evermini.errors import UnsupportedParameterError
from evermini.service import validation
from evermini.service.fine_tuning.spec import Hyperparameters, TuningOptions
from evermini.service.schemas import Metadata
from evermini.service.validation import WireModel


class MethodSettings(WireModel):
    """What belongs to one method."""

    hyperparameters: Hyperparameters = Hyperparameters()


class MethodChoice(WireModel):
    """``method``: its type decides which of the settings count."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: MethodSettings | None = None
    dpo: MethodSettings | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(WireModel):
    """Where Weights & Biases would be told."""

    project: str
    entity: str | None = None
    name: str | None = None
    tags: list[str] | None = None


class Integration(WireModel):
    """A service that would be told of the metrics."""

    type: Literal["wandb"]
    wandb: Wandb


class TuningCreate(WireModel):
    """``POST /v1/fine_tuning/jobs``."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: MethodChoice | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: list[Integration] | None = None
    x_evermini: TuningOptions | None = None

    @property
    def method_type(self) -> Literal["supervised", "dpo"]:
        """What is learnt from.

        Raises:
            UnsupportedParameterError: Rewards, which this server does not train on.
        """
        kind = "supervised" if self.method is None else self.method.type
        if kind == "reinforcement":
            raise UnsupportedParameterError(
                "Reinforcement fine-tuning is not supported by this server. Use the method 'supervised', or 'dpo' with "
                "preferred and non-preferred answers.",
                param="method.type",
            )
        return kind

    @property
    def wanted(self) -> Hyperparameters:
        """The hyperparameters of the method, or the deprecated ones beside it."""
        own = None
        if self.method is not None:
            own = self.method.dpo if self.method_type == "dpo" else self.method.supervised
        return own.hyperparameters if own else self.hyperparameters or Hyperparameters()


def parse_tuning(body: object) -> TuningCreate:
    """Validate the body that creates a job.

    Raises:
        InvalidRequestError: It is malformed.
    """
    return validation.parse(TuningCreate, body)
