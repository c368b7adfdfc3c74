"""What a training process tells whoever started it: one JSON object per line.

{"type": "checked", "data": {...}}            the files are good; counts, and hyperparameters without auto
{"type": "invalid", "param": "training_file", "count": 2, "errors": [...]}
{"type": "images", "done": 512}               so many of the files' images are computed
{"type": "started", "step": 0, "num_steps": 120, ...}
{"type": "metrics", "step": 1, "metrics": {"train_loss": 2.31, ...}, "seconds_left": 311.0}
{"type": "checkpoint", "step": 40, "metrics": {...}}     an adapter lies in adapters/step-40
{"type": "finished", "step": 120, "adapter_step": 120, "trained_tokens": 81234}
{"type": "stopped", "step": 57}               told to; it can go on from there
{"type": "failed", "message": "..."}
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import TextIO


class Reporter:
    """Writes reports where standard output was; what libraries print goes to standard error from then on."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, kind: str, **fields: object) -> None:
        """Write a report. Numbers that JSON does not know become null."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in fields.items()
        }
        self._out.write(json.dumps({"type": kind, **plain}, ensure_ascii=False) + "\n")
        self._out.flush()
