"""`slmops bundle results`: publishes the reports and measurements of gateways without a network from carried files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import AwareDatetime, BaseModel
from rich.table import Table

from slmops.console.commands.bundles import readable
from slmops.console.session import Session, command
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import CredentialRevoked, Denied
from slmops.contracts.events import GatewayEnrolled, GatewayReported, GatewayRevoked
from slmops.contracts.results import PublicKey, ResultsSeal
from slmops.kit.bus.client import BusClient
from slmops.kit.sealed_results import ResultsFile

_EXAMPLE = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"


class ResultsView(BaseModel):
    """The published content of one file. `phase` and `running` are those of the newest report."""

    file: str
    gateway_id: str
    blueprint: str
    created_at: AwareDatetime
    reports: int = 0
    measurements: int = 0
    phase: str | None = None
    running: Digest | None = None


class ResultsList(BaseModel):
    results: tuple[ResultsView, ...]


def declare(app: typer.Typer) -> None:
    """Adds the command to the group `bundle`."""
    command(
        app,
        "results",
        "slmops bundle results /media/stick/*.slmops-results",
        f"slmops bundle results gw-9.slmops-results --trust-key {_EXAMPLE}",
    )(results)


async def results(
    session: Session,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Files that gateways wrote into their bundle folder.")
    ],
    trust_key: Annotated[
        PublicKey | None,
        typer.Option(help="Public key of a gateway that was never enrolled: the full key, as its device shows it."),
    ] = None,
) -> None:
    """Publish the reports and measurements of gateways without a network, sealed with the gateways' keys.

    All files are verified before the first message is published. Publishing a file twice is harmless.
    """
    client = await session.client()
    found = []
    for path in files:
        with readable(path):
            one = await asyncio.to_thread(ResultsFile, path)
            await _check_seal(client, one.seal, path, trust_key)
            for _message in one.messages():
                pass
            found.append(one)
    views = ResultsList(results=tuple([await publish(client, one) for one in found]))
    session.show(views, _table(views.results))


async def _check_seal(client: BusClient, seal: ResultsSeal, path: Path, trusted: str | None) -> None:
    """Raises `Denied` unless the file is sealed with the gateway's enrolled key or, if it has none, with `trusted`;
    `CredentialRevoked` if that key was revoked."""
    enrolled = await client.latest(GatewayEnrolled, seal.gateway_id)
    revoked = await client.latest(GatewayRevoked, f"{seal.gateway_id}.{seal.public_key}")
    if revoked is not None and (enrolled is None or enrolled.at < revoked.revoked_at + timedelta(seconds=1)):
        raise CredentialRevoked(
            f"the key of {seal.gateway_id} was revoked, so its results do not count",
            where=str(path),
            fix="See slmops gateway show " + seal.gateway_id + ".",
        )
    key = enrolled.public_key if enrolled else trusted
    if key is None:
        raise Denied(
            f"{seal.gateway_id} was never enrolled here, so its key is not known",
            where=str(path),
            fix=f"If the device shows the key {seal.public_key}, give it with --trust-key.",
        )
    if key != seal.public_key:
        raise Denied(
            f"the file is sealed with the key {seal.public_key}, but the key of {seal.gateway_id} is {key}",
            where=str(path),
        )


async def publish(client: BusClient, file: ResultsFile) -> ResultsView:
    """Publishes each message as the gateway would. After `Unreachable`, publish the file again."""
    seal = file.seal
    view = ResultsView(
        file=str(file.path), gateway_id=seal.gateway_id, blueprint=seal.blueprint, created_at=seal.created_at
    )
    for message in file.messages():
        await client.store(message.subject, message.payload.encode(), message.headers)
        if message.subject.startswith(GatewayReported.type):
            said = GatewayReported.model_validate_json(message.payload)
            view.reports, view.phase, view.running = view.reports + 1, said.phase.value, said.running
        else:
            view.measurements += 1
    return view


def _table(views: Sequence[ResultsView]) -> Table:
    table = Table()
    for column in ("gateway", "blueprint", "written", "reports", "measurements", "phase", "runs"):
        table.add_column(column)
    for view in views:
        written = f"{view.created_at:%Y-%m-%d %H:%M}"
        runs = view.running.removeprefix("sha256:")[:12] if view.running else "-"
        figures = str(view.reports), str(view.measurements)
        table.add_row(view.gateway_id, view.blueprint, written, *figures, view.phase or "-", runs)
    return table
