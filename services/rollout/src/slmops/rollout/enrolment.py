"""Checks the enrolment token and signs gateways' credentials. The token is never stored or logged."""

from __future__ import annotations

import hmac
from datetime import datetime, timedelta
from pathlib import Path

from slmops.contracts.commands import EnrolGateway
from slmops.contracts.errors import Denied, InvalidMessage
from slmops.contracts.events import GatewayEnrolled
from slmops.kit.bus.nats_auth import check_user_key, gateway_jwt


class Enrolment:
    """The enrolment token and the signing key, which `open` reads from their files. `life`: that of a credential."""

    def __init__(self, token_file: Path, signing_file: Path, life: timedelta) -> None:
        self._token_file = token_file
        self._signing_file = signing_file
        self.life = life
        self._token = b""
        self._signing_key = ""

    async def open(self) -> None:
        """Reads both files. Raises `InvalidMessage` for a missing or empty one: an empty token would admit anyone."""
        self._token = _secret(self._token_file, "SLMOPS_ENROLMENT_TOKEN").encode()
        self._signing_key = _secret(self._signing_file, "SLMOPS_GATEWAY_SIGNING_SEED")

    def check(self, command: EnrolGateway) -> None:
        """Raises `Denied` for a wrong token, `InvalidMessage` for an invalid key."""
        # Constant time: the duration must not reveal how much of a guessed token is right.
        if not self._token or not hmac.compare_digest(command.token.encode(), self._token):
            raise Denied(
                f"the enrolment token of {command.gateway_id} is wrong",
                fix="Give the gateway this site's token (SLMOPS_ENROLMENT_TOKEN).",
            )
        check_user_key(command.public_key)

    def sign(self, known: GatewayEnrolled, now: datetime) -> str:
        """Returns the JWT of an enrolled gateway. It is valid from the second of `now`, for `life`."""
        return gateway_jwt(
            self._signing_key,
            known.public_key,
            known.gateway_id,
            known.blueprint,
            enrolment=known.enrolment,
            issued_at=now,
            expires_at=now + self.life,
        )


def _secret(path: Path, variable: str) -> str:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidMessage(
            f"the secret's file cannot be read: {type(error).__name__}",
            where=str(path),
            fix=f"Set {variable} to the file with the secret.",
        ) from error
    if not text:
        raise InvalidMessage(
            "the secret's file is empty", where=str(path), fix=f"Set {variable} to the file with the secret."
        )
    return text
