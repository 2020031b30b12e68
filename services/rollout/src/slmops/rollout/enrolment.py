"""Checks the enrolment token and signs a gateway's credential. The token is compared, never stored or logged."""

from __future__ import annotations

import hmac
from pathlib import Path

from slmops.contracts.commands import EnrolGateway
from slmops.contracts.errors import Denied, InvalidMessage
from slmops.kit.bus.nats_auth import gateway_jwt


class Enrolment:
    """Holds the two secrets once `open` has read them."""

    def __init__(self, token_file: Path, signing_file: Path) -> None:
        self._token_file = token_file
        self._signing_file = signing_file
        self._token = b""
        self._signing_key = ""

    async def open(self) -> None:
        """Raises `InvalidMessage` when a file is missing or empty: an empty token would let everybody in."""
        self._token = _secret(self._token_file, "SLMOPS_ENROLMENT_TOKEN").encode()
        self._signing_key = _secret(self._signing_file, "SLMOPS_GATEWAY_SIGNING_SEED")

    def sign(self, command: EnrolGateway) -> str:
        """The gateway's JWT. Raises `Denied` for a wrong token, `InvalidMessage` for a key that is none."""
        # Compared in constant time: how long a refusal takes must not tell how much of a guess was right.
        if not self._token or not hmac.compare_digest(command.token.encode(), self._token):
            raise Denied(
                f"the enrolment token of {command.gateway_id} is wrong",
                fix="Give the gateway this site's token (SLMOPS_ENROLMENT_TOKEN).",
            )
        return gateway_jwt(self._signing_key, command.public_key, command.gateway_id, command.blueprint)


def _secret(path: Path, variable: str) -> str:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidMessage(
            f"a secret cannot be read: {type(error).__name__}", where=str(path), fix=f"Set {variable} to its file."
        ) from error
    if not text:
        raise InvalidMessage("a secret's file is empty", where=str(path), fix=f"Set {variable} to its file.")
    return text
