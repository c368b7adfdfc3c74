"""The text of a choice and the tokens listed for it belong together, however both are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from evermini.engine.request import TokenLogprob, TokenOutput
from evermini.service.decode import ChoiceDecoder, ScoredToken

SPECIAL = 0


@dataclass
class ByteTokenizer:
    """Tokens are pieces of UTF-8, cut anywhere; token 0 is a control token."""

    pieces: list[bytes]
    special_ids: frozenset[int] = field(default_factory=lambda: frozenset({SPECIAL}))

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def run(
    pieces: list[bytes], ids: list[int], stops: list[str]
) -> tuple[str, list[ScoredToken], bool]:
    decoder = ChoiceDecoder(ByteTokenizer(pieces), stops)
    text, tokens = "", []
    for token_id in ids:
        piece = decoder.push(TokenOutput(token_id, TokenLogprob(token_id, -1.0)))
        text += piece.text
        tokens += piece.logprobs
        assert all(token.start < len(text) for token in tokens)
        if piece.stopped:
            return text, tokens, True
    piece = decoder.finish()
    return text + piece.text, [*tokens, *piece.logprobs], piece.stopped


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    text = draw(st.text(alphabet="abé€😀\n", max_size=30))
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=12)) | {0, len(data)})
    return text, [data[a:b] for a, b in pairwise(cuts)]


@settings(deadline=None)
@given(cut_texts())
def test_without_stops_everything_comes_out(case: tuple[str, list[bytes]]) -> None:
    text, tokens = case
    pieces = [b"<control>", *tokens]
    ids = list(range(1, len(pieces)))
    shown, listed, stopped = run(pieces, ids, [])
    assert (shown, stopped) == (text, False)
    assert [token.logprob.token_id for token in listed] == ids


@settings(deadline=None)
@given(cut_texts(), st.lists(st.text(alphabet="abé€😀\n", min_size=1, max_size=3), max_size=4))
def test_stops_cut_text_and_tokens_alike(case: tuple[str, list[bytes]], stops: list[str]) -> None:
    text, tokens = case
    pieces = [b"<control>", *tokens]
    shown, listed, stopped = run(pieces, list(range(1, len(pieces))), stops)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stopped or shown == text
    # The listed tokens are the first ones, up to the one that holds the last shown character.
    ids = [token.logprob.token_id for token in listed]
    assert ids == list(range(1, len(ids) + 1))
    data = b"".join(pieces[token_id] for token_id in ids)
    if stopped:
        assert data.startswith(shown.encode())
        assert len(shown.encode()) > len(data) - len(pieces[ids[-1]]) if ids else shown == ""


def test_a_character_in_two_tokens_comes_with_both() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    decoder = ChoiceDecoder(ByteTokenizer([b"", first, second]), [])
    assert decoder.push(TokenOutput(1, TokenLogprob(1, -1.0))).logprobs == ()
    piece = decoder.push(TokenOutput(2, TokenLogprob(2, -2.0)))
    assert piece.text == "é"
    assert [token.start for token in piece.logprobs] == [0, 0]


def test_a_half_character_at_the_end_is_listed() -> None:
    shown, listed, _ = run([b"", b"a", b"\xf0\x9f"], [1, 2], [])
    assert shown == "a\ufffd"
    assert len(listed) == 2


def test_control_tokens_are_listed_with_what_follows() -> None:
    shown, listed, _ = run([b"<control>", b"a", b"b"], [1, SPECIAL, 2, SPECIAL], [])
    assert shown == "ab"
    assert [token.logprob.token_id for token in listed] == [1, SPECIAL, 2, SPECIAL]
