"""What tokens cost: here by OpenAI's list prices for the tier's namesake, and elsewhere for comparison."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evermini.storage.usage import Total

BATCH_SHARE = 0.5
"""What a batch costs, as a share of the price."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    cached: float
    output: float

    def cost(
        self, input_tokens: int, cached_tokens: int, output_tokens: int, *, is_batch: bool = False
    ) -> float:
        """Return what tokens cost, in US dollars.

        Args:
            input_tokens: Of prompts, cached ones included.
            cached_tokens: Those of them that were found in a cache.
            output_tokens: Generated.
            is_batch: They were a batch's.
        """
        dollars = (
            (input_tokens - cached_tokens) * self.input
            + cached_tokens * self.cached
            + output_tokens * self.output
        ) / 1e6
        return dollars * BATCH_SHARE if is_batch else dollars


GPT_4_1_MINI = Price(0.40, 0.10, 1.60)
GPT_6_LUNA = Price(0.10, 0.01, 0.50)
PRICES = {
    "gpt-4.1-nano": Price(0.10, 0.025, 0.40),
    "gpt-4.1-mini": GPT_4_1_MINI,
    "gpt-4.1": Price(2.00, 0.50, 8.00),
}
"""By the beginning of a model's id; the longest that fits counts."""
FINE_TUNED_PRICES = {
    "gpt-4.1-nano": Price(0.20, 0.05, 0.80),
    "gpt-4.1-mini": Price(0.80, 0.20, 3.20),
    "gpt-4.1": Price(3.00, 0.75, 12.00),
}
"""The same for names that begin with ``ft:``, by their base."""


TRAINING_PRICES = {"gpt-4.1-nano": 1.50, "gpt-4.1-mini": 5.00, "gpt-4.1": 25.00}
"""US dollars per million tokens trained at OpenAI, by the beginning of a model's id."""


def training_price(model: str) -> float:
    """Return what a million tokens of training cost at OpenAI; a model that has no price counts as gpt-4.1-mini."""
    fitting = [name for name in TRAINING_PRICES if model.startswith(name)]
    return TRAINING_PRICES[max(fitting, key=len, default="gpt-4.1-mini")]


def price_of(model: str) -> Price:
    """Return the list price of a model; one that has none is counted as gpt-4.1-mini."""
    prices = FINE_TUNED_PRICES if model.startswith("ft:") else PRICES
    base = model.removeprefix("ft:")
    fitting = [name for name in prices if base.startswith(name)]
    return prices[max(fitting, key=len, default="gpt-4.1-mini")]


def cost_of(totals: Iterable[Total]) -> float:
    """Return what usage costs by the list prices, in US dollars; it was summed up by model, batches apart."""
    return sum(
        price_of(str(total.group["model"])).cost(
            total.input_tokens,
            total.cached_tokens,
            total.output_tokens,
            is_batch=bool(total.group["is_batch"]),
        )
        for total in totals
    )


def machine_price(
    hour: float | None, watts: float | None, kilowatt_hour: float | None
) -> float | None:
    """Return what a busy machine costs per hour, in US dollars; ``None`` if nothing is known about it.

    Args:
        hour: What an hour of it costs, such as a cloud's price.
        watts: What it draws when it is busy; counts if ``hour`` is not given.
        kilowatt_hour: What a kilowatt-hour costs.
    """
    if hour is not None:
        return hour
    if watts is not None and kilowatt_hour is not None:
        return watts / 1000 * kilowatt_hour
    return None
