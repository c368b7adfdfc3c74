"""Tool calling on the Berkeley Function-Calling Leaderboard's Python categories, scored by its own rules.

A call is right if its function is, its arguments have the declared types, each is among the answers that count as
correct, and none is missing or made up. Several calls may come in any order. A question that no function fits is
answered right without a call.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from evermini.errors import InvalidRequestError

if TYPE_CHECKING:
    from evermini.llm import LLM

CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
)
MAX_TOKENS = 1024
"""Of an answer."""

Calls = list[tuple[str, Any]]

_TYPES = {
    "dict": "object", "HashMap": "object", "Hashtable": "object", "float": "number", "double": "number",
    "tuple": "array", "list": "array", "ArrayList": "array", "Array": "array", "Queue": "array", "Stack": "array",
    "any": "string", "Any": "string", "String": "string", "char": "string", "bool": "boolean", "long": "integer",
    "short": "integer", "byte": "integer", "Bigint": "integer",
}  # fmt: skip
_PYTHON: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One question of the benchmark.

    Attributes:
        id: The benchmark's.
        category: One of `CATEGORIES`.
        messages: The question.
        functions: As the benchmark writes them, but for names the contract allows and JSON Schema's types.
        answers: For each expected call its function and, per argument, the values that count as right.
    """

    id: str
    category: str
    messages: list[dict[str, str]]
    functions: list[dict[str, Any]]
    answers: list[tuple[str, dict[str, list[Any]]]]


@dataclass(frozen=True)
class Outcome:
    """What came of one question.

    Attributes:
        id: The task's.
        category: Likewise.
        is_right: By the benchmark's rules.
        problem: Why not; empty if it is.
        is_valid: Every call's arguments are JSON that its schema accepts (of a cut answer, all but the last).
        is_cut: The answer reached the token limit.
        calls: What was called.
        text: What was said besides.
        seconds: Time it took, among the others that ran.
    """

    id: str
    category: str
    is_right: bool
    problem: str
    is_valid: bool
    is_cut: bool
    calls: list[tuple[str, str]]
    text: str
    seconds: float


