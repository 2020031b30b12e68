"""`slmops up`, `down` and `logs`: the whole system on this machine."""

from __future__ import annotations

import asyncio
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slmops.console.render.tables import printable
from slmops.local.process import ProcessState
from slmops.local.signals import cancelled_by_signals

if TYPE_CHECKING:
    from slmops.local.system import System

DEFAULT_DATA = Path.home() / ".slmops"
_COLOURS = {"starting": "yellow", "ready": "green", "restarting": "red", "failed": "red", "stopped": "dim"}


Data = Annotated[Path, typer.Option(help="Folder for all data of the system.", envvar="SLMOPS_DATA")]


def up(
    data: Data = DEFAULT_DATA,
    gateways: Annotated[int, typer.Option(help="How many gateways to run; gw-1 is the canary.", min=0)] = 3,
    nats_port: Annotated[
        int | None, typer.Option(help="Port of NATS. Default: a free port, kept for later starts.", min=1, max=65535)
    ] = None,
    s3_port: Annotated[
        int | None, typer.Option(help="Port of S3. Default: a free port, kept for later starts.", min=1, max=65535)
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="A further name or address in the servers' certificates; repeat it for several."),
    ] = None,
    api_tls: Annotated[bool, typer.Option("--api-tls", help="TLS for the gateways' OpenAI APIs too.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is ready, and keep it running until slmops down.")
    ] = False,
) -> None:
    """Run the whole system on this machine until Ctrl-C. The next start continues with the same data.

    Example: slmops up --data ~/.slmops --gateways 3
    """
    if detach:
        ports = {"--nats-port": nats_port, "--s3-port": s3_port}
        given = [text for name, port in ports.items() if port is not None for text in (name, str(port))]
        given += [text for name in host or () for text in ("--host", name)] + ["--api-tls"] * api_tls
        _detach(data, ["--data", str(data), "--gateways", str(gateways), *given])
        return
    # Imported here: every call of the command line loads this module, and these imports take longer than all others.
    from slmops.local.environment import default_gateways
    from slmops.local.system import System

    fixed = {name: port for name, port in (("nats", nats_port), ("s3.api", s3_port)) if port is not None}
    system = System(data, gateways=default_gateways(gateways), fixed_ports=fixed, hosts=host or (), api_tls=api_tls)
    console = Console()
    try:
        asyncio.run(_run(system, console))
    except asyncio.CancelledError:
        console.print("Stopped. All data is kept in", str(system.layout.root))


def _detach(data: Path, arguments: list[str]) -> None:
    from slmops.local.layout import Layout
    from slmops.local.running import start_detached

    layout = Layout(data.resolve())
    pid = start_detached(layout, arguments)
    Console(highlight=False).print(f"Ready, pid {pid}. Logs: {layout.logs}. Stop it: slmops down", soft_wrap=True)


def down(data: Data = DEFAULT_DATA) -> None:
    """Stop the system of a data folder and wait until it has ended. All data is kept.

    Example: slmops down --data ~/.slmops
    """
    from slmops.local.layout import Layout
    from slmops.local.running import stop

    pid = stop(Layout(data.resolve()))
    Console(highlight=False).print(f"Stopped pid {pid}. All data is kept in {data}", soft_wrap=True)


def logs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROCESS]...", help="Such as registry or gw-1. Default: all.", show_default=False),
    ] = None,
    data: Data = DEFAULT_DATA,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last lines.", min=0)] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until Ctrl-C.")] = False,
) -> None:
    """Print the ends of the logs of the system's processes.

    Example: slmops logs registry gw-1 --follow
    """
    from slmops.local.layout import Layout
    from slmops.local.running import log_files

    paths = log_files(Layout(data.resolve()), names or [])
    following = ["-F"] if follow else []
    raise typer.Exit(subprocess.call(["tail", "-n", str(lines), *following, "--", *map(str, paths)]))


async def _run(system: System, console: Console) -> None:
    with cancelled_by_signals():
        if console.is_terminal:
            with Live(get_renderable=lambda: _table(system), console=console, refresh_per_second=4):
                await _until_cancelled(system, console)
        else:
            await _until_cancelled(system, console)


async def _until_cancelled(system: System, console: Console) -> None:
    def print_state(state: ProcessState) -> None:
        if not console.is_terminal:
            error = f": {printable(state.last_error)}" if state.last_error else ""
            line = f"{state.name}: {state.status}, pid {state.pid}, restarts {state.restarts}{error}"
            console.print(line, markup=False, soft_wrap=True)

    try:
        await system.start(print_state)
        if system.capacity and system.capacity.remark:
            console.print(system.capacity.remark)
        console.print("Ready. In another terminal: [bold]slmops gateway ls[/], [bold]slmops chat[/]. Ctrl-C stops.")
        await asyncio.Event().wait()
    finally:
        await system.stop()


def _table(system: System) -> Group:
    """Returns the processes, and below them the last errors of those that exited and are not ready again."""
    columns = ("process", "status", "pid", "restarts", "last exit", "since")
    table = Table(*columns, caption=f"Logs: {system.layout.logs}")
    for state in system.states():
        age = (datetime.now(UTC) - state.since).total_seconds()
        colour = _COLOURS[state.status]
        exited = "" if state.last_exit is None else str(state.last_exit)
        pid = str(state.pid or "")
        table.add_row(state.name, f"[{colour}]{state.status}", pid, str(state.restarts), exited, f"{age:.0f} s")
    errors = [Text(f"{state.name}: {printable(state.last_error)}") for state in system.states() if state.last_error]
    return Group(table, *errors)
