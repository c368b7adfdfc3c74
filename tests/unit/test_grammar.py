"""Grammars over a small real vocabulary: which tokens they allow, where they end, what they refuse."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

from evermini.errors import EngineError, InvalidRequestError
from evermini.text.grammar import Grammar, GrammarCompiler
from evermini.text.tokenizer import Tokenizer
from tests.vocabularies import gguf_source, smollm_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(gguf_source(smollm_tokenizer(), "smollm"))


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def allowed(state, tokenizer: Tokenizer) -> set[int]:
    row = torch.zeros(-(-tokenizer.vocab_size // 32), dtype=torch.int32)
    state.fill_mask(row)
    bits = np.unpackbits(row.numpy().view(np.uint8), bitorder="little")
    assert not bits[tokenizer.vocab_size :].any()
    return set(np.flatnonzero(bits).tolist())


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Walk the text byte by byte, in the shortest tokens there are, checking each mask."""
    state = grammar.start()
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    for byte in text.encode():
        token_id = single[bytes([byte])]
        if state.num_valid([token_id]) == 0:
            return False
        state.advance(token_id)
    return bool(tokenizer.eos_ids & allowed(state, tokenizer))


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"name": "Zoé 🦙", "age": 12}', True),
        ('{"name": "", "age": 0}', True),
        ('{"name": "x", "age": -1}', False),
        ('{"name": "x"}', False),
        ('{"name": "x", "age": 1, "more": 1}', False),
        ('{"name": "x",\n\n "age": 1}', False),
        ("[]", False),
    ],
)
def test_json_schema(compiler, tokenizer, text, good):
    assert accepts(compiler.json_schema(SCHEMA), tokenizer, text) is good


def test_json_object(compiler, tokenizer):
    grammar = compiler.json_object()
    assert accepts(grammar, tokenizer, json.dumps({"a": [1, {"b": None}, "\n"]}))
    assert not accepts(grammar, tokenizer, "[1]")


def test_regex_and_lark(compiler, tokenizer):
    assert accepts(compiler.regex(r"[a-f]{2,3}"), tokenizer, "abc")
    assert not accepts(compiler.regex(r"[a-f]{2,3}"), tokenizer, "abcd")
    lark = compiler.lark('start: "yes" | "no" " "? "way"')
    assert accepts(lark, tokenizer, "no way")
    assert not accepts(lark, tokenizer, "no")


def test_masks_allow_special_tokens_only_at_the_end(compiler, tokenizer):
    state = compiler.regex("[a-z<|_>]{1,2}").start()
    assert not allowed(state, tokenizer) & tokenizer.special_ids
    state.advance(tokenizer.encode("a")[0])
    assert allowed(state, tokenizer) & tokenizer.special_ids == tokenizer.eos_ids
    assert not state.is_done
    state.advance(tokenizer.encode("b")[0])
    assert state.is_done
    assert allowed(state, tokenizer) == tokenizer.eos_ids


def test_states_are_independent(compiler, tokenizer):
    grammar = compiler.regex("ab|cd")
    first, second = grammar.start(), grammar.start()
    first.advance(tokenizer.encode("a")[0])
    second.advance(tokenizer.encode("c")[0])
    assert allowed(first, tokenizer) == set(tokenizer.encode("b"))
    assert allowed(second, tokenizer) == set(tokenizer.encode("d"))


def test_num_valid_changes_nothing(compiler, tokenizer):
    state = compiler.regex("abc").start()
    ids = [tokenizer.encode(letter)[0] for letter in "abx"]
    before = allowed(state, tokenizer)
    assert state.num_valid(ids) == 2
    assert allowed(state, tokenizer) == before


def test_a_forbidden_token_is_an_error(compiler, tokenizer):
    state = compiler.regex("abc").start()
    with pytest.raises(EngineError, match="cannot be followed"):
        state.advance(tokenizer.encode("x")[0])


@pytest.mark.parametrize("pattern", ["(", "[z-a]"])
def test_wrong_patterns_are_refused(compiler, pattern):
    with pytest.raises(InvalidRequestError):
        compiler.regex(pattern)


def test_compiled_grammars_are_kept(compiler):
    assert compiler.json_schema(SCHEMA) is compiler.json_schema(json.loads(json.dumps(SCHEMA)))


def test_threads_share_a_compiler(tokenizer):
    compiler = GrammarCompiler(tokenizer)
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            for length in range(1, 20):
                grammar = compiler.regex(f"[a-z]{{{length}}}")
                state = grammar.start()
                for _ in range(length):
                    assert not state.is_done
                    state.advance(tokenizer.encode("a")[0])
                assert state.is_done
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
