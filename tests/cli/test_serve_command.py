"""``evermini serve`` as a process: ready line, real clients, graceful end, refusals."""

import json
import signal
import socket
import threading
import time

import httpx
import openai
import pytest
from sqlalchemy import make_url, select

from evermini.storage.database import Database
from evermini.storage.jobs import JobRow
from tests.serving import wait_for

STORY = [{"role": "user", "content": "Tell me a long story."}]


def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="sesame", max_retries=0, timeout=60)


def read_in_background(stream) -> tuple[threading.Thread, list[str], list[Exception]]:
    texts, errors = [], []

    def read():
        try:
            texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
        except openai.APIError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, texts, errors


def test_serves_openai_clients_and_lets_them_finish_on_sigterm(start_server):
    server = start_server("--api-key", "sesame")
    with client(server) as openai_client:
        answer = openai_client.chat.completions.create(
            model="gpt-4.1-nano",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
        )
        assert "Paris" in answer.choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            openai_client.with_options(api_key="wrong").models.list()
        stream = openai_client.chat.completions.create(
            model="gpt-4.1-nano", messages=STORY, stream=True, max_tokens=100, temperature=0,
            logit_bias={"2": -100},
        )  # fmt: skip
        next(stream)
        reader, texts, errors = read_in_background(stream)
        stopped = server.stop()
        reader.join(30)
    assert errors == []
    assert len(texts) > 20
    assert stopped.code == 0
    assert "Stopping: 1 running requests get 30 s" in stopped.out
    assert '"path": "/v1/chat/completions", "status": 200' in stopped.err
    assert "sesame" not in stopped.out + stopped.err


def test_while_it_drains_new_requests_are_refused_and_work_is_given_back(start_server, tmp_path):
    server = start_server("--drain-timeout", "300")
    line = {"custom_id": "{}", "method": "POST", "url": "/v1/chat/completions"}
    body = {"model": "gpt-4.1-nano", "messages": STORY, "max_tokens": 20}
    lines = [json.dumps({**line, "custom_id": str(n), "body": body}) for n in range(400)]
    with client(server) as openai_client:
        file = openai_client.files.create(
            file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch"
        )
        batch = openai_client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while openai_client.batches.retrieve(batch.id).request_counts.completed < 1:
            time.sleep(0.05)
        stream = openai_client.chat.completions.create(
            model="gpt-4.1-nano", messages=STORY, stream=True, max_tokens=250, temperature=0,
            logit_bias={"2": -100},
        )  # fmt: skip
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        root = server.base_url.removesuffix("/v1")
        while (answer := httpx.get(f"{root}/readyz")).status_code == 200:
            time.sleep(0.02)
        assert answer.json()["status"] == "draining"
        assert httpx.get(f"{root}/healthz").status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            openai_client.models.list()
        assert caught.value.status_code == 503
        assert "retry-after" in caught.value.response.headers
        assert "shutting down" in caught.value.message
        with Database(make_url("sqlite:///evermini.db")) as database, database.reading() as session:
            wait_for(lambda: session.scalars(select(JobRow.owner)).all() == [None], 60)
        assert len(list(stream)) > 200
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0


def test_after_the_drain_timeout_clients_are_told(start_server):
    server = start_server("--drain-timeout", "0")
    with client(server) as openai_client:
        stream = openai_client.chat.completions.create(
            model="gpt-4.1-nano", messages=STORY, stream=True, max_tokens=5000, temperature=0,
            logit_bias={"2": -100},
        )  # fmt: skip
        next(stream)
        reader, _, errors = read_in_background(stream)
        stopped = server.stop()
        reader.join(30)
    assert stopped.code == 0
    [error] = errors
    assert "engine was stopped" in error.message


@pytest.mark.slow  # the lease of the dead server has to run out: half a minute
def test_a_background_response_survives_a_killed_server(start_server):
    server = start_server("--api-key", "sesame")
    with client(server) as openai_client:
        queued = openai_client.responses.create(
            model="gpt-4.1-nano",
            input="Write a long story about a lighthouse keeper.",
            background=True,
            max_output_tokens=1500,
            temperature=0,
        )
        while openai_client.responses.retrieve(queued.id).status == "queued":
            time.sleep(0.05)
    server.process.kill()
    server.process.communicate()
    with client(start_server("--api-key", "sesame")) as openai_client:
        assert openai_client.responses.retrieve(queued.id).status == "in_progress"
        deadline = time.monotonic() + 120
        while (answer := openai_client.responses.retrieve(queued.id)).status == "in_progress":
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert answer.usage.output_tokens == 1500 or answer.status == "completed"
    assert answer.output_text


def test_refuses_to_be_open_to_the_network_without_a_key(evermini):
    result = evermini("serve", "--host", "0.0.0.0", "--port", "0")
    assert result.code == 2
    assert "Not listening on 0.0.0.0" in result.err
    assert "EVERMINI_API_KEY" in result.err
    assert "--allow-unauthenticated" in result.err


@pytest.mark.parametrize("flags", [["--api-key", "k"], ["--allow-unauthenticated"]])
def test_a_key_or_the_flag_opens_the_network(evermini, flags):
    # The unknown model ends the command after it has listened.
    result = evermini("serve", "--host", "0.0.0.0", "--port", "0", "-m", "absent", *flags)
    assert result.code == 1
    assert "No model or path 'absent'" in result.err


def test_a_taken_port_is_told_before_weights_are_loaded(evermini):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = evermini("serve", "--port", str(taken.getsockname()[1]), "-m", "absent")
    assert result.code == 2
    assert "Cannot listen on 127.0.0.1" in result.err
    assert "--port" in result.err


def test_an_address_that_is_none_of_ours(evermini):
    result = evermini("serve", "--host", "192.0.2.1", "--port", "0", "--api-key", "k")
    assert result.code == 2
    assert "Cannot listen on 192.0.2.1" in result.err
