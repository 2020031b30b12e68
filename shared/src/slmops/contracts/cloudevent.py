"""CloudEvents 1.0 in binary mode over NATS: attributes are `ce-*` headers, the payload is the data alone.

An envelope always has id, source, type and time. `traceparent` (W3C) carries the trace across services. `actor` is an
extension: who caused the event, such as `person:alice`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from slmops.contracts.errors import InvalidMessage

SPEC_VERSION = "1.0"
MESSAGE_ID_HEADER = "Nats-Msg-Id"  # JetStream drops a second message with the same id inside its dedupe window
EVENT_NAMESPACE = uuid.UUID("0b6f7c1e-5d0e-5c56-9b7e-3c1d1f1e7a10")


class Envelope(BaseModel):
    """The attributes of one event: everything except its data."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(min_length=1)
    source: str = Field(min_length=1)
    type: str = Field(pattern=r"^slmops\.[a-z_]+\.[a-z_]+\.v[0-9]+$")
    time: AwareDatetime
    subject: str | None = None
    specversion: str = Field(default=SPEC_VERSION, pattern=r"^1\.")
    traceparent: str | None = None
    actor: str | None = Field(default=None, max_length=140, description="None: nobody but the source itself")

    def headers(self) -> dict[str, str]:
        """Returns the NATS headers of this event, with the id as JetStream's dedupe key."""
        found = {
            "ce-specversion": self.specversion,
            "ce-id": self.id,
            "ce-source": self.source,
            "ce-type": self.type,
            "ce-time": self.time.isoformat(),
            "content-type": "application/json",
            MESSAGE_ID_HEADER: self.id,
        }
        if self.subject:
            found["ce-subject"] = self.subject
        if self.actor:
            found["ce-actor"] = self.actor
        if self.traceparent:
            found["traceparent"] = self.traceparent
        return found

    @classmethod
    def from_headers(cls, headers: Mapping[str, Any] | None) -> Envelope:
        """Parses NATS headers. Raises `InvalidMessage` if an attribute is missing or malformed."""
        lowered = {key.lower(): value for key, value in (headers or {}).items()}
        attributes = {key[3:]: value for key, value in lowered.items() if key.startswith("ce-")}
        try:
            # Other senders put the trace into the CloudEvents extension, a separate header, or both.
            return cls.model_validate(attributes | {k: v for k, v in lowered.items() if k == "traceparent"})
        except ValidationError as error:
            fields = ", ".join(str(e["loc"][0]) for e in error.errors())
            raise InvalidMessage(f"not a CloudEvent: {fields} missing or malformed") from error


def event_id(*parts: str) -> str:
    """Derives an event id from `parts`. Repeating a step gives the same id, so it publishes the same event again."""
    return str(uuid.uuid5(EVENT_NAMESPACE, "\x1f".join(parts)))
