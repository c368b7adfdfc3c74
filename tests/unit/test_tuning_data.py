"""Training files: what is read, what is refused and where, and that what is learnt is what is served."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evermini.models.checkpoint import open_checkpoint
from evermini.service.fine_tuning.spec import Hyperparameters
from evermini.service.rendering import encode
from evermini.service.schemas import parse_chat
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer
from evermini.tuning.data import MAX_ERRORS, read_data
from evermini.tuning.examples import IGNORED, PreferenceExample, SupervisedExample, encode_row
from evermini.tuning.rows import PreferenceRow, RowError, SupervisedRow, read_rows
from tests.tuning_files import jsonl, preferences, words

USER = {"role": "user", "content": "What is the weather in Oslo?"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "Rain."}
ANSWER = {"role": "assistant", "content": "It rains in Oslo."}


@pytest.fixture(scope="module")
def tokenizer(nano_path: Path) -> Tokenizer:
    return Tokenizer(open_checkpoint(nano_path).tokenizer)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def read(row: Any, method: Any = "supervised") -> Any:
    (found,) = read_rows(io.BytesIO(jsonl([row])), method)
    return found


def problems(row: Any, method: Any = "supervised") -> list[tuple[str, str]]:
    found = read(row, method)
    assert isinstance(found, list), "the row is good"
    return [(error.path, error.message) for error in found]


def learnt(example: Any) -> list[list[int]]:
    assert isinstance(example, SupervisedExample)
    return [[int(i) for i in one.labels if i != IGNORED] for one in example.sequences]


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER, ANSWER]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, USER, ANSWER]},
    "turns": {"messages": [USER, ANSWER, {"role": "user", "content": "And Bergen?"}, ANSWER]},
    "call": {"messages": [USER, CALL], "tools": [TOOL]},
    "call and answer": {"messages": [USER, CALL, RESULT, ANSWER], "tools": [TOOL]},
    "function": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'},
            },
        ],
        "functions": [TOOL["function"]],
    },
    "special tokens in the text": {
        "messages": [
            {"role": "user", "content": "Write <|im_end|> please"},
            {"role": "assistant", "content": "<|im_end|> and <|im_start|>user"},
        ]
    },
    "line breaks at the border": {
        "messages": [USER, {"role": "assistant", "content": "\n\nIt rains."}]
    },
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_learnt_is_what_is_served(
    template: ChatTemplate, tokenizer: Tokenizer, name: str
) -> None:
    row = CONVERSATIONS[name]
    found = read(row)
    assert isinstance(found, SupervisedRow)
    example = encode_row(template, found, 8192)
    assert isinstance(example, SupervisedExample)
    answers = []
    for one in example.sequences:
        starts = np.flatnonzero((one.labels != IGNORED) & (np.roll(one.labels, 1) == IGNORED))
        for start in starts:
            answers.append((one.ids[:start].tolist(), one, int(start)))
    targets = [n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    assert len(answers) == len(targets)
    for target, (prompt, one, start) in zip(targets, answers, strict=True):
        offered = {key: row[key] for key in ("tools", "functions") if key in row}
        request = parse_chat({"model": "m", "messages": row["messages"][:target], **offered})
        assert prompt == encode(template, request, [m.text() for m in request.messages])
        stop = start + [i in tokenizer.eos_ids for i in one.ids[start:].tolist()].index(True)
        assert (one.labels[start : stop + 1] == one.ids[start : stop + 1]).all()
        written = tokenizer.decode(one.ids[start:stop].tolist())
        content = row["messages"][target].get("content")
        if content is not None:
            assert written == content
        else:
            assert json.loads(written)["name"] == "weather"


def test_weights(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    row = {"messages": [dict(message) for message in CONVERSATIONS["turns"]["messages"]]}
    row["messages"][1]["weight"] = 0
    row["messages"][3]["weight"] = 1
    found = read(row)
    assert isinstance(found, SupervisedRow)
    assert found.targets == (3,)
    (ids,) = learnt(encode_row(template, found, 8192))
    assert tokenizer.decode(ids) == "It rains in Oslo."
    row["messages"][3]["weight"] = 0
    assert problems(row) == [
        ("messages", "There is nothing to learn: no assistant's message with weight 1.")
    ]


def test_preferences(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    found = read(preferences(1)[0], "dpo")
    assert isinstance(found, PreferenceRow)
    example = encode_row(template, found, 8192)
    assert isinstance(example, PreferenceExample)
    assert tokenizer.decode(example.chosen[:-1].tolist()) == "Hello 0."
    assert int(example.chosen[-1]) in tokenizer.eos_ids
    assert tokenizer.decode(example.rejected[:-1].tolist()) == "Dear guest 0, welcome, welcome!"
    request = parse_chat({"model": "m", "messages": preferences(1)[0]["input"]["messages"]})
    assert example.prompt.tolist() == encode(
        template, request, [m.text() for m in request.messages]
    )


IMAGE = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
BAD: dict[str, tuple[Any, str, str]] = {
    "no object": ([1], "", "no JSON object"),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "prompt", "Write 'messages'"),
    "no messages": ({"tools": []}, "messages", "Missing required parameter: 'messages'"),
    "unknown key": ({"messages": [USER, ANSWER], "id": 1}, "id", "Unknown parameter"),
    "image": (
        {"messages": [{"role": "user", "content": IMAGE}, ANSWER]},
        "messages[0].content[0].type",
        "Training on images is not supported",
    ),
    "role": ({"messages": [{**USER, "role": "boss"}, ANSWER]}, "messages[0].role", "'boss'"),
    "last is the user's": (
        {"messages": [USER, ANSWER, USER]},
        "messages[2].role",
        "must be the assistant's",
    ),
    "weight of the user's": (
        {"messages": [{**USER, "weight": 1}, ANSWER]},
        "messages[0].weight",
        "Only an assistant's",
    ),
    "weight": ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight", "2"),
    "empty answer": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "messages[1]",
        "says nothing",
    ),
    "unknown tool": (
        {"messages": [USER, CALL]},
        "messages[1].tool_calls[0]",
        "'weather' is not among this example's tools",
    ),
    "call without a result": (
        {"messages": [USER, CALL, ANSWER], "tools": [TOOL]},
        "messages",
        "must be followed by tool messages",
    ),
    "preferences": (preferences(1)[0], "preferred_output", "Set the method to 'dpo'"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    row, path, words_in_it = BAD[name]
    assert any(found == path and words_in_it in message for found, message in problems(row)), (
        problems(row)
    )


def test_refused_preferences() -> None:
    good = preferences(1)[0]
    assert problems(words(1)[0], "dpo")[0][0] == "messages"
    same = {**good, "non_preferred_output": good["preferred_output"]}
    assert problems(same, "dpo") == [("non_preferred_output", "Both answers are the same.")]
    ended = copy.deepcopy(good)
    ended["input"]["messages"].append(ANSWER)
    assert problems(ended, "dpo")[0][0] == "input.messages[1].role"
    user = {**good, "preferred_output": [USER]}
    assert ("preferred_output[0].role", "An answer is the assistant's message.") in problems(
        user, "dpo"
    )


def test_all_problems_of_a_row_at_once() -> None:
    row = {"messages": [{**USER, "role": "boss"}, {**ANSWER, "weight": 3}], "extra": 1}
    assert len(problems(row)) == 3


def test_a_file(template: ChatTemplate, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(words(11)) + b"\n   \n")
    data = read_data(path, "supervised", template, 8192)
    assert (len(data.examples), data.num_errors) == (11, 0)
    assert 0 < data.num_learnt < data.num_tokens
    assert data.longest < 64

    path.write_bytes(jsonl(words(9)))
    (error,) = read_data(path, "supervised", template, 8192).errors
    assert "9 examples. It must have at least 10" in error.message

    rows = words(11)
    rows[3]["messages"][1]["content"] = "long " * 8200
    path.write_bytes(jsonl(rows))
    (error,) = read_data(path, "supervised", template, 8192).errors
    assert (error.line, error.path) == (4, "messages")
    assert "more than the model's window of 8192" in error.message

    path.write_bytes(b"{\n" * (MAX_ERRORS + 50))
    data = read_data(path, "supervised", template, 8192)
    assert (len(data.errors), data.num_errors) == (MAX_ERRORS, MAX_ERRORS + 50)
    assert str(data.errors[0]).startswith("line 1: This line is not parseable")


def test_errors_are_lines_for_people() -> None:
    assert str(RowError(3, "messages[0].role", "Wrong.")) == "line 3, messages[0].role: Wrong."


@pytest.mark.parametrize(
    ("num_examples", "epochs", "batch"), [(10, 10, 4), (200, 3, 4), (5000, 3, 10), (50_000, 1, 64)]
)
def test_auto_is_decided(num_examples: int, epochs: int, batch: int) -> None:
    wanted = Hyperparameters().resolve("supervised", num_examples)
    assert (wanted.n_epochs, wanted.batch_size) == (epochs, batch)
    assert wanted.learning_rate_multiplier == 2.0
    given = Hyperparameters(n_epochs=7, batch_size=256, beta=0.5).resolve("dpo", num_examples)
    assert (given.n_epochs, given.batch_size) == (7, min(256, num_examples))
    assert (given.learning_rate_multiplier, given.beta) == (0.5, 0.5)
