"""The one provisioner: streams, buckets and consumers are made, and changed, here and nowhere else.

Why: FastStream's `declare=True` overwrites a stream's configuration at each start, and a changed consumer
configuration on an existing durable is silently ignored. Provisioning is idempotent and safe to run from all services.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    KeyValueConfig,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)
from nats.js.errors import APIError, NotFoundError

from slmops.contracts.errors import Unreachable
from slmops.contracts.subjects import DESIRED_BUCKET, JOB_BUCKET, MOVED, STREAMS, StreamSpec
from slmops.kit.bus.gaps import Durable, metadata

ACK_WAIT_S = 10.0  # longer work keeps its message alive (`MessageContext.keepalive`)

_BUCKETS = (
    KeyValueConfig(
        bucket=DESIRED_BUCKET,
        history=8,
        direct=True,
        # Gateways core-subscribe to the copy: no consumer per gateway, and no sight of refused writes.
        republish=RePublish(src=f"$KV.{DESIRED_BUCKET}.>", dest=f"twin.{DESIRED_BUCKET}.>"),
    ),
    KeyValueConfig(bucket=JOB_BUCKET, ttl=timedelta(days=90).total_seconds(), direct=True),
)


async def provision(js: JetStreamContext) -> None:
    """Streams and buckets. Raises `Unreachable` when JetStream is not enabled or does not answer."""
    with _answering():
        # First what is there: a stream that gives up a subject frees it for the stream that is made for it.
        missing = [spec for spec in STREAMS if not await _changed(js, spec)]
        for spec in missing:
            await js.add_stream(StreamConfig(name=spec.name, **_wanted(spec)))
        for name, subject in MOVED:
            await _remove_moved(js, name, subject)
        for bucket in _BUCKETS:
            await _bucket(js, bucket)


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (NatsError, APIError, TimeoutError) as error:
        raise Unreachable(
            f"JetStream rejected the request: {str(error) or type(error).__name__}",
            fix="Enable JetStream on the server and the account, and see that it has disk space.",
        ) from error


async def _changed(js: JetStreamContext, spec: StreamSpec) -> bool:
    """Bring a stream that exists to what is wanted; whether there is one."""
    try:
        present = (await js.stream_info(spec.name)).config
    except NotFoundError:
        return False
    wanted = _wanted(spec) | _kept(spec, present)
    if any(getattr(present, name) != value for name, value in wanted.items()):
        # Only what is ours: an operator may have set the rest, such as the number of replicas.
        await js.update_stream(present.evolve(**wanted))
    return True


def _wanted(spec: StreamSpec) -> dict[str, Any]:
    return {
        "subjects": list(spec.subjects),
        "storage": StorageType.FILE,
        "retention": RetentionPolicy.WORK_QUEUE if spec.work_queue else RetentionPolicy.LIMITS,
        "discard": DiscardPolicy.NEW if spec.refuses else DiscardPolicy.OLD,
        "max_age": spec.max_age.total_seconds() if spec.max_age else 0,
        "max_bytes": spec.max_bytes,
        "max_msgs_per_subject": spec.per_subject or -1,
        "allow_direct": True,
    }


def _kept(spec: StreamSpec, present: StreamConfig) -> dict[str, Any]:
    """An operator's larger limits. A smaller one also removes messages at once, even of a stream that refuses."""
    size, age = present.max_bytes or -1, present.max_age or 0
    kept: dict[str, Any] = {}
    if size < 0 or size > spec.max_bytes:
        kept["max_bytes"] = present.max_bytes
    if not age or (spec.max_age and age > spec.max_age.total_seconds()):
        kept["max_age"] = present.max_age
    return kept


async def _remove_moved(js: JetStreamContext, stream: str, subject: str) -> None:
    left = (await js.stream_info(stream, subjects_filter=subject)).state.subjects
    if left:
        await js.purge_stream(stream, subject=subject)


async def _bucket(js: JetStreamContext, config: KeyValueConfig) -> None:
    try:
        await js.stream_info(f"KV_{config.bucket}")
    except NotFoundError:
        await js.create_key_value(config)


async def consumer(
    js: JetStreamContext, stream: str, durable: str, subject: str, ack_wait_s: float = ACK_WAIT_S
) -> None:
    """A durable pull consumer, as wanted now: an old one with another configuration is updated, not ignored.

    One of the same name on another stream, which stored the subject before, is removed. Raises `Unreachable`.
    """
    wanted = ConsumerConfig(
        durable_name=durable,
        filter_subject=subject,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ack_wait_s,
        max_deliver=-1,
        max_ack_pending=64,
    )
    with _answering():
        await _leave_other_streams(js, stream, durable)
        await js.add_consumer(stream, wanted.evolve(metadata=await metadata(js, Durable(stream, durable))))


async def _leave_other_streams(js: JetStreamContext, stream: str, durable: str) -> None:
    with suppress(NotFoundError):
        await js.consumer_info(stream, durable)
        return
    for other in (spec.name for spec in STREAMS if spec.name != stream):
        with suppress(NotFoundError):
            await js.delete_consumer(other, durable)
