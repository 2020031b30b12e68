"""Composition root of the registry."""

from __future__ import annotations

import secrets

from slmops.kit.bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.objects import Objects
from slmops.kit.relay import run_relay
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.registry.handlers import Handlers, routes
from slmops.registry.settings import Settings
from slmops.registry.store import project, schema


def build(settings: Settings) -> Service:
    bus, objects = Bus("registry", settings), Objects(settings)
    journal = Journal(settings.database_url, service="registry", metadata=schema(), project=project)
    routes(bus, Handlers(journal, objects, utc_now, lambda: secrets.token_hex(16)))
    return Service(
        "registry",
        settings,
        bus,
        opening=[journal.open, objects.open],
        tasks=[lambda: run_relay(journal, bus.client)],
        closing=[journal.close],
    )


def main() -> None:
    build(load(Settings)).run()


if __name__ == "__main__":
    main()
