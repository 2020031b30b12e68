"""The subjects of JetStream's API that a use of a stream, consumer or bucket needs. `permissions` grants them.

A right on `$JS.API.>` would let a service delete streams, read what others wrote and move others' consumers. So each
right names one stream and, where there is one, one consumer. No service may create, change, purge or delete a stream.
"""

from __future__ import annotations

from slmops.contracts.subjects import STREAMS, durable_name, stream_of

_API = "$JS.API"


def bucket_stream(bucket: str) -> str:
    """Returns the stream in which a key-value bucket is stored."""
    return f"KV_{bucket}"


def describing(*streams: str) -> tuple[str, ...]:
    """Reading the configuration and fill level of streams."""
    return tuple(f"{_API}.STREAM.INFO.{stream}" for stream in streams)


WATCHING = describing(*(spec.name for spec in STREAMS))
"""What every service does: it watches how full the streams are."""


def consuming(service: str, subject: str) -> tuple[str, ...]:
    """Consuming a subject with the durable consumer of a service: creating it, pulling and acknowledging.

    The consumer is created by the subject that contains its filter, which the server compares with the request. So it
    cannot be used to read other subjects of the stream. It may be deleted from any stream, because a subject may have
    had another stream before. Acknowledgements have the form of servers without the feature flag `js_ack_fc_v2`.
    """
    stream, durable = stored_in(subject), durable_name(service, subject)
    return (
        f"{_API}.CONSUMER.INFO.{stream}.{durable}",
        f"{_API}.CONSUMER.CREATE.{stream}.{durable}.{subject}",
        f"{_API}.CONSUMER.MSG.NEXT.{stream}.{durable}",
        f"{_API}.CONSUMER.DELETE.*.{durable}",
        f"$JS.ACK.{stream}.{durable}.>",
    )


def reading_all(subject: str) -> tuple[str, ...]:
    """Reading a stream's messages by sequence.

    The server does not limit this to the subject, only to the stream: the form of the request that names the subject
    returns nothing but the newest message. So this is for streams of facts, which hold no secrets. ADR 17 states the
    alternatives.
    """
    return (f"{_API}.DIRECT.GET.{stored_in(subject)}",)


def reading_latest(subject: str) -> tuple[str, ...]:
    """Reading the newest message of each subject that matches."""
    return (f"{_API}.DIRECT.GET.{stored_in(subject)}.{subject}",)


def forgetting(subject: str) -> tuple[str, ...]:
    """Deleting single messages of the stream that stores a subject. The server does not limit this to the subject."""
    return (f"{_API}.STREAM.MSG.DELETE.{stored_in(subject)}",)


def reading_bucket(bucket: str, keys: str = ">") -> tuple[str, ...]:
    """Reading the values of a bucket by key."""
    return (f"{_API}.DIRECT.GET.{bucket_stream(bucket)}.$KV.{bucket}.{keys}",)


def listing_bucket(bucket: str) -> tuple[str, ...]:
    """Listing a bucket's keys."""
    return describing(bucket_stream(bucket))


def scanning_bucket(bucket: str) -> tuple[str, ...]:
    """Reading all values of a bucket at once with a consumer that the server removes (an ordered consumer)."""
    stream = bucket_stream(bucket)
    return (
        *listing_bucket(bucket),
        f"{_API}.CONSUMER.CREATE.{stream}",
        f"{_API}.CONSUMER.CREATE.{stream}.>",
        f"{_API}.CONSUMER.INFO.{stream}.*",
        f"{_API}.CONSUMER.DELETE.{stream}.*",
        f"$JS.FC.{stream}.>",
    )


def reading_everything(*streams: str) -> tuple[str, ...]:
    """Reading all that streams or buckets hold, message by message: it leaves nothing on the server."""
    rights = ("STREAM.INFO.{}", "DIRECT.GET.{}", "DIRECT.GET.{}.>", "STREAM.MSG.GET.{}")
    return tuple(f"{_API}.{right.format(stream)}" for stream in streams for right in rights)


def observing(*streams: str) -> tuple[str, ...]:
    """Reading what the consumers of streams have not handled yet."""
    rights = ("CONSUMER.LIST.{}", "CONSUMER.INFO.{}.*")
    return tuple(f"{_API}.{right.format(stream)}" for stream in streams for right in rights)


def repairing(*streams: str) -> tuple[str, ...]:
    """What an admin does beyond reading: resizing streams, and accepting a consumer's gap."""
    rights = ("STREAM.UPDATE.{}", "CONSUMER.CREATE.{}.>")
    return tuple(f"{_API}.{right.format(stream)}" for stream in streams for right in rights)


def provisioning(*streams: str) -> tuple[str, ...]:
    """Creating streams and buckets, changing them, and purging subjects that moved to another stream."""
    rights = ("INFO", "CREATE", "UPDATE", "PURGE")
    return tuple(f"{_API}.STREAM.{right}.{stream}" for stream in streams for right in rights)


def stored_in(subject: str) -> str:
    stream = stream_of(subject)
    assert stream is not None, f"no stream stores {subject}"
    return stream
