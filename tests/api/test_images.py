"""Images in messages: what is read of them, what they cost, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from evermini.service.image_tokens import image_cost
from tests.images import bomb, data_url, encoded, image_part, text_image
from tests.serving import assert_error, wait_for

MODEL = "gpt-4.1-nano"
RECEIPT = encoded(text_image(["CORNER SHOP", "Coffee\t3.20", "TOTAL\t17.45"]))
QUESTION = {"type": "text", "text": "What is the total?"}


def ask(client: openai.OpenAI, *parts: dict[str, Any], **params: Any) -> Any:
    given = {"model": MODEL, "max_tokens": 8, "temperature": 0, **params}
    return client.chat.completions.create(messages=[{"role": "user", "content": [*parts]}], **given)


def test_the_text_on_an_image_reaches_the_model(client: openai.OpenAI):
    """What is not on the image cannot be echoed, so the answer tells that it was read."""
    answer = ask(
        client,
        image_part(RECEIPT),
        QUESTION,
        extra_body={"x_evermini": {"regex": r"(17\.45|63\.90|28\.11|99\.04)"}},
    )
    assert answer.choices[0].message.content == "17.45"


def test_usage_counts_images_as_openai_does(client: openai.OpenAI):
    text = ask(client, QUESTION).usage.prompt_tokens
    for options in ({}, {"detail": "low"}, {"detail": "high"}):
        usage = ask(client, image_part(RECEIPT, **options), QUESTION).usage
        expected = image_cost(480, 220, options.get("detail", "auto"), "gpt-4.1-nano-2025-04-14")
        details = usage.prompt_tokens_details
        assert details.image_tokens == expected == 259  # ceil(15 * 7 patches * 2.46)
        assert abs(usage.prompt_tokens - text - expected) <= 3
        assert details.cached_tokens <= usage.prompt_tokens
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    sent = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url(RECEIPT), "detail": "auto"},
                {"type": "input_text", "text": QUESTION["text"]},
            ],
        }
    ]
    count = client.responses.input_tokens.count(model=MODEL, input=sent).input_tokens
    answer = client.responses.create(model=MODEL, input=sent, max_output_tokens=16)
    assert answer.usage.input_tokens == count == usage.prompt_tokens


def test_an_uploaded_image_is_read_in_every_form(client: openai.OpenAI):
    uploaded = client.files.create(file=("receipt.png", RECEIPT), purpose="vision")
    expected = ask(client, image_part(RECEIPT), QUESTION).usage.prompt_tokens
    for part in (
        {"type": "image_url", "image_url": {"file_id": uploaded.id}},
        {"type": "file", "file": {"file_id": uploaded.id}},
        {"type": "file", "file": {"file_data": data_url(RECEIPT), "filename": "r.pdf"}},
    ):
        assert ask(client, part, QUESTION).usage.prompt_tokens == expected
    answer = client.responses.create(
        model=MODEL,
        max_output_tokens=16,
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "file_id": uploaded.id, "detail": "auto"},
                    {"type": "input_text", "text": QUESTION["text"]},
                ],
            }
        ],
    )
    assert answer.usage.input_tokens == expected
    followed = client.responses.create(
        model=MODEL, max_output_tokens=16, input="And the coffee?", previous_response_id=answer.id
    )
    assert followed.usage.input_tokens > expected


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_other_formats_whatever_the_mime_type_says(client: openai.OpenAI, format: str):
    data = encoded(text_image(["CORNER SHOP", "TOTAL\t17.45"]), format)
    part = {"type": "image_url", "image_url": {"url": data_url(data, "image/png")}}
    answer = ask(
        client, part, QUESTION, extra_body={"x_evermini": {"regex": r"(17\.45|63\.90|28\.11)"}}
    )
    assert answer.choices[0].message.content == "17.45"


def test_structured_outputs_and_tools_take_images(client: openai.OpenAI):
    schema = {
        "type": "object",
        "properties": {"total": {"type": "string", "pattern": r"^\d+\.\d\d$"}},
        "required": ["total"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "receipt", "strict": True, "schema": schema},
    }
    answer = ask(client, image_part(RECEIPT), QUESTION, response_format=form, max_tokens=30)
    assert set(json.loads(answer.choices[0].message.content)) == {"total"}
    tool = {"type": "function", "function": {"name": "book", "parameters": schema, "strict": True}}
    answer = ask(
        client,
        image_part(RECEIPT),
        QUESTION,
        tools=[tool],
        tool_choice="required",
        max_tokens=40,
    )
    assert set(json.loads(answer.choices[0].message.tool_calls[0].function.arguments)) == {"total"}


def test_batches_take_images(client: openai.OpenAI):
    body = {
        "model": MODEL,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": [image_part(RECEIPT), QUESTION]}],
    }
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    rows = client.files.create(file=("rows.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=rows.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
    output = client.files.content(client.batches.retrieve(batch.id).output_file_id).text
    usage = json.loads(output)["response"]["body"]["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 259


def refused(base_url: str, url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": [QUESTION, part]}]}
    response = httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=60)
    error = assert_error(response, 400)
    assert error["param"] == "messages[0].content[1].image_url.url"
    return error


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GIF89a but no image", "unsupported image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported image"),
        (RECEIPT[: len(RECEIPT) // 2], "damaged"),
        (b"\xff\xd8\xff\xe0broken", "unsupported image"),
        (encoded(Image.new("RGB", (4, 4)), "BMP"), "unsupported image"),
        (bomb(30_000, 30_000), "50,000,000 pixels"),
        (bomb(9_000, 9_000), "50,000,000 pixels"),
        (bomb(60_000, 1), "damaged"),
    ],
)
def test_malformed_and_hostile_images_are_a_400(base_url: str, data: bytes, says: str):
    assert says in refused(base_url, data_url(data))["message"]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "http://127.0.0.1/a.png",
        "file:///etc/passwd",
        "gopher://x",
        "/etc/passwd",
        "data:image/png,plain",
        "data:image/png;base64,",
    ],
)
def test_no_other_source_is_asked_unless_that_is_allowed(base_url: str, url: str):
    refused(base_url, url)


def test_too_many_images_are_a_400(base_url: str):
    tiny = image_part(encoded(Image.new("RGB", (1, 1))))
    body = {"model": MODEL, "messages": [{"role": "user", "content": [tiny] * 501}]}
    error = assert_error(httpx.post(f"{base_url}/v1/chat/completions", json=body), 400)
    assert (error["param"], error["code"]) == ("messages", "array_above_max_length")
