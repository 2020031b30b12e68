"""`slmops rollout`: starts, watches and changes rollouts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.live import Live

from slmops.console.poll import poll
from slmops.console.render import fleet as render
from slmops.console.session import Session, command
from slmops.contracts.commands import (
    AbortRollout,
    GatewayView,
    ListGateways,
    ListHistory,
    ListRollouts,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    RolloutView,
    Standing,
    StartRollout,
)
from slmops.contracts.commands.rollout import ASKED_BY_OPERATOR
from slmops.contracts.errors import NotFound
from slmops.contracts.exit_codes import ExitCode
from slmops.contracts.names import check_name, check_version
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now

app = typer.Typer(name="rollout", help="Roll out a release to the fleet, stage by stage.", no_args_is_help=True)
BlueprintName = Annotated[str, typer.Argument(metavar="BLUEPRINT", help="Name of the blueprint.")]
Reason = Annotated[str, typer.Option(help="Reason; it is stored with the rollout.")]
_CHANGES = {
    "pause": PauseRollout, "resume": ResumeRollout, "abort": AbortRollout, "rollback": RollbackRollout,
}  # fmt: skip


async def watch(client: BusClient, blueprint: str) -> AsyncIterator[tuple[RolloutView, list[GatewayView]]]:
    """Yields the newest rollout of a blueprint with the blueprint's gateways at each poll, until the rollout has ended.

    Raises `NotFound` if there is no rollout.
    """
    watched: str | None = None

    async def look() -> tuple[Sequence[RolloutView], Sequence[GatewayView]]:
        found = await client.request(ListRollouts(blueprint=blueprint))
        asked = ListGateways(blueprint=blueprint, standing=Standing.ENROLLED)
        return found.rollouts, (await client.request(asked)).gateways

    async for rollouts, fleet in poll(look):
        if not rollouts:
            raise NotFound(f"{blueprint} has no rollout", fix=f"Start one: slmops rollout start {blueprint}.")
        watched = watched or rollouts[-1].rollout
        view = next((r for r in rollouts if r.rollout == watched), rollouts[-1])
        yield view, [gateway for gateway in fleet if gateway.blueprint == blueprint]
        if view.ended_at is not None:
            return


@command(app, "start", "slmops rollout start edge-chat --version 1.0.0")
async def start(
    session: Session,
    blueprint: BlueprintName,
    version: Annotated[str | None, typer.Option(help="Default: the newest package.", show_default=False)] = None,
) -> None:
    """Start a rollout of a packaged version to a blueprint's gateways."""
    asked = StartRollout(
        blueprint=check_name(blueprint, "blueprint name"), version=check_version(version) if version else None
    )
    view = await (await session.client()).request(asked)
    session.show(view, render.rollout(view, [], utc_now()))
    session.remark(f"\nWatch it: slmops rollout watch {blueprint}")


@command(app, "watch", "slmops rollout watch edge-chat", "slmops rollout watch edge-chat --json")
async def watch_command(session: Session, blueprint: BlueprintName) -> int:
    """Follow the newest rollout until it ends. Exits 0 if it completed, 3 if it was rolled back or aborted.

    With --json, prints one line per change.
    """
    check_name(blueprint, "blueprint name")
    client = await session.client(patient=True)
    screen = None if session.as_json or not session.out.is_terminal else Live(console=session.out, auto_refresh=False)
    last: RolloutView | None = None
    with screen or nullcontext():
        async for view, gateways in watch(client, blueprint):
            if screen:
                screen.update(render.rollout(view, gateways, utc_now()), refresh=True)
            elif view != last:
                _line(session, view)
            last = view
    return 0 if last and last.state == "completed" else ExitCode.NOT_COMPLETED


def _line(session: Session, view: RolloutView) -> None:
    print(view.model_dump_json() if session.as_json else render.rollout_line(view), flush=True)


async def _change(session: Session, change: str, blueprint: str, reason: str) -> None:
    asked = _CHANGES[change](blueprint=check_name(blueprint, "blueprint name"), reason=reason)
    view = await (await session.client()).request(asked)
    session.show(view, render.rollout(view, [], utc_now()))


@command(app, "pause", "slmops rollout pause edge-chat")
async def pause(session: Session, blueprint: BlueprintName, reason: Reason = ASKED_BY_OPERATOR) -> None:
    """Stop a rollout from advancing. Gateways that have the candidate keep it."""
    await _change(session, "pause", blueprint, reason)


@command(app, "resume", "slmops rollout resume edge-chat")
async def resume(session: Session, blueprint: BlueprintName, reason: Reason = ASKED_BY_OPERATOR) -> None:
    """Continue a rollout that is paused or held."""
    await _change(session, "resume", blueprint, reason)


@command(app, "abort", 'slmops rollout abort edge-chat --reason "wrong version"')
async def abort(session: Session, blueprint: BlueprintName, reason: Reason = ASKED_BY_OPERATOR) -> None:
    """End the current rollout. Its gateways return to the stable release."""
    await _change(session, "abort", blueprint, reason)


@command(app, "rollback", 'slmops rollout rollback edge-chat --reason "complaints from the field"')
async def rollback(session: Session, blueprint: BlueprintName, reason: Reason = ASKED_BY_OPERATOR) -> None:
    """Roll back the current rollout or the last completed one. The gateways return to the release before it."""
    await _change(session, "rollback", blueprint, reason)


@command(app, "history", "slmops rollout history edge-chat", "slmops rollout history edge-chat --limit 200 --json")
async def history(
    session: Session,
    blueprint: BlueprintName,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many entries to show.")] = 50,
) -> None:
    """List what happened to a blueprint and its rollouts, and who caused it, the newest first."""
    asked = ListHistory(blueprint=check_name(blueprint, "blueprint name"), limit=limit)
    answer = await (await session.client()).request(asked)
    session.show(answer, render.history(answer.entries))
    if answer.cursor is not None:
        session.remark(f"\nThere are older entries: --limit {min(500, 2 * limit)}")


@command(app, "ls", "slmops rollout ls", "slmops rollout ls edge-chat --json")
async def ls(
    session: Session,
    blueprint: Annotated[
        str | None, typer.Argument(metavar="[BLUEPRINT]", help="Only rollouts of this blueprint.", show_default=False)
    ] = None,
) -> None:
    """List all rollouts, newest last."""
    asked = ListRollouts(blueprint=check_name(blueprint, "blueprint name") if blueprint else None)
    answer = await (await session.client()).request(asked)
    session.show(answer, render.rollouts(answer.rollouts, utc_now(), session.out.width))
