"""The job board: the state of every job and the requests to cancel jobs, in a KV bucket that all workers share.

Only the worker that holds a job's message writes its state. A request to cancel it is stored under a separate key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nats.errors import Error as NatsError
from nats.js.api import DeliverPolicy
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KV_OP, KeyValue

from slmops.contracts import subjects
from slmops.contracts.errors import Unreachable
from slmops.contracts.jobs import JobState, JobView
from slmops.kit.bus.service_bus import Bus

_FEW = 10
"""Up to this many keys are read one by one, which is faster than a consumer."""
_ENTRY_WITHIN_S = 5.0


class Board:
    """Reads and writes the job board. Every method raises `Unreachable`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._opened: KeyValue | None = None

    async def queue(self, view: JobView) -> None:
        """Adds a new job; a job that is already on the board keeps its state."""
        with _reachable():
            bucket = await self._bucket()
            try:
                await bucket.create(subjects.job_key(view.job), view.model_dump_json().encode())
            except KeyWrongLastSequenceError:
                return

    async def put(self, view: JobView) -> None:
        with _reachable():
            await (await self._bucket()).put(subjects.job_key(view.job), view.model_dump_json().encode())

    async def find(self, job: str) -> JobView | None:
        state = await self._get(subjects.job_key(job))
        return _with_cancellation(JobView.model_validate_json(state), await self.cancelled(job)) if state else None

    async def all(self) -> list[JobView]:
        """Returns all jobs in the order in which they were queued."""
        with _reachable():
            texts = await self._entries()
        views = [JobView.model_validate_json(text) for key, text in texts.items() if key == subjects.job_key(_job(key))]
        views = [_with_cancellation(view, texts.get(subjects.cancellation_key(view.job))) for view in views]
        return sorted(views, key=lambda view: view.queued_at)

    async def _entries(self) -> dict[str, str]:
        """Returns the values by key. Costs two requests, a message per key, and a request per key that changes.

        `KeyValue.watchall` is not used: nats-py 2.16 ends it at once, and empty, if messages have arrived that it has
        not processed yet. A consumer of last values misses a key that is overwritten while it reads.
        """
        stream, prefix = f"KV_{subjects.JOB_BUCKET}", f"$KV.{subjects.JOB_BUCKET}."
        js = self._bus.client.js
        names = (await js.stream_info(stream, subjects_filter=f"{prefix}>")).state.subjects or {}
        left = {name.removeprefix(prefix) for name in names}
        found: dict[str, str] = {}
        if len(left) > _FEW:
            found = await self._last_values(stream, prefix)
        for key in left - found.keys():
            if (value := await self._get(key)) is not None:
                found[key] = value.decode()
        return found

    async def _last_values(self, stream: str, prefix: str) -> dict[str, str]:
        reader = await self._bus.client.js.subscribe(
            f"{prefix}>", stream=stream, ordered_consumer=True, deliver_policy=DeliverPolicy.LAST_PER_SUBJECT
        )
        found: dict[str, str] = {}
        try:
            info = await reader.consumer_info()
            left = (info.num_pending or 0) + (info.delivered.consumer_seq if info.delivered else 0)
            while left:
                message = await reader.next_msg(timeout=_ENTRY_WITHIN_S)
                left = message.metadata.num_pending
                if KV_OP not in (message.headers or {}):  # otherwise the key was deleted
                    found[message.subject.removeprefix(prefix)] = message.data.decode()
        finally:
            await reader.unsubscribe()
        return found

    async def cancel(self, job: str, by: str) -> None:
        with _reachable():
            await (await self._bucket()).put(subjects.cancellation_key(job), by.encode())

    async def cancelled(self, job: str) -> str | None:
        """Returns who asked to cancel the job; None if nobody did."""
        by = await self._get(subjects.cancellation_key(job))
        return by.decode() if by is not None else None

    async def _get(self, key: str) -> bytes | None:
        with _reachable():
            bucket = await self._bucket()
            try:
                return (await bucket.get(key)).value
            except KeyNotFoundError:
                return None

    async def _bucket(self) -> KeyValue:
        if self._opened is None:
            self._opened = await self._bus.client.js.key_value(subjects.JOB_BUCKET)
        return self._opened


def _job(key: str) -> str:
    return key.rpartition(".")[2]


def _with_cancellation(view: JobView, cancelled_by: str | None) -> JobView:
    """Returns the job as cancelled if somebody asked for it, even if its worker has not noticed yet."""
    if cancelled_by is None or view.state.ended:
        return view
    state = JobState.CANCELLED if view.state is JobState.QUEUED else JobState.CANCELLING
    return view.model_copy(update={"state": state, "reason": f"cancelled by {cancelled_by}"})


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (TimeoutError, NatsError, OSError) as error:
        raise Unreachable(f"the job board does not answer: {str(error) or type(error).__name__}") from error
