"""Sweeps where another engine answers: a fake that keeps to the form, or not, and nano behind a server of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from evermini.config import Settings
from evermini.service.runtime import Runtime, ServedModel
from evermini.service.upstream import asking
from tests.long_texts import story
from tests.serving import abandoned, assert_error, make_client, reading, serving, wait_for
from tests.upstream_fakes import (
    FOREVER,
    NAME,
    FakeEngine,
    behind,
    fake_engine,
    json_response,
    whole,
)

Json = dict[str, Any]
START = int(time.time()) - 60
NUM_REVIEWS = 12
REVIEWS = "\n".join(
    f"Review {i + 1}: {('It broke.', 'I love it.', 'Fine.')[i % 3]}" for i in range(NUM_REVIEWS)
)
HOW_MANY = "How many of the reviews are negative?"


def says(body: Json) -> tuple[Json, str]:
    """What a good model replies to a question of a sweep: as an object, and in words."""
    system, asked = body["messages"][0]["content"], body["messages"][-1]["content"]
    if system.startswith("Turn a question about many"):
        fields = ["Is this review negative or positive?", "negative", "positive"]
        names = ("question", "wanted_answer", "other_answer")
        return dict(zip(names, fields, strict=True)), " | ".join(fields)
    if asked.endswith("with one word.") or "Answer with one word." in asked:
        word = "negative" if "broke" in asked else "positive"
        return {"answer": word}, f"{word.capitalize()}."
    if system.startswith("Turn a task"):
        return {"question": "Is this a person?"}, "Sure! Is this a person?"
    if system.startswith("You collect"):
        names = sorted(
            {name for name in ("Anna", "Brigid", "Carl") if name in asked.split("Text:\n")[-1]}
        )
        return {"items": names}, "".join(f"- {name}\n" for name in names) or "None."
    if system.startswith("You read one text"):
        return {"answer": "Yes"}, "**Yes**"
    return {}, "4 reviews are negative."


def in_words(body: Json) -> Response:
    return json_response(whole(content=says(body)[1]))


def in_schema(body: Json) -> Response:
    """Reply clearly only if a form is asked for as a schema."""
    value, text = says(body)
    if value:
        text = json.dumps(value) if "response_format" in body else "Well, it depends."
    return json_response(whole(content=text))


def at_last(body: Json) -> Response:
    """Refuse schemas, and reply clearly only if a form is said."""
    if "response_format" in body:
        error = {"message": "response_format is not supported", "param": "response_format"}
        return json_response({"error": error}, 400)
    if says(body)[0] and "nothing else" not in body["messages"][-1]["content"]:
        return json_response(whole(content="Well, it depends."))
    return in_words(body)


@contextmanager
def sweeping(
    nano: ServedModel, home: Any, base_url: str, *, spec: Json | None = None, **settings: Any
) -> Iterator[str]:
    """Serve a model whose engine is at ``base_url`` and whose window is short; yield the server's URL."""
    with (
        reading(nano, home, sweep_limit=100_000) as reader_of,
        behind(base_url, spec={"window": 8192, **(spec or {})}, **settings) as (url, served),
    ):
        served.reader = reader_of.reader
        yield url


@pytest.fixture(scope="module")
def running(nano: ServedModel, tmp_path_factory: Any) -> Iterator[tuple[FakeEngine, str]]:
    home = tmp_path_factory.mktemp("home")
    with fake_engine() as (engine, base_url), sweeping(nano, home, base_url) as url:
        yield engine, url


@pytest.fixture
def engine(running: tuple[FakeEngine, str], monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(asking, "BUSY_PAUSES", (0.01, 0.01))
    running[0].__dict__.update(FakeEngine(in_words).__dict__)
    return running[0]


@pytest.fixture
def url(running: tuple[FakeEngine, str]) -> str:
    return running[1]


def body_of(text: str, question: str, **fields: Any) -> Json:
    content = f'<document name="list.txt">\n{text}\n</document>\n\n{question}'
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "x_evermini": {"reading": "sweep", "why": True},
        **fields,
    }


def ask(url: str, text: str, question: str, **fields: Any) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/chat/completions", json=body_of(text, question, **fields), timeout=60
    )


def calls(engine: FakeEngine) -> list[Json]:
    return [body for path, _, body in engine.asked if path.endswith("/completions")]


