"""What settings' values are written like: sizes, lists, devices, paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(value: object) -> int:
    """Return bytes from ``4096``, ``"512MiB"``, ``"4G"`` (binary, as GiB) or ``"4 GB"`` (decimal).

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError("expected a size in bytes such as 4096, 512MiB or 4GiB")
        number, unit = float(match[1]), match[2].lower()
    return int(number * _UNITS[unit])


def parse_auto_bytes(value: object) -> int | Literal["auto"]:
    """Return bytes as `parse_bytes` does, or ``"auto"``.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "auto"') from None


def parse_list(value: object) -> tuple[str, ...]:
    """Return the strings of a list, or of one string with commas between.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str):
        return tuple(part for part in (part.strip() for part in value.split(",")) if part)
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ValueError("expected a list of strings, or one string separated by commas")


def parse_device(value: object) -> str:
    """Return the name of a device: auto, cpu, cuda or cuda:N.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("expected auto, cpu, cuda or cuda:N")


def parse_organization(value: object) -> str:
    """Return an organization's name.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        return value
    raise ValueError("expected up to 64 letters, digits, '-', '_' and '.'")


def parse_path(value: object) -> Path:
    """Return a path, ``~`` expanded.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str | Path):
        return Path(value).expanduser()
    raise ValueError("expected a path")


@dataclass(frozen=True)
class Parsed:
    """Annotation: pydantic runs ``parse`` on the raw value before it checks the type."""

    parse: Callable[[object], object]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.parse, handler(source))
