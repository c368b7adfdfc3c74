"""What training on a file will take: tokens, time, money."""

from __future__ import annotations

import time
from typing import Any

import torch

from evermini.models.config import ModelConfig
from evermini.service.fine_tuning.spec import TrainingSpec
from evermini.tuning.data import Data
from evermini.tuning.device import pick_device, pick_dtype
from evermini.tuning.images import ImageReader

_BACKWARD = {"supervised": 2.0, "dpo": 3.0}
"""Forward passes that a token costs: its own and the backward one, which is as long since the base is frozen; for
preferences the base's opinion, too."""
_EFFICIENCY = {torch.float32: 0.5, torch.bfloat16: 0.25}
"""Of the speed of plain matrix products, what training reaches on a CPU. The rest of a step gains nothing from bf16."""


def summary(
    spec: TrainingSpec,
    config: ModelConfig,
    training: Data,
    validation: Data | None,
    images: ImageReader,
) -> dict[str, Any]:
    """Return what there is to know before the start, ``auto`` decided.

    Args:
        spec: What is wanted.
        config: The model's shape.
        training: The training file.
        validation: The validation file.
        images: What has looked at their images.
    """
    wanted = spec.hyperparameters.resolve(spec.method, len(training.examples))
    assert isinstance(wanted.n_epochs, int)
    tokens = training.num_tokens * wanted.n_epochs
    learnt = training.num_learnt * wanted.n_epochs
    seconds = seconds_for(config, tokens, learnt, spec)
    if pick_device(spec.device).type == "cpu":  # on a GPU, images are a small part of it
        seconds += images.seconds()
    return {
        "num_examples": len(training.examples),
        "num_tokens": training.num_tokens,
        "num_learnt_tokens": training.num_learnt,
        "num_images": training.num_images,
        "longest": training.longest,
        "window": config.max_position,
        "num_validation_examples": 0 if validation is None else len(validation.examples),
        "hyperparameters": wanted.model_dump(),
        "trained_tokens": tokens,
        "estimated_seconds": seconds,
    }


def seconds_for(config: ModelConfig, num_tokens: int, num_learnt: int, spec: TrainingSpec) -> float:
    """Return about how long training on so many tokens takes, from a short measurement of this machine.

    Half or double that is possible; the running job's estimate is from its own speed.

    Args:
        config: The model's shape.
        num_tokens: All that are read, all epochs together.
        num_learnt: Those of them that are learnt; the vocabulary is scored for these alone.
        spec: Method, device and precision.
    """
    per_layer = config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
    per_layer = 2 * per_layer + 3 * config.hidden_size * config.intermediate_size
    products = config.num_layers * per_layer * num_tokens
    products += config.vocab_size * config.hidden_size * num_learnt
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.options.precision, device)
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    speed = _EFFICIENCY[dtype] * _flops_per_second(config, device, dtype)
    return 2 * products * _BACKWARD[spec.method] / speed


def _flops_per_second(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    rows = torch.randn(512, config.hidden_size, device=device, dtype=dtype)
    weights = torch.randn(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
    once = 2 * rows.shape[0] * weights.numel()
    best = 0.0
    for _ in range(3):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 0.05:
            rows @ weights
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, count * once / (time.perf_counter() - begin))
    return best
