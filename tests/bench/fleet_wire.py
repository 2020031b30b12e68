"""A small NATS client for simulated fleets: thousands of subscriptions on one connection, and publishing with a window.

nats-py runs a task for each subscription. With 100,000 of them the client would be measured instead of the system.
"""

from __future__ import annotations

import asyncio
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping

import nkeys

from slmops.kit.cancellation import cancel_and_wait

_ACKS = 1
"""The subscription of acknowledgements. Subscriptions of the caller begin at `FIRST_SID`."""
FIRST_SID = 2
_RESEND_AFTER_S = 20.0
_HANDSHAKE_S = 60.0
OnMessage = Callable[[int, bytes, bytes], None]
"""Called with the id of the subscription, the headers as they arrived (empty: none) and the payload."""


class Wire(asyncio.Protocol):
    """One connection. `connect` makes it; `on_message` gets all messages that are no acknowledgements."""

    def __init__(self, creds: str, inbox: str, window: int) -> None:
        self.on_message: OnMessage = lambda sid, headers, payload: None
        self.acknowledged = 0
        self.refused = 0
        """How often JetStream answered with an error. The message is sent again."""
        self._jwt, self._seed = _parts(creds)
        self._inbox = inbox
        self._window = window
        self._waiting: dict[int, tuple[float, bytes]] = {}
        self._number = 0
        self._rest = b""
        self._room = asyncio.Event()
        self._pongs: list[asyncio.Future[None]] = []
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._resending: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, host: str, port: int, creds: str, inbox: str, window: int = 128) -> Wire:
        """Connects with the text of a credentials file. `inbox`: a prefix to which the user may subscribe."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_HANDSHAKE_S):
            _, wire = await loop.create_connection(lambda: cls(creds, inbox, window), host, port)
            await wire._greeted
            wire.subscribe(f"{inbox}.*", _ACKS)
            await wire.flush()
        wire._resending = asyncio.create_task(wire._resend())
        return wire

    def subscribe(self, subject: str, sid: int) -> None:
        self._write(b"SUB %s %d\r\n" % (subject.encode(), sid))

    def publish(self, subject: str, headers: Mapping[str, str], payload: bytes) -> None:
        """Publishes to a stream. The message is sent again until JetStream has acknowledged it."""
        self._number += 1
        frame = _frame(subject, f"{self._inbox}.{self._number}", headers, payload)
        self._waiting[self._number] = time.monotonic(), frame
        self._write(frame)

    def tell(self, subject: str, headers: Mapping[str, str], payload: bytes) -> None:
        """Publishes a message for which nobody waits."""
        self._write(_frame(subject, "", headers, payload))

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._window

    async def room(self) -> None:
        """Waits until less than a window of messages is unacknowledged."""
        while self.full:
            self._room.clear()
            await self._room.wait()

    async def settled(self) -> None:
        """Waits until everything is acknowledged."""
        while self._waiting:
            self._room.clear()
            await self._room.wait()

    async def flush(self) -> None:
        """Returns when the server has handled everything that was sent before."""
        pong = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        self._write(b"PING\r\n")
        await pong

    async def close(self) -> None:
        await cancel_and_wait([self._resending] if self._resending else [])
        if self._transport is not None:
            self._transport.close()

    # ---- protocol -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        lost = ConnectionError(f"the bus closed the connection: {error or self._rest[:200]!r}")
        for waiting in (self._greeted, *self._pongs):
            if not waiting.done():
                waiting.set_exception(lost)

    def data_received(self, data: bytes) -> None:
        """Growth: with the bytes received. Only an incomplete message at the end is copied."""
        data = self._rest + data if self._rest else data
        at = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            line = data[at:end]
            if line.startswith((b"HMSG", b"MSG")):
                words = line.split()
                size = int(words[-1])
                head = int(words[-2]) if line[0] == 72 else 0  # H
                start, stop = end + 2, end + 2 + size
                if len(data) < stop + 2:
                    break
                self._message(words, data[start : start + head], data[start + head : stop])
                at = stop + 2
            else:
                at = end + 2
                self._control(line)
        self._rest = data[at:]

    def _message(self, words: list[bytes], headers: bytes, payload: bytes) -> None:
        sid = int(words[2])
        if sid != _ACKS:
            self.on_message(sid, headers, payload)
        elif b'"error"' in payload or not payload:
            self.refused += 1  # no room, or nobody listens: `_resend` tries again
        elif self._waiting.pop(int(words[1].rpartition(b".")[2]), None) is not None:
            self.acknowledged += 1
            self._room.set()

    def _control(self, line: bytes) -> None:
        if line.startswith(b"INFO"):
            if not self._greeted.done():
                self._write(self._hello(json.loads(line[5:])))
                self._greeted.set_result(None)
        elif line == b"PING":
            self._write(b"PONG\r\n")
        elif line == b"PONG":
            if self._pongs:
                self._pongs.pop(0).set_result(None)
        elif line.startswith(b"-ERR"):
            self._rest = line
            raise ConnectionError(f"the bus refused: {line.decode(errors='replace')}")

    def _hello(self, info: dict[str, str]) -> bytes:
        signature = nkeys.from_seed(self._seed.encode()).sign(info["nonce"].encode())
        options = {
            "jwt": self._jwt,
            "sig": urlsafe_b64encode(signature).rstrip(b"=").decode(),
            "verbose": False,
            "pedantic": False,
            "headers": True,
            "no_responders": True,
            "protocol": 1,
            "lang": "python",
            "version": "1",
            "name": "bench",
        }
        return b"CONNECT %s\r\n" % json.dumps(options).encode()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    async def _resend(self) -> None:
        while True:
            await asyncio.sleep(_RESEND_AFTER_S / 4)
            late = time.monotonic() - _RESEND_AFTER_S
            for number, (sent_at, frame) in list(self._waiting.items()):
                if sent_at > late:
                    break  # in the order in which they were sent
                del self._waiting[number]
                self._waiting[number] = time.monotonic(), frame
                self._write(frame)


def _frame(subject: str, reply: str, headers: Mapping[str, str], payload: bytes) -> bytes:
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    head = f"NATS/1.0\r\n{lines}\r\n".encode()
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (
        f"{subject} {reply}".strip().encode(),
        len(head),
        len(head) + len(payload),
        head,
        payload,
    )


def _parts(creds: str) -> tuple[str, str]:
    """Returns the JWT and the seed in the text of a credentials file."""
    jwt = creds.split("-----BEGIN NATS USER JWT-----")[1].split()[0]
    return jwt, creds.split("-----BEGIN USER NKEY SEED-----")[1].split()[0]
