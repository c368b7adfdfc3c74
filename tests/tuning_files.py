"""Training files for tests, and the real server on the real nano model that trains on them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from evermini.config import Settings, load_settings
from evermini.service.runtime import Runtime, load_tier
from evermini.storage.database import Database
from tests.serving import make_client, serving

MODEL = "gpt-4.1-nano-2025-04-14"


def words(count: int = 12) -> list[dict[str, Any]]:
    """Examples that teach to answer with one word in capitals."""
    names = ("apple", "river", "stone", "cloud", "tiger", "piano", "train", "glass", "bread")
    return [
        {
            "messages": [
                {"role": "system", "content": "Shout."},
                {"role": "user", "content": f"{names[at % len(names)]} {at}"},
                {"role": "assistant", "content": f"{names[at % len(names)].upper()} {at}!"},
            ]
        }
        for at in range(count)
    ]


def preferences(count: int = 12) -> list[dict[str, Any]]:
    """Pairs that prefer the short answer."""
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"Say hello to guest {at}."}]},
            "preferred_output": [{"role": "assistant", "content": f"Hello {at}."}],
            "non_preferred_output": [
                {"role": "assistant", "content": f"Dear guest {at}, welcome, welcome!"}
            ],
        }
        for at in range(count)
    ]


def jsonl(rows: Sequence[Any]) -> bytes:
    """The rows as a file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def upload(client: openai.OpenAI, rows: Sequence[Any] | bytes, name: str = "rows.jsonl") -> str:
    """Upload rows, and return the file's id."""
    data = rows if isinstance(rows, bytes) else jsonl(rows)
    return client.files.create(file=(name, data), purpose="fine-tune").id


def wait_for_status(
    client: openai.OpenAI, job_id: str, *statuses: str, seconds: float = 300.0
) -> Any:
    """Wait until a job has one of these statuses, and return it."""
    return wait_until(
        lambda: client.fine_tuning.jobs.retrieve(job_id),
        lambda job: job.status in statuses,
        seconds,
    )


def wait_until(
    look: Callable[[], Any], is_good: Callable[[Any], bool], seconds: float = 300.0
) -> Any:
    """Look until what is seen is good, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if is_good(seen):
            return seen
        assert time.monotonic() < deadline, f"timed out; last seen: {seen}"
        time.sleep(0.1)


@contextmanager
def tuning_server(nano_path: Path, **options: Any) -> Iterator[tuple[openai.OpenAI, Settings]]:
    """A server that trains on nano, on an empty home."""
    with tempfile.TemporaryDirectory(prefix="evermini-tune-") as folder:
        flags = {"model": f"nano={nano_path}", "home": folder, "kv_memory": "256MiB", "threads": 1}
        settings = load_settings({**flags, **options}).settings
        served = load_tier(settings.models[0], settings)
        try:
            with (
                Database.open(settings) as database,
                serving(Runtime([served]), settings, database) as url,
            ):
                yield make_client(url), settings
        finally:
            served.close(timeout=1.0)
