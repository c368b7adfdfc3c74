"""Stop strings: the same outcome however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evermini.errors import InvalidRequestError
from evermini.text.stops import StopMatcher

STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)
PIECES = st.lists(st.text(alphabet="abc", max_size=4), max_size=25)


def naive(stops: list[str], text: str) -> tuple[str, bool]:
    """Look at every prefix of the text: the first that ends with a stop decides."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(deadline=None)
@given(STOPS, PIECES)
@example(["abcd", "bc"], ["a", "b", "c", "d"])
@example(["aab"], ["a", "aa", "ab"])
@example(["abab", "b"], ["aab"])
def test_any_cutting_gives_what_the_whole_text_gives(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, seen, hit = "", "", False
    for piece in pieces:
        out, hit = matcher.push(piece)
        shown, seen = shown + out, seen + piece
        assert hit == naive(stops, seen)[1]  # found with the very push that completes it
        if hit:
            break
        # What is held back is the least possible: it may still become a stop.
        held = seen[len(shown) :]
        assert seen == shown + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        longer = (seen[start:] for start in range(len(shown)))
        assert not any(stop.startswith(tail) for tail in longer for stop in stops)
    shown += matcher.finish()
    assert (shown, hit) == naive(stops, seen)


def test_nothing_comes_after_a_hit() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("text EN") == ("text ", False)
    assert matcher.push("D and more") == ("", True)
    assert matcher.push("even more") == ("", True)
    assert matcher.finish() == ""


def test_a_false_beginning_is_given_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("one\n\nUs") == ("one", False)
    assert matcher.push("eful") == ("\n\nUseful", False)
    assert matcher.push("\n") == ("", False)
    assert matcher.finish() == "\n"


def test_without_stops_text_passes_through() -> None:
    matcher = StopMatcher()
    assert matcher.push("abc") == ("abc", False)
    assert matcher.finish() == ""


def test_long_stops_cost_little() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"])
    for _ in range(200):
        matcher.push("a" * 1_000)
    assert len(matcher.finish()) == 20_000


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty") as caught:
        StopMatcher(["x", ""])
    assert caught.value.param == "stop"
