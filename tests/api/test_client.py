"""The official client against a server: what an integration of gpt-4.1-mini relies on.

These tests need nothing of Evermini installed; see `conftest.py` for how to run them against a server elsewhere.
"""

from __future__ import annotations

import asyncio
import math
import time
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MODEL = "gpt-4.1-nano"
SNAPSHOT = "gpt-4.1-nano-2025-04-14"
HELLO = [{"role": "user", "content": "Say hello to the people of Paris."}]
COUNT = [{"role": "user", "content": "Count from one to twenty in words."}]


def chat(client: openai.OpenAI, **params: Any) -> ChatCompletion:
    defaults = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
    return client.chat.completions.create(**{**defaults, **params})


def stream(client: openai.OpenAI, **params: Any) -> list[ChatCompletionChunk]:
    defaults = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
    return list(client.chat.completions.create(**{**defaults, **params, "stream": True}))


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    deltas = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index]
    return "".join(deltas)


def raw(base_url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{base_url}/v1/{path}", json=body, timeout=60)


def complete(client: openai.OpenAI, **params: Any) -> Completion:
    defaults = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
    return client.completions.create(**{**defaults, **params})


class TestChat:
    def test_every_required_key_is_there_even_when_null(self, base_url: str) -> None:
        body = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 5}
        answer = raw(base_url, "chat/completions", body).json()
        assert answer.keys() == {
            *("id", "object", "created", "model", "choices", "usage"),
            *("service_tier", "system_fingerprint"),
        }
        assert answer["id"].startswith("chatcmpl-")
        assert answer["object"] == "chat.completion"
        assert abs(answer["created"] - time.time()) < 60
        assert answer["service_tier"] == "default"
        assert answer["system_fingerprint"].startswith("fp_")
        (choice,) = answer["choices"]
        assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
        assert choice["logprobs"] is None
        message = choice["message"]
        assert message.pop("content")
        assert message == {"role": "assistant", "refusal": None, "annotations": []}

    @pytest.mark.parametrize("name", [MODEL, SNAPSHOT, "nano"])
    def test_an_alias_is_answered_under_the_snapshot(
        self, client: openai.OpenAI, name: str
    ) -> None:
        assert chat(client, model=name, max_completion_tokens=1).model == SNAPSHOT

    def test_usage_counts_everything_and_shows_zeros(self, base_url: str) -> None:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 5, "logit_bias": {"0": -100}}
        usage = raw(base_url, "chat/completions", {**body, "n": 2}).json()["usage"]
        one = raw(base_url, "chat/completions", {**body, "n": 1}).json()["usage"]
        assert usage["prompt_tokens"] == one["prompt_tokens"] > 10
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens_details"] == {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        }
        assert usage["prompt_tokens_details"].keys() == {
            "cached_tokens",
            "audio_tokens",
            "image_tokens",
        }

    def test_a_repeated_prefix_is_cached(self, client: openai.OpenAI) -> None:
        messages = [{"role": "user", "content": f"{time.time_ns()} " + "tell me more " * 40}]
        first = chat(client, messages=messages, max_completion_tokens=1)
        second = chat(client, messages=messages, max_completion_tokens=1)
        assert first.usage.prompt_tokens_details.cached_tokens < 64
        assert second.usage.prompt_tokens_details.cached_tokens >= 96
        assert second.usage.prompt_tokens == first.usage.prompt_tokens

    def test_max_tokens_under_both_names(self, client: openai.OpenAI) -> None:
        for params in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3}):
            answer = chat(client, messages=COUNT, **{"max_completion_tokens": None, **params})
            assert answer.usage.completion_tokens == 3
            assert answer.choices[0].finish_reason == "length"

    def test_the_model_ends_by_itself(self, client: openai.OpenAI) -> None:
        answer = chat(client, max_completion_tokens=None)
        assert answer.choices[0].finish_reason == "stop"
        assert "<|im_end|>" not in answer.choices[0].message.content

    def test_choices_differ_and_are_in_order(self, client: openai.OpenAI) -> None:
        answer = chat(client, n=3, temperature=1, seed=1, max_completion_tokens=20)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert len({choice.message.content for choice in answer.choices}) == 3

    def test_a_seed_repeats_an_answer(self, client: openai.OpenAI) -> None:
        params = {"n": 2, "temperature": 1.0, "top_p": 0.95, "max_completion_tokens": 16}
        first = chat(client, seed=7, **params)
        again = chat(client, seed=7, **params)
        other = chat(client, seed=8, **params)
        texts = [[c.message.content for c in a.choices] for a in (first, again, other)]
        assert texts[0] == texts[1]
        assert texts[0] != texts[2]

    def test_top_p_zero_is_greedy(self, client: openai.OpenAI) -> None:
        greedy = chat(client).choices[0].message.content
        assert chat(client, temperature=1, top_p=0).choices[0].message.content == greedy

    def test_penalties_are_applied(self, client: openai.OpenAI) -> None:
        def num_different(**params: float) -> int:
            answer = complete(
                client, prompt="Again and again and", max_tokens=24, logprobs=0, **params
            )
            return len(set(answer.choices[0].logprobs.tokens))

        plain = num_different()
        assert num_different(presence_penalty=2) > plain
        assert num_different(frequency_penalty=2) > plain
        assert num_different(frequency_penalty=-2) <= plain

    def test_logit_bias_bans_and_forces(self, client: openai.OpenAI) -> None:
        prompt = "x" * 4
        scored = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=0)
        assert scored.choices[0].logprobs is not None
        forced = complete(client, logit_bias={"504": 100}, max_tokens=3, logprobs=0)
        tokens = forced.choices[0].logprobs.tokens
        assert len(set(tokens)) == 1
        banned = complete(client, logit_bias={"504": -100}, max_tokens=3, logprobs=0)
        assert tokens[0] not in banned.choices[0].logprobs.tokens

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "developer", "content": "Be brief."}, *HELLO],
            [{"role": "user", "content": [{"type": "text", "text": "Say "}, *[{"type": "text", "text": "hi"}]]}],
            [*HELLO, {"role": "assistant", "content": None}, *HELLO],
            [*HELLO, {"role": "assistant", "content": None, "refusal": "No."}, *HELLO],
            [
                *HELLO,
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]},
                {"role": "user", "content": "Please.", "name": "Alice"},
            ],
            [{"role": "system", "content": "Example", "name": "example_user"}, *HELLO],
        ],
    )  # fmt: skip
    def test_every_kind_of_message_is_taken(
        self, client: openai.OpenAI, messages: list[dict[str, Any]]
    ) -> None:
        assert chat(client, messages=messages, max_completion_tokens=2).usage.completion_tokens

    def test_an_answer_can_be_sent_back_as_it_came(self, client: openai.OpenAI) -> None:
        message = chat(client).choices[0].message
        messages = [*HELLO, message.model_dump(), *COUNT]
        assert chat(client, messages=messages).choices[0].message.role == "assistant"

    def test_a_name_and_the_developer_role_change_the_prompt(self, client: openai.OpenAI) -> None:
        def count(**message: str) -> int:
            answer = chat(client, messages=[{"content": "Hi", **message}], max_completion_tokens=1)
            return answer.usage.prompt_tokens

        assert count(role="user", name="Alice") > count(role="user")
        assert count(role="developer") == count(role="system")

    def test_values_that_mean_off_are_fine(self, client: openai.OpenAI) -> None:
        chat(
            client,
            max_completion_tokens=1,
            extra_body={
                "tools": None,
                "tool_choice": "none",
                "store": False,
                "response_format": {"type": "text"},
                "modalities": ["text"],
                "parallel_tool_calls": None,
                "stop": None,
                "seed": None,
                "n": None,
                "stream_options": None,
                "verbosity": "medium",
            },
        )

    def test_accepted_fields(self, client: openai.OpenAI) -> None:
        answer = chat(
            client,
            max_completion_tokens=1,
            user="u-1",
            metadata={"team": "blue"},
            service_tier="flex",
            safety_identifier="abc",
            prompt_cache_key="key",
            extra_body={"prompt_cache_retention": "24h"},
        )
        assert answer.service_tier == "default"
        assert answer.metadata == {"team": "blue"}


