"""Lets a text decoder of `transformers` read images: embeddings in the place of tokens, and positions on three axes.

    let_see(model, checkpoint.config, image_token_id)
    trainer.data_collator = SeeingCollator(trainer.data_collator, store, has_axes=bool(config.rope_sections))

A batch without images is computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evermini.models.config import ModelConfig
from evermini.models.rope import rope_tables, section_tables
from evermini.service.sight import axes_of
from evermini.tuning.examples import PlacedImage
from evermini.tuning.images import ImageStore

COLUMNS = ("image_keys", "image_starts", "image_grids")
"""Of a data set in which some examples have images."""
_VALUES, _AXES = "image_values", "image_axes"

Batch = dict[str, Any]


def columns(images: Sequence[Sequence[PlacedImage]]) -> dict[str, list[Any]]:
    """Return what a data set has to say of its examples' images; nothing if there are none."""
    if not any(images):
        return {}
    return {
        "image_keys": [[image.key for image in shown] for shown in images],
        "image_starts": [[image.start for image in shown] for shown in images],
        "image_grids": [[list(image.grid or ()) for image in shown] for shown in images],
    }


class SeeingCollator:
    """Adds to a batch the embeddings of its images, in the order of their tokens, and the positions of all tokens.

    Args:
        collate: Makes the batch of everything else: all examples in one row without padding, or, of preferences, a row
            for each answer, first all better ones.
        store: Has the embeddings.
        has_axes: The model's positions have three axes.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
        store: ImageStore,
        *,
        has_axes: bool,
    ) -> None:
        self._collate = collate
        self._store = store
        self._has_axes = has_axes

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Return a batch."""
        batch = self._collate(examples)
        if not any(example.get("image_keys") for example in examples):
            return batch
        are_pairs = "prompt_ids" in examples[0]
        rows = [*examples, *examples] if are_pairs else examples
        keys = [key for row in rows for key in row["image_keys"]]
        batch[_VALUES] = torch.cat([self._store.values(key) for key in keys])
        if self._has_axes:
            length = batch["input_ids"].shape[1]
            axes = [
                axes_of(length if are_pairs else len(row["input_ids"]), _grids(row)) for row in rows
            ]
            joined = np.stack(axes, 1) if are_pairs else np.concatenate(axes, 1)[:, None]
            batch[_AXES] = torch.from_numpy(joined)
        return batch


def _grids(row: Mapping[str, Any]) -> list[tuple[int, tuple[int, int]]]:
    return [
        (start, (grid[0], grid[1]))
        for start, grid in zip(row["image_starts"], row["image_grids"], strict=True)
    ]


def let_see(model: Any, config: ModelConfig, image_token_id: int) -> None:
    """Let a model take what `SeeingCollator` adds to its batches.

    Args:
        model: Of `transformers`, with an adapter of peft's.
        config: Its shape.
        image_token_id: Token in whose places embeddings are read.
    """
    decoder = model.get_base_model().base_model
    rotary = None
    if config.rope_sections:
        rotary = decoder.rotary_emb = _AxesRotary(decoder.rotary_emb, config)

    def insert(module: Any, args: Any, given: Batch) -> tuple[Any, Batch]:
        values, axes = given.pop(_VALUES, None), given.pop(_AXES, None)
        if rotary is not None:
            rotary.axes = axes
        if values is None:
            return args, given
        ids = given.pop("input_ids")
        embeds = module.embed_tokens(ids)
        where = (ids == image_token_id)[..., None].expand_as(embeds)
        given["inputs_embeds"] = embeds.masked_scatter(where, values.to(embeds))
        return args, given

    decoder.register_forward_pre_hook(insert, with_kwargs=True)


class _AxesRotary(nn.Module):
    """Rotations of positions on three axes; of plain ones where a batch has no others.

    Attributes:
        axes: (3, B, S) of the batch in work.
    """

    def __init__(self, plain: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self._plain = plain
        self._config = config
        self._tables = rope_tables(config)
        self.axes: Tensor | None = None

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (B, S, head_dim) in the states' type."""
        if self.axes is None:
            found: tuple[Tensor, Tensor] = self._plain(states, position_ids)
            return found
        axes = self.axes
        cos, sin = (table.to(axes.device) for table in self._tables)
        turned = section_tables(self._config, cos, sin, axes.flatten(1))
        cos, sin = (
            torch.cat([part, part], -1).view(*axes.shape[1:], -1).to(states.dtype)
            for part in turned
        )
        return cos, sin
