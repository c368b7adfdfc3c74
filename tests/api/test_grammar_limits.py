"""Grammars that turn out to be beyond the limits while the answer is written."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from llguidance import LLParserLimits

from evermini.text import grammar
from tests.serving import HELLO

# The end differs from test to test, so that none finds another's compiled grammar.
HARD = 'start: "Yes, I think so: " X\nX: /([ab]{1,3}|[bc]{2,5}){1,40}%s/ & ~/(?s:.)*ab(c|a){3}b(?s:.)*/'
STINGY = LLParserLimits(step_lexer_fuel=3000, verbose_errors=False)


def ask(client: openai.OpenAI, lark: str, **params: Any) -> Any:
    return client.with_options(max_retries=2).chat.completions.create(
        model="nano", messages=HELLO, max_tokens=20, extra_body={"x_evermini": {"grammar": lark}}, **params
    )  # fmt: skip


def check(error: openai.APIError) -> None:
    assert error.code == "grammar_limit_exceeded"
    assert error.type == "invalid_request_error"
    assert "Simplify" in error.message


@pytest.fixture(autouse=True)
def _stingy(monkeypatch):
    monkeypatch.setattr(grammar, "_LIMITS", STINGY)


def test_it_is_a_400_that_clients_do_not_send_again(client, httpx_requests):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, HARD % "x")
    check(caught.value)
    assert len(httpx_requests) == 1


def test_it_ends_a_stream_with_an_error(client):
    with pytest.raises(openai.APIError) as caught:
        for _ in ask(client, HARD % "y", stream=True):
            pass
    check(caught.value)


def test_it_fails_a_response(client):
    with pytest.raises(openai.BadRequestError, match="Simplify"):
        client.responses.create(
            model="nano", input="Hello!", max_output_tokens=20, extra_body={"x_evermini": {"grammar": HARD % "z"}}
        )  # fmt: skip


def test_other_requests_go_on(client):
    with pytest.raises(openai.BadRequestError):
        ask(client, HARD % "xx")
    assert client.chat.completions.create(model="nano", messages=HELLO, max_tokens=4).choices
