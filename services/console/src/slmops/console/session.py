"""One call of the command line: its options, its connection, its span, its output and its exit code.

    @command(app, "ls", "slmops model ls --json")
    async def ls(session: Session) -> None: ...

Every such command has `--json`, `--data` and `--traceparent`, and at least one example in its help. It prints errors of
the tree as text (or JSON) on stderr and exits with the error's exit code. So a traceback is always a bug.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import inspect
import logging
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType

from slmops.console import settings as where
from slmops.console.interrupt import as_exception
from slmops.console.render.tables import problem_text
from slmops.contracts.errors import DiskFull, Problem, SlmopsError
from slmops.contracts.exit_codes import ExitCode
from slmops.kit import tracing
from slmops.kit.bus.client import BusClient
from slmops.kit.extras import not_installed
from slmops.kit.tls import https_trust

Work = Callable[..., Awaitable[int | None]]
W = TypeVar("W", bound=Work)
F = TypeVar("F", bound=Callable[..., Any])

FULL = (errno.ENOSPC, errno.EDQUOT)
_LAST_SPANS_WITHIN_S = 0.5
"""A collector that does not answer costs a command no more than this."""


def _option(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


_COMMON = (
    _option("as_json", Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")], False),
    _option(
        "data",
        Annotated[
            Path | None,
            typer.Option(help="Data folder of slmops up, if not ~/.slmops (also SLMOPS_DATA).", show_default=False),
        ],
        None,
    ),
    _option(
        "traceparent",
        Annotated[str | None, typer.Option(help="W3C trace to continue (also TRACEPARENT).", show_default=False)],
        None,
    ),
)


class Session:
    """The settings, connection and output of one command. `out` is for the answer, `err` for everything else."""

    def __init__(self, settings: where.Settings, *, as_json: bool) -> None:
        self.settings = settings
        self.as_json = as_json
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)
        self._client: BusClient | None = None

    async def client(self, *, patient: bool = False) -> BusClient:
        """Returns the connection and opens it at the first call. With `patient` it survives a restart of the server.

        Raises `Unreachable`.
        """
        if self._client is None:
            self._client = await BusClient.connect(self.settings, name="console", patient=patient)
        return self._client

    @property
    def verify(self) -> ssl.SSLContext | bool:
        """httpx's `verify` for URLs of this system. Raises `InvalidMessage`."""
        return https_trust(self.settings.tls_ca)

    def show(self, view: BaseModel, table: RenderableType) -> None:
        """Prints the answer: the view with `--json`, otherwise the table."""
        if self.as_json:
            print(view.model_dump_json(indent=2))
        else:
            self.out.print(table)

    def remark(self, text: str) -> None:
        """Prints a remark on stderr, except with `--json`."""
        if not self.as_json:
            self.err.print(text, markup=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()


def command(app: typer.Typer, name: str, *examples: str) -> Callable[[W], W]:
    """Makes an async function `work(session, …)` a command of `app`. Its docstring is the help.

    `work` returns None, or an exit code for an outcome that is not an error.
    """

    def declare(work: W) -> W:
        def run(*, as_json: bool, data: Path | None, traceparent: str | None, **arguments: Any) -> None:
            title = " ".join(["slmops", *([app.info.name] if app.info.name else []), name])
            with report_errors(as_json=as_json):
                settings = where.find(data)
                code = _call(settings, title, work, arguments, as_json, traceparent or settings.traceparent)
            raise typer.Exit(code)

        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own] + list(_COMMON)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        epilog = "\n\n".join(f"Example: {example}" for example in examples)
        app.command(name, help=inspect.getdoc(work), epilog=epilog)(run)
        return work

    return declare


def _call(
    settings: where.Settings, title: str, work: Work, arguments: dict[str, Any], as_json: bool, parent: str | None
) -> int:
    for noisy in ("opentelemetry", "slmops.files"):  # stderr is for the command's own messages
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    provider = tracing.setup("console", settings)
    try:
        return asyncio.run(_in_session(settings, title, work, arguments, as_json, parent))
    finally:
        tracing.stop(provider, _LAST_SPANS_WITHIN_S)
        if problem := tracing.problem():
            where = f"the trace was not written to {settings.trace_file}: {problem.strerror}"
            fix = "Free disk space." if problem.errno in FULL else "Check the file's permissions, or SLMOPS_TRACE_FILE."
            print(f"warning: {where}. {fix}", file=sys.stderr)


async def _in_session(
    settings: where.Settings, title: str, work: Work, arguments: dict[str, Any], as_json: bool, parent: str | None
) -> int:
    # The span does not contain the arguments, because one of them may be a prompt.
    with tracing.span(title, parent=parent):
        async with Session(settings, as_json=as_json) as session:
            return await work(session, **arguments) or 0


@contextmanager
def report_errors(*, as_json: bool = False, exit_code: int | None = None) -> Iterator[None]:
    """Converts an error of the tree, a full disk or a missing module to a message and an exit, and Ctrl-C to 130.

    The exit code is the error's, or `exit_code`.
    """
    try:
        with as_exception():
            yield
    except SlmopsError as error:
        raise _reported(error, as_json, exit_code) from error
    except ModuleNotFoundError as error:
        raise _reported(not_installed(error), as_json, exit_code) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = str(error.filename) if error.filename else None
        full = DiskFull("not enough disk space", where=where, fix="Free disk space.")
        raise _reported(full, as_json, exit_code) from error
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        print("Interrupted.", file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from error


def _reported(error: SlmopsError, as_json: bool, exit_code: int | None) -> typer.Exit:
    problem = Problem.of(error)
    if as_json:
        print(problem.model_dump_json(), file=sys.stderr)
    else:
        Console(stderr=True, highlight=False).print(problem_text(problem), soft_wrap=True)
    return typer.Exit(exit_code or error.exit_code)


def plugin_command(work: F) -> F:
    """Wraps a command of another distribution so that its errors are reported in the same way."""

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        with report_errors():
            return work(*args, **kwargs)

    return run  # type: ignore[return-value]
