"""Finds stop strings in a stream. Text that may be the start of a stop string is held back."""

from __future__ import annotations


class StopWords:
    """`feed` returns the text that may be shown. After a stop string, `hit` is true and `feed` returns nothing.

    The stop string that is complete first ends the answer; of several that are complete at the same character, the
    longest. So the result does not depend on how the text is split.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = tuple(word for word in words if word)
        self._longest = max(map(len, self._words), default=0)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(word), at) for word in self._words if (at := self._held.find(word)) >= 0]
        self.hit = bool(found)
        keep = min(found)[1] if found else len(self._held) - self._tail()
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def flush(self) -> str:
        """Returns the held-back text, which turned out not to be a stop string."""
        shown, self._held = ("" if self.hit else self._held), ""
        return shown

    def _tail(self) -> int:
        """Returns the length of the longest suffix of the held text that is the start of a stop string."""
        # A suffix cannot be longer than the text: a slice with a larger negative bound is the whole text.
        lengths = range(min(self._longest - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if any(word.startswith(self._held[-n:]) for word in self._words)), 0)
