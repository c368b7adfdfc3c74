"""Flags made from the settings' declarations, so that a default or a help text is written once (`evermini.config`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from evermini.config import (
    LoadedSettings,
    Settings,
    env_name,
    flag_name,
    load_settings,
    setting_fields,
    shown_default,
)

MODEL_SETTINGS = (
    "model", "home", "weights_dir", "device", "precision", "threads", "kv_memory", "recall", "recall_index",
    "sweep_limit", "recall_disk", "prompt_disk",
)  # fmt: skip
"""The settings that matter to a command that runs a model in its own process."""

_SHORT = {"model": "-m"}

ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings file (TOML).",
        show_default="./evermini.toml, else config.toml in the home folder",
        rich_help_panel="Settings",
    ),
]


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag per named setting and ``--config``; it gets the result as its argument ``loaded``.

    ``names`` empty: every setting. Values are passed on as typed; `load_settings` alone judges them.
    """
    chosen = names or tuple(setting_fields())

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [item for item in own.parameters.values() if item.name != "loaded"]
        kinds = get_type_hints(Settings)
        flags = [_flag(name, kinds[name]) for name in chosen]
        config = _keyword("config", ConfigFlag)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in chosen}
            loaded: LoadedSettings = load_settings(given, config=values.pop("config"))
            command(loaded=loaded, **values)

        parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in kept]
        parameters += [*flags, config]
        del run.__wrapped__  # typer must see the flags, not `loaded`
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        return run

    return decorate


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _flag(name: str, kind: Any) -> inspect.Parameter:
    item = setting_fields()[name]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    flag, short = flag_name(name), _SHORT.get(name)
    if kind is bool:
        flag, metavar = f"{flag}/--no-{flag.removeprefix('--')}", None
    else:
        metavar = "|".join(choices) or item.metadata["metavar"]
    option = typer.Option(
        *filter(None, (flag, short)),
        help=f"{item.metadata['help']} (default: {shown_default(item)}; env: {env_name(name)})",
        show_default=False,
        metavar=metavar,
        rich_help_panel=item.metadata["group"],
        autocompletion=_tiers if name == "model" else (lambda: list(choices)) if choices else None,
    )
    return _keyword(name, Annotated[bool | None if kind is bool else str | None, option])


def _tiers() -> list[str]:
    from evermini.models.catalogue import CATALOGUE

    return [entry.tier for entry in CATALOGUE]
