"""Stop strings over a stream: text that may become a stop string is held back until it is certain."""

from __future__ import annotations


class StopWords:
    """`feed` gives what may be shown; once a stop string appeared, `hit` is true and nothing follows."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = tuple(word for word in words if word)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        if self.hit:
            return ""
        self._held += text
        ends = [at for word in self._words if (at := self._held.find(word)) >= 0]
        self.hit = bool(ends)
        keep = min(ends) if ends else len(self._held) - self._tail()
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def flush(self) -> str:
        """What was held back and turned out not to be a stop string."""
        shown, self._held = ("" if self.hit else self._held), ""
        return shown

    def _tail(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = range(max(map(len, self._words), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(word.startswith(self._held[-n:]) for word in self._words)), 0)
