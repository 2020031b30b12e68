"""`slmops gateway`: the gateways of the fleet."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel

from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.commands import GatewayView, ListGateways
from slmops.contracts.errors import NotFound
from slmops.contracts.names import check_name
from slmops.kit.clock import utc_now

app = typer.Typer(
    name="gateway", help="Show what each gateway runs, what it should run, and why.", no_args_is_help=True
)


class GatewayRow(GatewayView):
    """A gateway with the address of its API, if it is on this machine."""

    api: str | None = None


class GatewayRows(BaseModel):
    gateways: tuple[GatewayRow, ...]


@command(app, "ls", "slmops gateway ls", "slmops gateway ls --json")
async def ls(session: Session) -> None:
    """List all gateways. A * after the running version means that the plan names another version.

    API is the address of the OpenAI API of a gateway on this machine.
    """
    answer = await (await session.client()).request(ListGateways())
    apis = session.settings.gateways
    rows = tuple(GatewayRow(**dict(view), api=apis.get(view.gateway_id)) for view in answer.gateways)
    session.show(GatewayRows(gateways=rows), render.gateways(rows, apis, utc_now(), session.out.width))


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
