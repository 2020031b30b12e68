"""Writes results files message by message, and reads them only if the seal in the last line is valid for the others."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ValidationError

from slmops.contracts.errors import InvalidBundle, SignatureInvalid
from slmops.contracts.plan import Identity
from slmops.contracts.results import LINE_LIMIT_BYTES, RESULTS_LIMIT_BYTES, ResultMessage, ResultsSeal
from slmops.kit.atomic_write import atomic_write
from slmops.kit.bus.nats_auth import is_signed, public_key, sign

Add = Callable[[ResultMessage], None]
_SEAL_BYTES = 4096
"""More than the last line needs."""


@contextmanager
def writing(out: Path, who: Identity, seed: str, at: datetime) -> Iterator[Add]:
    """Yields a function that adds messages. `out` is sealed and exists when the block ends without an error.

    The function raises `InvalidBundle`, and adds nothing, for a message that would make the file too long to be read.
    """
    body, count, written = hashlib.sha256(), 0, _SEAL_BYTES
    with atomic_write(out) as file:

        def add(message: ResultMessage) -> None:
            nonlocal count, written
            line = _line(message)
            if len(line) > LINE_LIMIT_BYTES or written + len(line) > RESULTS_LIMIT_BYTES:
                raise InvalidBundle("the message or the file would be too long", where=str(out))
            written += len(line)
            body.update(line)
            file.write(line)
            count += 1

        yield add
        seal = ResultsSeal(
            gateway_id=who.gateway_id,
            blueprint=who.blueprint,
            public_key=public_key(seed),
            created_at=at,
            messages=count,
            digest=f"sha256:{body.hexdigest()}",
        )
        signature = base64.b64encode(sign(seed, seal.statement)).decode()
        file.write(_line(seal.model_copy(update={"signature": signature})))


class ResultsFile:
    """An open results file. Opening checks the seal; the caller must check that the seal's key is the gateway's."""

    def __init__(self, path: Path) -> None:
        """Raises `InvalidBundle`, `SignatureInvalid`, `InvalidMessage` for an invalid key, and `OSError`."""
        self.path = path
        body, count, last = hashlib.sha256(), 0, b""
        with path.open("rb") as file:
            for line in self._lines(file):
                if last:
                    body.update(last)
                    count += 1
                last = line
        self.seal = self._sealed(last)
        if (self.seal.digest, self.seal.messages) != (f"sha256:{body.hexdigest()}", count):
            raise InvalidBundle("the messages do not match the seal", where=str(path))

    def messages(self) -> Iterator[ResultMessage]:
        """Yields messages that the gateway may publish. Raises `InvalidBundle`, `InvalidMessage`, `OSError`."""
        with self.path.open("rb") as file:
            for number, line in enumerate(self._lines(file), 1):
                if number > self.seal.messages:
                    return
                try:
                    message = ResultMessage.model_validate_json(line)
                    message.check(self.seal.gateway_id)
                except ValidationError as error:
                    raise self._invalid(f"line {number} is not a valid message", error) from error
                yield message

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        read = 0
        while line := file.readline(LINE_LIMIT_BYTES + 1):
            read += len(line)
            if len(line) > LINE_LIMIT_BYTES or read > RESULTS_LIMIT_BYTES:
                raise InvalidBundle("the file or a line is longer than a gateway writes", where=str(self.path))
            if not line.endswith(b"\n"):
                raise InvalidBundle("the file is cut off", where=str(self.path), fix="Copy the whole file again.")
            yield line

    def _sealed(self, line: bytes) -> ResultsSeal:
        try:
            seal = ResultsSeal.model_validate_json(line)
            signature = base64.b64decode(seal.signature, validate=True)
        except (ValidationError, binascii.Error) as error:
            raise self._invalid("the last line is not a valid seal", error) from error
        if line != _line(seal) or base64.b64encode(signature).decode() != seal.signature:
            raise InvalidBundle("the seal is not encoded as gateways encode it", where=str(self.path))
        if not is_signed(seal.public_key, seal.statement, signature):
            raise SignatureInvalid("the seal is not signed by the key that it names", where=str(self.path))
        return seal

    def _invalid(self, what: str, error: Exception) -> InvalidBundle:
        why = error.errors(include_input=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        return InvalidBundle(f"{what}: {why}", where=str(self.path), fix="Copy the whole file again from the gateway.")


def _line(document: BaseModel) -> bytes:
    """Returns the only accepted encoding, so not even a space can be changed."""
    return document.model_dump_json().encode() + b"\n"
