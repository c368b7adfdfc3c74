"""Calls without marks: ``{"name": "f", "arguments": {...}}`` in a code block, in a list, or in the open.

The patterns are written for Python and for llguidance (Rust) alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from evermini.text.tools.syntax import ToolSpec

BLANK = r"[ \n]*"
CLOSE = rf"{BLANK}\}}"
"""Behind the arguments."""
BETWEEN = rf"{BLANK}(```)?{BLANK},?{BLANK}(```[a-z]*)?{BLANK}\{{?"
"""Between a call and the next one's brace."""
END = r"[ \n\]\}]{0,8}(```)?\n?"
"""Behind the last call."""
_BEFORE = (rf"```[a-z_]*{BLANK}", rf"\[{BLANK}", r"\{")
"""What may lead in a call, in this order, each optional; it is no text."""


def head(name: str, key: str) -> str:
    """Return the pattern of a call's beginning, up to the arguments' brace; ``name`` is a pattern, too."""
    return rf'\{{{BLANK}"name":{BLANK}"{name}",{BLANK}"{key}": ?'


class PlainHeads:
    """Finds where such a call begins in a text that is still growing.

    Args:
        tools: What may be called.
        key: Name of the arguments.
    """

    def __init__(self, tools: Sequence[ToolSpec], key: str) -> None:
        self._tools = {tool.name: tool for tool in tools if tool.kind == "function"}
        names = "|".join(re.escape(name) for name in self._tools) or r"(?!)"
        bare = head(f"({names})", key)
        before = "".join(f"(?:{part})?" for part in _BEFORE)
        # The brace is looked at, so that the blank in front of it is certain to be all there.
        self._whole = re.compile(rf"{before}{bare}(?=\{{)")
        self._partial = _partial(key)

    def find(self, text: str) -> tuple[int, int, ToolSpec] | None:
        """Return where a call's lead-in begins, where its arguments do, and whose it is."""
        if match := self._whole.search(text):
            return match.start(), match.end(), self._tools[match[1]]
        return None

    def free(self, text: str) -> int:
        """Return how many characters are certain not to belong to a call that begins in ``text``."""
        for at, char in enumerate(text):
            if char in "`[{" and self._partial.fullmatch(text, at):
                return at
        return len(text)


@cache
def _partial(key: str) -> re.Pattern[str]:
    """Return a pattern of all beginnings of a call, whatever its name."""
    name = "[a-zA-Z0-9_-]"
    atoms = [r"\{", BLANK, *'"name":', BLANK, '"', f"{name}*", '"', ",", BLANK, *f'"{key}":', " ?"]
    nested = ""
    for atom in reversed(atoms):
        escaped = atom if len(atom) > 1 else re.escape(atom)
        nested = rf"{escaped}(?:\Z|{nested})" if nested else rf"{escaped}\Z"
    fence = rf"`(?:\Z|`(?:\Z|`[a-z_]*(?:\Z|{BLANK}(?:\Z|%s))))"
    listed = rf"\[{BLANK}(?:\Z|%s)"
    doubled = rf"\{{(?:\Z|{nested})"
    inner = f"(?:{nested}|{doubled})"
    in_list = f"(?:{inner}|{listed % inner})"
    return re.compile(f"(?:{in_list}|{fence % in_list})")
