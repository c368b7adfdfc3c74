"""Trains an adapter: LoRA on a frozen base, by trl, from a job's folder, and goes on from where it was.

What it does is decided by the specification alone: the same one on the same machine gives the same adapter, whether it
was interrupted or not. Checkpoints (`STATE`) hold weights, optimizer, schedule and place in the data; they are written
at each epoch's end, every `SAVE_SECONDS`, and when training is told to stop.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, SFTConfig

from evermini.models.checkpoint import Checkpoint
from evermini.models.config import ModelConfig
from evermini.service.fine_tuning.spec import (
    ADAPTERS,
    IMAGES,
    LEARNING_RATE,
    STATE,
    TENSORBOARD,
    TrainingSpec,
)
from evermini.tuning import seeing, trainers
from evermini.tuning.base import TARGETS, load_base, load_base_4bit
from evermini.tuning.data import Data
from evermini.tuning.device import pick_device, pick_dtype
from evermini.tuning.images import ImageStore
from evermini.tuning.reports import Reporter

SAVE_SECONDS = 120.0
MAX_VALIDATIONS = 50
"""Validations on a single batch, over the whole training."""
BATCH_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens computed at a time, on average; a batch of more is computed in several goes."""
_ACTIVATION_SHARE = 0.3
"""Of the free memory that activations may take before they are recomputed in the backward pass."""
WARMUP = 0.05
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""The argument's name; the second is that of transformers before it was renamed."""
_PROGRESS = "progress.json"
_COMPLETE = "complete"
"""In a checkpoint of the training state: all of it is written, which transformers does file by file."""


def train(
    spec: TrainingSpec,
    folder: Path,
    checkpoint: Checkpoint,
    training: Data,
    validation: Data | None,
    reporter: Reporter,
    is_told_to_stop: Callable[[], bool],
) -> None:
    """Train, or go on with it, until it is done or told to stop; tell by `evermini.tuning.reports`.

    Args:
        spec: What to do, without ``auto``.
        folder: The job's.
        checkpoint: The base model's weights.
        training: The examples.
        validation: Examples to measure on.
        reporter: Told how it goes.
        is_told_to_stop: Asked after each step.

    Raises:
        ConfigError: The device is not there.
    """
    device = pick_device(spec.device)
    make = (
        trainers.supervised_dataset if spec.method == "supervised" else trainers.preference_dataset
    )
    dataset = make(training.examples)
    held_out = make(validation.examples) if validation is not None else None
    micro, steps = batches(spec, dataset, device)
    set_seed(spec.seed)  # the adapter's first weights
    dtype = pick_dtype(spec.options.precision, device)
    model = _model(spec, folder, checkpoint, device, dtype)
    checkpointing = device.type == "cuda" or _needs_checkpointing(
        checkpoint.config, _most_tokens(trainers.lengths(dataset), micro), dtype
    )
    args = _arguments(spec, folder, device, dtype, micro, steps, checkpointing)
    kind = trainers.Supervised if spec.method == "supervised" else trainers.Preferences
    trainer = kind(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=trainers.processing_class(),
    )
    if device.type == "cpu":
        trainers.score_learnt_alone(trainer)
    shown = [one for one in (dataset, held_out) if one and seeing.COLUMNS[0] in one.column_names]
    if shown:
        _let_see(trainer, checkpoint, ImageStore(folder / IMAGES))
        args.distributed_state.wait_for_everyone()  # each process has embedded a share of the images
    weights = checkpoint.fingerprint
    watch = _Watch(spec, folder, trainer, training.num_tokens, weights, reporter, is_told_to_stop)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.add_callback(_tensorboard(folder))
    trainer.train(resume_from_checkpoint=_last_state(folder))
    watch.end()


def _let_see(trainer: Any, checkpoint: Checkpoint, store: ImageStore) -> None:
    assert checkpoint.vision is not None, "images are of a model that sees"
    config = checkpoint.config
    seeing.let_see(trainer.model, config, checkpoint.vision.image_token_id)
    has_axes = bool(config.rope_sections)
    trainer.data_collator = seeing.SeeingCollator(trainer.data_collator, store, has_axes=has_axes)


