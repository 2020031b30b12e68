"""Reports the progress of a running job, as one JSON object per line."""

from __future__ import annotations

import time
from collections.abc import Callable

Tell = Callable[[dict[str, object]], None]

_WITHIN_EVERY_S = 2.0  # progress within a step is reported no more often than a person can read it


class Progress:
    """Reports `{"step", "done", "of"}`: `done` of `of` parts are finished; `done` is always less than `of`."""

    def __init__(self, of: int, tell: Tell) -> None:
        self._of, self._tell = of, tell
        self._done, self._step, self._reported_at = 0, "", 0.0

    def begin(self, step: str) -> None:
        self._step = step
        self._report(step)

    def within(self, what: str, share: float) -> None:
        if time.monotonic() - self._reported_at >= _WITHIN_EVERY_S:
            self._report(f"{self._step}: {what}, {min(share, 1):.0%}")

    def part_done(self) -> None:
        self._done = min(self._done + 1, self._of - 1)

    def _report(self, step: str) -> None:
        self._reported_at = time.monotonic()
        self._tell({"step": step, "done": self._done, "of": self._of})
