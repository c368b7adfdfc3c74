"""``evermini contexts``: the texts that were ingested, by name or digest, folders as one line."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings

if TYPE_CHECKING:
    from evermini.recall.store import SegmentInfo

_DIGEST_SHOWN = 12
_DIGEST = re.compile(r"[0-9a-f]{6,40}")
"""What counts as a digest or the beginning of one; shorter, it would match too easily by chance."""

contexts = typer.Typer(help="Look after the texts that were ingested.", no_args_is_help=True)

_WhichArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME",
        help="Name, folder/, glob, or digest (six digits or more) as `ls` prints them; `all` for all.",
    ),
]


@contexts.command()
@with_settings("home")
def ls(
    loaded: LoadedSettings,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="What to list: name, folder/, glob or digest; each text on a line of its own.",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="A line for each text, not for folders.")
    ] = False,
) -> None:
    """List what was ingested, the most recently used first; a folder of texts is one line."""
    from evermini.recall.store import list_segments

    home = loaded.settings.home
    found = _matching(home, names) if names else list_segments(home)
    if not found:
        print("Nothing is ingested. See `evermini ingest --help`.", file=sys.stderr)
    for name, group in _grouped(found, apart=every or bool(names)):
        print(_line(name, group))


@contexts.command()
@with_settings("home")
def show(loaded: LoadedSettings, names: _WhichArgument) -> None:
    """Show texts' indexes: size, progress, place."""
    for number, info in enumerate(_matching(loaded.settings.home, names)):
        if number:
            print()
        print(f"name        {info.name or '(none)'}")
        print(f"digest      {info.digest}")
        print(f"index       {info.fingerprint}")
        print(f"tokens      {info.num_tokens:,}")
        print(f"bytes       {info.num_bytes:,}")
        print(f"chunks done {_chunks_done(loaded.settings.home, info)}")
        print(f"begins      {info.preview}")


@contexts.command()
@with_settings("home")
def rm(loaded: LoadedSettings, names: _WhichArgument) -> None:
    """Delete texts' indexes from the disk."""
    from evermini.errors import OverloadedError
    from evermini.recall.store import remove_segment

    home = loaded.settings.home
    for info in _matching(home, names):
        if not remove_segment(home, info.fingerprint, info.digest):
            raise OverloadedError(
                f"{info.name or info.digest[:_DIGEST_SHOWN]} is being ingested right now. Try again later."
            )
        print(f"{info.digest[:_DIGEST_SHOWN]} {info.name or ''} deleted".replace("  ", " "))


@contexts.command()
@with_settings("home")
def verify(loaded: LoadedSettings) -> None:
    """Read everything and name what is damaged; its next use computes that part again."""
    from evermini.recall.store import all_stores, list_segments

    stores = all_stores(loaded.settings.home)
    ours = {store.calibration.fingerprint for store in stores}
    present = list_segments(loaded.settings.home)
    checked = [info for info in present if info.fingerprint in ours]
    names = {info.digest: info.name for info in checked}
    damage = [item for store in stores for item in store.verify()]
    for item in damage:
        name = names.get(item.digest)
        print(f"{item} ({name})" if name else item)
    print(f"{len(checked)} checked, {len(damage)} damaged parts")
    if others := len(present) - len(checked):
        print(f"{others} of another version, not checked. `evermini contexts rm` deletes them.")
    if damage:
        raise typer.Exit(1)


def _chunks_done(home: Path, info: SegmentInfo) -> str:
    from evermini.recall.store import all_stores

    for store in all_stores(home):
        if store.calibration.fingerprint == info.fingerprint:
            segment = store.open(info.digest)
            if segment is None:
                return "damaged"
            return f"{segment.chunks_done()} of {segment.num_chunks}"
    return "not known: an index of another version"


def _matching(home: Path, names: Sequence[str]) -> list[SegmentInfo]:
    """Return the texts that are meant, each once, the most recently used first."""
    from evermini.errors import NotFoundError
    from evermini.recall.store import list_segments

    present = list_segments(home)
    meant: set[tuple[str, str]] = set()
    for name in names:
        found = {(i.fingerprint, i.digest) for i in present if _is_meant(i, name)}
        if not found and name != "all":
            raise NotFoundError(f"No ingested text {name!r}. See `evermini contexts ls --all`.")
        meant |= found
    return [info for info in present if (info.fingerprint, info.digest) in meant]


def _is_meant(info: SegmentInfo, name: str) -> bool:
    if name == "all" or (_DIGEST.fullmatch(name) and info.digest.startswith(name)):
        return True
    if info.name is None:
        return False
    text = info.name
    folder = name.rstrip("/") + "/"
    return (
        text == name
        or re.fullmatch(re.escape(name) + r":\d+", text) is not None  # a part of a very long text
        or text.startswith(folder)
        or fnmatch.fnmatchcase(text, name)
    )


def _grouped(
    found: Sequence[SegmentInfo], *, apart: bool
) -> list[tuple[str | None, list[SegmentInfo]]]:
    """Return texts under the name of their outermost folder, in the order of ``found``."""
    groups: dict[tuple[str, str], list[SegmentInfo]] = {}
    for info in found:
        folder = _outermost(info.name) if info.name and not apart else None
        key = ("folder", folder) if folder else ("text", f"{info.fingerprint}/{info.digest}")
        groups.setdefault(key, []).append(info)
    return [(_group_name(group), group) for group in groups.values()]


def _group_name(group: Sequence[SegmentInfo]) -> str | None:
    """Return the folder that all are in, with a slash at its end; of one text, its name."""
    names = [info.name for info in group if info.name is not None]
    if len(group) == 1:
        return names[0] if names else None
    return f"{os.path.commonpath([os.path.dirname(name) for name in names])}/"


def _outermost(name: str) -> str | None:
    """Return the first folder of a path, with a slash at its end, after ``/`` and ``../``; ``None`` if it has none."""
    match = re.match(r"(?:/|(?:\.\./)+)?[^/]+/", name)
    return match[0] if match else None


def _line(name: str | None, group: Sequence[SegmentInfo]) -> str:
    from datetime import datetime

    from rich.filesize import decimal

    used = datetime.fromtimestamp(max(info.last_used for info in group)).strftime("%Y-%m-%d %H:%M")
    tokens = sum(info.num_tokens for info in group)
    size = decimal(sum(info.num_bytes for info in group))
    if len(group) == 1:
        which, shown = group[0].digest[:_DIGEST_SHOWN], name or f'"{group[0].preview[:60]}"'
    else:
        which, shown = f"{len(group):,} texts", str(name)
    return f"{which:>12}  {tokens:>11,} tokens  {size:>9}  {used}  {shown}"
