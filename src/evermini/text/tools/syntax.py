"""How calls look in a model's answer. Grammar and parser of a family share one `Syntax`, so that they cannot differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ToolSpec:
    """A tool that a model may call.

    Attributes:
        name: Letters, digits, ``_`` and ``-``.
        kind: A function takes JSON arguments, a custom tool takes one text.
        description: What it does.
        parameters: JSON schema of a function's arguments; ``None``: it takes none.
        definition: Grammar of a custom tool's text; ``None``: any text.
        definition_syntax: Language of ``definition``.
        path: Where ``parameters`` or ``definition`` stands in the request, for error messages.
    """

    name: str
    kind: Literal["function", "custom"] = "function"
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    definition: str | None = None
    definition_syntax: Literal["lark", "regex"] = "lark"
    path: str = "tools"


@dataclass(frozen=True)
class Syntax:
    r"""The shape of one family's calls.

    ``OPENER {"name": "f", "KEY": {"a": 1}} CLOSER SEPARATOR OPENER {"name": "g"}\nfree text CLOSER``, without
    blanks around the names in capitals. The second call is a custom tool's. JSON is written as `json.dumps` writes it.

    Attributes:
        opener: What a call begins with. Empty: an answer is all calls or, if it does not begin with a brace, text.
            Otherwise text may stand before the first call.
        closer: What a call ends with (see `ends_answer`).
        separator: Between two calls.
        key: Name of the arguments.
        tag: A special token that may stand before the calls, where the model's vocabulary has it.
        takes_plain: A call may also be written as JSON in a code block or in the open.
        max_calls: Calls in one answer that the family's template can write back.
    """

    opener: str
    closer: str
    separator: str
    key: str = "arguments"
    tag: str | None = None
    takes_plain: bool = False
    max_calls: int = 128

    def head(self, tool: ToolSpec) -> str:
        """Return a call's beginning, up to the arguments or the text."""
        if tool.kind == "custom":
            return f'{{"name": "{tool.name}"}}\n'
        return f'{{"name": "{tool.name}", "{self.key}": '

    def ends_answer(self, tool: ToolSpec) -> bool:
        """Return whether a call goes on to the end of the answer: its text cannot be told from what would follow.

        A Lark grammar may read a closing mark as more of its own text.
        """
        is_open = not self.closer or (
            tool.definition is not None and tool.definition_syntax == "lark"
        )
        return tool.kind == "custom" and is_open

    @property
    def has_opener(self) -> bool:
        """Whether calls are marked, so that text may precede them."""
        return bool(self.opener)


HERMES = Syntax(opener="<tool_call>\n", closer="\n</tool_call>", separator="\n", takes_plain=True)
"""Hermes 2 and 3, Qwen 2.5 and 3. Qwen 2.5 Coder is told of the marks and hardly ever writes them: it calls in code
blocks."""
LLAMA3 = Syntax(
    opener="", closer="", separator="\n", key="parameters", tag="<|python_tag|>", max_calls=1
)
"""Llama 3.1 to 3.3. The tag, which some of them put first, has no text."""
GENERIC = Syntax(opener="", closer="", separator="\n")
"""Models whose template knows no tools."""
