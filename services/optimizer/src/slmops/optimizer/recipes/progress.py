"""Progress of a running job, as one JSON object per line."""

from __future__ import annotations

import time
from collections.abc import Callable

Tell = Callable[[dict[str, object]], None]

_TOLD_EVERY_S = 2.0  # what goes on within a step, not more often than a person can read


class Progress:
    """`{"step", "done", "of"}`: `done` of `of` parts are behind us, and never all of them."""

    def __init__(self, of: int, tell: Tell) -> None:
        self._of, self._tell = of, tell
        self._done, self._step, self._told_at = 0, "", 0.0

    def begin(self, step: str) -> None:
        self._step = step
        self._say(step)

    def within(self, what: str, share: float) -> None:
        if time.monotonic() - self._told_at >= _TOLD_EVERY_S:
            self._say(f"{self._step}: {what}, {min(share, 1):.0%}")

    def part_done(self) -> None:
        self._done = min(self._done + 1, self._of - 1)

    def _say(self, step: str) -> None:
        self._told_at = time.monotonic()
        self._tell({"step": step, "done": self._done, "of": self._of})
