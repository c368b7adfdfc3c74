"""What a training process is told, in `spec.json` of a job's folder, and how ``auto`` is decided.

FOLDER/spec.json  training.jsonl  validation.jsonl     written before it starts
FOLDER/images/                                         embeddings of the examples' images, computed once
FOLDER/state/                                          the trainer's checkpoints, to go on from
FOLDER/adapters/step-N/                                an epoch's adapter, until it is stored elsewhere
FOLDER/tensorboard/                                    for `tensorboard --logdir`
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from evermini.service.validation import WireModel

SPEC = "spec.json"
TRAINING = "training.jsonl"
VALIDATION = "validation.jsonl"
IMAGES = "images"
STATE = "state"
ADAPTERS = "adapters"
TENSORBOARD = "tensorboard"

MIN_EXAMPLES = 10
LEARNING_RATE = 1e-4
"""What a learning rate multiplier multiplies."""
AUTO_MULTIPLIER = {"supervised": 2.0, "dpo": 0.5}
AUTO_BETA = 0.1
AUTO_RANK = 16

_TARGET_EPOCHS = 3
_FEW, _MANY = 100, 25_000
"""Examples, all epochs together, that ``n_epochs`` aims not to fall short of or exceed."""
_MAX_AUTO_EPOCHS = 25

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=50)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
Multiplier = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Beta = Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)]


class Hyperparameters(WireModel):
    """Hyperparameters, given or ``auto``; ``beta`` is for preferences only."""

    n_epochs: Epochs | Auto = "auto"
    batch_size: BatchSize | Auto = "auto"
    learning_rate_multiplier: Multiplier | Auto = "auto"
    beta: Beta | Auto = "auto"

    def resolve(self, method: str, num_examples: int) -> Hyperparameters:
        """Return them without ``auto``.

        Epochs are three, more for few examples and fewer for many; a batch is a 500th of the examples, 4 to 64.

        Args:
            method: ``supervised`` or ``dpo``.
            num_examples: In the training file.
        """
        epochs: int | Auto = self.n_epochs
        if epochs == "auto":
            epochs = _TARGET_EPOCHS
            if num_examples * epochs < _FEW:
                epochs = min(_MAX_AUTO_EPOCHS, -(-_FEW // num_examples))
            elif num_examples * epochs > _MANY:
                epochs = max(1, _MANY // num_examples)
        batch: int | Auto = self.batch_size
        if batch == "auto":
            batch = max(4, min(64, num_examples // 500))
        rate: float | Auto = self.learning_rate_multiplier
        return Hyperparameters(
            n_epochs=epochs,
            batch_size=min(batch, num_examples),
            learning_rate_multiplier=AUTO_MULTIPLIER[method] if rate == "auto" else rate,
            beta=AUTO_BETA if self.beta == "auto" else self.beta,
        )


class TuningOptions(WireModel):
    """``x_evermini`` of a job: what goes beyond the contract.

    Attributes:
        early_stopping_patience: End when the validation loss has not fallen for so many epochs, with the best epoch's
            weights; ``None``: train all epochs.
        rank: Of the adapter's matrices.
        precision: Of the frozen base and of what is computed with it. ``auto``: bf16 on GPUs and on CPUs that multiply
            in it, fp32 on others; what looks at images is as precise as where it serves. The adapter is fp32 in either
            case.
        quantize: Keep the base in four bits while training (QLoRA); needs a GPU.
    """

    early_stopping_patience: Annotated[int, Field(ge=1, le=50)] | None = None
    rank: Annotated[int, Field(ge=1, le=256)] = AUTO_RANK
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Literal["4bit"] | None = None


class JobSpec(WireModel):
    """What is trained, wherever that happens.

    Attributes:
        method: What is learnt from.
        hyperparameters: With ``auto`` until the file has been checked.
        seed: Of the data's order and the adapter's first weights.
        options: ``x_evermini``.
        has_validation: There is a validation file.
        adapter: An adapter to go on from (training a fine-tuned model further): its name, for the process its folder.
    """

    method: Literal["supervised", "dpo"]
    hyperparameters: Hyperparameters
    seed: int
    options: TuningOptions
    has_validation: bool
    adapter: str | None = None


class TrainingSpec(JobSpec):
    """All that a training process needs to know: the job, and the machine that it is on.

    Attributes:
        source: The base model: a tier, a path, or ``TIER=PATH``.
        home: Evermini's home folder.
        weights_dir: Folder with weights files already at hand.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads; ``None``: one per core.
        allow_remote_images: Images are fetched from the addresses that examples name.
    """

    source: str
    home: str
    weights_dir: str | None
    device: str
    threads: int | None
    allow_remote_images: bool = False

    @classmethod
    def read(cls, folder: Path) -> TrainingSpec:
        """Return the specification in a job's folder."""
        return cls.model_validate_json((folder / SPEC).read_text(encoding="utf-8"))

    def write(self, folder: Path) -> None:
        """Put it into a job's folder."""
        (folder / SPEC).write_text(self.model_dump_json(), encoding="utf-8")
