"""Prometheus gauges of the training in work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge

if TYPE_CHECKING:
    from evermini.storage.fine_tuning import StoredTuning

_GAUGES = {
    "train_loss": "Training loss of the last step.",
    "train_mean_token_accuracy": "Share of the learnt tokens that the model would have written, in the last step.",
    "valid_loss": "Validation loss on a batch, when last measured.",
    "full_valid_loss": "Loss on all of the validation file, when last measured.",
    "step": "Optimizer steps done.",
    "steps": "Optimizer steps in all.",
    "seconds_left": "Estimated seconds until the end.",
}


class TuningGauges:
    """Gauges by job; a job that has ended has none.

    Args:
        registry: Where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._labels: dict[str, tuple[str, str]] = {}
        self._gauges = {
            name: Gauge(
                f"evermini_fine_tuning_{name}", text, ["job", "model_name"], registry=registry
            )
            for name, text in _GAUGES.items()
        }

    def show(self, tuning: StoredTuning, report: dict[str, Any], num_steps: int) -> None:
        """Set a job's gauges from a report on a step."""
        labels = self._labels.setdefault(tuning.id, (tuning.id, str(tuning.body["model"])))
        values = {**report["metrics"], "step": report["step"], "steps": num_steps}
        values["seconds_left"] = report.get("seconds_left")
        for name, gauge in self._gauges.items():
            if values.get(name) is not None:
                gauge.labels(*labels).set(values[name])

    def forget(self, tuning_id: str) -> None:
        """Remove a job's gauges."""
        labels = self._labels.pop(tuning_id, None)
        for gauge in self._gauges.values() if labels else ():
            gauge.remove_by_labels({"job": tuning_id})