class TestStream:
    def test_chunks_have_the_contracts_shape(self, base_url: str) -> None:
        body = {
            "model": MODEL,
            "messages": HELLO,
            "max_tokens": 4,
            "stream": True,
            "temperature": 0,
        }
        response = raw(base_url, "chat/completions", body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, last, end = response.text.split("\n\n")
        assert last == "data: [DONE]"
        assert end == ""
        chunks = [httpx.Response(200, text=event.removeprefix("data: ")).json() for event in events]
        for chunk in chunks:
            assert chunk.keys() == {
                *("id", "object", "created", "model", "choices"),
                *("service_tier", "system_fingerprint"),
            }
            assert chunk["object"] == "chat.completion.chunk"
            assert chunk["model"] == SNAPSHOT
            (choice,) = chunk["choices"]
            assert choice.keys() == {"index", "delta", "logprobs", "finish_reason"}
        assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
        choices = [chunk["choices"][0] for chunk in chunks]
        assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert choices[-1]["delta"] == {}
        assert choices[-1]["finish_reason"] == "length"
        assert {choice["finish_reason"] for choice in choices[:-1]} == {None}
        assert all(choice["delta"].keys() == {"content"} for choice in choices[1:-1])

    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 0, "max_completion_tokens": 40},
            {"temperature": 1.2, "seed": 11, "max_completion_tokens": 40},
            {"temperature": 0.9, "seed": 3, "n": 3, "max_completion_tokens": 20},
            {"temperature": 0, "stop": ["ar", " P"], "max_completion_tokens": 40},
            {"temperature": 0, "messages": COUNT, "stop": "five, six", "max_completion_tokens": 40},
        ],
    )
    def test_streamed_equals_unstreamed(
        self, client: openai.OpenAI, params: dict[str, Any]
    ) -> None:
        chat(client, **params)  # so that both find the same prefix in the cache
        whole = chat(client, **params)
        chunks = stream(client, **params)
        for choice in whole.choices:
            assert text_of(chunks, choice.index) == choice.message.content
            ends = [
                c.finish_reason
                for chunk in chunks
                for c in chunk.choices
                if c.index == choice.index
            ]
            assert [end for end in ends if end] == [choice.finish_reason]

    def test_usage_chunk(self, client: openai.OpenAI) -> None:
        whole = chat(client, messages=COUNT)
        chunks = stream(client, messages=COUNT, stream_options={"include_usage": True})
        *body, last = chunks
        assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in body)
        assert last.choices == []
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        assert last.usage.completion_tokens == whole.usage.completion_tokens == 12
        assert "usage" not in stream(client)[-1].model_fields_set

    def test_obfuscation_may_be_switched(self, client: openai.OpenAI) -> None:
        assert stream(client, stream_options={"include_obfuscation": False})

    def test_choices_first_appear_in_order(self, client: openai.OpenAI) -> None:
        chunks = stream(client, n=4, temperature=1, max_completion_tokens=6)
        seen = list(dict.fromkeys(chunk.choices[0].index for chunk in chunks))
        assert seen == [0, 1, 2, 3]

    def test_the_clients_own_stream_helper(self, client: openai.OpenAI) -> None:
        with client.chat.completions.stream(
            model=MODEL, messages=HELLO, n=2, temperature=0, max_completion_tokens=200
        ) as events:
            final = events.until_done().get_final_completion()
        whole = chat(client, max_completion_tokens=200)
        assert [c.message.content for c in final.choices] == [whole.choices[0].message.content] * 2

    def test_logprobs_are_those_of_the_whole_answer(self, client: openai.OpenAI) -> None:
        params = {"logprobs": True, "top_logprobs": 2, "stop": [" of"]}
        chat(client, **params)
        whole = chat(client, **params).choices[0].logprobs.content
        chunks = stream(client, **params)
        streamed = [
            item
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for item in choice.logprobs.content
        ]
        assert streamed == whole