@pytest.mark.parametrize("answer", [in_words, in_schema, at_last])
def test_each_record_is_asked_of_the_engine_in_whatever_form_it_can(nano, tmp_path, answer):
    with fake_engine() as (engine, base_url), sweeping(nano, tmp_path, base_url) as url:
        engine.answer = answer
        got = ask(url, REVIEWS, HOW_MANY).json()
        swept = got["x_evermini"]["sweep"]
        assert (swept["task"], swept["windows"]) == ("check", NUM_REVIEWS)
        assert swept["counts"] == {"negative": 4, "positive": 8}
        assert swept["items"] == [REVIEWS.splitlines()[i] for i in range(0, NUM_REVIEWS, 3)]
        assert got["choices"][0]["message"]["content"] == "4 reviews are negative."
        refused = [b for b in calls(engine) if answer is at_last and "response_format" in b]
        assert len(refused) <= 1 + Settings().upstream_parallel  # those in flight when it was known
        told = len(calls(engine)) - len(refused)
        assert told == (NUM_REVIEWS + 1) * (1 if answer is in_words else 2) + 1
        assert (
            "[All of this text was read and counted" in calls(engine)[-1]["messages"][0]["content"]
        )
        assert (swept["tokens_read"], swept["tokens_written"]) == (5 * (told - 1), 3 * (told - 1))
        assert got["usage"]["completion_tokens"] == 3
        assert 80 < got["usage"]["prompt_tokens"] < 400  # what was sent

        def metered() -> tuple[int, int]:
            usage = httpx.get(f"{url}/v1/organization/usage/completions?start_time={START}")
            rows = [row for bucket in usage.json()["data"] for row in bucket["results"]]
            return sum(r["input_tokens"] for r in rows), sum(r["output_tokens"] for r in rows)

        wait_for(lambda: metered() == (5 * told, 3 * told))


def test_what_is_not_clear_in_two_ways_of_asking_is_an_error(engine, url):
    def never_clear(body: Json) -> Response:
        if "Answer with one word." in body["messages"][-1]["content"]:
            return json_response(whole("length", content=""))
        return in_words(body)

    engine.answer = never_clear
    error = assert_error(ask(url, REVIEWS, HOW_MANY), 502)
    assert "it wrote nothing within the limit" in error["message"]
    assert "json_schema" in error["message"]


def failing(status: int, times: int) -> Callable[[Json], Response]:
    """Fail over the fifth review, so many times."""
    left = [times]

    def answer(body: Json) -> Response:
        if "Review 5:" in body["messages"][-1]["content"].split("\n\n")[0] and left[0]:
            left[0] -= 1
            return json_response({"error": {"message": "on purpose"}}, status)
        return in_words(body)

    return answer


