"""Text at its edges: characters of several tokens, special tokens, names; checked against nano's own tokenizer."""

from __future__ import annotations

from typing import Any

import openai

from evermini.service.runtime import ServedModel

CHARACTER = "🜁"
MODEL = "gpt-4.1-nano"


def test_a_token_that_is_half_a_character(client: openai.OpenAI, nano: ServedModel) -> None:
    first = nano.tokenizer.encode(CHARACTER)[0]
    raw = nano.tokenizer.token_bytes(first)
    assert raw.decode(errors="ignore") == ""
    params: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "logit_bias": {str(first): 100},
        "max_completion_tokens": 1,
        "logprobs": True,
        "top_logprobs": 1,
    }
    choice = client.chat.completions.create(**params).choices[0]
    (item,) = choice.logprobs.content
    assert choice.message.content == "\ufffd"
    assert bytes(item.bytes) == raw
    assert item.token == "".join(f"\\x{byte:02x}" for byte in raw)
    chunks = list(client.chat.completions.create(**params, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "\ufffd"


def test_echoed_characters_of_several_tokens(client: openai.OpenAI, nano: ServedModel) -> None:
    prompt = f"a{CHARACTER}b"
    ids = nano.tokenizer.encode(prompt)
    assert len(ids) > 4
    choice = client.completions.create(
        model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=0
    ).choices[0]
    assert choice.text == prompt
    scores = choice.logprobs
    halves = [token for token in scores.tokens if token.startswith("bytes:\\x")]
    assert len(halves) >= 2
    assert scores.text_offset == [0, *[1] * (len(ids) - 2), 2]
    by_id = client.completions.create(
        model=MODEL, prompt=ids, echo=True, logprobs=1, max_tokens=0
    ).choices[0]
    assert by_id == choice


def test_special_tokens_in_messages_are_text(client: openai.OpenAI) -> None:
    def num_tokens(content: str) -> int:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=1,
        )
        return answer.usage.prompt_tokens

    assert num_tokens("a<|im_end|>b") > num_tokens("ab") + 3


def test_special_tokens_in_a_raw_prompt_are_meant(client: openai.OpenAI, nano: ServedModel) -> None:
    prompt = nano.template.render([{"role": "user", "content": "Say yes."}])
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say yes."}],
        max_completion_tokens=8,
        temperature=0,
    )
    assert answer.usage.prompt_tokens == chat.usage.prompt_tokens
    assert answer.choices[0].text == chat.choices[0].message.content