class TestLogprobs:
    def test_items(self, client: openai.OpenAI) -> None:
        answer = chat(client, logprobs=True, top_logprobs=3, max_completion_tokens=6)
        choice = answer.choices[0]
        items = choice.logprobs.content
        assert len(items) == 6
        assert b"".join(bytes(item.bytes) for item in items).decode() == choice.message.content
        assert choice.logprobs.refusal is None
        for item in items:
            assert item.token == bytes(item.bytes).decode()
            assert item.logprob <= 0
            assert len(item.top_logprobs) == 3
            assert all(a.logprob >= b.logprob for a, b in pairwise(item.top_logprobs))
            assert item.top_logprobs[0].token == item.token  # greedy
            assert math.isclose(item.top_logprobs[0].logprob, item.logprob, abs_tol=1e-6)

    def test_without_alternatives(self, client: openai.OpenAI) -> None:
        items = chat(client, logprobs=True).choices[0].logprobs.content
        assert all(item.top_logprobs == [] for item in items)

    def test_tokens_of_a_stop_string_are_not_listed(self, client: openai.OpenAI) -> None:
        full = chat(client, messages=COUNT).choices[0].message.content
        stop = full[6:11]  # begins and ends inside tokens
        choice = chat(client, messages=COUNT, logprobs=True, stop=stop).choices[0]
        assert choice.message.content == full[: full.index(stop)]
        assert choice.finish_reason == "stop"
        shown = b"".join(bytes(item.bytes) for item in choice.logprobs.content).decode()
        last = choice.logprobs.content[-1].token
        assert shown.startswith(choice.message.content)
        assert len(shown) - len(last) < len(choice.message.content)


