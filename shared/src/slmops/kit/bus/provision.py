"""Creates and updates streams, buckets and consumers. No other code does this.

Streams and buckets are provisioned before the services start, with a credential that no service has (`provisioner`).
Each service creates its own consumers.

FastStream's `declare=True` is not used: it overwrites a stream's configuration at each start and silently ignores a
changed configuration of an existing durable consumer. Provisioning is idempotent and may run while services do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    PersistMode,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, NotFoundError

from slmops.contracts.errors import NotReady, Unreachable
from slmops.contracts.subjects import DESIRED_BUCKET, JOB_BUCKET, MOVED, REMOVED, STREAMS, StreamSpec
from slmops.kit.bus.gaps import Durable, metadata

ACK_WAIT_S = 10.0  # longer work keeps its message alive (`MessageContext.keepalive`)
JOB_STATES_FOR = timedelta(days=90)
"""How long the state of a job stays on the board after its last change."""
_BUCKETS = (
    KeyValueConfig(
        bucket=DESIRED_BUCKET,
        history=8,
        direct=True,
        # Gateways core-subscribe to the copy: this needs no consumer per gateway and hides rejected writes.
        republish=RePublish(src=f"$KV.{DESIRED_BUCKET}.>", dest=f"twin.{DESIRED_BUCKET}.>"),
    ),
    KeyValueConfig(bucket=JOB_BUCKET, ttl=JOB_STATES_FOR.total_seconds(), direct=True),
)


async def provision(js: JetStreamContext, total_bytes: int | None = None) -> None:
    """Creates or updates streams and buckets.

    `total_bytes` limits the size of all streams together; None: as specified. Raises `Unreachable` if JetStream
    is not enabled or does not answer.
    """
    with _answering():
        # Existing streams first: one that gives up a subject frees it for the new stream of that subject.
        missing = [spec for spec in sized(STREAMS, total_bytes) if not await _changed(js, spec)]
        for spec in missing:
            mode = await _persistence(js, spec)
            await js.add_stream(StreamConfig(name=spec.name, persist_mode=mode, **_wanted(spec)))
        for name, subject in (*MOVED, *REMOVED):
            await _remove(js, name, subject)
        for bucket in _BUCKETS:
            await _bucket(js, bucket)


def sized(specs: Sequence[StreamSpec], total_bytes: int | None) -> list[StreamSpec]:
    """Returns the streams, each reduced by the same factor if they have more than `total_bytes` together."""
    specified = sum(spec.max_bytes for spec in specs)
    if total_bytes is None or total_bytes >= specified:
        return [*specs]
    return [replace(spec, max_bytes=spec.max_bytes * total_bytes // specified) for spec in specs]


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (NatsError, APIError, TimeoutError) as error:
        raise Unreachable(
            f"JetStream rejected the request: {str(error) or type(error).__name__}",
            fix="Enable JetStream on the server and the account, and check its disk space.",
        ) from error


@contextmanager
def _existing(stream: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise NotReady(
            "the stream does not exist yet", where=stream, fix="Create it: python -m slmops.kit.bus.provisioner."
        ) from error


async def _changed(js: JetStreamContext, spec: StreamSpec) -> bool:
    """Updates an existing stream to its specification. Returns whether the stream exists."""
    try:
        present = (await js.stream_info(spec.name)).config
    except NotFoundError:
        return False
    wanted = _wanted(spec) | _kept(spec, present)
    if any(getattr(present, name) != value for name, value in wanted.items()):
        # Only our fields: an operator may have set others, such as the number of replicas.
        await js.update_stream(present.evolve(**wanted))
    return True


async def _persistence(js: JetStreamContext, spec: StreamSpec) -> PersistMode | None:
    """Returns how a new stream is written; None: synchronously.

    The server never changes it and does not replicate such streams. So in a cluster, where an operator adds replicas,
    no stream is written asynchronously.
    """
    if not spec.asynchronous:
        return None
    cluster = (await js.stream_info(STREAMS[0].name)).cluster  # created before
    return None if cluster is not None and cluster.name else PersistMode.ASYNC


def _wanted(spec: StreamSpec) -> dict[str, Any]:
    return {
        "subjects": list(spec.subjects),
        "storage": StorageType.FILE,
        "retention": RetentionPolicy.WORK_QUEUE if spec.work_queue else RetentionPolicy.LIMITS,
        "discard": DiscardPolicy.NEW if spec.refuses else DiscardPolicy.OLD,
        "max_age": spec.max_age.total_seconds() if spec.max_age else 0,
        "max_bytes": spec.max_bytes,
        "max_msgs_per_subject": spec.per_subject or -1,
        "max_msg_size": spec.max_message_bytes or -1,
        "allow_direct": True,
    }


def _kept(spec: StreamSpec, present: StreamConfig) -> dict[str, Any]:
    """Returns an operator's larger limits, which are kept. Lowering a limit would remove messages at once, even from a
    stream that refuses."""
    size, age = present.max_bytes or -1, present.max_age or 0
    kept: dict[str, Any] = {}
    if size < 0 or size > spec.max_bytes:
        kept["max_bytes"] = present.max_bytes
    if not age or (spec.max_age and age > spec.max_age.total_seconds()):
        kept["max_age"] = present.max_age
    return kept


async def _remove(js: JetStreamContext, stream: str, subject: str) -> None:
    left = (await js.stream_info(stream, subjects_filter=subject)).state.subjects
    if left:
        await js.purge_stream(stream, subject=subject)


async def _bucket(js: JetStreamContext, config: KeyValueConfig) -> None:
    """Creates a bucket. An existing one whose values never expire gets the lifetime; an operator's own is kept."""
    try:
        present = (await js.stream_info(f"KV_{config.bucket}")).config
    except NotFoundError:
        await js.create_key_value(config)
        return
    if config.ttl and not present.max_age:
        await js.update_stream(present.evolve(max_age=config.ttl))


async def consumer(
    js: JetStreamContext,
    stream: str,
    durable: str,
    subject: str,
    ack_wait_s: float = ACK_WAIT_S,
    max_ack_pending: int = 64,
) -> None:
    """Creates a durable pull consumer, or updates an existing one to this configuration.

    Removes a consumer of the same name on another stream, which stored the subject before. Raises `Unreachable`,
    `NotReady` without the stream.
    """
    wanted = ConsumerConfig(
        name=durable,  # with a name, the API's subject contains the filter, on which the service's right depends
        durable_name=durable,
        filter_subject=subject,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait_s,
        max_deliver=-1,
        max_ack_pending=max_ack_pending,
    )
    with _answering(), _existing(stream):
        await _leave_other_streams(js, stream, durable)
        await js.add_consumer(stream, wanted.evolve(metadata=await metadata(js, Durable(stream, durable))))


async def _leave_other_streams(js: JetStreamContext, stream: str, durable: str) -> None:
    with suppress(NotFoundError):
        await js.consumer_info(stream, durable)
        return
    for other in (spec.name for spec in STREAMS if spec.name != stream):
        with suppress(NotFoundError):
            await js.delete_consumer(other, durable)
