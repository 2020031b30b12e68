"""Commands on single gateways that the rollout service answers: credentials, and who belongs to the fleet."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import ClassVar, Final

from pydantic import AwareDatetime, Field

from slmops.contracts.commands.base import Command, Result
from slmops.contracts.commands.rollout import Enrolment, GatewayView
from slmops.contracts.names import PUBLIC_USER_KEY, Name

STATEMENT_AGE: Final = timedelta(minutes=5)
"""How old, or how far ahead, the statement of a `RenewExpiredCredential` may be by the rollout service's clock."""
MAX_WINDOW: Final = timedelta(days=30)


class RenewCredential(Command[Enrolment]):
    """Get a new credential for a gateway's enrolled key, as the gateway. Also the answer to a move."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "renew"
    per_gateway: ClassVar[bool] = True
    gateway_id: Name
    public_key: str = Field(pattern=PUBLIC_USER_KEY)


class RenewExpiredCredential(Command[Enrolment]):
    """Get a new credential for an enrolled key without a valid one. `signature` proves the private half of the key."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "renew_expired"
    anonymous: ClassVar[bool] = True
    gateway_id: Name
    public_key: str = Field(pattern=PUBLIC_USER_KEY)
    signed_at: AwareDatetime
    signature: str = Field(default="", max_length=128, description="Ed25519 of `statement`, base64")

    @property
    def statement(self) -> bytes:
        """What the gateway signs. It names its purpose, so a signature for something else is not valid here."""
        said = {"purpose": "slmops.renew_expired.v1", "gateway_id": self.gateway_id, "public_key": self.public_key}
        return json.dumps(said | {"signed_at": self.signed_at.isoformat()}, sort_keys=True).encode()


class _OnGateway(Command[GatewayView]):
    service: ClassVar[str] = "rollout"
    gateway_id: Name


class RevokeGateway(_OnGateway):
    """Refuse a gateway's key from now on. The gateway stays listed as revoked and counts nowhere."""

    name: ClassVar[str] = "revoke"
    reason: str = Field(default="", max_length=200)


class ReenrolGateway(_OnGateway):
    """Allow one enrolment with another key under a gateway's id, or with `same_key` the return of its revoked key."""

    name: ClassVar[str] = "reenrol"
    within_s: float = Field(default=24 * 3600, gt=0, le=MAX_WINDOW.total_seconds(), allow_inf_nan=False)
    same_key: bool = False


class MoveGateway(_OnGateway):
    """Move a gateway to another blueprint. It fetches its new credential by itself at its next contact."""

    name: ClassVar[str] = "move"
    blueprint: Name


class GatewayRemoval(Result):
    gateway_id: Name
    blueprint: Name = Field(description="To which it belonged")
    at: AwareDatetime


class RemoveGateway(Command[GatewayRemoval]):
    """Revoke a gateway and forget it. Its id is free for another device."""

    service: ClassVar[str] = "rollout"
    name: ClassVar[str] = "remove"
    gateway_id: Name
    reason: str = Field(default="", max_length=200)
