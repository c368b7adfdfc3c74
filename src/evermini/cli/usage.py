"""``evermini usage`` and ``evermini cost``: what was used, and what it costs here and elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings
from evermini.errors import ConfigError

if TYPE_CHECKING:
    from evermini.storage.usage import Total

_DAY = 86_400
_PRICE_SETTINGS = ("machine_price", "machine_watts", "electricity_price")


@with_settings("home", "database_url", *_PRICE_SETTINGS)
def usage(
    loaded: LoadedSettings,
    days: Annotated[int, typer.Option(min=1, help="How many days back, today included.")] = 30,
    by: Annotated[
        Literal["model", "key", "project", "day"], typer.Option(help="What a line sums up.")
    ] = "model",
) -> None:
    """Show what was used, what it would have cost elsewhere, and what it cost here.

    Elsewhere: gpt-4.1-mini and gpt-6-luna at their list prices, batches at half. Here: the time this machine was busy,
    at `machine_price` per hour, or at its watts.
    """
    import time

    from evermini.storage.database import Database
    from evermini.storage.usage import UsageStore

    now = int(time.time())
    start = (now // _DAY - days + 1) * _DAY
    column = {"model": "model", "key": "key_id", "project": "project"}.get(by)
    with Database.open(loaded.settings) as database:
        store = UsageStore(database)
        totals = store.totals(
            start,
            now + 1,
            width=_DAY if by == "day" else None,
            group_by=(*([column] if column else []), "is_batch"),
        )
        busy = store.machine_seconds(start, now + 1)
    rows: dict[str, list[Total]] = {}
    for total in totals:
        day = time.strftime("%Y-%m-%d", time.gmtime(total.start))
        rows.setdefault(str(total.group[column] or "none") if column else day, []).append(total)
    _print_usage(by, rows)
    _print_busy(loaded.settings, busy)


def cost(
    input_tokens: Annotated[
        str, typer.Option("--input", help="Prompt tokens, such as 1000M.", metavar="TOKENS")
    ] = "0",
    output_tokens: Annotated[
        str, typer.Option("--output", help="Generated tokens, such as 100M.", metavar="TOKENS")
    ] = "0",
    cached: Annotated[
        str, typer.Option(help="Of the prompt tokens, those in a cache.", metavar="TOKENS")
    ] = "0",
    batch: Annotated[bool, typer.Option("--batch", help="As a batch, at half the price.")] = False,
    hours: Annotated[
        float | None,
        typer.Option(
            min=0, help="Hours that this takes on your machine.", show_default="not known"
        ),
    ] = None,
    hour_price: Annotated[
        float | None,
        typer.Option(
            min=0, help="What an hour of it costs in US dollars.", show_default="not known"
        ),
    ] = None,
) -> None:
    """Work out what tokens cost at the list prices, and on a machine of yours.

    \b
    evermini cost --input 1000M --output 100M
    evermini cost --input 1000M --output 100M --hours 300 --hour-price 0.10
    """  # noqa: D301 (\b, a real backspace, keeps the examples' line breaks in --help)
    from evermini.service.prices import GPT_4_1_MINI, GPT_6_LUNA

    tokens = [_tokens(value) for value in (input_tokens, cached, output_tokens)]
    if tokens[1] > tokens[0]:
        raise ConfigError("More tokens are cached than sent. Lower --cached.", param="cached")
    for name, price in (("gpt-4.1-mini", GPT_4_1_MINI), ("gpt-6-luna", GPT_6_LUNA)):
        print(f"{name:<13} ${price.cost(*tokens, is_batch=batch):,.2f}")
    if hours is not None and hour_price is not None:
        print(f"{'your machine':<13} ${hours * hour_price:,.2f}")


def _print_usage(by: str, rows: dict[str, list[Total]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from evermini.service.prices import GPT_4_1_MINI, GPT_6_LUNA

    table = Table(box=None, pad_edge=False)
    for name in (by, "requests", "input", "cached", "output", "gpt-4.1-mini", "gpt-6-luna"):
        table.add_column(name, justify="left" if name == by else "right")
    everything = [total for some in rows.values() for total in some]
    for name, totals in (*rows.items(), ("total", everything)):
        dollars = [
            sum(
                price.cost(
                    total.input_tokens,
                    total.cached_tokens,
                    total.output_tokens,
                    is_batch=bool(total.group["is_batch"]),
                )
                for total in totals
            )
            for price in (GPT_4_1_MINI, GPT_6_LUNA)
        ]
        table.add_row(
            name,
            f"{sum(total.num_requests for total in totals):,}",
            f"{sum(total.input_tokens for total in totals):,}",
            f"{sum(total.cached_tokens for total in totals):,}",
            f"{sum(total.output_tokens for total in totals):,}",
            *(f"${value:,.4f}" for value in dollars),
        )
    Console(width=140).print(table)


def _print_busy(settings: Settings, seconds: float) -> None:
    from evermini.service.prices import machine_price

    price = machine_price(
        settings.machine_price, settings.machine_watts, settings.electricity_price
    )
    here = (
        f"${seconds / 3600 * price:,.4f}"
        if price is not None
        else ("unknown: set machine_price, or machine_watts and electricity_price")
    )
    print(f"This machine was busy for {seconds / 3600:,.3f} hours; cost here: {here}")


def _tokens(text: str) -> int:
    """Return a number of tokens from ``1000000``, ``1000k``, ``1M`` or ``1B``."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    clean = text.strip().lower().replace(",", "").replace("_", "")
    try:
        value = float(clean[:-1]) * units[clean[-1]] if clean[-1:] in units else float(clean)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e18:
        raise ConfigError(f"{text!r} is no number of tokens. Write 1500000, 1500k or 1.5M.")
    return round(value)
