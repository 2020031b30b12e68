"""Lists, reads and replays dead letters: the messages that a consumer gave up on.

They are read one at a time by sequence, without a consumer, so a reader that crashes leaves nothing on the server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.api import RawStreamMsg
from nats.js.errors import APIError, NotFoundError
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from slmops.contracts import subjects
from slmops.contracts.clocks import SENT_AT_HEADER
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER
from slmops.contracts.errors import NotFound, NotReady, PermanentError, Problem, Unreachable
from slmops.contracts.identity import ActorKind, sender_of
from slmops.kit.bus.client import PROBLEM_HEADER, BusClient
from slmops.kit.bus.exchange import REQUEST_TIMEOUT, exchange

STREAM = "DLQ"
REASON_HEADER = "slmops-dead-because"
CODE_HEADER = "slmops-dead-code"
CONSUMER_HEADER = "slmops-dead-consumer"
SUBJECT_HEADER = "slmops-dead-subject"
SIZE_HEADER = "slmops-dead-size"


class DeadLetter(BaseModel):
    """A message and the reason why it was dead-lettered. `headers` are the original ones, without those of the bus."""

    model_config = ConfigDict(frozen=True)

    sequence: int
    subject: str = Field(description="Original subject")
    consumer: str
    code: str
    reason: str
    at: AwareDatetime = Field(description="When the consumer gave up")
    size_bytes: int = Field(description="Size of the original payload")
    whole: bool = Field(
        default=True,
        description="False: it was too large, and its headers and its end are missing; or it is confidential, and its "
        "headers and payload are missing",
    )
    genuine: bool = Field(
        default=True, description="False: its headers name another subject than the one under which it is stored"
    )
    # A payload may be private, so it is excluded from output unless a caller requests the field.
    payload: bytes = Field(repr=False, exclude=True)
    headers: Mapping[str, str] = Field(repr=False, exclude=True)

    @property
    def is_command(self) -> bool:
        """Whether a replay makes a service act in the name of the person who replays it."""
        return subjects.stream_of(self.subject) is None


async def dead_letters(client: BusClient, newest: int | None = None) -> AsyncIterator[DeadLetter]:
    """Yields the stored dead letters, oldest first: all, or those among the `newest` sequences.

    Raises `Unreachable`, `NotReady`.
    """
    with _reachable():
        last = (await client.js.stream_info(STREAM)).state.last_seq
    after = 0 if newest is None else max(0, last - newest)
    while after < last:
        with _reachable():
            try:
                message = await client.js.get_msg(STREAM, seq=after + 1, subject=">", next=True)
            except NotFoundError:
                return
        letter = _letter(message)
        after = letter.sequence
        if after <= last:
            yield letter


async def number_stored(client: BusClient) -> int:
    """Returns the number of stored dead letters. Raises `Unreachable`, `NotReady`."""
    with _reachable():
        return int((await client.js.stream_info(STREAM)).state.messages)


async def dead_letter(client: BusClient, sequence: int) -> DeadLetter:
    """Returns one dead letter. Raises `NotFound`, `Unreachable`."""
    with _reachable():
        try:
            return _letter(await client.js.get_msg(STREAM, seq=sequence))
        except NotFoundError as error:
            raise NotFound(f"there is no dead letter {sequence}", fix="List them: slmops dlq ls.") from error


async def replay(client: BusClient, letter: DeadLetter) -> None:
    """Publishes a dead letter again to its original subject, then deletes it.

    It keeps its `ce-id`, so consumers that already handled it skip it. Its message id is new to JetStream, but the same
    in each replay of this letter, so a replay that was interrupted before the deletion publishes nothing twice.
    A command is sent again, in the name of who replays it, and its letter is kept if no service answers. So show the
    person what it is first. Raises `Unreachable`, the service's own error if it rejects the command again, and
    `PermanentError` for a letter that is not whole or not genuine.
    """
    if not letter.genuine:
        raise PermanentError(
            f"its headers do not agree with its subject, so {letter.consumer or 'its consumer'} did not store it",
            where=letter.subject,
            fix=f"Find out which service stored it, then remove it: slmops dlq rm {letter.sequence}.",
        )
    if not letter.whole:
        raise PermanentError(
            "the message is incomplete because it was too large for the dead letter queue, or confidential",
            where=letter.subject,
            fix="Send it again from its source.",
        )
    problem = None
    if letter.is_command:
        problem = await _ask(client, letter)
    else:
        fresh = {MESSAGE_ID_HEADER: f"replay:{STREAM}:{letter.sequence}"}
        await client.store(letter.subject, letter.payload, {**letter.headers, **fresh})
    with _reachable():
        await client.js.delete_msg(STREAM, letter.sequence)
    if problem is not None:
        raise problem.error()


async def remove(client: BusClient, letter: DeadLetter) -> None:
    """Removes a dead letter for good; its message is lost. Raises `Unreachable`, `NotReady`."""
    with _reachable():
        await client.js.delete_msg(STREAM, letter.sequence)


async def _ask(client: BusClient, letter: DeadLetter) -> Problem | None:
    subject, sender = letter.subject, sender_of(letter.subject)
    if sender is not None and sender.kind is not ActorKind.GATEWAY:  # the server lets nobody send in another name
        subject = f"{subjects.template(subject)}.{client.sender.token}"
    try:
        answer = await exchange(client.connection, subject, letter.payload, REQUEST_TIMEOUT, letter.headers)
    except NoRespondersError as error:
        raise Unreachable(
            "no service answers this command; its dead letter is kept", where=letter.subject, fix="Start its service."
        ) from error
    except (TimeoutError, NatsError) as error:
        raise Unreachable(f"no answer; the dead letter is kept: {error}", where=letter.subject) from error
    if PROBLEM_HEADER not in answer.headers:
        return None
    return Problem.model_validate_json(answer.data)


def _letter(message: RawStreamMsg) -> DeadLetter:
    headers = dict(message.headers or {})
    payload = bytes(message.data or b"")
    # A replay is not sent at the time of the original, so that header would make the sender's clock look wrong.
    ours = {REASON_HEADER, CODE_HEADER, CONSUMER_HEADER, SUBJECT_HEADER, SIZE_HEADER, SENT_AT_HEADER}
    original = {k: v for k, v in headers.items() if k not in ours and not k.lower().startswith("nats-")}
    assert message.subject is not None and message.time is not None, "the server sends both"
    # The server checked this subject against the rights of whoever stored the letter. It did not check the headers.
    subject, consumer = subjects.dead_letter_of(message.subject), headers.get(CONSUMER_HEADER, "")
    named = headers.get(SUBJECT_HEADER, subject), consumer.partition("/")[2] or subjects.template(subject)
    return DeadLetter(
        sequence=message.seq or 0,
        subject=subject,
        consumer=consumer,
        code=headers.get(CODE_HEADER, ""),
        reason=headers.get(REASON_HEADER, ""),
        at=message.time,
        size_bytes=int(size) if (size := headers.get(SIZE_HEADER, "")).isdecimal() else len(payload),
        whole=SIZE_HEADER not in headers,
        genuine=named == (subject, subjects.template(subject)),
        payload=payload,
        headers=original,
    )


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise NotReady(
            "there is no dead letter stream yet", fix="Create it: python -m slmops.kit.bus.provisioner."
        ) from error
    except (TimeoutError, NatsError, APIError) as error:
        raise Unreachable(f"the dead letters cannot be read: {error}", where=STREAM) from error
