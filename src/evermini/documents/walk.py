"""Which files of a folder are meant: what git would track and ripgrep would search.

Left out without a word: hidden files and folders, and what ``.gitignore`` (of every level, from the repository's root
down), ``.git/info/exclude`` and ``.ignore`` say. Symbolic links inside a folder are not followed, so nothing is
found twice and no loop has an end to miss. What is named itself is taken in any case.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

IGNORE_FILES = (".ignore", ".gitignore", ".git/info/exclude")
"""Files with patterns of what to leave out; the first kind wins, and in one kind the deepest folder."""
_GLOB = "*?["


@dataclass(frozen=True)
class Found:
    """A file of a folder.

    Attributes:
        path: Where it is.
        is_link: It is a symbolic link, which is not followed.
    """

    path: Path
    is_link: bool


class _Rules:
    """The patterns of one folder's ignore files; ``prefix`` is that folder's path, with a slash at its end."""

    def __init__(self, folder: Path) -> None:
        self.prefix = f"{str(folder).rstrip('/')}/"
        self.specs = [_read_spec(folder / name) for name in IGNORE_FILES]

    def judge(self, path: str, kind: int) -> bool | None:
        """Return whether a path (of a folder: with a slash at its end) is ignored; ``None``: no pattern says."""
        spec, relative = self.specs[kind], path.removeprefix(self.prefix)
        for pattern in reversed(spec.patterns if spec is not None else ()):
            if pattern.regex is not None and _matches_itself(pattern.regex, relative):
                return pattern.include
        return None


def _matches_itself(pattern: re.Pattern[str], path: str) -> bool:
    """Tell whether a pattern matches a path, and not just a folder above it.

    The library's patterns match what lies in a matching folder, too (their group ``ps_d`` is that folder's slash); to
    git, that has been settled when it came to the folder, and a folder taken back says nothing of what is in it.
    """
    for match in pattern.finditer(path):
        if match.groupdict().get("ps_d") is not None:
            if match.start("ps_d") == len(path) - 1:
                return True
        elif match.end() < len(path) or path[-1] != "/":  # "a/**" means what is in a
            return True
    return False


def walk(folder: Path, exclude: Sequence[str] = ()) -> Iterator[Found]:
    """Yield a folder's files, sorted by name in each folder, a subfolder's in its name's place.

    Args:
        folder: Where to look; taken even if it is hidden or ignored itself.
        exclude: More patterns to leave out, relative to the folder, as in a ``.gitignore``.

    Raises:
        OSError: A folder cannot be listed.
    """
    top = Path(os.path.abspath(folder))
    rules = [_Rules(parent) for parent in _parents_in_repository(top)]
    own = GitIgnoreSpec.from_lines(exclude)
    yield from _walk(folder, str(top), len(str(top).rstrip("/")) + 1, rules, own)


def _walk(
    folder: Path, absolute: str, top: int, outer: list[_Rules], exclude: GitIgnoreSpec
) -> Iterator[Found]:
    own = _Rules(Path(absolute))
    rules = [*outer, own] if any(own.specs) else outer
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        path = os.path.join(absolute, entry.name)
        judged = f"{path}/" if is_folder else path
        if _is_ignored(judged, rules) or exclude.match_file(judged[top:]):
            continue
        if is_folder:
            yield from _walk(folder / entry.name, path, top, rules, exclude)
        elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
            yield Found(folder / entry.name, entry.is_symlink())


def _is_ignored(path: str, rules: Sequence[_Rules]) -> bool:
    for kind in range(len(IGNORE_FILES)):
        for level in reversed(rules):
            if (ignored := level.judge(path, kind)) is not None:
                return ignored
    return False


def _parents_in_repository(folder: Path) -> list[Path]:
    """Return the folders above, from the repository's root down; none outside a repository."""
    above: list[Path] = []
    if not (folder / ".git").exists():
        for parent in folder.parents:
            above.append(parent)
            if (parent / ".git").exists():
                return above[::-1]
    return []


def _read_spec(path: Path) -> GitIgnoreSpec | None:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return GitIgnoreSpec.from_lines(lines)


def is_glob(argument: str) -> bool:
    """Tell whether a path has wildcards and is not the name of something."""
    return any(char in argument for char in _GLOB) and not os.path.lexists(argument)


def walk_glob(pattern: str, exclude: Sequence[str] = ()) -> Iterator[Found]:
    """Yield the files that a glob means, as `walk` would find them; ``**`` stands for any folders.

    As with a shell's, a folder that the glob matches is taken with all that is in it.

    Raises:
        OSError: The folder before the first wildcard cannot be listed.
    """
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if any(char in part for char in _GLOB))
    base = "/".join(parts[:fixed])
    folder = Path(base or ("/" if pattern.startswith("/") else "."))
    wanted = GitIgnoreSpec.from_lines(["/" + "/".join(parts[fixed:])])
    for found in walk(folder, exclude):
        if wanted.match_file(found.path.relative_to(folder).as_posix()):
            yield found
