"""Finds stop strings in a stream of text and keeps them out of it."""

from __future__ import annotations

from collections.abc import Sequence

from evermini.errors import InvalidRequestError


class StopMatcher:
    """Passes text through until the first stop string is complete.

    The first stop is the one that ends first (of two that end together, the longer). So the outcome depends on the
    text alone, not on how it was cut into pushes, and generation can end with the character that completes a stop.
    Text that may be the beginning of a stop is held back. Work per character is constant on average, whatever the
    stops' length (Knuth, Morris and Pratt, 1977).

    Args:
        stops: Stop strings, none of them empty.

    Raises:
        InvalidRequestError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise InvalidRequestError("A stop string is empty. Leave it out.", param="stop")
        # Longest first, so that of two stops that end together the longer is seen first.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(
            self._stops
        )  # characters of each stop that the text now ends with
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text.

        Returns:
            The text that can be shown now, and whether a stop was found. After that nothing comes any more.
        """
        if self._hit:
            return "", True
        if not self._stops:
            return text, False
        pending = self._held + text
        for index, char in enumerate(text, start=len(self._held) + 1):
            for which, stop in enumerate(self._stops):
                self._matched[which] = matched = self._advance(which, char)
                if matched == len(stop):
                    self._hit, self._held = True, ""
                    return pending[: index - matched], True
        keep = max(self._matched)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def finish(self) -> str:
        """Return the text held back, now that it cannot become a stop any more."""
        held, self._held = self._held, ""
        return held

    def _advance(self, which: int, char: str) -> int:
        stop, borders, matched = self._stops[which], self._borders[which], self._matched[which]
        while matched and stop[matched] != char:
            matched = borders[matched - 1]
        return matched + (stop[matched] == char)


def _borders(stop: str) -> list[int]:
    """Return for each prefix of ``stop`` the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = borders[length - 1]
        length += stop[length] == stop[index]
        borders[index] = length
    return borders
