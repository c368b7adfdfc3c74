"""Whether a long prompt is looked up or read as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from evermini.recall.scope import needs_whole
from evermini.service.assembly import Plan
from evermini.service.schemas import Reading
from evermini.service.sweep.tally import tally_of


@dataclass(frozen=True)
class Chosen:
    """How a long prompt is read.

    Attributes:
        is_sweep: All of it; else the excerpts that the question needs.
        note: What the caller should know of the excerpts.
    """

    is_sweep: bool
    note: str | None = None


def choose(reading: Reading, plan: Plan, limit: int) -> Chosen:
    """Return how to read a prompt that does not fit the window.

    Args:
        reading: What is asked for.
        plan: The prompt.
        limit: Longer ones are not read as a whole unless that is asked for, or code alone can do it.
    """
    if reading != "auto":
        return Chosen(reading == "sweep")
    is_tally = tally_of(plan.question) is not None
    if not is_tally and not needs_whole(plan.question):
        return Chosen(False)
    if is_tally or plan.full_tokens <= limit:
        return Chosen(True)
    return Chosen(
        False,
        f"This question seems to be about the whole text, but only excerpts of it were read: {plan.full_tokens} tokens "
        f"are more than sweep_limit ({limit}). To have all of it read, which takes long, set x_evermini.reading to "
        "'sweep'.",
    )