def load_tasks(folder: Path, category: str, limit: int | None = None) -> list[Task]:
    """Return a category's questions, ``limit`` of them evenly spread.

    Raises:
        InvalidRequestError: The category is unknown or its file is not there.
    """
    if category not in CATEGORIES:
        raise InvalidRequestError(
            f"No category {category!r}. Choose from: {', '.join(CATEGORIES)}."
        )
    name = f"BFCL_v4_{category}.json"
    path = folder / "bfcl" / name
    if not path.is_file():
        raise InvalidRequestError(f"{path} is not there. docs/evaluation.md says where to get it.")
    truths: dict[str, Any] = {}
    if (known := path.parent / "possible_answer" / name).is_file():
        truths = {row["id"]: row["ground_truth"] for row in _lines(known)}
    rows = list(_lines(path))
    if limit is not None and limit < len(rows):
        rows = [rows[number * len(rows) // limit] for number in range(limit)]
    return [_task(row, category, truths.get(row["id"], [])) for row in rows]


def ask(llm: LLM, task: Task, choice: str = "auto") -> Outcome:
    """Put one question to the model, greedily, with ``choice`` as ``tool_choice``."""
    began = time.perf_counter()
    tools = [{"type": "function", "function": function} for function in task.functions]
    answer = llm.chat(
        task.messages,
        tools=tools,
        tool_choice=choice,
        temperature=0,
        max_completion_tokens=MAX_TOKENS,
    )
    said = answer.choices[0]
    made = [(call.name, call.arguments) for call in said.tool_calls]
    is_cut = said.finish_reason == "length"
    calls, is_valid = _read(made[:-1] if is_cut else made, task.functions)
    problem = "cut by the token limit" if is_cut and made else judge(calls, task)
    return Outcome(
        task.id, task.category, not problem, problem, is_valid, is_cut, made, said.text,
        round(time.perf_counter() - began, 3),
    )  # fmt: skip


def run(
    llm: LLM,
    tasks: Sequence[Task],
    out: Path,
    *,
    workers: int,
    choice: str,
    progress: Callable[[Outcome], None],
) -> list[Outcome]:
    """Ask all of them, each answer kept in ``out`` at once; those that are there already are not asked again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Outcome] = {}
    if out.is_file():
        done = {row["id"]: Outcome(**row) for row in _lines(out)}
    left = [task for task in tasks if task.id not in done]
    with ThreadPoolExecutor(workers) as pool, out.open("a", encoding="utf-8") as file:
        for outcome in pool.map(lambda task: ask(llm, task, choice), left):
            done[outcome.id] = outcome
            file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
            file.flush()
            progress(outcome)
    return [done[task.id] for task in tasks]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table: per category the share of right, of valid and of cut answers."""
    lines = [
        "| category | questions | right | schema-valid | cut | seconds each |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    categories = [name for name in CATEGORIES if any(o.category == name for o in outcomes)]
    for category in categories:
        rows = [outcome for outcome in outcomes if outcome.category == category]
        right, valid, cut = (
            sum(map(count, rows)) / len(rows)
            for count in (_is_right, _is_valid, lambda outcome: outcome.is_cut)
        )
        seconds = sum(row.seconds for row in rows) / len(rows)
        lines.append(
            f"| {category} | {len(rows)} | {right:.1%} | {valid:.1%} | {cut:.1%} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def _is_right(outcome: Outcome) -> bool:
    return outcome.is_right


def _is_valid(outcome: Outcome) -> bool:
    return outcome.is_valid


def judge(calls: Calls, task: Task) -> str:
    """Return what is wrong with the calls, or ``""``."""
    if len(calls) != len(task.answers):
        return f"{len(calls)} calls instead of {len(task.answers)}"
    schemas = {function["name"]: function["parameters"] for function in task.functions}
    left = list(calls)
    for expected in task.answers:
        problems = [_compare(call, expected, schemas) for call in left]
        if "" not in problems:
            return problems[0] if len(problems) == 1 else f"no call is right for {expected[0]}"
        left.pop(problems.index(""))
    return ""


def _compare(
    call: tuple[str, Any],
    expected: tuple[str, Mapping[str, Sequence[Any]]],
    schemas: Mapping[str, Any],
) -> str:
    name, arguments = call
    wanted, allowed = expected
    if name != wanted:
        return f"called {name} instead of {wanted}"
    schema = schemas[name]
    for required in schema.get("required", ()):
        if required not in arguments:
            return f"{required} is missing"
    for key, value in arguments.items():
        if key not in allowed or key not in schema["properties"]:
            return f"{key} was not asked for"
        if not _is_possible(value, allowed[key], schema["properties"][key]):
            return f"{key} is {value!r}, not one of {allowed[key]!r}"
    for key, options in allowed.items():
        if key not in arguments and "" not in options:
            return f"{key} is missing"
    return ""


def _is_possible(value: Any, options: Sequence[Any], schema: Mapping[str, Any]) -> bool:
    expected = _PYTHON[schema.get("type", "string")]
    if not _has_type(value, expected):
        # A variable's name instead of a value counts where an answer says so.
        return any(type(option) is type(value) and option == value for option in options)
    if isinstance(value, dict):
        return any(isinstance(option, dict) and _fits(value, option) for option in options)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return any(_all_fit(value, option) for option in options if isinstance(option, list))
    return any(_plain(value) == _plain(option) for option in options)


def _has_type(value: object, expected: tuple[type, ...]) -> bool:
    return isinstance(value, expected) and (not isinstance(value, bool) or bool in expected)


def _fits(value: Mapping[str, Any], option: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether an object is among those that ``option`` spans: for each key the values that count."""
    for key, item in value.items():
        if key not in option or not any(_plain(item) == _plain(one) for one in option[key]):
            return False
    return all(key in value or "" in options for key, options in option.items())


def _all_fit(value: Sequence[Any], option: Sequence[Any]) -> bool:
    return len(value) == len(option) and all(map(_fits, value, option))


def _plain(value: Any) -> Any:
    """Return a value as it is compared: of texts neither case, blanks nor most punctuation counts."""
    if isinstance(value, str):
        return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _read(
    made: Sequence[tuple[str, str]], functions: Sequence[Mapping[str, Any]]
) -> tuple[Calls, bool]:
    """Return the calls with their arguments decoded, and whether each fits its function's schema."""
    schemas = {function["name"]: function["parameters"] for function in functions}
    calls: Calls = []
    is_valid = True
    for name, text in made:
        try:
            arguments = json.loads(text)
            jsonschema.validate(arguments, schemas[name])
        except (ValueError, KeyError, jsonschema.ValidationError):
            is_valid = False
            arguments = {}
        calls.append((name, arguments))
    return calls, is_valid


def _task(row: Mapping[str, Any], category: str, truth: Sequence[Mapping[str, Any]]) -> Task:
    functions = [
        {
            "name": _allowed_name(function["name"]),
            "description": function["description"][:1024],
            "parameters": _schema(function["parameters"]),
        }
        for function in row["function"]
    ]
    answers = [
        (_allowed_name(name), dict(options)) for call in truth for name, options in call.items()
    ]
    return Task(row["id"], category, row["question"][0], functions, answers)


def _allowed_name(name: str) -> str:
    """Return a name without the dots that the contract does not allow, as the benchmark's own client does."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64]


def _schema(schema: Any) -> Any:
    """Return a schema with JSON Schema's names of types."""
    if isinstance(schema, list):
        return [_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: {name: _schema(item) for name, item in value.items()}
        if key == "properties"
        else _schema(value)
        if key in ("items", "parameters", "anyOf")
        else value
        for key, value in schema.items()
        if key not in ("optional", "format")
    }
    if isinstance(kind := result.get("type"), str):
        result["type"] = _TYPES.get(kind, kind)
    return result


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)
