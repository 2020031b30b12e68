"""`slmops fleet`: the whole fleet in numbers. `gateways.py` lists gateways."""

from __future__ import annotations

from typing import Annotated

import typer

from slmops.console.render import fleet_summary as render
from slmops.console.session import Session, command
from slmops.contracts.commands import SummarizeFleet
from slmops.contracts.names import check_name

app = typer.Typer(name="fleet", help="Show the whole fleet in numbers.", no_args_is_help=True)


@command(app, "summary", "slmops fleet summary", "slmops fleet summary --blueprint kiosk --json")
async def summary(
    session: Session,
    blueprint: Annotated[str | None, typer.Option(help="Only gateways of this blueprint.", show_default=False)] = None,
) -> None:
    """Count gateways by state, version, blueprint and profile, and those that need attention.

    Revoked gateways are only counted as such. A gateway is offline if nothing arrived from it for half an hour.
    """
    asked = SummarizeFleet(blueprint=check_name(blueprint, "blueprint name") if blueprint else None)
    found = await (await session.client()).request(asked)
    session.show(found, render.summary(found))
