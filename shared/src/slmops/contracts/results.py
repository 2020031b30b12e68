"""Results that are carried back over an air gap: a gateway's reports and measurements, sealed with its own key.

A file of JSON lines: messages, and in the last line a seal over all of them. Nobody who carries it can change, add or
leave out a message of it; that an older file is carried again is harmless, for each message has its identity.
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
"""Of one message: NATS takes no more."""
_DOMAIN: Final = b"slmops results 1\n"
_HEADER: Final = re.compile(rf"{MESSAGE_ID_HEADER}|content-type|traceparent|ce-[a-z]+")
"""Others would be instructions to the server."""
PublicKey = Annotated[str, StringConstraints(pattern=r"^U[A-Z2-7]{55}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ResultMessage(_Strict):
    """As it would have been published."""

    subject: str
    headers: dict[str, str]
    payload: str

    def check(self, gateway_id: str) -> None:
        """Raises `InvalidMessage` for a message that this gateway may not publish over the bus."""
        told: GatewayReported | MeasurementBatch
        if strange := sorted(name for name in self.headers if not _HEADER.fullmatch(name)):
            raise InvalidMessage(f"no message of a gateway has a header {strange[0]!r}", where=self.subject)
        if self.subject == subjects.measurements(gateway_id):
            told = MeasurementBatch.model_validate_json(self.payload)
            whole = bool(self.headers.get(MESSAGE_ID_HEADER))
        else:
            told = GatewayReported.model_validate_json(self.payload)
            whole = Envelope.from_headers(self.headers).id == self.headers.get(MESSAGE_ID_HEADER)
            whole = whole and told.subject == self.subject
        if told.gateway_id != gateway_id or not whole:
            raise InvalidMessage(f"{gateway_id} may not tell this", where=self.subject)


class ResultsSeal(_Strict):
    """The last line. `digest` is of the lines before it; `signature` base64, by ed25519, of `statement`."""

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
        """What is signed."""
        return _DOMAIN + self.model_dump_json(exclude={"signature"}).encode()
