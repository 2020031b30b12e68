"""Results that are carried back over an air gap: a gateway's reports and measurements, sealed with its own key.

A results file has JSON lines: messages, and in the last line a seal over all of them. Nobody who transports the file
can change, add or remove a message. Importing an older file again is harmless, because each message has an id.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from slmops.contracts import subjects
from slmops.contracts.cloudevent import MESSAGE_ID_HEADER, Envelope
from slmops.contracts.descriptor import Digest
from slmops.contracts.errors import InvalidMessage
from slmops.contracts.events import GatewayReported
from slmops.contracts.measurement import MeasurementBatch
from slmops.contracts.names import Name

RESULTS_SUFFIX: Final = ".slmops-results"
RESULTS_LIMIT_BYTES: Final = 256 << 20
LINE_LIMIT_BYTES: Final = 1 << 20
"""Limit of one message, which is NATS' limit."""
_DOMAIN: Final = b"slmops results 1\n"
_HEADER: Final = re.compile(rf"{MESSAGE_ID_HEADER}|content-type|traceparent|ce-[a-z]+")
"""The allowed headers. The server would interpret others as instructions."""
PublicKey = Annotated[str, StringConstraints(pattern=r"^U[A-Z2-7]{55}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ResultMessage(_Strict):
    """A message as the gateway would have published it."""

    subject: str
    headers: dict[str, str]
    payload: str

    def check(self, gateway_id: str) -> None:
        """Raises `InvalidMessage` for a message that this gateway may not publish over the bus."""
        body: GatewayReported | MeasurementBatch
        if unexpected := sorted(name for name in self.headers if not _HEADER.fullmatch(name)):
            raise InvalidMessage(f"gateways may not send the header {unexpected[0]!r}", where=self.subject)
        if self.subject == subjects.measurements(gateway_id):
            body = MeasurementBatch.model_validate_json(self.payload)
            valid = bool(self.headers.get(MESSAGE_ID_HEADER))
        else:
            body = GatewayReported.model_validate_json(self.payload)
            valid = Envelope.from_headers(self.headers).id == self.headers.get(MESSAGE_ID_HEADER)
            valid = valid and body.subject == self.subject
        if body.gateway_id != gateway_id or not valid:
            raise InvalidMessage(f"{gateway_id} may not publish this message", where=self.subject)


class ResultsSeal(_Strict):
    """The last line. `digest` covers the lines before it; `signature` is `statement`'s ed25519 signature in base64."""

    format: Literal[1] = 1
    gateway_id: Name
    blueprint: Name
    public_key: PublicKey
    created_at: AwareDatetime
    messages: int = Field(ge=0)
    digest: Digest
    signature: str = ""

    @property
    def statement(self) -> bytes:
        """The signed bytes."""
        return _DOMAIN + self.model_dump_json(exclude={"signature"}).encode()
