"""Gaps: messages that were removed from a stream before a durable consumer had finished with them.

Beside each consumer, in its metadata on the server, stands its mark: every message up to a sequence was finished by it
or is not for it. A gap is found, at the next look, when
- the stream begins after the mark (somebody purged it, or it was full and forgot),
- the stream ends before the mark (it was restored from an older state), or
- a message after the mark was deleted from the middle of a stream of facts.

The consumer's own position on the server is no proof: a purge moves it past what was removed. So only the mark counts,
and what was finished since the last look and then removed is reported, too. A gap stays until an operator accepts it.

Work queues and streams that keep the newest of each subject remove messages by design and have no gaps.
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
FOUND = Counter("slmops_gaps_total", "Gaps found in what a consumer was delivered", ["stream", "consumer"])


class Mark(BaseModel):
    """`until`: see above. `first` and `deleted`: where the stream began then, and how many it lacked in its middle."""

    model_config = ConfigDict(frozen=True)

    until: int
    first: int = 0
    deleted: int = 0


class Gap(BaseModel):
    """Messages `first` to `last` of the stream, or some of them, are gone."""

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
    """Names of a consumer and of its stream."""

    stream: str
    consumer: str


class Found(NamedTuple):
    durable: Durable
    gap: Gap


def exempt(stream: str) -> bool:
    """Whether messages of the stream are removed by design."""
    spec = spec_of(stream)
    return spec is None or spec.work_queue or spec.per_subject is not None


async def metadata(js: JetStreamContext, durable: Durable) -> dict[str, str]:
    """What a consumer that is being provisioned keeps or begins with. Raises what nats-py raises.

    A new consumer of facts has seen nothing, so facts that are gone already are a gap. A new one of another stream
    begins with what is there, and so does one from before there were marks.
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


async def look(client: BusClient, durable: Durable) -> Gap | None:
    """Move the consumer's mark; the gap that nobody accepted. Raises `Unreachable`, `NotReady`."""
    if exempt(durable.stream):
        return None
    with answering(durable):
        # In this order: what is in the stream before the consumer is asked, and finished when it is asked, is finished.
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
    """Note a gap that was found in another way. Raises `Unreachable`, `NotReady`."""
    with answering(durable):
        info = await client.js.consumer_info(*durable)
        known, present = _read(info)
        _report(durable, gap)
        await _write(client.js, durable, info, known, gap.with_earlier(present))


async def found(client: BusClient, stream: str) -> list[Found]:
    """The gaps of all consumers of a stream that nobody accepted. Raises `Unreachable`, `NotReady`."""
    with answering(Durable(stream, "")):
        infos = await client.js.consumers_info(stream)
    return [Found(Durable(stream, i.name), gap) for i in infos if (gap := gap_of(i)) is not None]


async def accept(client: BusClient, stream: str) -> list[Found]:
    """Forget the gaps of a stream's consumers, and say which they were. Raises `Unreachable`, `NotReady`."""
    accepted = await found(client, stream)
    for durable, _ in accepted:
        with answering(durable):
            info = await client.js.consumer_info(*durable)
            await _write(client.js, durable, info, _read(info)[0], None)
    return accepted


def gap_of(info: ConsumerInfo) -> Gap | None:
    return _read(info)[1]


def described(gaps: Sequence[Found]) -> str:
    """One line: `1 to 7 of EVENTS for registry-… (removed …)`."""
    parts = [f"{g.first} to {g.last} of {d.stream} for {d.consumer} ({g.why})" for d, g in gaps]
    return "; ".join(parts)


# ---- steps ------------------------------------------------------------------------------------------------


async def _missing(client: BusClient, stream: str, known: Mark, state: StreamState) -> Gap | None:
    if state.last_seq < known.until:
        return _gap(state.last_seq + 1, known.until, "the stream ends before them: it was restored or made anew")
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
    """Sequences between the first and the last message that are gone. nats-py does not ask for them."""
    answer = await client.connection.request(
        f"$JS.API.STREAM.INFO.{stream}", json.dumps({"deleted_details": True}).encode(), timeout=30
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
        await js.add_consumer(durable.stream, info.config.evolve(metadata=wanted))


@contextmanager
def answering(durable: Durable) -> Iterator[None]:
    where = "/".join(part for part in durable if part)
    try:
        yield
    except NotFoundError as error:
        if spec_of(durable.stream) is None:
            raise NotFound(f"there is no stream {durable.stream}", fix="List them: slmops stream ls.") from error
        raise NotReady(
            "the stream or its consumer is not there", where=where, fix="Restart the service: it makes both."
        ) from error
    except (TimeoutError, NatsError, OSError) as error:
        raise Unreachable(
            f"the stream cannot be looked at: {str(error) or type(error).__name__}", where=where
        ) from error
