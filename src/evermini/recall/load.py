"""From a loaded index model to a working `Recall`: its calibration is looked up, or measured now and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from evermini.models.batch import IndexModel
from evermini.recall.calibrate import OnCalibration, Plan, calibrate, default_prefix
from evermini.recall.calibration import Calibration, find_calibration, save_calibration
from evermini.recall.recall import Recall
from evermini.recall.segment import ModelTokenizer
from evermini.recall.store import SegmentStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Indexer:
    """The model that finds passages; the one that answers may be another.

    Attributes:
        model: The index model.
        tokenizer: Its tokenizer.
        weights: Its checkpoint's fingerprint.
    """

    model: IndexModel
    tokenizer: ModelTokenizer
    weights: str

    def open(
        self,
        home: Path,
        *,
        max_bytes: int | None = None,
        progress: OnCalibration = lambda _: None,
    ) -> Recall:
        """Return recall with this model; arguments as in `open_recall`."""
        return open_recall(
            self.model, self.tokenizer, self.weights, home, max_bytes=max_bytes, progress=progress
        )


def load_calibration(
    model: IndexModel, tokenizer: ModelTokenizer, weights: str, home: Path, *,
    progress: OnCalibration = lambda _: None, plan: Plan | None = None,
) -> Calibration:  # fmt: skip
    """Return a model's calibration, measuring an unknown model first (a minute or more).

    Args:
        model: The index model.
        tokenizer: Its tokenizer.
        weights: Its checkpoint's fingerprint.
        home: Evermini's home folder, where a new calibration is kept.
        progress: Told how measuring goes.
        plan: What to measure, if it must be.
    """
    found = find_calibration(home, weights)
    if found is None:
        logger.info("This model is not known: measuring which of its heads find passages, once.")
        found = calibrate(
            model, tokenizer, weights, prefix=default_prefix(tokenizer), plan=plan, progress=progress
        )  # fmt: skip
        path = save_calibration(home, found)
        chosen = found.measured["chosen"]
        logger.info(
            "Its heads rank %.0f %% of passages in the top 4: %s", 100 * chosen["recall_at_4"], path
        )
    return found


def open_recall(
    model: IndexModel, tokenizer: ModelTokenizer, weights: str, home: Path, *,
    max_bytes: int | None = None,
    gate: Callable[[], AbstractContextManager[object]] | None = None,
    progress: OnCalibration = lambda _: None,
) -> Recall:  # fmt: skip
    """Return recall with one index model; arguments as in `load_calibration`, `SegmentStore` and `Recall`."""
    calibration = load_calibration(model, tokenizer, weights, home, progress=progress)
    return Recall(model, tokenizer, SegmentStore(home, calibration, max_bytes), gate=gate)