def batches(spec: TrainingSpec, dataset: Dataset, device: torch.device) -> tuple[int, int]:
    """Return examples computed at a time, and how many of these make a batch."""
    batch = spec.hyperparameters.batch_size
    assert isinstance(batch, int), "resolved before"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share = max(1, batch // world)
    fitting = BATCH_TOKENS[device.type] / float(trainers.lengths(dataset).mean())
    micro = max(n for n in range(1, share + 1) if share % n == 0 and (n == 1 or n <= fitting))
    return micro, share // micro


def _model(
    spec: TrainingSpec,
    folder: Path,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    if spec.options.quantize == "4bit":
        base = load_base_4bit(checkpoint, device=device, scratch=folder / "scratch")
    else:
        base = load_base(checkpoint, device=device, dtype=dtype)
    if spec.adapter is not None:
        return PeftModel.from_pretrained(base, spec.adapter, is_trainable=True)
    config = LoraConfig(
        r=spec.options.rank,
        lora_alpha=2 * spec.options.rank,
        lora_dropout=0.0,  # nothing random in a step: going on after a crash gives the same weights
        target_modules=list(TARGETS),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def _most_tokens(lengths: np.ndarray[Any, Any], micro: int) -> int:
    """Return how many tokens ``micro`` examples drawn at random hardly ever exceed."""
    likely = micro * lengths.mean() + 3 * lengths.std() * micro**0.5
    return int(max(lengths.max(), min(likely, micro * lengths.max())))


def _needs_checkpointing(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> bool:
    """Return whether the activations of so many tokens are too much to keep."""
    per_layer = 14 * config.hidden_size + 5 * config.intermediate_size
    needed = num_tokens * config.num_layers * per_layer * dtype.itemsize
    return needed > _ACTIVATION_SHARE * psutil.virtual_memory().available


def _arguments(
    spec: TrainingSpec,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    micro: int,
    accumulated: int,
    checkpointing: bool,
) -> Any:
    wanted = spec.hyperparameters
    multiplier = wanted.learning_rate_multiplier
    assert isinstance(multiplier, float), "resolved before"
    common: dict[str, Any] = {
        "output_dir": str(folder / STATE),
        "num_train_epochs": wanted.n_epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        _CHECKPOINTING: checkpointing,
        "learning_rate": LEARNING_RATE * multiplier,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": spec.seed % 2**32,
        "data_seed": spec.seed % 2**32,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # the watch says when
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "max_length": None,
        "pad_to_multiple_of": None,
    }
    if spec.method == "supervised":
        # The examples of a batch stand in one row, each attending to itself alone: nothing is computed for padding.
        return SFTConfig(**common, padding_free=True)
    return DPOConfig(**common, beta=wanted.beta)


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder / TENSORBOARD)))


def _last_state(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, and delete those that a crash left behind."""
    state = folder / STATE
    if not state.is_dir():
        return None
    for place in state.glob("checkpoint-*"):
        if not (place / _COMPLETE).exists():
            shutil.rmtree(place, ignore_errors=True)
    last = get_last_checkpoint(str(state))
    return last and str(last)


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Reports, measures, saves and stops."""

    def __init__(
        self,
        spec: TrainingSpec,
        folder: Path,
        trainer: Any,
        num_tokens: int,
        base_weights: str,
        reporter: Reporter,
        is_told_to_stop: Callable[[], bool],
    ) -> None:
        self._spec = spec
        self._base_weights = base_weights
        self._folder = folder
        self._trainer = trainer
        self._num_tokens = num_tokens
        self._reporter = reporter
        self._is_told_to_stop = is_told_to_stop
        self._epochs: list[dict[str, float]] = []
        self._last: dict[str, float] = {}
        self._began = (time.monotonic(), 0)
        self._saved = time.monotonic()
        self._was_stopped = False
        self._validation_steps = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where it begins, and forget what came after."""
        done = self._folder / _PROGRESS
        known = json.loads(done.read_text()) if done.exists() else []
        self._epochs = [epoch for epoch in known if epoch["step"] <= state.global_step]
        self._began = (time.monotonic(), state.global_step)
        self._saved = time.monotonic()
        self._validation_steps = max(1, state.max_steps // MAX_VALIDATIONS)
        self._report(
            "started",
            step=state.global_step,
            num_steps=state.max_steps,
            base_weights=self._base_weights,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save now and then; stop if told to."""
        stop, save = self._agree(
            self._is_told_to_stop() and state.global_step < state.max_steps,
            time.monotonic() - self._saved > SAVE_SECONDS,
        )
        if stop:
            self._was_stopped = True
            control.should_save = control.should_training_stop = True
        elif save:
            control.should_save = True

    @staticmethod
    def _agree(*wishes: bool) -> list[bool]:
        """Return what the first process wishes: it alone is told, and all must do the same in the same step."""
        if not torch.distributed.is_initialized():
            return list(wishes)
        told = [list(wishes)]
        torch.distributed.broadcast_object_list(told, src=0)
        return told[0]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember when, and mark what is written as complete."""
        self._saved = time.monotonic()
        if state.is_world_process_zero:
            (self._folder / STATE / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Report a step's metrics, or a validation's."""
        names = {"loss": "train", "valid_loss": "valid", "full_valid_loss": "full_valid"}
        name = next((names[key] for key in names if key in logs), None)
        if name is None:
            return
        key = "loss" if name == "train" else f"{name}_loss"
        prefix = "" if name == "train" else "eval_"
        found = {f"{name}_loss": float(logs[key])}
        for theirs, ours in (
            ("mean_token_accuracy", "mean_token_accuracy"),
            ("rewards/accuracies", "reward_accuracy"),
        ):
            if (value := logs.get(f"{prefix}{theirs}")) is not None:
                found[f"{name}_{ours}"] = float(value)
        self._last |= found
        if name != "train":
            return
        since, before = self._began
        seconds = (time.monotonic() - since) / max(1, state.global_step - before)
        self._last = {k: v for k, v in self._last.items() if not k.startswith("valid")}
        if self._trainer.eval_dataset is not None and (
            state.global_step == 1 or state.global_step % self._validation_steps == 0
        ):
            self._validate_some(state.global_step)  # comes back here, with its own logs
        self._report(
            "metrics",
            step=state.global_step,
            metrics=self._shown("train", "valid"),
            seconds_left=seconds * (state.max_steps - state.global_step),
        )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure on all held-out examples, keep the epoch's adapter, and stop if it does not get better."""
        epochs = self._spec.hyperparameters.n_epochs
        assert isinstance(epochs, int), "resolved before"
        if state.global_step % (state.max_steps // epochs):
            return  # told to stop on the way
        if self._trainer.eval_dataset is not None:
            self._trainer.evaluate(metric_key_prefix="full_valid")
            full = self._shown("full_valid")
            self._report("metrics", step=state.global_step, metrics=full)
        self._epochs.append({"step": state.global_step, **self._last})
        if state.is_world_process_zero:
            self._keep(state.global_step)
        control.should_save = True
        patience = self._spec.options.early_stopping_patience
        if patience is not None:
            losses = [epoch["full_valid_loss"] for epoch in self._epochs]
            if len(losses) - 1 - int(np.argmin(losses)) >= patience:
                control.should_training_stop = True

    def end(self) -> None:
        """Say how it ended."""
        state = self._trainer.state
        if self._was_stopped:
            self._report("stopped", step=state.global_step)
            return
        best = self._epochs[-1]
        if self._spec.options.early_stopping_patience is not None:
            best = min(self._epochs, key=lambda epoch: epoch["full_valid_loss"])
        self._report(
            "finished",
            step=state.global_step,
            adapter_step=int(best["step"]),
            trained_tokens=self._num_tokens * len(self._epochs),
        )

    def _validate_some(self, step: int) -> None:
        """Measure on one batch, another one each time."""
        held_out, size = self._trainer.eval_dataset, self._trainer.args.per_device_eval_batch_size
        first = (step // self._validation_steps * size) % len(held_out)
        rows = held_out.select([(first + at) % len(held_out) for at in range(size)])
        self._trainer.evaluate(rows, metric_key_prefix="valid")

    def _keep(self, step: int) -> None:
        """Put the adapter where it will be found, all of it or nothing."""
        place = self._folder / ADAPTERS / f"step-{step}"
        work = place.with_name(f"{place.name}.part")
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        model.save_pretrained(work, selected_adapters=["default"])
        (work / "metrics.json").write_text(json.dumps(self._epochs[-1]))
        if place.exists():  # from before a crash
            for file in work.iterdir():
                file.replace(place / file.name)
            work.rmdir()
        else:
            work.replace(place)
        progress = self._folder / _PROGRESS
        part = progress.with_suffix(".part")
        part.write_text(json.dumps(self._epochs))
        part.replace(progress)
        self._report("checkpoint", step=step, metrics=self._epochs[-1])

    def _shown(self, *kinds: str) -> dict[str, float]:
        """Return the newest metrics of these kinds."""
        return {key: value for key, value in self._last.items() if key.startswith(kinds)}

    def _report(self, kind: str, **fields: object) -> None:
        if self._trainer.state.is_world_process_zero:
            self._reporter.send(kind, **fields)
