"""Answers of a given form, as users ask for them: through the official client, with the real nano model."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.schemas import strict_object

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "überraschend"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK: list[Any] = [{"role": "user", "content": "Describe Alice, who is 30 years old, as JSON."}]


def as_format(schema: dict[str, Any], name: str = "person", **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, **more}}


def ask(client: openai.OpenAI, response_format: Any, **params: Any) -> Any:
    arguments = {"model": "nano", "messages": ASK, "temperature": 0, "max_tokens": 200, **params}
    return client.chat.completions.create(response_format=response_format, **arguments)


def refusal(client: openai.OpenAI, response_format: Any, **params: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format, **params)
    return caught.value


def check(choice: Any, schema: dict[str, Any]) -> Any:
    assert choice.message.refusal is None
    if choice.finish_reason == "length":
        return None
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    jsonschema.validate(value, schema)
    return value


class TestJsonSchema:
    @pytest.mark.parametrize("strict", [True, False, None])
    def test_the_answer_follows_the_schema(self, client, strict):
        more = {} if strict is None else {"strict": strict}
        answer = ask(client, as_format(PERSON, **more))
        assert answer.choices[0].finish_reason == "stop"
        assert set(check(answer.choices[0], PERSON)) == {"name", "age", "tags"}

    def test_every_choice_follows_it_at_any_temperature(self, client):
        params = {"temperature": 2.0, "top_p": 0.99, "n": 8, "seed": 7, "presence_penalty": 2.0}
        answer = ask(client, as_format(PERSON, strict=True), **params)
        values = [check(choice, PERSON) for choice in answer.choices]
        assert len({json.dumps(value) for value in values}) > 1

    def test_bias_cannot_break_it(self, client):
        bias = {str(token): 100 for token in range(17, 120)}
        check(ask(client, as_format(PERSON), logit_bias=bias).choices[0], PERSON)

    def test_a_stream_says_the_same(self, client):
        whole = ask(client, as_format(PERSON, strict=True), seed=3, temperature=1)
        stream = ask(
            client,
            as_format(PERSON, strict=True),
            seed=3,
            temperature=1,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
        assert chunks[-1].usage == whole.usage

    def test_cut_by_the_limit_is_no_stop(self, client):
        answer = ask(client, as_format(PERSON, strict=True), max_tokens=5)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5

    def test_complete_at_the_limit_is_a_stop(self, client):
        whole = ask(client, as_format(PERSON))
        exact = ask(client, as_format(PERSON), max_tokens=whole.usage.completion_tokens)
        assert exact.choices[0].finish_reason == "stop"
        assert exact.choices[0].message.content == whole.choices[0].message.content

    def test_log_probabilities_are_there(self, client):
        answer = ask(client, as_format(PERSON), logprobs=True, top_logprobs=2)
        scored = answer.choices[0].logprobs.content
        assert "".join(item.token for item in scored) == answer.choices[0].message.content
        assert all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in scored)

    def test_beside_others_as_alone(self, client):
        formats = [as_format(PERSON, strict=True), {"type": "text"}, {"type": "json_object"}]
        alone = [ask(client, f, max_tokens=60).choices[0].message.content for f in formats]
        with concurrent.futures.ThreadPoolExecutor(9) as pool:
            together = list(pool.map(lambda f: ask(client, f, max_tokens=60), formats * 3))
        texts = [answer.choices[0].message.content for answer in together]
        assert texts == alone * 3

    def test_recursion_and_definitions(self, client):
        tree: dict[str, Any] = {
            "type": "object",
            "properties": {"root": {"$ref": "#/$defs/node"}},
            "required": ["root"],
            "additionalProperties": False,
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                    },
                    "required": ["value", "next"],
                    "additionalProperties": False,
                }
            },
        }
        for seed in range(3):
            answer = ask(client, as_format(tree, strict=True), seed=seed, temperature=1.0)
            check(answer.choices[0], tree)

    @pytest.mark.parametrize(
        "name",
        ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"],
    )
    def test_formats(self, client, name):
        schema = {
            "type": "object",
            "properties": {"x": {"type": "string", "format": name}},
            "required": ["x"],
            "additionalProperties": False,
        }
        answer = ask(client, as_format(schema, strict=True), n=4, temperature=1.5, seed=1)
        validator = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                validator.validate(json.loads(choice.message.content))

    def test_the_schema_counts_as_prompt(self, client):
        told = ask(client, as_format(PERSON)).usage.prompt_tokens
        assert told > ask(client, {"type": "text"}).usage.prompt_tokens + 20

    def test_a_new_client_can_leave(self, client):
        stream = ask(client, as_format(PERSON, strict=True), stream=True, n=3)
        next(iter(stream))
        stream.close()
        check(ask(client, as_format(PERSON)).choices[0], PERSON)


class Kind(BaseModel):
    kind: Literal["circle", "square"]
    size: float | None


class Drawing(BaseModel):
    """What is drawn."""

    title: str = Field(description="A short title", max_length=30)
    shapes: list[Kind] = Field(max_length=2)


class TestClient:
    def test_parse(self, client):
        answer = client.chat.completions.parse(
            model="nano",
            messages=[{"role": "user", "content": "Draw a circle."}],
            response_format=Drawing,
            temperature=0,
            max_tokens=300,
        )
        assert isinstance(answer.choices[0].message.parsed, Drawing)

    def test_a_cut_answer_is_told_as_such(self, client):
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(
                model="nano", messages=ASK, response_format=Drawing, max_tokens=3
            )

    def test_stream_helper(self, client):
        with client.chat.completions.stream(
            model="nano", messages=ASK, response_format=Drawing, temperature=0, max_tokens=300
        ) as stream:
            for _ in stream:
                pass
            parsed = stream.get_final_completion().choices[0].message.parsed
        assert isinstance(parsed, Drawing)


class TestJsonObject:
    def test_any_object(self, client):
        answer = ask(client, {"type": "json_object"}, n=4, temperature=1.0, seed=1)
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                assert isinstance(json.loads(choice.message.content), dict)

    def test_the_messages_must_say_json(self, client):
        error = refusal(
            client,
            {"type": "json_object"},
            messages=[{"role": "user", "content": "Describe Alice."}],
        )
        assert error.body == {
            "message": "'messages' must contain the word 'json' in some form, to use 'response_format' of type "
            "'json_object'.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": None,
        }


class TestGrammars:
    def test_regex(self, client):
        extra = {"x_evermini": {"regex": r"(yes|no), [a-z]{3,8}"}}
        answer = ask(client, openai.NOT_GIVEN, extra_body=extra, temperature=1.0, n=4)
        for choice in answer.choices:
            word, _, rest = choice.message.content.partition(", ")
            assert word in {"yes", "no"}
            assert 3 <= len(rest) <= 8
            assert choice.finish_reason == "stop"

    def test_lark(self, client):
        grammar = 'start: "A" (" " WORD)~2 "!"\nWORD: /[a-z]{2,6}/'
        answer = ask(client, openai.NOT_GIVEN, extra_body={"x_evermini": {"grammar": grammar}})
        words = answer.choices[0].message.content.split(" ")
        assert words[0] == "A"
        assert words[2].endswith("!")
        assert len(words) == 3

    @pytest.mark.parametrize(
        ("extension", "text"),
        [("regex", "(a"), ("grammar", "start: missing"), ("grammar", "no grammar")],
    )
    def test_wrong_ones_are_refused(self, client, extension, text):
        error = refusal(client, openai.NOT_GIVEN, extra_body={"x_evermini": {extension: text}})
        assert error.body["param"] == f"x_evermini.{extension}"
        assert error.body["message"].startswith(f"Invalid 'x_evermini.{extension}': ")

    def test_one_form_at_a_time(self, client):
        extra = {"x_evermini": {"regex": "a"}}
        error = refusal(client, as_format(PERSON), extra_body=extra)
        assert error.body["param"] == "x_evermini.regex"


class TestRefusals:
    @pytest.mark.parametrize(
        ("schema", "problem"),
        [
            (
                strict_object(y={"type": "string", "default": "a"}),
                "In context=('properties', 'y'), 'default' is not permitted.",
            ),
            (
                {"type": "object", "properties": {}, "required": []},
                "In context=(), 'additionalProperties' is required to be supplied and to be false.",
            ),
            (
                strict_object(a={"type": "array"}),
                "In context=('properties', 'a'), array schema missing items.",
            ),
            (
                {**strict_object(a={"type": "string"}, b={"type": "string"}), "required": ["a"]},
                "In context=(), 'required' is required to be supplied and to be an array including every key in "
                "properties. Missing 'b'.",
            ),
            (
                {**strict_object(a={"type": "string"}), "required": ["a", "z"]},
                "In context=(), 'required' is required to be supplied and to be an array including every key in "
                "properties. Extra required key 'z' supplied.",
            ),
            (
                {"type": "array", "items": {"type": "string"}},
                "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"array\"'.",
            ),
            (
                strict_object(a={"description": "anything"}),
                "In context=('properties', 'a'), schema must have a 'type' key.",
            ),
            (
                strict_object(a={"type": "string", "format": "uri"}),
                "In context=('properties', 'a'), 'uri' is not a valid format.",
            ),
            (
                strict_object(a={"oneOf": [{"type": "string"}]}),
                "In context=('properties', 'a'), 'oneOf' is not permitted.",
            ),
            (
                {
                    **strict_object(a={"$ref": "#/$defs/x", "description": "y"}),
                    "$defs": {"x": {"type": "string"}},
                },
                "In context=('properties', 'a'), $ref cannot have keywords {'description'}.",
            ),
        ],
    )
    def test_strict(self, client, schema, problem):
        error = refusal(client, as_format(schema, name="X", strict=True))
        assert error.body == {
            "message": f"Invalid schema for response_format 'X': {problem}",
            "type": "invalid_request_error",
            "param": "response_format",
            "code": None,
        }

    @pytest.mark.parametrize(
        ("items", "problem"),
        [
            (
                {"type": "array", "uniqueItems": True},
                "In context=('properties', 'a'), 'uniqueItems' is not supported by this server.",
            ),
            (
                {"type": "string", "not": {"pattern": "^a.*b$"}, "minLength": 3},
                "In context=('properties', 'a'), this use of 'not' is not supported by this server: it cannot be told "
                "from the outside what the schemas in it refuse.",
            ),
            (
                {"$ref": "https://example.com/x.json"},
                "In context=('properties', 'a', '$ref'), the reference 'https://example.com/x.json' leads nowhere in "
                "this schema. Others are not fetched.",
            ),
        ],
    )
    def test_what_cannot_be_enforced(self, client, items, problem):
        error = refusal(client, as_format({"type": "object", "properties": {"a": items}}, name="X"))
        assert error.body["message"] == f"Invalid schema for response_format 'X': {problem}"
        assert error.body["param"] == "response_format"

    @pytest.mark.parametrize(
        ("response_format", "param"),
        [
            ({"type": "json_schema"}, "response_format.json_schema"),
            ({"type": "xml"}, "response_format.type"),
            (as_format({}, name="no spaces"), "response_format.json_schema.name"),
            (
                {"type": "json_schema", "json_schema": {"name": "x"}},
                "response_format.json_schema.schema",
            ),
            (
                {"type": "text", "json_schema": {"name": "x", "schema": {}}},
                "response_format.json_schema",
            ),
            (as_format(PERSON, stict=True), "response_format.json_schema.stict"),
        ],
    )
    def test_malformed_formats(self, client, response_format, param):
        assert refusal(client, response_format).body["param"] == param

    def test_hostile_schemas_are_refused_soon(self, client):
        nested: Any = {"type": "string"}
        for _ in range(30):
            nested = {"allOf": [nested, {"anyOf": [nested, {"not": nested}]}]}
            if len(json.dumps(nested)) > 200_000:
                break
        choices = [
            {"anyOf": [{"type": "object", "required": [f"k{i}_{j}"]} for j in range(8)]}
            for i in range(8)
        ]
        for schema in (nested, {"allOf": choices}):
            error = refusal(client, as_format({"type": "object", "properties": {"a": schema}}))
            assert "Invalid schema for response_format 'person'" in error.body["message"]
        check(ask(client, as_format(PERSON)).choices[0], PERSON)


def test_metrics_tell_of_masks(client, base_url):
    import httpx

    ask(client, as_format(PERSON))
    text = httpx.get(f"{base_url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("evermini_grammar_")]
    values = {line.split(" ")[0].split("{")[0]: float(line.split(" ")[1]) for line in lines}
    assert values["evermini_grammar_mask_seconds_count"] > 0
    assert values["evermini_grammar_mask_seconds_sum"] > 0
    assert values["evermini_grammar_compile_seconds_count"] > 0
