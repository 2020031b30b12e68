"""`slmops status` and `slmops doctor`: a system at a glance, and what is wrong with it."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import typer
from pydantic import ValidationError

from slmops.console import settings as where
from slmops.console.commands.attention import AttentionList, find_items
from slmops.console.commands.streams import stream_views
from slmops.console.credentials_file import expiring
from slmops.console.render import status as render
from slmops.console.render import stream as render_stream
from slmops.console.render.status_view import (
    BacklogView,
    CredentialsView,
    DiskView,
    ExpiryView,
    LocalStatus,
    ProcessView,
    Status,
)
from slmops.console.render.stream_view import Item
from slmops.console.session import Session, command
from slmops.contracts.commands import FleetSummary, SummarizeFleet
from slmops.contracts.errors import InvalidMessage, Problem, TemporaryError
from slmops.contracts.exit_codes import ExitCode
from slmops.contracts.identity import ServiceProcess
from slmops.contracts.permissions import SERVICE_PERMISSIONS
from slmops.kit.bus import deadletters
from slmops.kit.bus.client import BusClient, read_file
from slmops.kit.bus.roll_call import call_roll
from slmops.kit.clock import utc_now
from slmops.kit.revision import shared_revision
from slmops.kit.sizes import size_text
from slmops.kit.tls import EXPIRES_SOON, file_expiry

STATE_FILE, LOCK_FILE = "state.json", "lock"
TRUST_EXPIRES_SOON = timedelta(days=60)
LOW_DISK_BYTES = 1 << 30
LARGE_BACKLOG = 1000
FLEET_WITHIN = timedelta(seconds=5)

# ---- reading -----------------------------------------------------------------------------------------------


def local_status(folder: Path) -> LocalStatus | None:
    """Returns the state of the system in a data folder; None if none was started there. Raises `InvalidMessage`."""
    try:
        found = json.loads((folder / STATE_FILE).read_bytes())
        processes = tuple(map(ProcessView.model_validate, found["processes"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise InvalidMessage("the file was not written by `slmops up`", where=str(folder / STATE_FILE)) from error
    running, usage = is_locked(folder / LOCK_FILE), shutil.disk_usage(folder)
    if not running:  # a supervisor that was killed could not write that its processes ended with it
        processes = tuple(process.model_copy(update={"status": "stopped", "pid": None}) for process in processes)
    return LocalStatus(
        data=str(folder),
        running=running,
        processes=processes,
        disk=DiskView(free_bytes=usage.free, size_bytes=usage.total),
        expiry=_expiry(folder / "keys" / "tuf"),
        certificates=_certificates(folder / "keys" / "tls"),
        readable_keys=tuple(str(path) for path in sorted((folder / "keys").rglob("*")) if _is_open(path)),
    )


def is_locked(lock: Path) -> bool:
    """Returns whether a process holds the lock of a data folder. The kernel releases it when the process ends."""
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _is_open(path: Path) -> bool:
    """Returns whether others may read a private file. Metadata and public keys are meant to be read."""
    secret = path.suffix in (".pem", ".creds", ".key") and "trusted" not in path.name
    return secret and path.is_file() and bool(path.stat().st_mode & 0o077)


def _expiry(folder: Path) -> tuple[ExpiryView, ...]:
    if not folder.exists():
        return ()
    from slmops.kit.trust.folder import Folder
    from slmops.kit.trust.overview import overview

    roles = overview(Folder(folder), utc_now()).roles
    return tuple(ExpiryView(role=role.role, expires=role.expires) for role in roles if role.expires)


def _certificates(folder: Path) -> tuple[ExpiryView, ...]:
    found = {path.stem: file_expiry(path) for path in sorted(folder.glob("*.pem")) if "trusted" not in path.name}
    return tuple(ExpiryView(role=name, expires=expires) for name, expires in found.items() if expires)


async def find_status(session: Session) -> Status:
    """Returns the status. A bus that does not answer is a part of it, not an error."""
    found = Status(
        version=version("slmops-console"),
        shared_revision=shared_revision(),
        local=local_status(session.settings.data or where.DEFAULT_DATA),
        credentials=_credentials(session.settings.nats_creds),
    )
    try:
        client = await session.client()
        streams = await stream_views(client)
        services = await call_roll(client, SERVICE_PERMISSIONS)
    except TemporaryError as error:
        return found.model_copy(update={"problem": Problem.of(error)})
    backlog = tuple(
        BacklogView(stream=stream.name, consumer=consumer.name, pending=consumer.pending)
        for stream in streams
        for consumer in stream.consumers
    )
    letters = sum(stream.messages for stream in streams if stream.name == deadletters.STREAM)
    server = client.connection.connected_server_version
    return found.model_copy(
        update={
            "backlog": backlog,
            "dead_letters": letters,
            "services": services,
            "fleet": await _fleet(client),
            "nats_version": f"{server.major}.{server.minor}.{server.patch}",
        }
    )


async def _fleet(client: BusClient) -> FleetSummary | None:
    """Returns the fleet in numbers; None if the rollout service does not answer."""
    try:
        return await client.request(SummarizeFleet(), FLEET_WITHIN)
    except TemporaryError:
        return None


def _credentials(path: Path | None) -> CredentialsView | None:
    if path is None:
        return None
    own = read_file(path)
    return CredentialsView(user=own.who.name, role=own.who.role, expires_at=own.until)


# ---- findings: pure ----------------------------------------------------------------------------------------


def findings(status: Status, now: datetime) -> list[Item]:
    """Returns what is wrong with the machine and the processes, the most serious first. Each finding has its fix."""
    local = status.local
    return [*(_of_machine(local, now) if local else ()), *_of_bus(status), *_of_releases(status)]


def _of_machine(local: LocalStatus, now: datetime) -> Iterator[Item]:
    if not local.running:
        fix = f"slmops up --data {local.data}"
        yield Item(kind="not_running", what="the system is not running", where=local.data, fix=fix)
    for process in local.processes if local.running else ():
        if process.status != "ready":
            what = f"{process.status} after {process.restarts} restarts: {process.last_error or 'no error logged'}"
            yield Item(kind="process", what=what, where=process.name, fix=f"Read its log: {process.log}")
    if local.disk.free_bytes < LOW_DISK_BYTES:
        what = f"{size_text(local.disk.free_bytes)} free"
        yield Item(kind="disk", what=what, where=local.data, fix="Free some space, first: slmops storage gc")
    yield from map(_expiring, sorted(soon(local.expiry, now), key=lambda expiry: expiry.expires))
    for certificate in local.certificates:
        if certificate.expires < now + EXPIRES_SOON:
            what = f"valid until {certificate.expires:%Y-%m-%d}; after that, nobody connects"
            fix = f"slmops up renews it, also while it runs: slmops up --data {local.data}"
            yield Item(kind="certificate", what=what, where=f"certificate {certificate.role}", fix=fix)
    for path in local.readable_keys:
        yield Item(kind="key", what="other users can read this key", where=path, fix=f"chmod 600 {path}")


def soon(expiry: Sequence[ExpiryView], now: datetime) -> list[ExpiryView]:
    """Returns what has expired or will within `TRUST_EXPIRES_SOON`."""
    return [one for one in expiry if one.expires < now + TRUST_EXPIRES_SOON]


def _expiring(expiry: ExpiryView) -> Item:
    what = f"valid until {expiry.expires:%Y-%m-%d}; after that, gateways install nothing"
    fix = f"slmops trust rotate {expiry.role} --keep-keys"
    return Item(kind="expiry", what=what, where=f"trust {expiry.role}", fix=fix)


def _of_bus(status: Status) -> Iterator[Item]:
    if status.problem:
        problem = status.problem
        yield Item(kind="unreachable", what=problem.what, where=problem.where or "bus", fix=problem.fix or "slmops up")
    for backlog in status.backlog:
        if backlog.pending >= LARGE_BACKLOG:
            what = f"{backlog.pending:,} messages wait"
            fix = f"Check that {backlog.consumer.partition('-')[0]} runs and keeps up: slmops stream ls"
            yield Item(kind="backlog", what=what, where=f"{backlog.stream} for {backlog.consumer}", fix=fix)


def _of_releases(status: Status) -> Iterator[Item]:
    """Finds processes of different releases, and a command line of another release than all of them."""
    codes = {process.shared_revision for process in status.services}
    if len(codes) > 1:
        yield Item(
            kind="mixed_releases",
            what=f"{len(codes)} releases run: {'; '.join(map(_of_release, _by_release(status.services)))}",
            where="services",
            fix="Restart the services of the older release; slmops status shows each one's version.",
        )
    elif codes and status.shared_revision not in codes:
        what = f"the command line has revision {status.shared_revision}, the services have {min(codes)}"
        yield Item(kind="mixed_releases", what=what, where="command line", fix="Use the release of the services.")


def _by_release(processes: Sequence[ServiceProcess]) -> list[list[ServiceProcess]]:
    found: dict[tuple[str, str], list[ServiceProcess]] = {}
    for process in processes:
        found.setdefault((process.version, process.shared_revision), []).append(process)
    return [found[key] for key in sorted(found)]


def _of_release(processes: Sequence[ServiceProcess]) -> str:
    names = ", ".join(dict.fromkeys(process.service for process in processes))
    return f"{processes[0].version} ({processes[0].shared_revision}): {names}"


# ---- commands ----------------------------------------------------------------------------------------------


async def status(session: Session) -> None:
    """Show the processes, the versions, the disk, the backlog, the dead letters and the expiry dates."""
    found = await find_status(session)
    session.show(found, render.status(found, utc_now()))


async def doctor(session: Session) -> int:
    """List everything that is wrong, each with its fix: this machine, the bus, and what `slmops attention` lists.

    Exits with 1 if there is something.
    """
    status = await find_status(session)
    found = findings(status, utc_now()) + expiring(session.settings.nats_creds, utc_now())
    if status.problem is None:
        known = {(item.kind, item.where) for item in found}
        found += [item for item in await find_items(await session.client()) if (item.kind, item.where) not in known]
    session.show(AttentionList(found), render_stream.attention(found))
    return ExitCode.REFUSED if found else 0


def declare(app: typer.Typer) -> None:
    """Adds both commands to `app` itself, because they have no group."""
    command(app, "status", "slmops status", "slmops status --json")(status)
    command(app, "doctor", "slmops doctor", "slmops doctor --json")(doctor)
