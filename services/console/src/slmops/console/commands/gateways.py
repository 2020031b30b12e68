"""`slmops gateway`: the fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.commands import ListGateways
from slmops.contracts.errors import NotFound
from slmops.contracts.names import check_name
from slmops.kit.clock import utc_now

app = typer.Typer(name="gateway", help="What each gateway runs, should run, and why.", no_args_is_help=True)


@command(app, "ls", "slmops gateway ls", "slmops gateway ls --json")
async def ls(session: Session) -> None:
    """All gateways. A * behind the running version: the plan wants another one."""
    answer = await (await session.client()).request(ListGateways())
    session.show(answer, render.gateways(answer.gateways, utc_now(), session.out.width))


@command(app, "show", "slmops gateway show gw-1", "slmops gateway show gw-1 --json")
async def show(
    session: Session, gateway_id: Annotated[str, typer.Argument(metavar="ID", help="The gateway's id.")]
) -> None:
    """One gateway: what it runs, what it should run and the source of every choice."""
    asked = ListGateways(gateway_id=check_name(gateway_id, "gateway id"))
    found = (await (await session.client()).request(asked)).gateways
    if not found:
        raise NotFound(f"there is no gateway {gateway_id}", fix="List them: slmops gateway ls.")
    session.show(found[0], render.gateway(found[0], session.settings.gateways.get(gateway_id), utc_now()))