class TestCompletions:
    def test_shape(self, base_url: str) -> None:
        answer = raw(
            base_url, "completions", {"model": MODEL, "prompt": "One two", "max_tokens": 3}
        ).json()
        assert answer.keys() == {
            *("id", "object", "created", "model", "choices", "usage", "system_fingerprint")
        }
        assert answer["id"].startswith("cmpl-")
        assert answer["object"] == "text_completion"
        assert answer["choices"][0].keys() == {"text", "index", "logprobs", "finish_reason"}
        assert answer["usage"]["completion_tokens"] == 3

    def test_default_is_sixteen_tokens(self, client: openai.OpenAI) -> None:
        answer = complete(client, prompt="1, 2, 3, 4, 5,")
        assert answer.usage.completion_tokens == 16
        assert answer.choices[0].finish_reason == "length"

    def test_prompts_of_every_kind(self, client: openai.OpenAI) -> None:
        prompts = ["The sun is", "Two plus two is"]
        texts = [complete(client, prompt=p, max_tokens=4).choices[0].text for p in prompts]
        both = complete(client, prompt=prompts, max_tokens=4)
        assert [choice.text for choice in both.choices] == texts
        assert [choice.index for choice in both.choices] == [0, 1]
        one_id = complete(client, prompt=[504], max_tokens=2, echo=True)
        lists = complete(client, prompt=[[504], [504, 2000]], max_tokens=2, echo=True)
        assert lists.choices[0].text == one_id.choices[0].text
        assert lists.usage.prompt_tokens == 3

    def test_no_prompt_starts_a_document(self, client: openai.OpenAI) -> None:
        empty = complete(client, prompt="", max_tokens=3)
        assert empty.usage.prompt_tokens == 1
        assert complete(client, prompt=None, max_tokens=3).choices == empty.choices

    def test_scoring_a_text(self, client: openai.OpenAI) -> None:
        prompt = "The capital of France is Paris. Naïve café."
        choice = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices[0]
        assert choice.text == prompt
        assert choice.finish_reason == "length"
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs)
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert all(score < 0 for score in scores.token_logprobs[1:])
        for token, score, top in zip(
            scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True
        ):
            assert 2 <= len(top) <= 3
            assert top[token] == score
        for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
            if not token.startswith("bytes:"):
                assert prompt[offset : offset + len(token)] == token

    def test_scores_do_not_depend_on_the_cache(self, client: openai.OpenAI) -> None:
        prompt = f"{time.time_ns()} " + "The quick brown fox jumps over the lazy dog. " * 12
        runs = [
            complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=0) for _ in range(2)
        ]
        first, second = (run.choices[0].logprobs.token_logprobs[1:] for run in runs)
        assert len(first) == len(second) > 64
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) < 0.05

    def test_echo_with_generated_tokens(self, client: openai.OpenAI) -> None:
        prompt = "The capital of France is"
        choice = complete(client, echo=True, logprobs=1, max_tokens=2).choices[0]
        assert choice.text.startswith(prompt)
        scores = choice.logprobs
        assert "".join(scores.tokens) == choice.text
        assert scores.text_offset[-2] == len(prompt)
        plain = complete(client, logprobs=1, max_tokens=2).choices[0]
        assert plain.logprobs.text_offset == scores.text_offset[-2:]
        assert plain.logprobs.tokens == scores.tokens[-2:]

    def test_the_last_token_of_a_scored_answer_is_its_end(self, client: openai.OpenAI) -> None:
        # Harnesses ask for one token, drop the last score and take the rest for the prompt's.
        prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        end = {"2": 100}
        plain = complete(client, prompt=prompt, max_tokens=1, logit_bias=end)
        assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("", "stop")
        choice = complete(
            client, prompt=prompt, max_tokens=1, logit_bias=end, echo=True, logprobs=1
        ).choices[0]
        assert choice.text == prompt
        assert choice.finish_reason == "stop"
        assert len(choice.logprobs.tokens) == plain.usage.prompt_tokens + 1
        assert choice.logprobs.tokens[-1] == "<|im_end|>"
        assert choice.logprobs.text_offset[-1] == len(prompt)

    def test_logprobs_zero_gives_only_the_drawn_token(self, client: openai.OpenAI) -> None:
        scores = complete(client, logprobs=0, max_tokens=2).choices[0].logprobs
        assert len(scores.token_logprobs) == 2
        assert scores.top_logprobs is None

    def test_choices_are_numbered_prompt_by_prompt(self, client: openai.OpenAI) -> None:
        answer = complete(
            client, prompt=["A b", "C d"], n=2, temperature=1, seed=1, max_tokens=4, echo=True
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text[:3] for choice in answer.choices] == ["A b", "A b", "C d", "C d"]

    def test_best_of_returns_the_likeliest(self, client: openai.OpenAI) -> None:
        params = {"temperature": 1, "seed": 2, "max_tokens": 5, "logprobs": 0}
        everything = complete(client, n=4, **params)
        best = complete(client, n=2, best_of=4, **params)

        def mean(choice: Any) -> float:
            return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens)

        ranked = sorted(everything.choices, key=mean, reverse=True)
        assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
        assert [choice.index for choice in best.choices] == [0, 1]
        assert best.usage.completion_tokens == everything.usage.completion_tokens
        hidden = complete(client, n=1, best_of=4, **{**params, "logprobs": None}).choices[0]
        assert hidden.text == ranked[0].text
        assert hidden.logprobs is None

    def test_streamed_equals_unstreamed(self, client: openai.OpenAI) -> None:
        params = {
            "prompt": ["One, two,", "Red, green,"],
            "max_tokens": 8,
            "logprobs": 1,
            "echo": True,
            "stop": ["seven"],
        }
        complete(client, **params)
        whole = complete(client, **params)
        chunks = list(
            complete(client, **params, stream=True, stream_options={"include_usage": True})
        )
        *body, last = chunks
        assert last.choices == []
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        assert all(chunk.usage is None for chunk in body)
        for choice in whole.choices:
            mine = [c for chunk in body for c in chunk.choices if c.index == choice.index]
            assert "".join(c.text for c in mine) == choice.text
            assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
            for part in ("tokens", "token_logprobs", "text_offset"):
                joined = [item for c in mine for item in getattr(c.logprobs, part)]
                assert joined == getattr(choice.logprobs, part)


