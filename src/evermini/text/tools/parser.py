"""Reads calls out of a model's answer while it is written.

What comes out does not depend on how the text was cut into pushes: text goes on until a call can begin, arguments go
on as they come, and nothing is shown that might still turn out to be something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evermini.text.tools.plain import PlainHeads
from evermini.text.tools.syntax import Syntax, ToolSpec


@dataclass(frozen=True)
class CallPiece:
    """What call number ``index`` gained: its tool, in its first piece, or more arguments."""

    index: int
    tool: ToolSpec | None = None
    arguments: str = ""


class CallParser:
    """Splits one answer into text and calls.

    White space around a call belongs to neither. What looks like a call and is none is text; text behind the first
    call is dropped (the grammar allows none). A call that repeats an earlier one, argument for argument, ends the
    answer and is dropped: small models that have made all of their calls begin again.

    Args:
        syntax: How the model writes calls.
        tools: What may be called.
    """

    def __init__(self, syntax: Syntax, tools: Sequence[ToolSpec]) -> None:
        self._syntax = syntax
        self._plain = PlainHeads(tools, syntax.key) if syntax.takes_plain else None
        self._is_plain = False
        self._heads = {syntax.head(tool): tool for tool in tools}
        self._state: Callable[[], bool] = (
            self._in_text if syntax.has_opener else self._before_answer
        )
        self._buffer = ""
        self._seen = ""
        """What was taken from the buffer and would be text after all if no call follows."""
        self._num_calls = 0
        self._made: list[tuple[str, str]] = []
        self._call = _OpenCall()
        self._is_repeated = False
        self._json = _JsonEnd()
        self._text: list[str] = []
        self._pieces: list[CallPiece] = []

    @property
    def has_called(self) -> bool:
        """A call has begun."""
        return self._num_calls > 0

    @property
    def has_ended(self) -> bool:
        """A call was a repeat of an earlier one: nothing that follows is shown."""
        return self._is_repeated

    def push(self, text: str) -> tuple[str, list[CallPiece]]:
        """Take more of the answer; return what text and what calls it adds."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        shown, self._text = "".join(self._text), []
        pieces, self._pieces = self._pieces, []
        return shown, pieces

    def finish(self) -> tuple[str, list[CallPiece]]:
        """Return what was held back, now that the answer is over; a call whose name is not complete is none."""
        held, self._buffer = self._buffer, ""
        if self._state in (self._in_text, self._before_answer):
            return held, []
        if self._state == self._in_input:
            self._grow(held)
        if self._state in (self._in_input, self._in_arguments):
            self._tell()
        pieces, self._pieces = self._pieces, []
        return "", pieces

    # States: each takes what it can from the buffer and returns whether another one is on now.

    def _before_answer(self) -> bool:
        """Calls are not marked: the first character decides."""
        begun = self._buffer.lstrip()
        if not begun:
            return False
        if begun.startswith("{"):
            self._seen = self._buffer[: len(self._buffer) - len(begun)]
            self._buffer = begun
            self._state = self._in_head
        else:
            self._state = self._in_plain_text
        return True

    def _in_plain_text(self) -> bool:
        """No call can follow any more."""
        self._text.append(self._buffer)
        self._buffer = ""
        return False

    def _in_text(self) -> bool:
        opener = self._syntax.opener
        at = self._buffer.find(opener)
        plain = self._plain.find(self._buffer) if self._plain else None
        if plain is not None and not 0 <= at < plain[0]:
            start, end, tool = plain
            self._text.append(self._buffer[:start].rstrip())
            self._is_plain = True
            self._begin(tool, end)
            return True
        if at >= 0:
            shown = self._buffer[:at].rstrip()
            self._text.append(shown)
            self._seen = self._buffer[len(shown) : at + len(opener)]
            self._buffer = self._buffer[at + len(opener) :]
            self._state = self._in_head
            return True
        free = len(self._buffer) - _overlap(self._buffer, opener)
        if self._plain is not None:
            free = min(free, self._plain.free(self._buffer))
        shown = self._buffer[:free].rstrip()
        self._text.append(shown)
        self._buffer = self._buffer[len(shown) :]
        return False

    def _begin(self, tool: ToolSpec, head_length: int) -> None:
        """Begin a call whose head the buffer begins with."""
        self._buffer = self._buffer[head_length:]
        self._call = _OpenCall(tool)
        self._json = _JsonEnd()
        self._grow("")
        if tool.kind == "function":
            self._state = self._in_arguments
        else:
            ends = self._syntax.ends_answer(tool)
            self._state = self._in_last_input if ends else self._in_input

    def _in_head(self) -> bool:
        for head, tool in self._heads.items():
            if self._buffer.startswith(head):
                self._begin(tool, len(head))
                return True
        if any(head.startswith(self._buffer) for head in self._heads):
            return False
        if self._num_calls:
            self._state = self._after_calls
            return True
        self._buffer = self._seen + self._buffer
        if not self._syntax.has_opener:
            self._state = self._in_plain_text
            return True
        # The mark was text: past it, for it would be found again.
        past = len(self._seen)
        self._text.append(self._buffer[:past])
        self._buffer = self._buffer[past:]
        self._state = self._in_text
        return True

    def _in_arguments(self) -> bool:
        end = self._json.find(self._buffer)
        taken = self._buffer if end is None else self._buffer[:end]
        self._grow(taken)
        self._buffer = self._buffer[len(taken) :]
        if end is None:
            return False
        if self._ends_repeated():
            return True
        if self._is_plain:
            self._state = self._between_plain
        else:
            self._expect("}" + self._syntax.closer)
        return True

    def _between_plain(self) -> bool:
        """Behind a call without marks: another one, or the end."""
        found = self._plain.find(self._buffer) if self._plain else None
        if found is None:
            return False
        _, end, tool = found
        self._begin(tool, end)
        return True

    def _in_input(self) -> bool:
        closer = self._syntax.closer
        at = self._buffer.find(closer)
        free = at if at >= 0 else len(self._buffer) - _overlap(self._buffer, closer)
        self._take_input(free)
        if at < 0:
            return False
        if not self._ends_repeated():
            self._expect(closer)
        return True

    def _in_last_input(self) -> bool:
        self._take_input(len(self._buffer))
        return False

    def _take_input(self, length: int) -> None:
        if length:
            self._grow(self._buffer[:length])
            self._buffer = self._buffer[length:]

    def _grow(self, text: str) -> None:
        """Take more of a call's arguments; they are told as soon as no earlier call begins like this."""
        call = self._call
        call.arguments += text
        if call.is_told or not any(
            name == call.name and arguments.startswith(call.arguments)
            for name, arguments in self._made
        ):
            self._tell()

    def _tell(self) -> None:
        call = self._call
        if not call.is_told:
            self._pieces.append(CallPiece(self._num_calls, call.tool))
            self._num_calls += 1
            call.is_told = True
        if new := call.arguments[call.num_told :]:
            self._pieces.append(CallPiece(self._num_calls - 1, arguments=new))
            call.num_told = len(call.arguments)

    def _ends_repeated(self) -> bool:
        """Close the call, whose end was found; return whether it is a repeat, after which nothing counts."""
        if self._call.is_told:
            self._made.append((self._call.name, self._call.arguments))
            return False
        self._is_repeated = True
        self._state = self._after_calls
        return True

    def _expect(self, end: str) -> None:
        """Go on with the end of a call, then perhaps another one."""
        wanted = end + self._syntax.separator + self._syntax.opener

        def between() -> bool:
            if self._buffer.startswith(wanted):
                self._buffer = self._buffer[len(wanted) :]
                self._state = self._in_head
                return True
            if wanted.startswith(self._buffer):
                return False
            self._state = self._after_calls
            return True

        self._state = between

    def _after_calls(self) -> bool:
        self._buffer = ""
        return False


@dataclass
class _OpenCall:
    """The call that is being read.

    Attributes:
        tool: What is called.
        arguments: As far as they were read.
        is_told: It is no repeat of an earlier call.
        num_told: Characters of the arguments that were told.
    """

    tool: ToolSpec | None = None
    arguments: str = ""
    is_told: bool = False
    num_told: int = 0

    @property
    def name(self) -> str:
        """The tool's name."""
        return self.tool.name if self.tool else ""


class _JsonEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """Return where the object ends in ``text``, the next piece, or ``None``."""
        for at, char in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that ``mark`` begins with, less than all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
