"""Finds gaps: messages that were removed from a stream before a durable consumer had finished with them.

Each consumer's metadata on the server contains a mark: the consumer finished every message up to this sequence, or the
message is not for it. The next check finds a gap if
- the stream begins after the mark (somebody purged it, or it was full and removed messages),
- the stream ends before the mark (it was restored from an older state), or
- a message after the mark was deleted from the middle of a stream of facts.

The consumer's own position on the server proves nothing, because a purge moves it past the removed messages. So only
the mark counts. Messages that were finished since the last check and then removed are reported, too. A gap stays until
an operator accepts it.

Work queues and streams that keep the newest message of each subject remove messages by design and have no gaps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import ConsumerInfo, StreamState
from nats.js.errors import NotFoundError
from prometheus_client import Counter
from pydantic import AwareDatetime, BaseModel, ConfigDict

from slmops.contracts.errors import NotFound, NotReady, Unreachable
from slmops.contracts.subjects import spec_of
from slmops.kit.bus.client import BusClient
from slmops.kit.clock import utc_now

log = logging.getLogger("slmops.gaps")
MARK_KEY, GAP_KEY = "slmops-mark", "slmops-gap"
FOUND = Counter("slmops_gaps_total", "Gaps found in the messages of a consumer", ["stream", "consumer"])


class Mark(BaseModel):
    """A consumer's mark. `until` is the sequence described above. `first` and `deleted` are the stream's first sequence
    and its number of messages deleted from the middle at that time."""

    model_config = ConfigDict(frozen=True)

    until: int
    first: int = 0
    deleted: int = 0


class Gap(BaseModel):
    """A gap: messages `first` to `last` of the stream, or some of them, were removed."""

    model_config = ConfigDict(frozen=True)

    first: int
    last: int
    why: str
    found_at: AwareDatetime

    def with_earlier(self, earlier: Gap | None) -> Gap:
        if earlier is None:
            return self
        span = {"first": min(self.first, earlier.first), "last": max(self.last, earlier.last)}
        return earlier.model_copy(update=span)


class Durable(NamedTuple):
    """A durable consumer: the names of its stream and of the consumer."""

    stream: str
    consumer: str


class Found(NamedTuple):
    durable: Durable
    gap: Gap


def exempt(stream: str) -> bool:
    """Returns whether the stream removes messages by design."""
    spec = spec_of(stream)
    return spec is None or spec.work_queue or spec.per_subject is not None


async def metadata(js: JetStreamContext, durable: Durable) -> dict[str, str]:
    """Returns the metadata for provisioning a consumer: its existing metadata, and a mark. Raises nats-py's errors.

    A new consumer of facts has received nothing, so its mark is 0 and facts that were already removed are a gap. Other
    new consumers, and existing ones without a mark, begin with the messages that are there.
    """
    try:
        kept = (await js.consumer_info(*durable)).config.metadata or {}
        from_nothing = False
    except NotFoundError:
        spec = spec_of(durable.stream)
        kept, from_nothing = {}, bool(spec and spec.facts)
    if MARK_KEY in kept or exempt(durable.stream):
        return kept
    state = (await js.stream_info(durable.stream)).state
    until = 0 if from_nothing else max(0, state.first_seq - 1)
    return kept | {MARK_KEY: _mark(until, state).model_dump_json()}


async def check_for_gap(client: BusClient, durable: Durable) -> Gap | None:
    """Advances the consumer's mark and returns its unaccepted gap. Raises `Unreachable`, `NotReady`."""
    if exempt(durable.stream):
        return None
    with answering(durable):
        # The stream is read before the consumer: a message that is in it then, and not pending later, is finished.
        before = (await client.js.stream_info(durable.stream)).state
        info = await client.js.consumer_info(*durable)
        state = (await client.js.stream_info(durable.stream)).state
        known, present = _read(info)
        known = known or _mark(max(0, before.first_seq - 1), before)
        gap = await _missing(client, durable.stream, known, state)
        if gap is not None:
            _report(durable, gap)
            present = gap.with_earlier(present)
        await _write(client.js, durable, info, _next(known, gap, before, info, state), present)
    return present


async def declare(client: BusClient, durable: Durable, gap: Gap) -> None:
    """Records a gap that was found in another way. Raises `Unreachable`, `NotReady`."""
    with answering(durable):
        info = await client.js.consumer_info(*durable)
        known, present = _read(info)
        _report(durable, gap)
        await _write(client.js, durable, info, known, gap.with_earlier(present))


async def found(client: BusClient, stream: str) -> list[Found]:
    """Returns the unaccepted gaps of all consumers of a stream. Raises `Unreachable`, `NotReady`."""
    with answering(Durable(stream, "")):
        infos = await client.js.consumers_info(stream)
    return [Found(Durable(stream, i.name), gap) for i in infos if (gap := gap_of(i)) is not None]


