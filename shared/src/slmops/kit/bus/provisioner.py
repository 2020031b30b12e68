"""Provisions streams and buckets with a credential of its own: `python -m slmops.kit.bus.provisioner`.

It runs before the services start, and again after an upgrade. It needs `SLMOPS_NATS_URL` and `SLMOPS_NATS_CREDS`.
"""

from __future__ import annotations

import asyncio
import sys

from slmops.contracts.errors import SlmopsError
from slmops.contracts.permissions import PROVISIONER
from slmops.kit.bus.client import BusClient
from slmops.kit.bus.provision import provision
from slmops.kit.logs import log_as_json
from slmops.kit.settings import BusSettings, load


async def run(settings: BusSettings) -> None:
    """Connects, creates or updates what is missing, and disconnects. Raises `Unreachable`, `InvalidMessage`."""
    client = await BusClient.connect(settings, name=PROVISIONER, patient=False)
    try:
        await provision(client.js, settings.stream_bytes)
    finally:
        await client.close()


def main() -> None:
    try:
        settings = load(BusSettings)
        log_as_json(PROVISIONER, settings.log_level)
        asyncio.run(run(settings))
    except SlmopsError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
