"""Counts for how many held-out messages a model's answer is exactly the JSON that is wanted, key by key too.

evermini serve --model nano
python examples/json_keys/evaluate.py OUT_FOLDER --model gpt-4.1-nano --model ft:gpt-4.1-nano-2025-04-14:...
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", action="append", required=True)
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key="unused", timeout=1800)
    lines = (options.folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    wanted = [json.loads(messages[2]["content"]) for messages in rows]
    for model in options.model:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda messages: ask(client, model, messages), rows))  # noqa: B023
        exact = sum(answer == want for answer, want in zip(answers, wanted, strict=True))
        keys = {
            key: sum(
                isinstance(answer, dict) and answer.get(key) == want[key]
                for answer, want in zip(answers, wanted, strict=True)
            )
            for key in wanted[0]
        }
        print(f"{model}: {exact} of {len(rows)} exact; by key {keys}", flush=True)


def ask(client: openai.OpenAI, model: str, messages: list[dict[str, Any]]) -> object:
    """Return the decoded answer; what is no JSON stays text."""
    answer = client.chat.completions.create(
        model=model,
        messages=messages[:2],  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=96,
    )
    text = answer.choices[0].message.content or ""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
