"""Structured outputs against public schemas: how many are accepted, and is what comes out always valid?

    python benchmarks/schemas.py masks DATA               # every schema, no model runs: minutes
    python benchmarks/schemas.py generate DATA --model nano --schemas 200
    python benchmarks/schemas.py speed --model mini

DATA holds ``jsonschemabench/{schemas,maskbench}_sample.jsonl.gz`` (lines with a ``schema``; the second with ``tests``
of ``data`` and ``valid``) and ``json-schema-test-suite/tests/draft*/*.json``.

- *masks*: the share of schemas that are accepted; instances that the masks take or refuse against what they are said to
  be; and random walks: texts drawn from the masks alone, with no model to make them sensible, checked by `jsonschema`.
- *generate*: the model itself at temperature 1; every answer that ends with ``stop`` is checked.
- *speed*: time per token with a grammar against none, prompts and lengths equal.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import torch
from jsonschema.protocols import Validator

from evermini import LLM
from evermini.config import load_settings
from evermini.errors import EngineError, InvalidRequestError
from evermini.models.checkpoint import open_checkpoint
from evermini.models.pull import ensure
from evermini.text.grammar import Grammar, GrammarCompiler
from evermini.text.tokenizer import Tokenizer

Bits = npt.NDArray[np.bool_]

DRAFTS = ("draft4", "draft6", "draft7")


@dataclass(frozen=True)
class Case:
    """A schema and instances of which is known whether they are valid."""

    source: str
    name: str
    schema: Any
    tests: list[tuple[Any, bool]] = field(default_factory=list)


def bench_cases(path: Path) -> Iterator[Case]:
    """Yield the schemas of a JSONSchemaBench or MaskBench file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            tests = [(t["data"], t["valid"]) for t in row.get("tests", ()) if "data" in t]
            yield Case(row["split"], row["file"], row["schema"], tests)


def suite_cases(root: Path) -> Iterator[Case]:
    """Yield the groups of the JSON Schema test suite, each schema saying which draft it is of."""
    uris = {"draft4": "http://json-schema.org/draft-04/schema#"}
    for draft in DRAFTS:
        uri = uris.get(draft, f"http://json-schema.org/draft-0{draft[-1]}/schema#")
        for path in sorted((root / "tests" / draft).glob("*.json")):
            for group in json.loads(path.read_text(encoding="utf-8")):
                schema = group["schema"]
                if isinstance(schema, dict):
                    schema = {"$schema": uri, **schema}
                tests = [(test["data"], test["valid"]) for test in group["tests"]]
                yield Case(f"suite {draft}", f"{path.stem}: {group['description']}", schema, tests)


def tokenizer_of(model: str) -> Tokenizer:
    """Return a tier's tokenizer without its weights."""
    home = load_settings({}).settings.home
    return Tokenizer(open_checkpoint(ensure(model, home=home)).tokenizer)


