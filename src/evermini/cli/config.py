"""``evermini config``: every setting's effective value and where it came from."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, setting_fields


@with_settings()
def config(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each setting's effective value and where it came from.

    Flags win over EVERMINI_* variables, those over the settings file, that over the defaults.
    """
    values = {
        name: _shown(name, value) for name, value in dataclasses.asdict(loaded.settings).items()
    }
    if as_json:
        report = {
            "file": str(loaded.file) if loaded.file else None,
            "settings": {
                name: {"value": value, "source": loaded.sources[name]}
                for name, value in values.items()
            },
        }
        print(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    rows = [(name, _as_text(value), loaded.sources[name]) for name, value in values.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, text, source in rows:
        line = f"{name:<{widths[0]}}  {text:<{widths[1]}}  {source}"
        console.print(Text(line, style="dim" if source == "default" else "bold"))
    console.print(f"\nsettings file: {loaded.file or 'none'}")


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def _shown(name: str, value: Any) -> Any:
    """Return the value as printed: secrets masked, paths as text."""
    if setting_fields()[name].metadata["secret"] and value is not None:
        return "********"
    return value if isinstance(value, str | int | float | list | tuple | None) else str(value)
