"""The whole way of a batch with OpenAI's client against `evermini serve`: upload in parts, poll, download, compare.

pytest tests/e2e/test_batch_client.py -m slow -s        1,000 lines
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from tests.processes import Server, new_home

MODEL = "gpt-4.1-nano"
CHAT = "/v1/chat/completions"
BAD = {
    # What is wrong with every so many-th line -> the status of its error.
    11: ({"temperature": 3}, 400),
    17: ({"model": "gpt-17"}, 404),
    23: ({"max_tokens": "many"}, 400),
    31: ({"response_format": {"type": "json_schema"}}, 400),
}


def line(number: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You answer in one short sentence."},
            {"role": "user", "content": f"What do you know about the number {number}?"},
        ],
        "temperature": 0,
        "max_tokens": 4 + number % 13,
    }
    for every, (change, _) in BAD.items():
        if number % every == every - 1:
            body |= change
            break
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}


def status_of(number: int) -> int:
    return next((status for every, (_, status) in BAD.items() if number % every == every - 1), 200)


@pytest.mark.parametrize("num_lines", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_batch_of_mixed_lines(tmp_path: Path, nano_path: Path, num_lines: int) -> None:
    lines = [line(number) for number in range(num_lines)]
    content = b"".join(json.dumps(one).encode() + b"\n" for one in lines)
    with Server(new_home(tmp_path / "home")) as server, server.client(timeout=300) as client:
        began = time.monotonic()
        file_id = upload(client, content)
        assert client.files.content(file_id).read() == content
        batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        done = ended(client, batch.id)
        seconds = time.monotonic() - began
        assert done.status == "completed"
        assert done.usage
        good, bad = read(client, done.output_file_id), read(client, done.error_file_id)
        found = {**good, **bad}
        assert len(good) + len(bad) == len(found) == num_lines
        for number in range(num_lines):
            answer = found[f"line-{number}"]["response"]
            assert answer["status_code"] == status_of(number)
            assert (f"line-{number}" in good) == (answer["status_code"] == 200)
        assert done.request_counts
        assert done.request_counts.model_dump() == {
            "total": num_lines,
            "completed": len(good),
            "failed": len(bad),
        }
        assert done.usage.total_tokens == sum(
            one["response"]["body"]["usage"]["total_tokens"] for one in good.values()
        )
        for number in range(0, num_lines, max(1, num_lines // 20)):  # as if asked alone
            if status_of(number) == 200:
                alone = client.chat.completions.create(**lines[number]["body"])
                together = good[f"line-{number}"]["response"]["body"]["choices"][0]["message"]
                assert together["content"] == alone.choices[0].message.content

        other = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        while counts(client, other.id) < num_lines // 4:
            time.sleep(0.05)
        client.batches.cancel(other.id)
        cancelled = ended(client, other.id)
        assert cancelled.status == "cancelled"
        some, rest = read(client, cancelled.output_file_id), read(client, cancelled.error_file_id)
        assert some.keys().isdisjoint(rest)
        assert some.keys() | rest.keys() == found.keys()
        for name, one in some.items():
            mine, other_body = one["response"]["body"], good[name]["response"]["body"]
            assert mine["choices"] == other_body["choices"]
        not_done = [one for one in rest.values() if one["response"] is None]
        assert {one["error"]["code"] for one in not_done} <= {"batch_cancelled"}
    print(
        f"\n{num_lines} lines ({len(bad)} bad), uploaded in parts, in {seconds:.0f} s: "
        f"{num_lines / seconds:.1f} lines/s, {done.usage.total_tokens} tokens; "
        f"the other one cancelled with {len(some)} done, {len(not_done)} not"
    )


def upload(client: openai.OpenAI, content: bytes) -> str:
    done = client.uploads.upload_file_chunked(
        file=content,
        filename="lines.jsonl",
        bytes=len(content),
        mime_type="application/jsonl",
        purpose="batch",
        part_size=len(content) // 3,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert done.file
    return done.file.id


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    deadline = time.monotonic() + 1800
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "cancelled", "failed", "expired"):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)


def counts(client: openai.OpenAI, batch_id: str) -> int:
    found = client.batches.retrieve(batch_id).request_counts
    return found.completed if found else 0


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    lines = [json.loads(one) for one in client.files.content(file_id).text.splitlines()]
    return {one["custom_id"]: one for one in lines}
