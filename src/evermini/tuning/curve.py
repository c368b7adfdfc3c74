"""The loss curve of a job: on a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_SERIES = (
    ("train_loss", "training"),
    ("valid_loss", "validation (a batch)"),
    ("full_valid_loss", "validation (all)"),
)


def draw(losses: Sequence[float], *, width: int = 60, height: int = 8) -> list[str]:
    """Return the curve as lines of text, the highest first; longer ones are averaged to ``width`` columns."""
    if not losses:
        return []
    columns = min(width, len(losses))
    edges = [at * len(losses) // columns for at in range(columns + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    levels = [round(8 + (mean - low) / span * 8 * (height - 1)) for mean in means]
    lines = []
    for row in reversed(range(height)):
        bars = "".join(_EIGHTHS[max(0, min(8, level - 8 * row))] for level in levels)
        label = low + span * row / max(1, height - 1)
        lines.append(f"{label:8.3f} {bars}")
    return lines


def save(steps: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Write the curves of all losses as a picture.

    Args:
        steps: Metrics of each step, with its number in ``step``.
        path: Where to; the ending decides the format.
        title: What stands above them.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in _SERIES:
        points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
        if points:
            style = "-" if key == "train_loss" else "o-"
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
