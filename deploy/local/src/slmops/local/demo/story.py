"""Tells what happens: a line per step, a spinner with the newest detail on what takes long, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console


@dataclass
class Step:
    """One step under way; `detail` is what it is doing now."""

    name: str
    say: Console
    live: bool
    detail: str = ""
    started: float = field(default_factory=time.monotonic)
    _told: float = 0.0
    _shown: str = ""

    def progress(self, detail: str) -> None:
        """New detail: in a terminal the spinner shows it, elsewhere a line at most every other second."""
        self.detail = detail
        now = time.monotonic()
        if not self.live and detail != self._shown and now - self._told >= 2:
            self.say.print(f"    … {detail} ({now - self.started:.0f} s)", highlight=False)
            self._told, self._shown = now, detail

    def __rich__(self) -> str:
        return f"{self.name}: {self.detail} ({time.monotonic() - self.started:.0f} s)"


class Story:
    """The demo's voice. `timings_s` holds the seconds of each finished step by its key."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.timings_s: dict[str, float] = {}

    def chapter(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/]", highlight=False)

    def tell(self, line: str) -> None:
        self.console.print(f"  {line}", highlight=False)

    @contextmanager
    def step(self, key: str, name: str) -> Iterator[Step]:
        """A step that may take long. A failed one is said to have failed."""
        step = Step(name, self.console, self.console.is_terminal)
        try:
            if step.live:
                with self.console.status(step):
                    yield step
            else:
                self.tell(f"{name} …")
                yield step
        except BaseException:
            self.tell(f"[red]✗[/] {name} [dim]({time.monotonic() - step.started:.1f} s)[/]")
            raise
        seconds = time.monotonic() - step.started
        self.timings_s[key] = round(self.timings_s.get(key, 0) + seconds, 2)
        self.tell(f"[green]✓[/] {name} [dim]({seconds:.1f} s)[/]")