async def accept(client: BusClient, stream: str) -> list[Found]:
    """Removes the gaps of a stream's consumers and returns them. Raises `Unreachable`, `NotReady`."""
    accepted = await found(client, stream)
    for durable, _ in accepted:
        with answering(durable):
            info = await client.js.consumer_info(*durable)
            await _write(client.js, durable, info, _read(info)[0], None)
    return accepted


def gap_of(info: ConsumerInfo) -> Gap | None:
    return _read(info)[1]


def described(gaps: Sequence[Found]) -> str:
    """Describes gaps in one line: `1 to 7 of EVENTS for registry-… (removed …)`."""
    parts = [f"{g.first} to {g.last} of {d.stream} for {d.consumer} ({g.why})" for d, g in gaps]
    return "; ".join(parts)


# ---- steps ------------------------------------------------------------------------------------------------


async def _missing(client: BusClient, stream: str, known: Mark, state: StreamState) -> Gap | None:
    if state.last_seq < known.until:
        return _gap(state.last_seq + 1, known.until, "the stream ends before them: it was restored or recreated")
    if state.first_seq > known.until + 1:
        return _gap(known.until + 1, state.first_seq - 1, "removed before they were known to be handled")
    spec, now = spec_of(stream), _mark(0, state)
    if spec is None or not spec.facts or not now.deleted or (now.first, now.deleted) == (known.first, known.deleted):
        return None
    lost = [sequence for sequence in await _deleted(client, stream) if sequence > known.until]
    return _gap(min(lost), max(lost), f"{len(lost)} of them deleted from the middle of the stream") if lost else None


def _gap(first: int, last: int, why: str) -> Gap:
    return Gap(first=first, last=last, why=why, found_at=utc_now())


async def _deleted(client: BusClient, stream: str) -> list[int]:
    """Returns the deleted sequences between the first and the last message. nats-py has no call for this."""
    answer = await client.connection.request(
        f"{client.api}.STREAM.INFO.{stream}", json.dumps({"deleted_details": True}).encode(), timeout=30
    )
    return list(json.loads(answer.data).get("state", {}).get("deleted") or [])


def _next(known: Mark, gap: Gap | None, before: StreamState, info: ConsumerInfo, state: StreamState) -> Mark:
    idle = not info.num_pending and not info.num_ack_pending
    finished = before.last_seq if idle else (info.ack_floor.stream_seq if info.ack_floor else 0)
    anew = gap is not None and state.last_seq < known.until
    floor = 0 if anew else known.until
    return _mark(max(floor, min(finished, state.last_seq), state.first_seq - 1), state)


def _mark(until: int, state: StreamState) -> Mark:
    return Mark(until=until, first=state.first_seq, deleted=state.num_deleted or 0)


def _report(durable: Durable, gap: Gap) -> None:
    FOUND.labels(*durable).inc()
    log.error("messages are missing: %s", described([Found(durable, gap)]))


def _read(info: ConsumerInfo) -> tuple[Mark | None, Gap | None]:
    kept = info.config.metadata or {}
    mark, gap = kept.get(MARK_KEY), kept.get(GAP_KEY)
    return Mark.model_validate_json(mark) if mark else None, Gap.model_validate_json(gap) if gap else None


async def _write(
    js: JetStreamContext, durable: Durable, info: ConsumerInfo, mark: Mark | None, gap: Gap | None
) -> None:
    ours = {MARK_KEY: mark.model_dump_json()} if mark else {}
    ours |= {GAP_KEY: gap.model_dump_json()} if gap else {}
    kept = info.config.metadata or {}
    wanted = {key: value for key, value in kept.items() if key not in (MARK_KEY, GAP_KEY)} | ours
    if wanted != kept:
        # By name: see `provision.consumer`.
        await js.add_consumer(durable.stream, info.config.evolve(name=durable.consumer, metadata=wanted))


@contextmanager
def answering(durable: Durable) -> Iterator[None]:
    where = "/".join(part for part in durable if part)
    try:
        yield
    except NotFoundError as error:
        if spec_of(durable.stream) is None:
            raise NotFound(f"there is no stream {durable.stream}", fix="List them: slmops stream ls.") from error
        raise NotReady(
            "the stream or its consumer does not exist",
            where=where,
            fix="Create the stream (python -m slmops.kit.bus.provisioner) and restart the service, which creates the "
            "consumer.",
        ) from error
    except (TimeoutError, NatsError, OSError) as error:
        raise Unreachable(f"the stream cannot be read: {str(error) or type(error).__name__}", where=where) from error
