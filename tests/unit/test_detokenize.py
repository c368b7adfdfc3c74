"""Incremental detokenisation: no half characters, and in the end the whole text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermini.text.detokenize import IncrementalDetokenizer
from evermini.text.tokenizer import Tokenizer
from tests.vocabularies import gguf_source, smollm_tokenizer


class Bytes:
    """Token 0 is special; any other id stands for the bytes given."""

    special_ids = frozenset({0})

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = [b"<special>", *tokens]

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(gguf_source(smollm_tokenizer(), "smollm"))


def run(detokenizer: IncrementalDetokenizer, ids: list[int]) -> tuple[list[str], str]:
    return [detokenizer.push(i) for i in ids], detokenizer.finish()


# Pieces of valid characters, so that sequences often come close to being valid.
FRAGMENTS = st.one_of(
    st.binary(max_size=3),
    st.sampled_from([b"\xf0\x9f", b"\xa6\x99", b"\xe6\x97", b"\xa5", b"\xc3", b"\xa9", b"a"]),
)


@given(st.lists(FRAGMENTS, max_size=20))
def test_any_bytes(tokens: list[bytes]) -> None:
    pieces, rest = run(IncrementalDetokenizer(Bytes(tokens)), list(range(1, len(tokens) + 1)))
    data = b"".join(tokens)
    assert "".join(pieces) + rest == data.decode("utf-8", errors="replace")
    # Before the end a replacement character stands only for bytes that nothing after them could repair.
    seen = b""
    for token, shown in zip(tokens, pieces, strict=True):
        seen += token
        if "\ufffd" in shown:
            assert "\ufffd" in seen.decode("utf-8", errors="replace")
            with pytest.raises(UnicodeDecodeError) as caught:
                seen.decode()
            assert caught.value.reason != "unexpected end of data"


@given(st.text(), st.data())
def test_valid_text_cut_anywhere_never_shows_a_replacement(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=12).map(sorted))
    edges = [0, *cuts, len(raw)]
    tokens = [raw[a:b] for a, b in itertools.pairwise(edges)]
    pieces, rest = run(IncrementalDetokenizer(Bytes(tokens)), list(range(1, len(tokens) + 1)))
    assert "".join(pieces) == text
    assert rest == ""
    for index in range(len(pieces)):
        assert text.startswith("".join(pieces[: index + 1]))


@given(st.data())
@settings(deadline=None)
def test_real_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    for skip in (True, False):
        pieces, rest = run(IncrementalDetokenizer(tokenizer, skip), ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special=skip)


def test_a_character_of_four_tokens(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids = [single[bytes([byte])] for byte in "🦙".encode()]
    assert run(IncrementalDetokenizer(tokenizer), ids) == (["", "", "", "🦙"], "")
    assert run(IncrementalDetokenizer(tokenizer), ids[:3]) == (["", "", ""], "\ufffd")


def test_special_tokens_inside_a_character(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(Bytes([b"\xc3", b"\xa9"]))
    assert run(detokenizer, [1, 0, 2]) == (["", "", "é"], "")