def validator_of(schema: Any) -> Validator:
    """Return the judge: `jsonschema` with its checks of formats."""
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def is_taken(grammar: Grammar, tokenizer: Tokenizer, value: Any) -> bool:
    """Return whether the masks let a value through, written as the server writes JSON."""
    ids = tokenizer.encode(json.dumps(value, ensure_ascii=False))
    state = grammar.start()
    if state.num_valid(ids) < len(ids):
        return False
    for token_id in ids:
        state.advance(token_id)
    row = torch.zeros(-(-tokenizer.vocab_size // 32), dtype=torch.int32)
    state.fill_mask(row)
    return bool(bits_of(row)[list(tokenizer.eos_ids)].any())


def bits_of(row: torch.Tensor) -> Bits:
    """Return a mask as one boolean per token."""
    return np.unpackbits(row.numpy().view(np.uint8), bitorder="little").view(bool)


class Walker:
    """Draws texts from masks alone; after a while it takes short tokens that close what is open."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = np.random.default_rng(seed)
        self._row = torch.zeros(-(-tokenizer.vocab_size // 32), dtype=torch.int32)
        self._ends = list(tokenizer.eos_ids)
        ends = {b'"': 3, b"}": 5, b"]": 4, b"l": 1, b"e": 1, b"0": 1}
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._rank = np.array([ends.get(token[-1:], 0) - 0.01 * len(token) for token in tokens])

    def text(self, grammar: Grammar, patience: int, limit: int) -> str | None:
        """Return a whole text of the grammar, or ``None`` if it takes more than ``limit`` tokens."""
        state, ids = grammar.start(), []
        for step in range(limit):
            state.fill_mask(self._row)
            bits = bits_of(self._row)
            may_end = bits[self._ends].any()
            bits[self._ends] = False
            going = np.flatnonzero(bits)
            if not len(going) or (may_end and self._random.random() < 0.3):
                return self._tokenizer.decode(ids)
            if step >= patience:
                ranks = self._rank[going]
                going = going[ranks >= ranks.max() - 0.05]
            token_id = int(self._random.choice(going))
            state.advance(token_id)
            ids.append(token_id)
        return None


def masks(arguments: argparse.Namespace) -> None:
    """Compile every schema; try its instances; walk."""
    tokenizer = tokenizer_of(arguments.model)
    compiler, walker = GrammarCompiler(tokenizer), Walker(tokenizer, seed=0)
    bench = arguments.data / "jsonschemabench"
    for title, cases in (
        ("JSONSchemaBench", bench_cases(bench / "schemas_sample.jsonl.gz")),
        ("MaskBench", bench_cases(bench / "maskbench_sample.jsonl.gz")),
        ("JSON Schema test suite", suite_cases(arguments.data / "json-schema-test-suite")),
    ):
        counts: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        seconds = []
        for case in cases:
            counts["schemas"] += 1
            began = time.perf_counter()
            try:
                grammar = compiler.json_schema(case.schema)
            except InvalidRequestError as error:
                refused[error.message.partition("), ")[2][:70]] += 1
                continue
            seconds.append(time.perf_counter() - began)
            counts["accepted"] += 1
            for value, valid in case.tests:
                taken = is_taken(grammar, tokenizer, value)
                counts[f"{'valid' if valid else 'invalid'}, {'taken' if taken else 'refused'}"] += 1
                if taken and not valid:
                    print("  WRONG: takes", case.name, json.dumps(value)[:200])
            walks(case, grammar, walker, arguments.walks, counts)
        print(f"{title}: {counts['accepted'] / counts['schemas']:.1%} accepted; {dict(counts)}")
        median, worst = statistics.median(seconds), max(seconds)
        print(f"  compiled in {1000 * median:.1f} ms (median), {1000 * worst:.0f} ms (worst)")
        for reason, count in refused.most_common():
            print(f"  {count:4} {reason}")


def walks(case: Case, grammar: Grammar, walker: Walker, number: int, counts: Counter[str]) -> None:
    """Draw texts and check them."""
    validator = validator_of(case.schema)
    for attempt in range(number):
        try:
            text = walker.text(grammar, patience=15 * (attempt + 1), limit=400)
        except EngineError:
            counts["walks beyond limits"] += 1
            continue
        if text is None:
            counts["walks unfinished"] += 1
            continue
        try:
            validator.validate(json.loads(text))
            counts["walks valid"] += 1
        except (jsonschema.ValidationError, ValueError) as error:
            counts["walks INVALID"] += 1
            print(
                "  WRONG: writes", case.source, case.name, text[:200], str(error).partition("\n")[0]
            )
        except Exception as error:  # references that jsonschema would have to fetch
            counts[f"walks unchecked ({type(error).__name__})"] += 1


def generate(arguments: argparse.Namespace) -> None:
    """Let the model answer with schemas drawn from the benchmark."""
    path = arguments.data / "jsonschemabench" / "schemas_sample.jsonl.gz"
    cases = list(bench_cases(path))
    random.Random(0).shuffle(cases)
    counts: Counter[str] = Counter()
    with LLM(arguments.model) as llm:
        for case in cases[: arguments.schemas]:
            response_format = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": case.schema},
            }
            try:
                answer = llm.chat(
                    [{"role": "user", "content": "Make up an example."}],
                    response_format=response_format,
                    max_completion_tokens=arguments.tokens,
                    temperature=1.0,
                    seed=0,
                )
            except InvalidRequestError:
                counts["refused"] += 1
                continue
            counts[str(answer.finish_reason)] += 1
            if answer.finish_reason != "stop":
                continue
            try:
                validator_of(case.schema).validate(json.loads(answer.text))
                counts["valid"] += 1
            except (jsonschema.ValidationError, ValueError) as error:
                counts["INVALID"] += 1
                print("WRONG", case.name, answer.text[:200], str(error).partition("\n")[0])
            except Exception as error:  # references that jsonschema would have to fetch
                counts[f"unchecked ({type(error).__name__})"] += 1
    print(dict(counts))


SPEED_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "title": {"type": "string"},
                    "text": {"type": "string"},
                    "score": {"type": "number", "minimum": 0, "maximum": 10},
                    "day": {"type": "string", "format": "date"},
                    "kind": {"enum": ["note", "task", "event"]},
                },
                "required": ["title", "text", "score", "day", "kind"],
                "additionalProperties": False,
            },
            "minItems": 1000,
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}


def speed(arguments: argparse.Namespace) -> None:
    """Alternate answers of equal length with and without a grammar."""
    grammar = {"type": "json_schema", "json_schema": {"name": "list", "schema": SPEED_SCHEMA}}
    ends = tokenizer_of(arguments.model).eos_ids
    endless = {
        str(token_id): -100.0 for token_id in ends
    }  # as the schema keeps the masked side going
    prompt = [{"role": "user", "content": "List all that happened in JSON, in detail."}]
    with LLM(arguments.model) as llm:
        rows: dict[str, list[float]] = {"free": [], "masked": []}
        for round_number in range(arguments.rounds + 1):
            for name, params in (
                ("free", {"logit_bias": endless}),
                ("masked", {"response_format": grammar}),
            ):
                stamps = []
                with llm.chat(
                    prompt, stream=True, max_completion_tokens=arguments.tokens, temperature=0.7,
                    seed=round_number, logprobs=True, **params,
                ) as stream:  # fmt: skip
                    for delta in stream:
                        stamps += [time.perf_counter()] * len(delta.logprobs)
                per_token = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
                if round_number:
                    rows[name].append(per_token)
    free, masked = (statistics.median(rows[name]) for name in ("free", "masked"))
    ratios = [m / f for f, m in zip(rows["free"], rows["masked"], strict=True)]
    print(
        f"{arguments.model}: {1000 * free:.2f} ms per token free, {1000 * masked:.2f} ms masked, ratio "
        f"{statistics.median(ratios):.3f} (rounds {', '.join(f'{r:.3f}' for r in ratios)})"
    )


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("masks")
    part.add_argument("data", type=Path)
    part.add_argument("--model", default="nano")
    part.add_argument("--walks", type=int, default=3)
    part.set_defaults(run=masks)
    part = parts.add_parser("generate")
    part.add_argument("data", type=Path)
    part.add_argument("--model", default="nano")
    part.add_argument("--schemas", type=int, default=100)
    part.add_argument("--tokens", type=int, default=300)
    part.set_defaults(run=generate)
    part = parts.add_parser("speed")
    part.add_argument("--model", default="mini")
    part.add_argument("--tokens", type=int, default=100)
    part.add_argument("--rounds", type=int, default=5)
    part.set_defaults(run=speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
