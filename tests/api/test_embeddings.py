"""Embeddings through the official client and `evermini.LLM`."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

MODEL = "gpt-4.1-nano"
TEXTS = ["A cat sat on the mat.", "The stock market fell sharply on Monday.", "x"]


def vectors(answer: Any) -> np.ndarray:
    return np.array([item.embedding for item in answer.data])


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return {"model": MODEL, "input": TEXTS, "encoding_format": "float"}


def test_texts_become_unit_vectors_in_order(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    found = vectors(answer)
    assert answer.object == "list"
    assert answer.model == "gpt-4.1-nano-2025-04-14"
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert {item.object for item in answer.data} == {"embedding"}
    assert found.shape == (3, 576)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for text, vector in zip(TEXTS, found, strict=True):
        alone = vectors(client.embeddings.create(model=MODEL, input=text))[0]
        np.testing.assert_allclose(alone, vector, atol=1e-7)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10


def test_alike_texts_are_closer_than_others(client: openai.OpenAI) -> None:
    cat, kitten, market = vectors(
        client.embeddings.create(
            model=MODEL,
            input=[TEXTS[0], "A kitten was sitting on the rug.", TEXTS[1]],
        )
    )
    assert cat @ kitten > cat @ market


def test_floats_and_base64_say_the_same(base_url: str, plain: dict[str, Any]) -> None:
    def ask(**changes: Any) -> list[Any]:
        body = httpx.post(f"{base_url}/v1/embeddings", json=plain | changes).json()
        return [item["embedding"] for item in body["data"]]

    floats = np.array(ask(), np.float32)
    packed = [np.frombuffer(base64.b64decode(row), "<f4") for row in ask(encoding_format="base64")]
    np.testing.assert_array_equal(floats, np.stack(packed))
    assert isinstance(ask(encoding_format=None)[0], list)


def test_token_ids_mean_the_text_that_they_are(client: openai.OpenAI, nano: Any) -> None:
    ids = nano.tokenizer.encode(TEXTS[0], add_bos=True)
    text = vectors(client.embeddings.create(model=MODEL, input=TEXTS[0]))
    for given in (ids, [ids]):
        answer = client.embeddings.create(model=MODEL, input=given)
        np.testing.assert_allclose(vectors(answer), text, atol=1e-7)
        assert answer.usage.prompt_tokens == len(ids)


def test_fewer_dimensions_are_the_first_ones_at_unit_length(client: openai.OpenAI) -> None:
    whole = vectors(client.embeddings.create(model=MODEL, input=TEXTS))
    cut = vectors(client.embeddings.create(model=MODEL, input=TEXTS, dimensions=100))
    expected = whole[:, :100] / np.linalg.norm(whole[:, :100], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)


async def test_beside_a_chat_both_are_as_if_alone(async_client: openai.AsyncOpenAI) -> None:
    text = "The lighthouse keeper wrote in his book every evening. " * 60

    async def chat() -> str | None:
        answer = await async_client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Count to ten."}], temperature=0, max_tokens=40
        )  # fmt: skip
        return answer.choices[0].message.content

    async def embed() -> np.ndarray:
        inputs = [text, text[:900], *TEXTS]
        return vectors(await async_client.embeddings.create(model=MODEL, input=inputs))

    alone = await chat(), await embed()
    together = await asyncio.gather(chat(), embed(), chat())
    assert together[0] == together[2] == alone[0]
    np.testing.assert_allclose(together[1], alone[1], atol=1e-6)


def test_many_inputs(client: openai.OpenAI) -> None:
    found = vectors(client.embeddings.create(model=MODEL, input=[f"{n} x" for n in range(300)]))
    assert len(np.unique(found.round(6), axis=0)) == 300


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [5, "a"]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "word " * 9000}, "input"),
        ({"input": ["a", "word " * 9000]}, "input[1]"),
        ({"input": ["word " * 7000] * 50}, "input"),
        ({"input": [10**9]}, None),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 577}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_what_is_refused(base_url: str, plain: dict[str, Any], changes: dict, param: str) -> None:
    answer = httpx.post(f"{base_url}/v1/embeddings", json=plain | changes, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_other_models_are_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="text-embedding-3-small", input="x")
    assert error.value.code == "model_not_found"
