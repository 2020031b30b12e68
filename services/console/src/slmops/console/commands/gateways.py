"""`slmops gateway`: the gateways of the fleet, and who belongs to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from slmops.console.commands.optimizing import duration
from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.commands import (
    Attention,
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
from slmops.contracts.events import UpdatePhase
from slmops.contracts.names import check_name, check_version
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now

app = typer.Typer(
    name="gateway",
    help="Show what each gateway runs, what it should run, and why. Revoke, remove, move and re-enrol gateways.",
    no_args_is_help=True,
)
Id = Annotated[str, typer.Argument(metavar="ID", help="The gateway's id.")]
PAGE = 500
"""Gateways that are asked for at once."""
MOST_LABELS = 8
_ANY = "any"
_STATES = ", ".join(["online", "offline", *Standing, *UpdatePhase])
_REASONS = ", ".join(Attention)
_AFTER_REVOKE = "The bus refuses it within seconds. The device keeps serving its current release."


class GatewayRow(GatewayView):
    """A gateway with the address of its API, if it is on this machine."""

    api: str | None = None


class _Page(NamedTuple):
    gateways: tuple[GatewayView, ...]
    total: int | None


async def pages(client: BusClient, asked: ListGateways, most: int) -> AsyncIterator[_Page]:
    """Yields the pages of up to `most` gateways that match. `total`: the number of all, on the first page."""
    left, cursor = most, asked.cursor
    while True:
        asked = asked.model_copy(update={"limit": min(left, PAGE), "cursor": cursor})
        page = await client.request(asked)
        yield _Page(page.gateways, page.total)
        left, cursor = left - len(page.gateways), page.cursor
        if cursor is None or left <= 0:
            return


@command(
    app,
    "ls",
    "slmops gateway ls",
    "slmops gateway ls --state offline --label site=berlin",
    "slmops gateway ls --attention failed --blueprint kiosk --json",
)
async def ls(
    session: Session,
    revoked: Annotated[bool, typer.Option("--revoked", help="Only gateways that are revoked.")] = False,
    moving: Annotated[
        bool, typer.Option("--moving", help="Only gateways that have not followed their move yet.")
    ] = False,
    blueprint: Annotated[str | None, typer.Option(help="Only gateways of this blueprint.", show_default=False)] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only gateways with this label; may be repeated.", show_default=False),
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help=f"Only gateways in this state: {_STATES}.", show_default=False)
    ] = None,
    version: Annotated[
        str | None, typer.Option(help="Only gateways that run this version.", show_default=False)
    ] = None,
    silent_for: Annotated[
        str | None,
        typer.Option("--silent-for", help="Only gateways from which nothing arrived for: 2h, 30d.", show_default=False),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="REASON", help=f"Only gateways that need attention: any, {_REASONS}.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many gateways to show.")] = 100,
) -> None:
    """List gateways by id. A * after the running version means that the plan names another version.

    A gateway must meet all conditions. A revoked or moving gateway counts in no gate and no figure of the fleet. API is
    the address of the OpenAI API of a gateway on this machine. See also: slmops fleet summary.
    """
    asked = ListGateways(
        blueprint=blueprint and check_name(blueprint, "blueprint name"),
        labels=_labels(label or []),
        version=check_version(version) if version else None,
        silent_for_s=duration(silent_for).total_seconds() if silent_for else None,
        attention=_attention(attention),
        **_state(revoked, moving, state),
    )
    found = pages(await session.client(), asked, limit)
    if session.as_json:
        await _print_json(found, session.settings.gateways)
    else:
        await _print_table(session, found, limit)


async def _print_json(found: AsyncIterator[_Page], apis: Mapping[str, str]) -> None:
    """Prints one JSON document, each page as it arrives."""
    first, total = True, None
    print('{"gateways": [', end="")
    async for page in found:
        total = page.total if total is None else total
        for view in page.gateways:
            row = GatewayRow(**dict(view), api=apis.get(view.gateway_id))
            print("\n" if first else ",\n", row.model_dump_json(), sep="", end="", flush=True)
            first = False
    print(f'], "total": {json.dumps(total)}}}')


async def _print_table(session: Session, found: AsyncIterator[_Page], limit: int) -> None:
    views: list[GatewayView] = []
    total: int | None = None
    async for page in found:
        views += page.gateways
        total = page.total if total is None else total
    apis = session.settings.gateways
    session.out.print(render.gateways(views, apis, utc_now(), session.out.width))
    if total is not None and total > len(views) >= limit:
        session.remark(
            f"\n{len(views):,} of {total:,} gateways. Show more with --limit {total}, or fewer with --blueprint,"
            " --label, --state, --version or --attention. Count them: slmops fleet summary."
        )


def _labels(given: Sequence[str]) -> dict[str, str]:
    """Raises `InvalidMessage`."""
    pairs = [text.partition("=") for text in given]
    for text, (key, sign, _) in zip(given, pairs, strict=True):
        if not key or not sign:
            raise InvalidMessage(f"{text!r} is not a label", fix="Write --label KEY=VALUE, for example --label ring=a.")
    found = {key: value for key, _, value in pairs}
    if len(found) < len(given) or len(found) > MOST_LABELS:
        what = "a key is given twice" if len(found) < len(given) else f"{len(found)} labels are too many"
        raise InvalidMessage(what, fix=f"Give at most {MOST_LABELS} labels with different keys.")
    return found


def _attention(given: str | None) -> tuple[Attention, ...]:
    """Raises `InvalidMessage`."""
    if given is None:
        return ()
    if given == _ANY:
        return tuple(Attention)
    if given not in set(Attention):
        raise InvalidMessage(f"{given!r} is not a reason", fix=f"Give one of: {_ANY}, {_REASONS}.")
    return (Attention(given),)


def _state(revoked: bool, moving: bool, given: str | None) -> dict[str, Any]:
    """Returns the fields of the query for a state. Raises `InvalidMessage`."""
    if revoked + moving + (given is not None) > 1:
        raise InvalidMessage(
            "a gateway is either revoked or moving", fix="Choose one of --revoked, --moving and --state."
        )
    given = Standing.REVOKED if revoked else Standing.MOVING if moving else given
    if given is None:
        return {}
    if given in set(Standing):
        return {"standing": Standing(given)}
    if given in set(UpdatePhase):
        return {"phase": UpdatePhase(given)}
    if given not in ("online", "offline"):
        raise InvalidMessage(f"{given!r} is not a state", fix=f"Give one of: {_STATES}.")
    return {"online": given == "online"}


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