class TestModels:
    def test_list_and_retrieve(self, client: openai.OpenAI) -> None:
        models = client.models.list().data
        assert {MODEL, SNAPSHOT} <= {model.id for model in models}
        one = client.models.retrieve(SNAPSHOT)
        assert one in models
        assert one.object == "model"
        assert one.owned_by == "evermini"


class TestErrors:
    def test_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            chat(client, model="gpt-9")
        assert caught.value.code == "model_not_found"
        assert "The model `gpt-9` does not exist" in caught.value.message
        assert SNAPSHOT in caught.value.message
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/name")

    def test_context_overflow_names_both_counts(self, client: openai.OpenAI) -> None:
        for streamed in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                chat(client, messages=HELLO, max_completion_tokens=8192, stream=streamed)
            error = caught.value
            assert error.code == "context_length_exceeded"
            assert error.param == "messages"
            assert "maximum context length is 8192 tokens" in error.message
            assert "8192 in the completion" in error.message
        long = [{"role": "user", "content": "word " * 9000}]
        with pytest.raises(openai.BadRequestError, match="resulted in 90") as caught:
            chat(
                client,
                messages=long,
                max_completion_tokens=None,
                extra_body={"x_evermini": {"reading": "dense"}},
            )
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="in your prompt; 16 for"):
            complete(client, prompt="word " * 9000)

    def test_bad_request(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, temperature=3)
        assert caught.value.param == "temperature"
        assert caught.value.code == "decimal_above_max_value"
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id.startswith("req_")

    def test_unsupported_field(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, reasoning_effort="low")
        assert caught.value.code == "unsupported_parameter"
        assert caught.value.param == "reasoning_effort"

    def test_unknown_route(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match=r"Invalid URL \(POST /v1/images"):
            client.images.generate(prompt="x")

    def test_moderation_is_refused(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="does not moderate") as caught:
            client.moderations.create(input="x")
        assert caught.value.code == "unsupported_endpoint"

    def test_raw_response_headers(self, client: openai.OpenAI) -> None:
        response = client.models.with_raw_response.list()
        assert response.headers["x-request-id"].startswith("req_")
        assert response.headers["openai-version"] == "2020-10-01"
        assert int(response.headers["openai-processing-ms"]) >= 0


