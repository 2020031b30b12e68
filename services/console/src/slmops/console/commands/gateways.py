"""`slmops gateway`: the gateways of the fleet, and who belongs to it."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel

from slmops.console.commands.optimizing import duration
from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.commands import (
    GatewayView,
    ListGateways,
    MoveGateway,
    ReenrolGateway,
    RemoveGateway,
    RevokeGateway,
    Standing,
)
from slmops.contracts.commands.gateways import MAX_WINDOW
from slmops.contracts.errors import InvalidMessage, NotFound
from slmops.contracts.names import check_name
from slmops.kit.clock import utc_now

app = typer.Typer(
    name="gateway",
    help="Show what each gateway runs, what it should run, and why. Revoke, remove, move and re-enrol gateways.",
    no_args_is_help=True,
)
Id = Annotated[str, typer.Argument(metavar="ID", help="The gateway's id.")]
_AFTER_REVOKE = "The bus refuses it within seconds. The device keeps serving its current release."


class GatewayRow(GatewayView):
    """A gateway with the address of its API, if it is on this machine."""

    api: str | None = None


class GatewayRows(BaseModel):
    gateways: tuple[GatewayRow, ...]


@command(app, "ls", "slmops gateway ls", "slmops gateway ls --revoked", "slmops gateway ls --blueprint kiosk --json")
async def ls(
    session: Session,
    revoked: Annotated[bool, typer.Option("--revoked", help="Only gateways that are revoked.")] = False,
    moving: Annotated[
        bool, typer.Option("--moving", help="Only gateways that have not followed their move yet.")
    ] = False,
    blueprint: Annotated[str | None, typer.Option(help="Only gateways of this blueprint.", show_default=False)] = None,
) -> None:
    """List gateways. A * after the running version means that the plan names another version.

    A revoked or moving gateway counts in no gate and no figure of the fleet. API is the address of the OpenAI API of a
    gateway on this machine.
    """
    if revoked and moving:
        raise InvalidMessage("a gateway is either revoked or moving", fix="Choose one of --revoked and --moving.")
    standing = Standing.REVOKED if revoked else Standing.MOVING if moving else None
    asked = ListGateways(blueprint=blueprint and check_name(blueprint, "blueprint name"), standing=standing)
    answer = await (await session.client()).request(asked)
    apis = session.settings.gateways
    rows = tuple(GatewayRow(**dict(view), api=apis.get(view.gateway_id)) for view in answer.gateways)
    session.show(GatewayRows(gateways=rows), render.gateways(rows, apis, utc_now(), session.out.width))


@command(app, "show", "slmops gateway show gw-1", "slmops gateway show gw-1 --json")
async def show(session: Session, gateway_id: Id) -> None:
    """Show one gateway: what it runs, what it should run, and the reason for every setting."""
    asked = ListGateways(gateway_id=check_name(gateway_id, "gateway id"))
    found = (await (await session.client()).request(asked)).gateways
    if not found:
        raise NotFound(f"there is no gateway {gateway_id}", fix="List them: slmops gateway ls.")
    session.show(found[0], render.gateway(found[0], session.settings.gateways.get(gateway_id), utc_now()))


@command(app, "revoke", "slmops gateway revoke gw-1 --reason stolen", "slmops gateway revoke gw-1 --json")
async def revoke(
    session: Session,
    gateway_id: Id,
    reason: Annotated[str, typer.Option(help="Reason; it is stored, and shown to the gateway.")] = "",
) -> None:
    """Refuse a gateway's key from now on, for example because the device was stolen or lost.

    It leaves gates, stages, figures and measured windows, and stays listed as revoked. A stolen device also knows the
    site's enrolment token: replace the token.
    """
    asked = RevokeGateway(gateway_id=check_name(gateway_id, "gateway id"), reason=_reason(reason))
    view = await (await session.client()).request(asked)
    session.show(view, render.gateway(view, None, utc_now()))
    session.remark(f"\n{_AFTER_REVOKE}")


@command(app, "rm", "slmops gateway rm gw-1 --reason scrapped", "slmops gateway rm gw-1 --json")
async def rm(
    session: Session,
    gateway_id: Id,
    reason: Annotated[str, typer.Option(help="Reason; it is stored with the event.")] = "",
) -> None:
    """Revoke a gateway and forget it. Another device may then enrol under its id; its own key stays refused."""
    asked = RemoveGateway(gateway_id=check_name(gateway_id, "gateway id"), reason=_reason(reason))
    gone = await (await session.client()).request(asked)
    session.show(gone, render.answer(f"{gone.gateway_id} was removed from {gone.blueprint}."))


@command(app, "re-enrol", "slmops gateway re-enrol gw-1 --within 24h", "slmops gateway re-enrol gw-1 --same-key --json")
async def re_enrol(
    session: Session,
    gateway_id: Id,
    within: Annotated[str, typer.Option(help="How long it is allowed: 30m, 24h (at most 30 days).")] = "24h",
    same_key: Annotated[
        bool,
        typer.Option("--same-key", help="Let the revoked key itself return: it was revoked by mistake."),
    ] = False,
) -> None:
    """Allow one new key under a gateway's id: its device was set up again or replaced.

    The device enrols with the site's token. Then its old key is revoked, and its reports are counted from 1 again. With
    --same-key no token is needed: the gateway returns by itself, within an hour.
    """
    window = duration(within)
    if not 0 < window.total_seconds() <= MAX_WINDOW.total_seconds():
        raise InvalidMessage(f"--within {within} is out of bounds", fix="Give more than 0 and at most 720h.")
    asked = ReenrolGateway(
        gateway_id=check_name(gateway_id, "gateway id"), within_s=window.total_seconds(), same_key=same_key
    )
    view = await (await session.client()).request(asked)
    session.show(view, render.gateway(view, None, utc_now()))


@command(app, "move", "slmops gateway move gw-1 --blueprint kiosk", "slmops gateway move gw-1 --blueprint kiosk --json")
async def move(
    session: Session,
    gateway_id: Id,
    blueprint: Annotated[str, typer.Option(help="The blueprint to which it belongs from now on.", show_default=False)],
) -> None:
    """Move a gateway to another blueprint. It follows by itself at its next contact, and serves meanwhile.

    It leaves the gates of its blueprint now, and joins those of the new one when it has followed.
    """
    asked = MoveGateway(
        gateway_id=check_name(gateway_id, "gateway id"), blueprint=check_name(blueprint, "blueprint name")
    )
    view = await (await session.client()).request(asked)
    session.show(view, render.gateway(view, None, utc_now()))


def _reason(text: str) -> str:
    if len(text) > 200:
        raise InvalidMessage("the reason is longer than 200 characters", fix="Shorten --reason.")
    return text
