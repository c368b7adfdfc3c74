"""trl's trainers, fed with token ids that are ready: no template, tokenizer or truncation of theirs has a say."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer, SFTTrainer

from evermini.tuning import seeing
from evermini.tuning.examples import IGNORED, Example, PreferenceExample, SupervisedExample

PAD_ID = 0
"""Fills up shorter rows of a batch; never attended to, and never learnt."""


def supervised_dataset(examples: Sequence[Example]) -> Dataset:
    """Return the sequences of the examples."""
    sequences = [
        one for example in examples for one in _checked(example, SupervisedExample).sequences
    ]
    return Dataset.from_dict(
        {
            "input_ids": [one.ids for one in sequences],
            "labels": [one.labels for one in sequences],
            **seeing.columns([one.images for one in sequences]),
        }
    )


def preference_dataset(examples: Sequence[Example]) -> Dataset:
    """Return prompts and answers."""
    pairs = [_checked(example, PreferenceExample) for example in examples]
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
            **seeing.columns([pair.images for pair in pairs]),
        }
    )


def _checked(example: Example, kind: type) -> Any:
    assert isinstance(example, kind), "a file is of one method"
    return example


def lengths(dataset: Dataset) -> np.ndarray[Any, Any]:
    """Return the tokens of each row."""
    if "input_ids" in dataset.column_names:
        return np.array([len(ids) for ids in dataset["input_ids"]])
    columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return np.array(
        [2 * len(prompt) + len(a) + len(b) for prompt, a, b in zip(*columns, strict=True)]
    )


def processing_class() -> PreTrainedTokenizerFast:
    """Return the tokenizer that trl asks for, of which it needs a padding token."""
    backend = Tokenizer(WordLevel({"<pad>": PAD_ID}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<pad>")


_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What trl's head returns for each position."""


def score_learnt_alone(trainer: Any) -> None:
    """Let a trainer compute the vocabulary's logits only where a token is learnt.

    trl's own head does so on GPUs alone; elsewhere it computes them for prompts, too, and throws them away: half of the
    time and most of the memory with a vocabulary of 152k. Losses and gradients are the same.

    Args:
        trainer: One of trl's, ready to train.
    """
    model = trainer.model.get_base_model()
    score = model.forward
    learnt: list[torch.Tensor] = []

    def keep_learnt(_: Any, __: Any, found: Any) -> Any:
        if learnt:
            found.last_hidden_state = found.last_hidden_state[:, :-1][learnt[-1]][None]
        return found

    model.base_model.register_forward_hook(keep_learnt)

    @functools.wraps(score)
    def forward(*args: Any, labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return score(*args, labels=labels, **kwargs)
        labels = labels[:, 1:]
        mask = labels != IGNORED
        learnt.append(mask)
        try:
            found = score(*args, shift_labels=labels[mask][None], fused_lm_head=True, **kwargs)
        finally:
            learnt.pop()
        scattered = {
            name: value.new_zeros(mask.shape).masked_scatter(mask, value)
            for name in _PER_TOKEN
            if (value := getattr(found, name)) is not None
        }
        return replace(found, label_mask=mask, **scattered)

    model.forward = forward


class _Ours:
    """Keeps what a data set says of images, and writes no model card: the adapter is named elsewhere."""

    _signature_columns: list[str] | None

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()  # type: ignore[misc]  # trl's, which has no types
            self._signature_columns = [*(self._signature_columns or ()), *seeing.COLUMNS]


class Supervised(_Ours, SFTTrainer):  # type: ignore[misc]  # trl has no types
    """Learns sequences by their labels."""


class Preferences(_Ours, DPOTrainer):  # type: ignore[misc]
    """Learns to tell better answers from worse ones."""

    def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
        return dataset
