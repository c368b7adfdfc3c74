"""Where the bulk of many documents lies, by folder, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def advice(sizes: Mapping[str, int], unit: str) -> str:
    """Return which folders are largest, and how to leave some out.

    Args:
        sizes: Of each document, by its name.
        unit: What they are counted in.
    """
    largest = ", ".join(f"{folder} ({size:,} {unit})" for folder, size in largest_folders(sizes, 5))
    return (
        f"Largest: {largest}. Name fewer folders, narrow the glob (such as 'src/**/*.py'), or leave some out with "
        "--exclude."
    )


def largest_folders(sizes: Mapping[str, int], number: int) -> list[tuple[str, int]]:
    """Return the folders (with a slash) and files that hold most, the largest first; none lies in another.

    The walk starts where the names part, and opens a folder as long as it holds more than a third of everything.
    """
    total = sum(sizes.values())
    shown = _children(sizes, "")
    while large := [
        name for name, size in shown.items() if name.endswith("/") and size * 3 > total
    ]:
        for name in large:
            del shown[name]
            shown |= _children(sizes, name)
    return sorted(shown.items(), key=lambda item: (-item[1], item[0]))[:number]


def _children(sizes: Mapping[str, int], folder: str) -> dict[str, int]:
    """Return what lies directly in a folder (``""`` or with a slash at its end), folders with all that is in them.

    A folder that holds nothing but one folder stands for that one.
    """
    found: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith(folder):
            head, slash, _ = name[len(folder) :].partition("/")
            found[folder + head + slash] += size
    if len(found) == 1 and (only := next(iter(found))).endswith("/"):
        return _children(sizes, only)
    return dict(found)
