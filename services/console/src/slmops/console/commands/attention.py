"""`slmops attention`: lists everything that needs a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

import typer
from pydantic import BaseModel, RootModel

from slmops.console.commands.streams import stream_views
from slmops.console.credentials_file import expiring
from slmops.console.render import stream as render_stream
from slmops.console.render.fleet_summary import items as gateways_to_look_at
from slmops.console.render.stream_view import Item, StreamView
from slmops.console.session import Session, command
from slmops.contracts import freshness
from slmops.contracts.commands import (
    Attention,
    Command,
    DescribeStorage,
    DescribeTrust,
    ListGateways,
    ListRollouts,
    RolloutView,
    StorageStatus,
    SummarizeFleet,
)
from slmops.contracts.errors import TemporaryError
from slmops.contracts.tuf_names import REVOKED_ROLE
from slmops.kit.bus import deadletters
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.deadletters import DeadLetter
from slmops.kit.bus.dialing import peer_certificate_expires
from slmops.kit.bus.stream_watch import LEVELS
from slmops.kit.clock import utc_now
from slmops.kit.sizes import size_text
from slmops.kit.tls import EXPIRES_SOON

NEWEST = 1000
"""How many dead letters are read at most. Reading takes one request for each."""
NAMED = 3
"""How many gateways an item names."""
_REPAIR = "List and restore them: slmops storage verify --repair"
_KEYHOLDERS = ("root", "targets", REVOKED_ROLE)
"""The roles whose metadata people sign. The packager renews all others."""
R = TypeVar("R", bound=BaseModel)


class AttentionList(RootModel[list[Item]]):
    """The output with `--json`: a list."""


# ---- the items: pure ---------------------------------------------------------------------------------------


def items(
    streams: Sequence[StreamView],
    letters: Sequence[DeadLetter],
    rollouts: Sequence[RolloutView],
    storage: StorageStatus | None = None,
    expiries: Mapping[str, datetime] = {},
    now: datetime | None = None,
) -> list[Item]:
    """Returns the items, the most serious first: full streams, gaps, damaged blobs, trust metadata, held rollouts, dead
    letters. `expiries`: when the trust metadata of each role expires, compared with `now`."""
    stored = next((stream.messages for stream in streams if stream.name == deadletters.STREAM), 0)
    return [
        *_full(streams),
        *_gaps(streams),
        *(_damaged(storage) if storage else ()),
        *(_expiring(expiries, now) if now else ()),
        *_held(rollouts),
        *_dead(letters),
        *_unread(stored, len(letters)),
    ]


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


def _damaged(storage: StorageStatus) -> Iterator[Item]:
    for kind, number, what in (
        ("blobs_corrupt", storage.corrupt, "blobs have other bytes than their digest and are in quarantine"),
        ("blobs_missing", storage.missing, "blobs are named but not in the object store"),
    ):
        if number:
            some = f", for example {storage.damaged[0]}" if storage.damaged else ""
            yield Item(kind=kind, what=f"{number} {what}{some}", where="object store", fix=_REPAIR)
    for name, problem in storage.problems.items():
        yield Item(
            kind="scheduled",
            what=f"could not {name}: {problem}",
            where="registry",
            fix="Fix the cause.",
        )


def _expiring(expiries: Mapping[str, datetime], now: datetime) -> Iterator[Item]:
    """Metadata that the packager renews is listed only after it expired, which means that renewing fails."""
    for role, expires in sorted(expiries.items(), key=lambda pair: pair[1]):
        if expires <= now:
            what = f"expired on {expires:%Y-%m-%d}: gateways install nothing"
        elif role in _KEYHOLDERS and expires - now <= freshness.WARN_AHEAD:
            days = (expires - now).days
            what = f"expires on {expires:%Y-%m-%d}, in {days} days; after that, gateways install nothing"
        else:
            continue
        renewed = "targets" if role == REVOKED_ROLE else role  # it is signed again with targets
        renew = f"Renew it with its keyholders: slmops trust rotate {renewed} --keep-keys"
        fix = renew if role in _KEYHOLDERS else "The packager renews it: read its log."
        yield Item(kind="expiry", what=what, where=f"trust {role}", fix=fix)


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


def certificate_items(expires: datetime | None, server: str, now: datetime) -> list[Item]:
    """Returns an item if the certificate of NATS expires soon. `expires` None: there is no TLS."""
    if expires is None or expires > now + EXPIRES_SOON:
        return []
    what = f"the certificate of NATS is valid until {expires:%Y-%m-%d}; after that, no gateway connects"
    fix = "Renew it (docs/tls.md). slmops up renews its own certificates; read its log."
    return [Item(kind="certificate", what=what, where=server, fix=fix)]


async def newest_letters(client: BusClient, stored: int) -> list[DeadLetter]:
    """Reads the newest dead letters, at most about `NEWEST`. Raises `Unreachable`, `NotReady`."""
    newest = None if stored <= NEWEST else NEWEST
    return [letter async for letter in deadletters.dead_letters(client, newest)]


async def find_items(client: BusClient) -> list[Item]:
    """Returns all items, including one for each service that does not answer.

    Raises `Unreachable` and `NotReady` of the bus.
    """
    server = str(getattr(client.connection.connected_url, "netloc", ""))
    certificates = certificate_items(peer_certificate_expires(client.connection), server, utc_now())
    streams = await stream_views(client)
    stored = next(stream.messages for stream in streams if stream.name == deadletters.STREAM)
    letters = await newest_letters(client, stored)
    silent: list[Item] = []
    rollouts = await _asked(client, ListRollouts(under_way=True, limit=500), silent)
    fleet = await gateway_items(client) if rollouts else []
    storage = await _asked(client, DescribeStorage(), silent)
    trust = await _asked(client, DescribeTrust(), silent)
    found = items(
        streams,
        letters,
        rollouts.rollouts if rollouts else (),
        storage,
        trust.expires if trust else {},
        utc_now(),
    )
    return [*certificates, *fleet, *found, *silent]


async def gateway_items(client: BusClient) -> list[Item]:
    """Returns an item for each reason for which gateways need attention: their number, and a few of them by name.

    A service that does not answer, or is of an earlier release, gives none.
    """
    try:
        counts = (await client.request(SummarizeFleet())).attention.counts
        named = {}
        for reason in Attention:
            if counts.get(reason):
                few = await client.request(ListGateways(attention=(reason,), limit=NAMED))
                named[reason.value] = [view.gateway_id for view in few.gateways]
    except TemporaryError:
        return []
    return gateways_to_look_at(counts, named)


async def _asked(client: BusClient, query: Command[R], silent: list[Item]) -> R | None:
    """Returns the answer; None if the service does not answer, which is then an item too."""
    try:
        return await client.request(query)
    except TemporaryError as error:
        where = error.where or query.service
        silent.append(Item(kind="unreachable", what=error.what, where=where, fix=error.fix or "Try again."))
        return None


async def attention(session: Session) -> None:
    """List what needs a person: filling streams, missing messages, damaged blobs, trust metadata that expires within 60
    days, held rollouts, gateways that are offline, failed or have a wrong clock or an old credential, the newest 1,000
    dead letters, and your own credentials if they expire soon."""
    found = await find_items(await session.client()) + expiring(session.settings.nats_creds, utc_now())
    session.show(AttentionList(found), render_stream.attention(found))


def declare(app: typer.Typer) -> None:
    """Adds the command to `app` itself, because it has no group."""
    command(app, "attention", "slmops attention", "slmops attention --json")(attention)
