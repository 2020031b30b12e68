"""Composition root of the registry."""

from __future__ import annotations

import secrets
from functools import partial

from slmops.kit.bus.relay import run_relay
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.main import errors_as_one_line
from slmops.kit.objects.collecting import Collecting
from slmops.kit.objects.store import Objects
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.registry.facts import Facts
from slmops.registry.garbage import Collector
from slmops.registry.handlers import Handlers, routes
from slmops.registry.marker import Marker
from slmops.registry.settings import Settings
from slmops.registry.store import MIGRATIONS, project, schema


def build(settings: Settings) -> Service:
    bus, objects = Bus("registry", settings), Objects(settings)
    journal = Journal(
        settings.database_url, service="registry", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    facts = Facts(journal, lambda: bus.client, lambda: bus.durables)
    collector = Collector(Collecting(settings), Marker(journal, objects, lambda: bus.client, facts.check).mark)
    new_upload = partial(secrets.token_hex, 16)
    routes(bus, Handlers(journal, objects, collector, utc_now, new_upload, settings.shortest_grace))
    return Service(
        "registry",
        settings,
        bus,
        opening=[journal.open, objects.open],
        tasks=[lambda: run_relay(journal, bus.client), facts.run],
        closing=[journal.close],
    )


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