class TestAbort:
    def test_leaving_a_stream_frees_the_engine(self, client: openai.OpenAI, base_url: str) -> None:
        aborted = metric(base_url, "evermini_choices_total", 'finished_reason="abort"')
        events = client.chat.completions.create(
            model=MODEL, messages=COUNT, max_completion_tokens=4000, stream=True, n=2,
            logit_bias={"2": -100},
        )  # fmt: skip
        for chunk in events:
            if chunk.choices[0].delta.content:
                break
        wait_until_running(base_url, 2)
        events.close()
        wait_until_running(base_url, 0)
        assert metric(base_url, "evermini_kv_blocks_used") == 0
        assert metric(base_url, "evermini_choices_total", 'finished_reason="abort"') == aborted + 2

    def test_a_client_timeout_frees_the_engine(self, client: openai.OpenAI, base_url: str) -> None:
        with pytest.raises(openai.APITimeoutError):
            chat(
                client.with_options(timeout=0.5),
                messages=COUNT,
                max_completion_tokens=4000,
                logit_bias={"2": -100},
            )
        wait_until_running(base_url, 0)


class TestConcurrency:
    async def test_mixed_requests_answer_as_they_would_alone(
        self, async_client: openai.AsyncOpenAI
    ) -> None:
        async def whole(topic: str) -> str:
            answer = await async_client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Write about {topic}."}],
                max_completion_tokens=12,
                temperature=0,
            )
            return answer.choices[0].message.content

        async def streamed(topic: str) -> str:
            chunks = await async_client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Write about {topic}."}],
                max_completion_tokens=12,
                temperature=0,
                stream=True,
            )
            return "".join([c.choices[0].delta.content or "" async for c in chunks])

        async def scored(topic: str) -> str:
            answer = await async_client.completions.create(
                model=MODEL, prompt=f"I like {topic}.", echo=True, logprobs=1, max_tokens=0
            )
            return answer.choices[0].text

        topics = ["cats", "rain", "tea", "Rome", "trains"]
        alone = [await whole(topic) for topic in topics]
        together = await asyncio.gather(
            *map(whole, topics), *map(streamed, topics), *map(scored, topics), *map(whole, topics)
        )
        assert together[10:15] == [f"I like {topic}." for topic in topics]
        same = [a == b for a, b in zip(together[:10] + together[15:], alone * 3, strict=True)]
        assert all(same)


def wait_until_running(base_url: str, number: int) -> None:
    deadline = time.monotonic() + 60
    while metric(base_url, "evermini_num_requests_running") != number:
        assert time.monotonic() < deadline, f"it never was {number} requests"
        time.sleep(0.05)


def metric(base_url: str, name: str, label: str = "") -> float:
    """Return the sum of a metric's samples."""
    total = 0.0
    for line in httpx.get(f"{base_url}/metrics").text.splitlines():
        if line.partition("{")[0].partition(" ")[0] == name and label in line:
            total += float(line.rpartition(" ")[2])
    return total
