"""Training files: one example per line, in OpenAI's formats, with everything that is wrong with them.

    {"messages": [...], "tools": [...]}                                              supervised
    {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}     dpo

An assistant's message with ``"weight": 0`` is shown to the model and not learnt. Messages of users may hold images
where the model sees; `evermini.tuning.images` looks at them. A bad line does not end the reading: its author wants to
know of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

from pydantic import Field
from pydantic_core import from_json

from evermini.errors import InvalidRequestError
from evermini.service.messages import Message, check_conversation
from evermini.service.tools import Functions, Tools, Toolset, from_functions, from_tools
from evermini.service.validation import WireModel, find_problems

Method = Literal["supervised", "dpo"]
MAX_LINE_BYTES = 160 * 1024**2
"""Room for `MAX_IMAGES` of the largest images in base64."""
MAX_IMAGES = 10
"""Images of an example (OpenAI's limit, as are those of `evermini.tuning.images`)."""
_PARTS = {
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "file": "files",
}
_BLIND = (
    "Training on images is not supported by this model, which reads text only. Serve a vision-language checkpoint "
    "under the tier (mini=/path/to/Qwen2.5-VL-3B-Instruct), or leave this example out."
)


@dataclass(frozen=True)
class RowError:
    """What is wrong with a line.

    Attributes:
        line: Its number, from 1.
        path: The field, such as ``messages[1].role``; ``""``: all of the line.
        message: Cause and remedy.
    """

    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"line {self.line}, {self.path}" if self.path else f"line {self.line}"
        return f"{where}: {self.message}"


class TrainingMessage(Message):
    """A message; ``weight`` 0 on an assistant's: it is not learnt."""

    weight: Literal[0, 1] | None = None


class _Supervised(WireModel):
    messages: Annotated[list[TrainingMessage], Field(min_length=1)]
    tools: Tools | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None


class _Input(WireModel):
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Tools | None = None
    parallel_tool_calls: bool | None = None


class _Preference(WireModel):
    input: _Input
    preferred_output: Annotated[list[Message], Field(min_length=1, max_length=1)]
    non_preferred_output: Annotated[list[Message], Field(min_length=1, max_length=1)]


@dataclass(frozen=True)
class SupervisedRow:
    """A conversation to learn from.

    Attributes:
        line: Where it stands in the file.
        messages: The last one is the assistant's.
        targets: Numbers of the messages that are learnt.
        toolset: What the model is told of.
    """

    line: int
    messages: tuple[Message, ...]
    targets: tuple[int, ...]
    toolset: Toolset


@dataclass(frozen=True)
class PreferenceRow:
    """A conversation with a better and a worse answer.

    Attributes:
        line: Where it stands in the file.
        messages: Up to the answer.
        preferred: The better answer.
        rejected: The worse one.
        toolset: What the model is told of.
    """

    line: int
    messages: tuple[Message, ...]
    preferred: Message
    rejected: Message
    toolset: Toolset


Row = SupervisedRow | PreferenceRow


def read_rows(
    file: IO[bytes], method: Method, *, sees: bool = False
) -> Iterator[Row | list[RowError]]:
    """Yield, for each line that is not blank, its example or what is wrong with it.

    Args:
        file: The lines.
        method: What they are.
        sees: The model looks at images; they are refused otherwise.
    """
    read = _supervised if method == "supervised" else _preference
    for number, raw in enumerate(iter(file.readline, b""), start=1):
        if not raw.strip():
            continue
        try:
            yield read(number, _object(raw), sees)
        except _Problems as problems:
            yield [RowError(number, path, message) for path, message in problems.found]


class _Problems(Exception):
    def __init__(self, *found: tuple[str, str]) -> None:
        super().__init__(found)
        self.found = found


def _object(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise _Problems(("", f"This line has more than {MAX_LINE_BYTES} bytes. Split it."))
    try:
        row = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise _Problems(
            ("", f"This line is not parseable as valid JSON: {error}. Write one object per line.")
        ) from None
    if not isinstance(row, dict):
        raise _Problems(("", "This line is no JSON object. Write one object per line."))
    return row


def _supervised(line: int, row: dict[str, Any], sees: bool) -> SupervisedRow:
    if "prompt" in row and "messages" not in row:
        raise _Problems(
            ("prompt", "Examples of prompt and completion are for base models. Write 'messages'.")
        )
    if "preferred_output" in row:
        raise _Problems(
            ("preferred_output", "This is an example of preferences. Set the method to 'dpo'.")
        )
    _check_media(row.get("messages"), "messages", sees)
    found = find_problems(_Supervised, row)
    if not isinstance(found, _Supervised):
        raise _Problems(*found)
    messages = found.messages
    problems = _message_problems(messages, "messages")
    for number, message in enumerate(messages):
        if message.weight is not None and message.role != "assistant":
            problems.append(
                (f"messages[{number}].weight", "Only an assistant's message has a weight.")
            )
    if messages[-1].role != "assistant":
        problems.append(
            (f"messages[{len(messages) - 1}].role", "The last message must be the assistant's.")
        )
    targets = tuple(
        number
        for number, message in enumerate(messages)
        if message.role == "assistant" and message.weight != 0
    )
    if not targets:
        problems.append(
            ("messages", "There is nothing to learn: no assistant's message with weight 1.")
        )
    toolset = _toolset(found.tools, found.functions, found.parallel_tool_calls, problems)
    problems += _call_problems(messages, toolset, "messages")
    if not problems:  # a last message with calls has no results yet, which is what is learnt
        problems += _order_problems(messages[:-1], "")
    if problems:
        raise _Problems(*problems)
    return SupervisedRow(line, tuple(messages), targets, toolset)


def _preference(line: int, row: dict[str, Any], sees: bool) -> PreferenceRow:
    if "messages" in row and "input" not in row:
        raise _Problems(
            (
                "messages",
                "This is no example of preferences. Write 'input', 'preferred_output' and 'non_preferred_output', or "
                "set the method to 'supervised'.",
            )
        )
    given = row.get("input")
    asked = given.get("messages") if isinstance(given, dict) else None
    _check_media(asked, "input.messages", sees)
    for name in ("preferred_output", "non_preferred_output"):
        _check_media(row.get(name), name, sees)
    found = find_problems(_Preference, row)
    if not isinstance(found, _Preference):
        raise _Problems(*found)
    messages = found.input.messages
    problems = _message_problems(messages, "input.messages")
    toolset = _toolset(found.input.tools, None, found.input.parallel_tool_calls, problems)
    problems += _call_problems(messages, toolset, "input.messages")
    if messages[-1].role == "assistant":
        problems.append(
            (
                f"input.messages[{len(messages) - 1}].role",
                "The input ends where the answer begins: with a user's or tool's message.",
            )
        )
    answers = []
    for name in ("preferred_output", "non_preferred_output"):
        (answer,) = getattr(found, name)
        answers.append(answer)
        problems += _message_problems([answer], name)
        problems += _call_problems([answer], toolset, name)
        if answer.role != "assistant":
            problems.append((f"{name}[0].role", "An answer is the assistant's message."))
    if answers[0] == answers[1]:
        problems.append(("non_preferred_output", "Both answers are the same."))
    if not problems:
        problems += _order_problems(messages, "input.")
    if problems:
        raise _Problems(*problems)
    return PreferenceRow(line, tuple(messages), answers[0], answers[1], toolset)


def _check_media(messages: object, path: str, sees: bool) -> None:
    """Refuse what is not learnt before the schema says so in words that do not help."""
    problems = []
    num_images = 0
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for index, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind not in _PARTS:
                continue
            where = f"{path}[{number}].content[{index}]"
            if kind == "image_url" and sees:
                num_images += 1
                problems += _image_problems(message, part, where)
            elif _PARTS[kind] != "images":
                words = f"Training on {_PARTS[kind]} is not supported. Leave this example out."
                problems.append((f"{where}.type", words))
            else:
                words = "Write images as parts of type 'image_url'." if sees else _BLIND
                problems.append((f"{where}.type", words))
    if num_images > MAX_IMAGES:
        words = f"This example has {num_images} images. It may have {MAX_IMAGES}: split it."
        problems.append((path, words))
    if problems:
        raise _Problems(*problems)


def _image_problems(
    message: dict[str, Any], part: dict[str, Any], where: str
) -> list[tuple[str, str]]:
    if (role := message.get("role")) != "user":
        words = f"Images are for messages with the role 'user', and this one's is {role!r}. Move it there."
        return [(f"{where}.type", words)]
    image = part.get("image_url")
    if isinstance(image, dict) and image.get("file_id") is not None:
        words = (
            "Images of training files are data URLs or addresses. Put the bytes in as a data URL."
        )
        return [(f"{where}.image_url.file_id", words)]
    return []


def _message_problems(messages: Sequence[Message], path: str) -> list[tuple[str, str]]:
    found = []
    for number, message in enumerate(messages):
        where = f"{path}[{number}]"
        try:
            message.check(where)
        except InvalidRequestError as error:
            found.append((error.param or where, error.message))
        says = message.content or message.refusal or message.tool_calls or message.function_call
        if message.role == "assistant" and not says:
            found.append((where, "This message of the assistant says nothing."))
    return found


def _call_problems(
    messages: Sequence[Message], toolset: Toolset, path: str
) -> list[tuple[str, str]]:
    known = {tool.name for tool in toolset.tools}
    found = []
    for number, message in enumerate(messages):
        calls = [
            (f"{path}[{number}].tool_calls[{index}]", call.name)
            for index, call in enumerate(message.tool_calls or ())
            if call.function is not None or call.custom is not None
        ]
        if message.function_call is not None:
            calls.append((f"{path}[{number}].function_call", message.function_call.name))
        for where, name in calls:
            if name not in known:
                found.append(
                    (where, f"The tool '{name}' is not among this example's tools. Add it there.")
                )
    return found


def _order_problems(messages: Sequence[Message], prefix: str) -> list[tuple[str, str]]:
    try:
        check_conversation(messages)
    except InvalidRequestError as error:
        return [(f"{prefix}{error.param or 'messages'}", error.message)]
    return []


def _toolset(
    tools: Tools | None,
    functions: Functions | None,
    parallel: bool | None,
    problems: list[tuple[str, str]],
) -> Toolset:
    try:
        if functions:
            if tools:
                problems.append(("functions", "Use 'tools' or 'functions' (deprecated), not both."))
            return from_functions(functions, None)
        return from_tools(tools, None, parallel)
    except InvalidRequestError as error:
        problems.append((error.param or "tools", error.message))
        return Toolset()
