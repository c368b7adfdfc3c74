"""Predicted outputs through the official client: the same answer in fewer steps, and the counts in the usage."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

CODE = """class User:
    first_name = ""
    last_name = ""
    username = ""

    def greet(self):
        return "Hello, " + self.first_name + " " + self.last_name
"""
ASK = [{"role": "user", "content": f"Repeat this code. Answer with code only.\n\n{CODE}"}]


def ask(client: openai.OpenAI, **params: Any) -> ChatCompletion:
    defaults = {"model": "gpt-4.1-nano", "messages": ASK, "temperature": 0, "max_tokens": 80}
    return client.chat.completions.create(**{**defaults, **params})


def predicted(text: Any) -> dict[str, Any]:
    return {"type": "content", "content": text}


def metric(base_url: str, name: str) -> float:
    lines = httpx.get(f"{base_url}/metrics").text.splitlines()
    return float(
        next(line for line in lines if line.startswith(f"evermini_{name}_total")).split()[1]
    )


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_answer_is_the_same_in_fewer_steps(
    client: openai.OpenAI, base_url: str, temperature: float
) -> None:
    plain = ask(client, temperature=temperature, seed=4)
    text = plain.choices[0].message.content
    assert text
    steps, drafted = (
        metric(base_url, "engine_steps"),
        metric(base_url, "spec_decode_num_draft_tokens"),
    )
    again = ask(client, temperature=temperature, seed=4, prediction=predicted(text))
    assert again.choices == plain.choices
    assert again.usage
    assert plain.usage
    details = again.usage.completion_tokens_details
    assert details
    assert details.accepted_prediction_tokens is not None
    assert details.accepted_prediction_tokens > 0.9 * plain.usage.completion_tokens
    assert (
        details.rejected_prediction_tokens
        == again.usage.completion_tokens - plain.usage.completion_tokens
    )
    assert metric(base_url, "engine_steps") - steps < plain.usage.completion_tokens / 3
    assert metric(base_url, "spec_decode_num_draft_tokens") > drafted
    assert metric(base_url, "spec_decode_num_accepted_tokens") > 0


def test_rejected_tokens_count_as_completion_tokens(client: openai.OpenAI) -> None:
    plain = ask(client)
    wrong = ask(client, prediction=predicted("Zebras 77 quietly juggle 31 violet pianos."))
    assert wrong.choices == plain.choices
    assert wrong.usage
    assert plain.usage
    details = wrong.usage.completion_tokens_details
    assert details
    assert details.rejected_prediction_tokens
    assert details.rejected_prediction_tokens > 5
    assert (
        wrong.usage.completion_tokens
        == plain.usage.completion_tokens + details.rejected_prediction_tokens
    )
    assert wrong.usage.total_tokens == wrong.usage.prompt_tokens + wrong.usage.completion_tokens


def test_parts_streams_and_stop_strings(client: openai.OpenAI) -> None:
    plain = ask(client, stop=["last_name"])
    text = plain.choices[0].message.content
    assert text
    parts = [{"type": "text", "text": CODE[:60]}, {"type": "text", "text": CODE[60:]}]
    chunks = client.chat.completions.create(
        model="gpt-4.1-nano", messages=ASK, temperature=0, max_tokens=80, stop=["last_name"],
        prediction=predicted(parts), stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    received = list(chunks)
    assert "".join(c.choices[0].delta.content or "" for c in received if c.choices) == text
    assert received[-2].choices[0].finish_reason == "stop"
    used = received[-1].usage
    assert used
    assert used.completion_tokens_details
    assert used.completion_tokens_details.accepted_prediction_tokens


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"max_tokens": None, "max_completion_tokens": 9}, "max_completion_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_what_it_cannot_be_combined_with(
    client: openai.OpenAI, changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, prediction=predicted(CODE), **changes)
    assert error.value.param == param
    assert error.value.code == "unsupported_parameter"


def test_values_that_ask_for_nothing_can_be_combined_with_it(client: openai.OpenAI) -> None:
    ask(client, prediction=predicted(CODE), n=1, logprobs=False, presence_penalty=0, tools=[])


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ("x", "prediction"),
        ({"type": "text", "content": "x"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": []}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content[0].type"),
        ({"type": "content", "content": [{"type": "text"}]}, "prediction.content[0].text"),
        ({"type": "content", "content": "x", "more": 1}, "prediction.more"),
        ({"type": "content", "content": "word " * 9000}, "prediction"),
    ],
)
def test_malformed_predictions(client: openai.OpenAI, prediction: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, prediction=prediction)
    assert error.value.param == param
