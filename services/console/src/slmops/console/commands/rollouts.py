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
    ListHistory,
    ListRollouts,
    PauseRollout,
    ResumeRollout,
    RollbackRollout,
    RolloutView,
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
_NEWEST = 5
"""A rollout that is watched is among these, also if others start meanwhile."""
_CHANGES = {
    "pause": PauseRollout, "resume": ResumeRollout, "abort": AbortRollout, "rollback": RollbackRollout,
}  # fmt: skip


async def watch(client: BusClient, blueprint: str) -> AsyncIterator[RolloutView]:
    """Yields the newest rollout of a blueprint at each poll, until it has ended: counts, and the few gateways that need
    attention, whatever the size of the fleet.

    Raises `NotFound` if there is no rollout.
    """
    watched: str | None = None

    async def look() -> Sequence[RolloutView]:
        return (await client.request(ListRollouts(blueprint=blueprint, limit=_NEWEST))).rollouts

    async for rollouts in poll(look):
        view = next((r for r in rollouts if r.rollout == watched), None) or _newest(rollouts, blueprint)
        watched = watched or view.rollout
        yield view
        if view.ended_at is not None:
            return


def _newest(rollouts: Sequence[RolloutView], blueprint: str) -> RolloutView:
    if not rollouts:
        raise NotFound(f"{blueprint} has no rollout", fix=f"Start one: slmops rollout start {blueprint}.")
    return rollouts[-1]


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
    session.show(view, render.rollout(view, utc_now()))
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
        async for view in watch(client, blueprint):
            if screen:
                screen.update(render.rollout(view, utc_now()), refresh=True)
            elif view != last:
                _line(session, view)
            last = view
    return 0 if last and last.state == "completed" else ExitCode.NOT_COMPLETED


@command(app, "show", "slmops rollout show edge-chat", "slmops rollout show edge-chat --json")
async def show(session: Session, blueprint: BlueprintName) -> None:
    """Show the newest rollout of a blueprint: its stages in numbers, and the gateways that need attention."""
    asked = ListRollouts(blueprint=check_name(blueprint, "blueprint name"), limit=1)
    view = _newest((await (await session.client()).request(asked)).rollouts, blueprint)
    session.show(view, render.rollout(view, utc_now()))


def _line(session: Session, view: RolloutView) -> None:
    print(view.model_dump_json() if session.as_json else render.rollout_line(view), flush=True)


async def _change(session: Session, change: str, blueprint: str, reason: str) -> None:
    asked = _CHANGES[change](blueprint=check_name(blueprint, "blueprint name"), reason=reason)
    view = await (await session.client()).request(asked)
    session.show(view, render.rollout(view, utc_now()))


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
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many rollouts to show.")] = 50,
) -> None:
    """List the newest rollouts, newest last."""
    asked = ListRollouts(blueprint=check_name(blueprint, "blueprint name") if blueprint else None, limit=limit)
    answer = await (await session.client()).request(asked)
    session.show(answer, render.rollouts(answer.rollouts, utc_now(), session.out.width))
    if answer.cursor is not None:
        session.remark(f"\nThere are older rollouts: --limit {min(500, 2 * limit)}")
