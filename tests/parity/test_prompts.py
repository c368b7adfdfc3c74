"""What the models are sent, against `transformers` with the same checkpoint's tokenizer and template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from evermini.config import load_settings
from evermini.models import pull
from evermini.models.catalogue import find
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.service.rendering import encode
from evermini.service.schemas import parse_chat
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city: 'now' & \"today\"",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
}
TALK = [
    {"role": "system", "content": "Be brief. 12345 déjà vu"},
    {"role": "user", "content": "Hi  there\n\n don't 日本 🦙"},
    {"role": "assistant", "content": "OK"},
    {"role": "user", "content": "And 3.14?"},
]
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
    {"role": "tool", "tool_call_id": "call_2", "content": "13 C"},
]


def checkpoint_of(tier: str) -> Checkpoint:
    """Return a tier's checkpoint; all but nano only where it was fetched before."""
    home = load_settings({}).settings.home
    entry = find(tier)
    assert entry is not None
    if tier != "nano" and not (home / "models" / entry.sha256 / entry.filename).is_file():
        pytest.skip(f"the weights of {tier} are not here")
    return open_checkpoint(pull.ensure(tier, home=home))


@cache
def reference_of(path: Path) -> Any:
    """Return `transformers`' tokenizer of a file, which takes it seconds to read."""
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as `transformers` wants them: arguments decoded."""
    decoded: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in decoded:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return decoded


def prompt_of(template: ChatTemplate, body: dict[str, Any]) -> list[int]:
    request = parse_chat(body)
    return encode(template, request, [message.text() for message in request.messages])


@pytest.mark.parametrize(
    ("tier", "messages", "tools"),
    [
        ("nano", TALK, None),
        ("nano", TALK[1:], None),
        ("mini", TALK, None),
        ("mini", TALK, [TOOL]),
        ("mini", CALLED, [TOOL]),
    ],
)
def test_prompts_are_the_models_own(
    tier: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    checkpoint = checkpoint_of(tier)
    template = ChatTemplate(Tokenizer(checkpoint.tokenizer))
    body = {"model": tier, "messages": messages, "tools": tools}
    ours = prompt_of(template, {**body, "parallel_tool_calls": False} if tools else body)
    theirs = reference_of(checkpoint.path).apply_chat_template(
        with_objects(messages),
        tools=tools,
        chat_template=checkpoint.tokenizer.chat_template,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ours == theirs


def test_several_calls_are_asked_for_and_nothing_else_is_changed() -> None:
    checkpoint = checkpoint_of("mini")
    tokenizer = Tokenizer(checkpoint.tokenizer)
    template = ChatTemplate(tokenizer)
    body = {"model": "mini", "messages": TALK, "tools": [TOOL]}
    own = tokenizer.decode(prompt_of(template, {**body, "parallel_tool_calls": False}))
    ours = tokenizer.decode(prompt_of(template, body))
    before, _, rest = ours.partition("If the request names several items")
    _, _, after = rest.partition("answer in plain words.\n\n")
    assert rest
    assert before + after == own
