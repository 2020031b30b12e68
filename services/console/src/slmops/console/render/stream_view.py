"""Views of streams and of attention items."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict

from slmops.kit.bus.gaps import Gap


class ConsumerView(BaseModel):
    """A consumer. `pending`: messages that it has not finished. `gap`: messages that it missed, until accepted."""

    model_config = ConfigDict(frozen=True)

    name: str
    pending: int
    gap: Gap | None = None


class StreamView(BaseModel):
    """A stream. `limit_bytes` and `max_age` are None if unlimited.

    `refuses`: a full stream refuses new messages; otherwise it drops the oldest.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    subjects: tuple[str, ...]
    messages: int
    size_bytes: int
    limit_bytes: int | None
    max_age: timedelta | None
    refuses: bool
    consumers: tuple[ConsumerView, ...] = ()

    @property
    def share(self) -> float:
        return self.size_bytes / self.limit_bytes if self.limit_bytes else 0.0


class AcceptedGap(Gap):
    stream: str
    consumer: str


class Item(BaseModel):
    """One thing that needs a person.

    `kind` is for scripts: stream_full, gap, blobs_corrupt, blobs_missing, scheduled, expiry, dead_letters, rollout_held
    or unreachable.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    what: str
    where: str
    fix: str
