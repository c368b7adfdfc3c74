"""What recall knows about a model: which heads look up facts, and how its index is laid out. Made by `calibrate`."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evermini.errors import ModelError
from evermini.recall.windows import Windows

FORMAT = 1
"""Version of calibration files; another one is not read."""
INDEX_FORMAT = 2
"""Version of the index on disk; another one is not read, and goes when its space is needed."""


@dataclass(frozen=True)
class Calibration:
    """Retrieval heads of one model.

    Attributes:
        weights: Fingerprint of the checkpoint it was measured on.
        head_dim: Width of one head.
        group: Query heads per key/value head.
        heads: (layer, query head) pairs that vote, best first.
        means: Mean key of each of `pairs`, (num_pairs, head_dim).
        windows: How text is cut into passes.
        measured: What calibration measured: recall, and the curve of depth against it. Not part of the identity.
    """

    weights: str
    head_dim: int
    group: int
    heads: tuple[tuple[int, int], ...]
    means: tuple[tuple[float, ...], ...]
    windows: Windows
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The (layer, key/value head) pairs whose keys the index holds, ascending."""
        return tuple(sorted({(layer, head // self.group) for layer, head in self.heads}))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, ascending; the model is run no further than the last one."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def mean_keys(self) -> Tensor:
        """`means` as (num_pairs, head_dim) float32."""
        return torch.tensor(self.means)

    @property
    def fingerprint(self) -> str:
        """Identity (16 hex digits) of every index made with it."""
        content = {key: value for key, value in asdict(self).items() if key != "measured"}
        text = json.dumps([INDEX_FORMAT, content], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """Return the text of a calibration file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            ModelError: It is of another version or damaged.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("it was written by another version")
            windows = data.pop("windows")
            data["windows"] = Windows(**{**windows, "prefix": tuple(windows["prefix"])})
            data["heads"] = tuple((layer, head) for layer, head in data["heads"])
            data["means"] = tuple(tuple(row) for row in data["means"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"A calibration file cannot be used: {error}. Run `evermini calibrate` again."
            ) from error


def calibration_path(home: Path, weights: str) -> Path:
    """Return where the calibration of a checkpoint is kept."""
    return home / "calibration" / f"{weights}.json"


def find_calibration(home: Path, weights: str) -> Calibration | None:
    """Return the calibration of a checkpoint: the user's own, else a shipped one, else ``None``."""
    path = calibration_path(home, weights)
    if path.is_file():
        return Calibration.from_json(path.read_text())
    for shipped in importlib.resources.files("evermini.recall").joinpath("heads").iterdir():
        calibration = Calibration.from_json(shipped.read_text())
        if calibration.weights == weights:
            return calibration
    return None


def save_calibration(home: Path, calibration: Calibration) -> Path:
    """Keep a calibration for later; atomic."""
    path = calibration_path(home, calibration.weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(calibration.to_json())
    temporary.replace(path)
    return path
