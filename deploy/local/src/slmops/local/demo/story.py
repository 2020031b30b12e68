"""Prints the steps of the demo: one line per step with its duration, and a spinner with the latest detail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console


@dataclass
class Step:
    """A running step. `detail` is its current action."""

    name: str
    say: Console
    live: bool
    detail: str = ""
    started: float = field(default_factory=time.monotonic)
    _told: float = 0.0
    _shown: str = ""

    def progress(self, detail: str) -> None:
        """Sets the detail. A terminal shows it in the spinner; otherwise a line is printed at most every 2 seconds."""
        self.detail = detail
        now = time.monotonic()
        if not self.live and detail != self._shown and now - self._told >= 2:
            self.say.print(f"    … {detail} ({now - self.started:.0f} s)", highlight=False)
            self._told, self._shown = now, detail

    def __rich__(self) -> str:
        return f"{self.name}: {self.detail} ({time.monotonic() - self.started:.0f} s)"


class Story:
    """Prints chapters, steps and lines. `timings_s` holds the seconds of each finished step by its key."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.timings_s: dict[str, float] = {}

    def chapter(self, title: str) -> None:
        self.console.print(f"\n[bold]{title}[/]", highlight=False)

    def tell(self, line: str) -> None:
        self.console.print(f"  {line}", highlight=False)

    @contextmanager
    def step(self, key: str, name: str) -> Iterator[Step]:
        """Runs the block as a step, and prints whether it succeeded and how long it took."""
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
