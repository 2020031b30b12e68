"""`slmops gateway`: the gateways of the fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.commands import ListGateways
from slmops.contracts.errors import NotFound
from slmops.contracts.names import check_name
from slmops.kit.clock import utc_now

app = typer.Typer(
    name="gateway", help="Show what each gateway runs, what it should run, and why.", no_args_is_help=True
)


@command(app, "ls", "slmops gateway ls", "slmops gateway ls --json")
async def ls(session: Session) -> None:
    """List all gateways. A * after the running version means that the plan names another version."""
    answer = await (await session.client()).request(ListGateways())
    session.show(answer, render.gateways(answer.gateways, utc_now(), session.out.width))


@command(app, "show", "slmops gateway show gw-1", "slmops gateway show gw-1 --json")
async def show(
    session: Session, gateway_id: Annotated[str, typer.Argument(metavar="ID", help="The gateway's id.")]
) -> None:
    """Show one gateway: what it runs, what it should run, and the reason for every setting."""
    asked = ListGateways(gateway_id=check_name(gateway_id, "gateway id"))
    found = (await (await session.client()).request(asked)).gateways
    if not found:
        raise NotFound(f"there is no gateway {gateway_id}", fix="List them: slmops gateway ls.")
    session.show(found[0], render.gateway(found[0], session.settings.gateways.get(gateway_id), utc_now()))
