"""Compares models on the test files that data.py has made, through a running server.

    evermini serve --model nano
    python examples/simpletext/evaluate.py OUT_FOLDER --model gpt-4.1-nano --model ft:gpt-4.1-nano-2025-04-14:...

Every model gets the instruction and the text, and nothing else. Two baselines stand beside them: the source as it is,
and what people wrote (whose SARI and BLEU are 100 by definition).
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from evermini.evals.simplification import bleu, compression, fkgl, sari


def main() -> None:
    """Print a table for each level."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--documents", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key="unused", timeout=1800)
    for level, limit in (("sentence", options.sentences), ("document", options.documents)):
        if not limit:
            continue
        lines = (options.folder / f"test_{level}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        chosen = random.Random(options.seed).sample(rows, min(limit, len(rows)))
        sources = [messages[1]["content"] for messages in chosen]
        people = [messages[2]["content"] for messages in chosen]
        answers = {"source copied": sources, "people's": people}
        for model in options.model:
            answers[model] = ask(client, model, chosen)
            place = options.folder / f"answers_{level}_{model.replace(':', '_')}.json"
            place.write_text(json.dumps(answers[model], indent=1, ensure_ascii=False))
        print(f"\n{level}, {len(chosen)} pairs\n")
        print("| | SARI | BLEU | FKGL | compression |\n|---|---|---|---|---|")
        for name, texts in answers.items():
            scores = [
                sari(sources, texts, [[one] for one in people]),
                bleu(texts, [[one] for one in people]),
                fkgl(texts),
                compression(sources, texts),
            ]
            print(f"| {name} | " + " | ".join(f"{score:.2f}" for score in scores) + " |")


def ask(client: openai.OpenAI, model: str, rows: list[list[dict[str, Any]]]) -> list[str]:
    """Return a model's answers, which may be as long as one and a half times the text."""

    def one(messages: list[dict[str, Any]]) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=messages[:2],  # type: ignore[arg-type]
            temperature=0,
            max_completion_tokens=max(64, len(messages[1]["content"]) * 3 // 8),
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, rows))


if __name__ == "__main__":
    main()