@pytest.mark.parametrize(
    ("status", "times", "ours"),
    [(500, 1, 200), (500, 9, 502), (429, 2, 200), (429, 9, 429), (503, 9, 503), (401, 9, 502)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_in_the_middle_ends_the_sweep_unless_it_recovers(
    engine, url, status, times, ours, stream
):
    engine.answer = failing(status, times)
    if not stream or ours == 200:
        response = ask(url, REVIEWS, HOW_MANY)
        assert response.status_code == ours
        if ours == 200:
            assert response.json()["x_evermini"]["sweep"]["counts"] == {
                "negative": 4,
                "positive": 8,
            }
        else:
            assert_error(response, ours)
        return
    response = ask(url, REVIEWS, HOW_MANY, stream=True)
    assert '"finish_reason":"stop"' not in response.text.replace(" ", "")
    assert "[DONE]" not in response.text
    assert '"error"' in response.text


def test_a_list_that_is_cut_is_asked_for_in_smaller_parts(engine, url):
    text = "\n\n".join(
        f"Then {name} spoke of the weather, and of the {i} boats that had not come back."
        for i in range(40)
        for name in ("Anna", "Brigid", "Carl")
    )

    def answer(body: Json) -> Response:
        asked = body["messages"][-1]["content"]
        if asked.startswith("Text:\n") and len(asked) > 1500:
            return json_response(whole("length", content="- Anna\n- Bri"))
        return in_words(body)

    engine.answer = answer
    swept = ask(url, text, "List every person that is named.").json()["x_evermini"]["sweep"]
    assert swept["task"] == "collect"
    assert sorted(swept["items"]) == ["Anna", "Brigid", "Carl"]
    assert swept["windows"] > 4


def test_a_summary_is_written_from_the_engines_notes_in_a_stream_that_tells_how_it_goes(
    engine, url
):
    engine.answer = lambda body: (
        [
            {"choices": [{"index": 0, "delta": {"content": "All."}, "finish_reason": "stop"}]},
            "[DONE]",
        ]
        if body.get("stream")
        else json_response(whole(content="Something happens here."))
    )
    body = body_of(story(seed=4, num_lines=400), "Summarise the text.", stream=True)
    extensions = {**body.pop("x_evermini"), "progress": True}
    with make_client(url) as client:
        stream = client.chat.completions.create(**body, extra_body={"x_evermini": extensions})
        chunks = list(stream)
    told = [
        c.x_evermini["progress"]
        for c in chunks
        if (c.model_extra or {}).get("x_evermini", {}).get("progress")
    ]
    assert all(report["stage"] == "sweep" for report in told)
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    assert last.x_evermini["sweep"]["task"] == "note"
    assert last.x_evermini["sweep"]["windows"] > 3
    assert "Something happens here." in calls(engine)[-1]["messages"][0]["content"]


def test_a_client_that_leaves_ends_all_calls_of_which_there_are_no_more_than_allowed(
    nano, tmp_path
):
    with (
        fake_engine() as (engine, base_url),
        sweeping(nano, tmp_path, base_url, upstream_parallel=3) as url,
    ):
        engine.answer = lambda body: (
            [FOREVER]
            if "Answer with one word." in body["messages"][-1]["content"]
            else in_words(body)
        )
        with abandoned(url, body_of(REVIEWS, HOW_MANY)):
            wait_for(lambda: len(calls(engine)) == 1 + 3)
            time.sleep(0.3)  # in which a fourth would come
        wait_for(lambda: engine.num_left == 3)
        assert len(calls(engine)) == 1 + 3


def test_auto_sweeps_if_the_question_is_about_all_up_to_the_limit(engine, url):
    text = story(seed=7, num_lines=500)
    auto = {"x_evermini": {"why": True}}
    engine.answer = lambda body: json_response(whole(content="Something happens here."))
    assert ask(url, text, "Summarise this text.", **auto).json()["x_evermini"]["reading"] == "sweep"


def test_an_answer_that_states_another_figure_than_was_counted_is_an_error(engine, url):
    engine.answer = lambda body: (
        json_response(whole(content="There are 5 of them."))
        if "[All of this text" in body["messages"][0]["content"]
        else in_words(body)
    )
    error = assert_error(ask(url, REVIEWS, HOW_MANY), 502)
    assert "4 was counted" in error["message"]


def test_nano_behind_a_server_of_its_own_reads_all_of_a_text(nano, tmp_path):
    engine = Runtime([replace(nano, reader=None, info=replace(nano.info, context_window=8192))])
    with (
        serving(engine) as there,
        sweeping(nano, tmp_path, f"{there}/v1", spec={"model": "gpt-4.1-nano"}) as url,
        make_client(url) as client,
    ):
        wanted: Any = {"max_completion_tokens": 24, "temperature": 0}
        extensions = {"extra_body": {"x_evermini": {"reading": "sweep", "why": True}}}

        def swept(text: str, question: str) -> Json:
            body = body_of(text, question)
            del body["x_evermini"]
            answer = client.chat.completions.create(**body, **wanted, **extensions)
            return answer.x_evermini["sweep"]

        found = swept(REVIEWS, "Which of the reviews are negative?")
        assert found["task"] == "check"
        assert sum(found["counts"].values()) == found["windows"] == NUM_REVIEWS
        listed = swept(story(seed=3, num_lines=60), "List every person that is named.")
        assert listed["task"] == "collect"
        assert listed["windows"] > 1
        assert listed["tokens_written"] > 0


def test_another_evermini_reads_long_prompts_itself_and_says_how(base_url, client):
    with behind(f"{base_url}/v1", spec={"model": "gpt-4.1-nano"}) as (url, _):
        fields: Any = {"max_completion_tokens": 12, "temperature": 0}
        asked = body_of(story(seed=3, num_lines=60), "Summarise the text.", **fields)
        extensions = {**asked["x_evermini"], "progress": True}
        ours = ask(url, story(seed=3, num_lines=60), "Summarise the text.", **fields).json()
        with make_client(url) as through:
            chunks = list(
                through.chat.completions.create(
                    model=NAME,
                    messages=asked["messages"],
                    stream=True,
                    **fields,
                    extra_body={"x_evermini": extensions},
                )
            )
        direct = client.chat.completions.create(
            model="gpt-4.1-nano",
            messages=asked["messages"],
            **fields,
            extra_body={"x_evermini": {"reading": "sweep", "why": True}},
        )
    theirs = direct.x_evermini["sweep"]
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    for told in (ours["x_evermini"]["sweep"], last.x_evermini["sweep"]):
        assert {**told, "seconds": 0} == {**theirs, "seconds": 0}
    assert ours["choices"][0]["message"]["content"] == direct.choices[0].message.content
    assert ours["usage"]["prompt_tokens"] == direct.usage.prompt_tokens
    reports = [c.x_evermini["progress"] for c in chunks if not c.choices and c.model_extra]
    assert all(report["stage"] == "sweep" for report in reports)
