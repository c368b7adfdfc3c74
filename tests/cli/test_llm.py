"""The Python API on the real nano model."""

import subprocess
import sys
import threading
from typing import Literal

import pytest
from pydantic import BaseModel

from evermini import LLM
from evermini.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    InvalidRequestError,
    ModelNotFoundError,
)

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
ENDLESS = {"max_tokens": 2000, "logit_bias": {"2": -100}, "temperature": 0}


def idle(llm: LLM) -> bool:
    stats = llm._served.worker.stats()
    return stats.running == stats.waiting == 0


def test_chat_answers_with_usage(llm):
    answer = llm.chat(CAPITAL, temperature=0, max_tokens=20)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert answer.model == "gpt-4.1-nano-2025-04-14"
    assert answer.usage.prompt_tokens > 5
    assert 0 < answer.usage.completion_tokens <= 20
    assert answer.seconds > 0


def test_a_stream_adds_up_to_the_whole_answer(llm):
    whole = llm.chat(CAPITAL, temperature=0)
    with llm.chat(CAPITAL, temperature=0, stream=True) as stream:
        pieces = [delta.text for delta in stream]
    assert len(pieces) > 3
    assert "".join(pieces) == stream.text == whole.text
    assert stream.finish_reason == whole.finish_reason
    assert stream.usage.completion_tokens == whole.usage.completion_tokens
    assert 0 < stream.first_token_seconds < stream.seconds
    assert list(stream) == []


def test_why_is_what_the_api_says_of_the_reading(llm):
    text = (
        '<document name="pets.txt">\nThe cat is called Minka.\n</document>\nWhat is the cat called?'
    )
    asked = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    whole = llm.chat(**asked, x_evermini={"why": True})
    assert whole.why["reading"] == "dense"
    assert [found["quote"] for found in whole.why["citations"]] == ["Minka"]
    with llm.chat(**asked, x_evermini={"why": True}, stream=True) as stream:
        assert list(stream)
    assert stream.why == whole.why
    assert llm.chat(**asked).why is None


def test_several_choices_and_logprobs(llm):
    answer = llm.chat(
        CAPITAL, n=3, temperature=1.5, seed=7, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    assert len(answer.choices[0].logprobs[0].top) == 2


def test_complete_continues_text_and_token_ids(llm):
    answer = llm.complete("The capital of France is", temperature=0, max_tokens=4)
    assert "Paris" in answer.text
    with llm.complete(
        "The capital of France is", temperature=0, max_tokens=4, stream=True
    ) as stream:
        assert "".join(delta.text for delta in stream) == answer.text
    ids = llm._served.tokenizer.encode("The capital of France is")
    assert llm.complete(ids, temperature=0, max_tokens=4).text == answer.text


def test_leaving_a_stream_early_ends_the_request(llm):
    with llm.chat(CAPITAL, stream=True, **ENDLESS) as stream:
        next(stream)
    stream.close()
    assert list(stream) == []
    again = llm.chat(CAPITAL, temperature=0, max_tokens=3)  # a step later, it is gone
    assert again.usage.completion_tokens == 3
    assert idle(llm)


def test_ctrl_c_in_a_stream_ends_the_request(llm, monkeypatch):
    stream = llm.chat(CAPITAL, stream=True, **ENDLESS)
    next(stream)
    real = llm._portal.start_task_soon

    def interrupted(function, *args):
        future = real(function, *args)

        class Interrupted:
            cancel = future.cancel

            def result(self):
                raise KeyboardInterrupt

        monkeypatch.undo()
        return Interrupted()

    monkeypatch.setattr(llm._portal, "start_task_soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert list(stream) == []
    llm.chat(CAPITAL, temperature=0, max_tokens=3)
    assert idle(llm)


def test_threads_share_the_model(llm):
    alone = llm.chat(CAPITAL, temperature=0, max_tokens=10).text
    texts = []
    threads = [
        threading.Thread(
            target=lambda: texts.append(llm.chat(CAPITAL, temperature=0, max_tokens=10).text)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == [alone] * 4


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"temprature": 0}, InvalidRequestError, "temprature"),
        ({"temperature": 3}, InvalidRequestError, "temperature"),
        ({"tools": [{"type": "function"}]}, InvalidRequestError, "tools"),
        ({"max_tokens": 8192}, ContextLengthError, "8192 in the completion"),
    ],
)
def test_wrong_parameters_are_refused_as_by_the_server(llm, params, error, message):
    with pytest.raises(error, match=message):
        llm.chat(CAPITAL, **params)


def test_what_cannot_be_loaded_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERMINI_HOME", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="No model or path 'nan'"):
        LLM("nan")
    with pytest.raises(ConfigError, match="Did you mean threads"):
        LLM("nano", thread=2)
    with pytest.raises(ConfigError, match="argument threads"):
        LLM("nano", threads=0)


def test_a_script_that_does_not_close_it_ends_in_silence():
    script = "from evermini import LLM; llm = LLM('nano'); print(llm.complete('One, two,', max_tokens=1).finish_reason)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "length\n", "")


def test_a_closed_llm_says_so():
    with LLM("nano", kv_memory="64MiB") as llm:
        stream = llm.chat(CAPITAL, stream=True, **ENDLESS)
        next(stream)
    llm.close()
    stream.close()
    with pytest.raises(EngineStoppedError, match="closed"):
        llm.chat(CAPITAL)


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    people: int | None = None


def test_answers_of_a_pydantic_model(llm):
    answer = llm.chat(CAPITAL, temperature=0, response_format=City)
    assert City.model_validate_json(answer.text).name == "Paris"
    with llm.chat(CAPITAL, temperature=0, response_format=City, stream=True) as stream:
        assert "".join(delta.text for delta in stream) == answer.text


def test_answers_of_a_dict(llm):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": City.model_json_schema()}}
    City.model_validate_json(llm.chat(CAPITAL, response_format=form).text)


def test_another_class_is_no_form(llm):
    with pytest.raises(InvalidRequestError, match="no pydantic model"):
        llm.chat(CAPITAL, response_format=dict)


def test_embeddings(llm):
    found = llm.embed(["one text", "another"], dimensions=64)
    assert found.vectors.shape == (2, 64)
    assert found.prompt_tokens == 3
    alone = llm.embed("another", dimensions=64).vectors[0]
    assert alone @ found.vectors[1] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(InvalidRequestError, match=r"input\[1\]"):
        llm.embed(["x", ""])
