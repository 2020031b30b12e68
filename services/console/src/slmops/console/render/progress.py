"""Progress on stderr: a bar in a terminal, one line per step elsewhere, nothing with `--json`."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from slmops.console.render.tables import printable, size


class Screen(Protocol):
    """Where a command writes progress and remarks (`console.session.Session`)."""

    as_json: bool
    err: Console

    def remark(self, text: str) -> None: ...


class ProgressReporter:
    """Shows progress; a context manager. `bytes_done` is an `OnProgress`; `status` is for work of unknown length."""

    def __init__(self, session: Screen) -> None:
        self._session = session
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=session.err,
            transient=True,
            disable=session.as_json or not session.err.is_terminal,
        )
        self._status = session.err.status("", spinner="dots") if not self._bar.disable else None
        self._task: TaskID | None = None
        self._last_step = ""

    def bytes_done(self, step: str, done: int, of: int) -> None:
        if not done:  # a step without a byte count
            self.status(f"{step} {size(of)}")
            return
        self._line(step, f"{step} {size(of)}")
        if self._status is None:
            return
        self._status.stop()  # a terminal shows either the spinner or the bar
        self._bar.start()
        if self._task is None or self._bar.tasks[0].description != step:
            for task in list(self._bar.task_ids):
                self._bar.remove_task(task)
            self._task = self._bar.add_task(step, total=of)
        self._bar.update(self._task, completed=done)

    def status(self, text: str) -> None:
        self._line(text, text)
        if self._status is not None:
            self._bar.stop()
            self._status.update(Text(printable(text)))
            self._status.start()

    def _line(self, key: str, text: str) -> None:
        if self._bar.disable and key != self._last_step:
            self._last_step = key
            self._session.remark(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._status is not None:
            self._status.stop()
