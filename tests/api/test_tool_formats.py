"""Tool calls in the formats of other families than nano's, over HTTP: a model that writes what it is told to.

However the text is cut into tokens, the calls are the same, streamed or not.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from evermini.config import load_settings
from evermini.service.runtime import ModelInfo, Runtime, ServedModel, start_worker
from evermini.text.chat import ChatTemplate
from tests.fakes import ScriptedModel, tiny_config
from tests.serving import make_client, serving, wait_for

HERMES = (Path(__file__).parents[1] / "unit" / "templates" / "qwen2.5.jinja").read_text()
LLAMA3 = """{%- if tools %}Environment: ipython
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
Answer with {"name": NAME, "parameters": {...}}.{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}{"name": "{{ message.tool_calls[0].function.name }}", "parameters": \
{{ message.tool_calls[0].function.arguments | tojson }}}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    function("get_weather", city={"type": "string"}, days={"type": "integer"}),
    function("now"),
    {"type": "custom", "custom": {"name": "note"}},
]
PARIS = '{"city": "Paris \\"}{\\" 🦙", "days": 3}'
ROME = '{"city": "Rome", "days": 1}'


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def marked(*bodies: str) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


Calls = list[tuple[str, str]]
ANSWERS: dict[str, tuple[str, str, str | None, Calls]] = {
    "marks": ("hermes", marked(call("get_weather", PARIS)), None, [("get_weather", PARIS)]),
    "text first": (
        "hermes",
        f"Let me look <tool or not>.\n{marked(call('now', '{}'))}",
        "Let me look <tool or not>.",
        [("now", "{}")],
    ),
    "several": (
        "hermes",
        marked(call("get_weather", PARIS), '{"name": "note"}\na < b', call("get_weather", ROME)),
        None,
        [("get_weather", PARIS), ("note", "a < b"), ("get_weather", ROME)],
    ),
    "a list in a code block": (
        "hermes",
        f"```json\n[\n  {call('get_weather', ROME)},\n  {call('get_weather', PARIS)}\n]\n```",
        None,
        [("get_weather", ROME), ("get_weather", PARIS)],
    ),
    "a repeat ends it": (
        "hermes",
        f"[{call('get_weather', ROME)}, {call('now', '{}')}, {call('get_weather', ROME)}, {call('now', '{}')}]",
        None,
        [("get_weather", ROME), ("now", "{}")],
    ),
    "no call": ("hermes", 'Use {"name": "x"} or `[', 'Use {"name": "x"} or `[', []),
    "llama": (
        "llama3",
        call("get_weather", PARIS, "parameters"),
        None,
        [("get_weather", PARIS)],
    ),
    "llama's text": ("llama3", "It is late.", "It is late.", []),
}


class Stage:
    """A served model whose next answer is known."""

    def __init__(self, like: ServedModel, template: str) -> None:
        self.tokenizer = copy.copy(like.tokenizer)
        self.tokenizer.chat_template = template
        tokenizer = self.tokenizer
        tokens = (i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)
        self.model = ScriptedModel(
            tiny_config(tokenizer.vocab_size, 2048),
            {tokenizer.token_bytes(i): i for i in tokens},
            min(tokenizer.eos_ids),
        )
        settings = load_settings({"model": "nano", "kv_memory": "64MiB"}).settings
        self.worker = start_worker(self.model, settings)
        info = ModelInfo("org/scripted", (), 0, self.worker.max_model_len, "fp_scripted")
        self.served = ServedModel(
            info, self.worker, self.tokenizer, ChatTemplate(self.tokenizer), like.grammars
        )

    def say(self, text: str, cuts: list[int]) -> None:
        """Let the next answer be ``text``, cut at these bytes at least, once the one before is over."""
        wait_for(lambda: self.worker.stats().running == 0)
        self.model.say(text.encode(), cuts)


@pytest.fixture(scope="module")
def stages(nano: ServedModel) -> Iterator[dict[str, tuple[Stage, openai.OpenAI]]]:
    made = {name: Stage(nano, source) for name, source in (("hermes", HERMES), ("llama3", LLAMA3))}
    with (
        serving(Runtime([made["hermes"].served])) as hermes,
        serving(Runtime([made["llama3"].served])) as llama,
    ):
        urls = {"hermes": hermes, "llama3": llama}
        yield {name: (stage, make_client(urls[name])) for name, stage in made.items()}
    for stage in made.values():
        stage.served.close(timeout=1.0)


def told(message: Any) -> tuple[str | None, Calls]:
    calls = [
        (made.custom.name, made.custom.input)
        if made.type == "custom"
        else (made.function.name, made.function.arguments)
        for made in message.tool_calls or ()
    ]
    return message.content, calls


def ask(client: openai.OpenAI, **params: Any) -> Any:
    return client.chat.completions.create(
        model="org/scripted",
        messages=[{"role": "user", "content": "Weather?"}],
        tools=TOOLS,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=400,
        **params,
    )


def streamed(client: openai.OpenAI, **params: Any) -> tuple[str | None, Calls, str | None]:
    """Put a stream together as clients do, checking what each chunk may hold."""
    text, calls, kinds, reason = "", list[list[str]](), list[str](), None
    for chunk in ask(client, stream=True, **params):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for piece in choice.delta.tool_calls or ():
            if piece.index == len(calls):
                assert piece.id
                assert piece.type
                kinds.append(piece.type)
                calls.append(["", ""])
            else:
                assert piece.index == len(calls) - 1
                assert piece.id is None
            part = piece.model_dump()[kinds[-1]]
            calls[-1][0] += part.get("name") or ""
            calls[-1][1] += part.get("arguments") or part.get("input") or ""
        reason = choice.finish_reason or reason
    return text or None, [(name, arguments) for name, arguments in calls], reason


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_read_however_they_come(stages: Any, name: str) -> None:
    family, text, content, calls = ANSWERS[name]
    stage, client = stages[family]
    rng = random.Random(name)
    every = list(range(1, len(text.encode())))
    for cuts in ([], every, *(rng.sample(every, len(every) // 3) for _ in range(3))):
        stage.say(text, cuts)
        choice = ask(client).choices[0]
        assert told(choice.message) == (content, calls)
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        stage.say(text, cuts)
        assert streamed(client) == (content, calls, choice.finish_reason)


@pytest.mark.parametrize("name", ["several", "a list in a code block", "llama"])
def test_a_cut_answer_is_the_same_streamed_or_not(stages: Any, name: str) -> None:
    family, text, _, calls = ANSWERS[name]
    stage, client = stages[family]
    for limit in (1, 9, 17):
        stage.say(text, [])
        choice = ask(client, extra_body={"max_tokens": limit}).choices[0]
        assert choice.finish_reason == "length"
        content, made = told(choice.message)
        assert all(b.startswith(a) for (_, a), (_, b) in zip(made, calls, strict=False))
        stage.say(text, [])
        assert streamed(client, extra_body={"max_tokens": limit}) == (content, made, "length")


def test_responses_have_the_calls_as_items(stages: Any) -> None:
    _, text, _, calls = ANSWERS["a list in a code block"]
    stage, client = stages["hermes"]
    stage.say(text, list(range(1, 400)))
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS[:2]]
    found = client.responses.create(
        model="org/scripted", input="Weather?", tools=flat, max_output_tokens=400
    )
    assert [(item.name, item.arguments) for item in found.output] == calls
    assert all(json.loads(item.arguments) for item in found.output)
