"""`slmops attention`: lists everything that needs a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC

import typer
from pydantic import RootModel

from slmops.console.commands.streams import stream_views
from slmops.console.credentials_file import expiring
from slmops.console.render import stream as render_stream
from slmops.console.render.stream_view import Item, StreamView
from slmops.console.session import Session, command
from slmops.contracts.commands import ListRollouts, RolloutView
from slmops.contracts.errors import Unreachable
from slmops.kit.bus import deadletters
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.deadletters import DeadLetter
from slmops.kit.bus.stream_watch import LEVELS
from slmops.kit.clock import utc_now
from slmops.kit.sizes import size_text

NEWEST = 1000
"""How many dead letters are read at most. Reading takes one request for each."""


class Attention(RootModel[list[Item]]):
    """The output with `--json`: a list."""


# ---- the items: pure ---------------------------------------------------------------------------------------


def items(streams: Sequence[StreamView], letters: Sequence[DeadLetter], rollouts: Sequence[RolloutView]) -> list[Item]:
    """Returns the items, the most serious first: full streams, gaps, held rollouts, dead letters."""
    stored = next((stream.messages for stream in streams if stream.name == deadletters.STREAM), 0)
    return [*_full(streams), *_gaps(streams), *_held(rollouts), *_dead(letters), *_unread(stored, len(letters))]


def _full(streams: Sequence[StreamView]) -> Iterator[Item]:
    """Skips streams that drop their oldest messages: those are meant to be full."""
    for stream in streams:
        if stream.refuses and stream.limit_bytes and stream.share >= LEVELS[0]:
            yield Item(
                kind="stream_full",
                what=f"{stream.share:.0%} of {size_text(stream.limit_bytes)} used; a full stream refuses new messages",
                where=stream.name,
                fix=f"slmops stream resize {stream.name} {size_text(2 * stream.limit_bytes)}",
            )


def _gaps(streams: Sequence[StreamView]) -> Iterator[Item]:
    for stream in streams:
        for consumer in stream.consumers:
            if consumer.gap:
                gap = consumer.gap
                yield Item(
                    kind="gap",
                    what=f"messages {gap.first} to {gap.last}: {gap.why}",
                    where=f"{stream.name} for {consumer.name}",
                    fix=f"Restore the lost data, then run: slmops stream accept {stream.name}",
                )


def _held(rollouts: Sequence[RolloutView]) -> Iterator[Item]:
    for rollout in rollouts:
        if rollout.state == "held":
            yield Item(
                kind="rollout_held",
                what=f"{rollout.rollout} is held at stage {rollout.stages[rollout.stage].name}: {rollout.reason}",
                where=rollout.blueprint,
                fix=f"Watch it: slmops rollout watch {rollout.blueprint}. "
                f"Wait, or end it: slmops rollout abort {rollout.blueprint}",
            )


def _dead(letters: Sequence[DeadLetter]) -> list[Item]:
    """Returns one item for each consumer, code and subject (which names the gateway), the newest first."""
    groups: dict[tuple[str, str, str], list[DeadLetter]] = {}
    for letter in sorted(letters, key=lambda one: one.sequence, reverse=True):
        groups.setdefault((letter.consumer, letter.code, letter.subject), []).append(letter)
    return [_group(group) for group in groups.values()]


def _group(group: Sequence[DeadLetter]) -> Item:
    newest = group[0]
    return Item(
        kind="dead_letters",
        what=f"{len(group)} × {newest.code}, last {newest.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC: {newest.reason}",
        where=f"{newest.subject} for {newest.consumer.partition('/')[0]}",
        fix=f"Fix the cause, then run: slmops dlq replay {newest.sequence}"
        + (" (and the others)" if group[1:] else ""),
    )


def _unread(stored: int, read: int) -> Iterator[Item]:
    if stored > read:
        yield Item(
            kind="dead_letters",
            what=f"{stored - read} older dead letters were not read",
            where=deadletters.STREAM,
            fix="slmops dlq ls",
        )


# ---- reading -----------------------------------------------------------------------------------------------


async def newest_letters(client: BusClient, stored: int) -> list[DeadLetter]:
    """Reads the newest dead letters, at most about `NEWEST`. Raises `Unreachable`, `NotReady`."""
    newest = None if stored <= NEWEST else NEWEST
    return [letter async for letter in deadletters.dead_letters(client, newest)]


async def find_items(client: BusClient) -> list[Item]:
    """Returns all items, including one for a service that does not answer.

    Raises `Unreachable` and `NotReady` of the bus.
    """
    streams = await stream_views(client)
    stored = next(stream.messages for stream in streams if stream.name == deadletters.STREAM)
    letters = await newest_letters(client, stored)
    try:
        rollouts = (await client.request(ListRollouts())).rollouts
    except Unreachable as error:
        unreachable = Item(kind="unreachable", what=error.what, where=error.where or "rollout", fix=error.fix or "")
        return [*items(streams, letters, ()), unreachable]
    return items(streams, letters, rollouts)


async def attention(session: Session) -> None:
    """List what needs a person: filling streams, missing messages, held rollouts, the newest 1,000 dead letters, and
    your own credentials if they expire soon."""
    found = await find_items(await session.client()) + expiring(session.settings.nats_creds, utc_now())
    session.show(Attention(found), render_stream.attention(found))


def declare(app: typer.Typer) -> None:
    """Adds the command to `app` itself, because it has no group."""
    command(app, "attention", "slmops attention", "slmops attention --json")(attention)
