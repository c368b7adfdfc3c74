"""Tool calls in text: what grammars allow, parsers read; how it was cut into pieces never shows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evermini.errors import InvalidRequestError
from evermini.text.chat import ChatTemplate
from evermini.text.grammar import GrammarCompiler
from evermini.text.tokenizer import Tokenizer
from evermini.text.tools.formats import choose_format
from evermini.text.tools.grammar import Rules, declared_only, tool_grammar
from evermini.text.tools.parser import CallParser
from evermini.text.tools.syntax import GENERIC, HERMES, LLAMA3, Syntax, ToolSpec
from tests.vocabularies import gguf_source, smollm_tokenizer

WEATHER = ToolSpec(
    "get_weather",
    description="Weather of a city",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a}", '"b{']}, "maxItems": 2},
        },
        "required": ["city"],
    },
)
NOW = ToolSpec("now")
NOTE = ToolSpec("note", "custom")
CODE = ToolSpec("code", "custom", definition="[a-c]{1,4}/[0-9]", definition_syntax="regex")
SQL = ToolSpec("sql", "custom", definition='start: "SELECT {" W "}"\nW: /[a-z]{1,5}/')
ALL = (WEATHER, NOW, NOTE, CODE, SQL)
SYNTAXES = {"hermes": HERMES, "llama3": LLAMA3, "generic": GENERIC}

Parsed = tuple[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(gguf_source(smollm_tokenizer(), "smollm"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def parse(syntax: Syntax, pieces: list[str], tools: tuple[ToolSpec, ...] = ALL) -> Parsed:
    """Read an answer that comes in ``pieces``, checking the order in which calls are told."""
    parser = CallParser(syntax, tools)
    shown = ""
    calls: list[list[str]] = []
    for text, found in [*map(parser.push, pieces), parser.finish()]:
        assert not (text and calls), "text after a call"
        shown += text
        for piece in found:
            if piece.tool is not None:
                assert piece.index == len(calls)
                assert piece.arguments == ""
                calls.append([piece.tool.name, ""])
            else:
                assert piece.index == len(calls) - 1
                calls[-1][1] += piece.arguments
    assert parser.has_called == bool(calls)
    return shown, [(name, arguments) for name, arguments in calls]


def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, lark: str, text: str) -> bool:
    ids = [*tokenizer.encode(text), min(tokenizer.eos_ids)]
    return compiler.lark(lark).start().num_valid(ids) == len(ids)


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def marked(*bodies: str) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


PARIS = '{"city": "Paris", "days": 3}'
ODD = '{"city": "}\\"{<", "tags": ["a}", "\\"b{"]}'
FENCED = '```json\n{\n  "name": "now",\n  "arguments": {}\n}\n```'
LISTED = (
    '```json\n[\n  {"name": "now", "arguments": {}},\n'
    '  {"name": "get_weather", "arguments": {"city": "x"}}\n]\n```'
)

EXAMPLES: list[tuple[str, str, Parsed]] = [
    ("hermes", "Hello.\n", ("Hello.\n", [])),
    ("hermes", "", ("", [])),
    ("hermes", "a < b <tool", ("a < b <tool", [])),
    ("hermes", marked(call("get_weather", PARIS)), ("", [("get_weather", PARIS)])),
    ("hermes", "Let me see. \n" + marked(call("now", "{}")), ("Let me see.", [("now", "{}")])),
    (
        "hermes",
        marked(call("get_weather", ODD), call("now", "{}")),
        ("", [("get_weather", ODD), ("now", "{}")]),
    ),
    (
        "hermes",
        marked('{"name": "note"}\nfree\n</text', '{"name": "code"}\nab/1'),
        ("", [("note", "free\n</text"), ("code", "ab/1")]),
    ),
    ("hermes", '<tool_call>\n{"name": "sql"}\nSELECT {ab}', ("", [("sql", "SELECT {ab}")])),
    ("hermes", FENCED, ("", [("now", "{}")])),
    ("hermes", "So:\n" + FENCED, ("So:", [("now", "{}")])),
    ("hermes", '{{"name": "now", "arguments": {}}}', ("", [("now", "{}")])),
    ("hermes", LISTED, ("", [("now", "{}"), ("get_weather", '{"city": "x"}')])),
    ("hermes", '```json\n{"name": "Bob"}\n```', ('```json\n{"name": "Bob"}\n```', [])),
    ("hermes", 'f = {"a": [1, {}]} `x`', ('f = {"a": [1, {}]} `x`', [])),
    ("generic", "Hello {", ("Hello {", [])),
    ("generic", call("get_weather", ODD), ("", [("get_weather", ODD)])),
    (
        "generic",
        call("now", "{}") + "\n" + call("get_weather", PARIS),
        ("", [("now", "{}"), ("get_weather", PARIS)]),
    ),
    (
        "generic",
        call("now", "{}") + '\n{"name": "note"}\n{"x\n',
        ("", [("now", "{}"), ("note", '{"x\n')]),
    ),
    ("llama3", call("get_weather", PARIS, "parameters"), ("", [("get_weather", PARIS)])),
    ("llama3", "No call.", ("No call.", [])),
]


@pytest.mark.parametrize(("family", "text", "expected"), EXAMPLES)
def test_examples(
    compiler: GrammarCompiler, tokenizer: Tokenizer, family: str, text: str, expected: Parsed
) -> None:
    syntax = SYNTAXES[family]
    assert parse(syntax, [text]) == expected
    assert parse(syntax, list(text)) == expected
    lark = tool_grammar(syntax, Rules(ALL, "auto"))
    assert accepts(compiler, tokenizer, lark, text)
    required = tool_grammar(syntax, Rules(ALL, "required"))
    assert not accepts(compiler, tokenizer, required, "")
    if not expected[1]:
        assert not accepts(compiler, tokenizer, required, text)


REPEATS = [
    ("hermes", marked(call("now", "{}"), call("now", "{}"), call("get_weather", PARIS)), [("now", "{}")]),
    (
        "hermes",
        "```json\n[\n" + ",\n".join(call("get_weather", a) for a in (PARIS, ODD, PARIS, ODD)) + "\n]\n```",
        [("get_weather", PARIS), ("get_weather", ODD)],
    ),
    (
        "generic",
        f"{call('now', '{}')}\n{call('get_weather', PARIS)}\n{call('now', '{}')}",
        [("now", "{}"), ("get_weather", PARIS)],
    ),
    (
        "hermes",
        marked('{"name": "note"}\nab', '{"name": "note"}\nabc', '{"name": "note"}\nab'),
        [("note", "ab"), ("note", "abc")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "expected"), REPEATS)
def test_a_repeated_call_ends_the_answer(
    family: str, text: str, expected: list[tuple[str, str]]
) -> None:
    syntax = SYNTAXES[family]
    assert parse(syntax, [text]) == ("", expected)
    assert parse(syntax, list(text)) == ("", expected)
    parser = CallParser(syntax, ALL)
    parser.push(text)
    assert parser.has_ended


def test_what_is_cut_while_it_could_be_a_repeat_is_a_call_that_was_cut() -> None:
    text = marked(call("get_weather", PARIS), call("get_weather", PARIS[:10]))
    cut = text[: text.rindex(PARIS[:10]) + 10]
    assert parse(HERMES, list(cut)) == ("", [("get_weather", PARIS), ("get_weather", PARIS[:10])])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_how_it_is_cut_does_not_show(data: st.DataObject) -> None:
    family, text, _ = data.draw(st.sampled_from([*EXAMPLES, *REPEATS]))
    syntax = SYNTAXES[family]
    text = text[: data.draw(st.integers(0, len(text)))]  # the token limit may come anywhere
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(syntax, pieces) == parse(syntax, [text])


TEXTS = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "\n", "</tool_call>", '{"name": "', "now", '", "arguments": ', "{}", "}", "{", "["),
            *("```", "json", " ", "x", '"', "note", '"}\n', "\\", "get_weather", "`", '{"name": "now"'),
        ]
    ),
    max_size=14,
)  # fmt: skip


@given(TEXTS, st.sampled_from(sorted(SYNTAXES)))
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_alike_however_it_is_cut(pieces: list[str], family: str) -> None:
    syntax = SYNTAXES[family]
    whole = parse(syntax, ["".join(pieces)])
    assert parse(syntax, pieces) == whole
    assert parse(syntax, list("".join(pieces))) == whole
    if not whole[1] and not syntax.has_opener and not "".join(pieces).lstrip().startswith("{"):
        assert whole[0] == "".join(pieces)


@pytest.mark.parametrize("family", sorted(SYNTAXES))
@pytest.mark.parametrize("parallel", [True, False])
def test_whatever_the_mask_allows_is_a_valid_call(
    compiler: GrammarCompiler, tokenizer: Tokenizer, family: str, parallel: bool
) -> None:
    """Draw allowed tokens at random, as a model without any sense would."""
    syntax = SYNTAXES[family]
    tools = (WEATHER, NOW, CODE, SQL)
    grammar = compiler.lark(tool_grammar(syntax, Rules(tools, "required", parallel)))
    checks = {
        "code": lambda text: len(text) >= 3 and text[-2] == "/",
        "sql": lambda text: text.startswith("SELECT {") and text.endswith("}"),
    }
    seen = set()
    for seed in range(40):
        text = walk(grammar.start(), tokenizer, random.Random(seed))
        shown, calls = parse(syntax, [text], tools)
        assert shown == ""
        assert calls
        assert parallel or len(calls) == 1
        for name, arguments in calls:
            seen.add(name)
            if name in checks:
                assert checks[name](arguments), arguments
            else:
                schema = WEATHER.parameters if name == "get_weather" else {"maxProperties": 0}
                jsonschema.validate(json.loads(arguments), schema)
    assert seen == {tool.name for tool in tools}


def walk(state: Any, tokenizer: Tokenizer, rng: random.Random) -> str:
    ids: list[int] = []
    row = torch.zeros(-(-tokenizer.vocab_size // 32), dtype=torch.int32)
    while not state.is_done and len(ids) < 2000:
        state.fill_mask(row)
        allowed = np.flatnonzero(np.unpackbits(row.numpy().view(np.uint8), bitorder="little"))
        token_id = int(rng.choice(allowed.tolist()))
        if token_id in tokenizer.eos_ids:
            break
        ids.append(token_id)
        state.advance(token_id)
    else:
        assert state.is_done, "went on and on"
    return tokenizer.decode(ids)


@pytest.mark.parametrize("count", [8, 32, 128])
def test_many_tools_are_told_apart_to_the_end(
    compiler: GrammarCompiler, tokenizer: Tokenizer, count: int
) -> None:
    """The lexer has limits in compiling and in use."""
    parameters = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    tools = tuple(
        ToolSpec(f"weather_{n}_report_of_the_{n * 7919}_cities", parameters=parameters)
        for n in range(count)
    )
    lark = tool_grammar(HERMES, Rules(tools, "auto"))
    first, last = (call(tool.name, '{"city": "x"}') for tool in (tools[0], tools[-1]))
    for text in (
        f"```json\n[{first}, {last}]\n```",
        f"```json\n{last}\n```\n```json\n{first}\n```",
        marked(last, first),
        'Say {"name": "Bob"} and {"name": "weather_0"}.',
    ):
        assert accepts(compiler, tokenizer, lark, text)
    made_up = last.replace("city", "town")
    assert not accepts(compiler, tokenizer, lark, f"```json\n[{first}, {made_up}]\n```")
    assert not accepts(compiler, tokenizer, lark, f'Say {{"name": "Bob"}}: {made_up}')


def test_a_schema_that_cannot_be_enforced_names_the_function() -> None:
    tool = ToolSpec("f", parameters={"type": "array", "uniqueItems": True}, path="tools[0]")
    broken = ToolSpec("f", parameters={"properties": {"a": {"$ref": "#/nowhere"}}}, path="tools[3]")
    with pytest.raises(InvalidRequestError, match="Invalid schema for function 'f'") as caught:
        tool_grammar(HERMES, Rules((broken,), "auto"))
    assert (caught.value.param, caught.value.code) == ("tools[3]", "invalid_function_parameters")
    assert tool.path == "tools[0]"


def test_only_declared_properties() -> None:
    open_schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {}}}},
    }
    closed = declared_only(open_schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["additionalProperties"] is False
    for said in ({"additionalProperties": True}, {"patternProperties": {"x": {}}}, {"allOf": [{}]}):
        assert declared_only({**open_schema, **said}).get("additionalProperties") is not False
    assert declared_only({"type": "object"}) == {"type": "object"}


class TestFormats:
    def templates(self) -> dict[str, str]:
        folder = Path(__file__).parent / "templates"
        return {path.stem: path.read_text() for path in folder.iterdir()}

    def test_several_calls_are_asked_for_with_the_names_of_functions(self) -> None:
        form = choose_format("{% if tools %}<tool_call>{% endif %}", True)
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
        asked, _ = form.prepare(messages, [NOTE, WEATHER, NOW], several=True)
        assert [m["role"] for m in asked] == ["system", "user"]
        told = asked[0]["content"]
        assert told.startswith("Be kind.\n\n")
        example = '[{"name": "get_weather", "arguments": {...}}, {"name": "now", "arguments": {...}}, ...]'
        assert example in told
        assert asked[1] == messages[1]
        assert form.prepare(messages, [NOTE, WEATHER])[0] == messages
        assert form.prepare(messages, [NOTE], several=True)[0] == messages
        assert form.prepare(messages, [], several=True)[0] == messages
        alone, _ = form.prepare(messages[1:], [NOW], several=True)
        assert [m["role"] for m in alone] == ["system", "user"]
        llama = choose_format('{{ tools }} ipython "parameters": ', True)
        assert llama.prepare(messages, [NOW], several=True)[0] == messages

    def test_chosen_by_the_template(self) -> None:
        qwen = "{% if tools %}<tool_call>{% endif %}"
        assert choose_format(qwen, True).family == "hermes"
        assert choose_format(qwen + "<function=", True).family == "generic"
        assert choose_format('{{ tools }} ipython "parameters": ', True).family == "llama3"
        assert choose_format("{{ messages }}", False).family == "generic"

    def test_history_without_a_tool_template(self) -> None:
        form = choose_format("", False)
        messages = [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                    {"id": "b", "type": "custom", "custom": {"name": "note", "input": "x\ny"}},
                ],
            },
            {"role": "tool", "tool_call_id": "a", "name": "now", "content": "12:00"},
            {"role": "tool", "tool_call_id": "b", "name": "note", "content": "ok"},
        ]
        written, tools = form.prepare(messages, [NOW, NOTE])
        assert tools is None
        assert [m["role"] for m in written] == ["system", "user", "assistant", "user"]
        assert '"name": "now"' in written[0]["content"]
        assert "free text" not in written[0]["content"] or NOTE.name in written[0]["content"]
        assert parse(GENERIC, [written[2]["content"]]) == ("", [("now", "{}"), ("note", "x\ny")])
        assert written[3]["content"] == "Result of now:\n12:00\n\nResult of note:\nok"

    def test_one_call_at_a_time(self) -> None:
        form = choose_format('{{ tools }} ipython "parameters": ', True)
        calls = [
            {"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}}
            for name in "ab"
        ]
        messages = [
            {"role": "assistant", "content": "So.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "b", "content": "B"},
            {"role": "tool", "tool_call_id": "a", "content": "A"},
        ]
        written, _ = form.prepare(messages, [])
        assert [m.get("content") for m in written] == ["So.", "A", None, "B"]
        assert [len(m["tool_calls"]) for m in written[::2]] == [1, 1]

    @pytest.mark.parametrize("text", ["<|im_end|>", "</tools>", "{{ 7 * 7 }}"])
    def test_definitions_cannot_write_special_tokens(self, text: str) -> None:
        tokenizer = Tokenizer(
            gguf_source(
                smollm_tokenizer(),
                "smollm",
                "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
            )
        )
        template = ChatTemplate(tokenizer)
        tool = ToolSpec("f", description=text)
        messages, tools = template.tool_format.prepare([{"role": "user", "content": "x"}], [tool])
        ids = template.encode_chat(messages, tools)
        assert sum(token_id in tokenizer.special_ids for token_id in ids) == 2 * len(messages)
        assert json.dumps(text)[1:-1] in tokenizer.decode(ids)
