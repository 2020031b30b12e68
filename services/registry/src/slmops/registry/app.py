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
from slmops.kit.objects.verifying import Verifying
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.registry.chores import Chores
from slmops.registry.facts import Facts
from slmops.registry.garbage import Collector
from slmops.registry.handlers import Handlers, routes
from slmops.registry.marker import Marker
from slmops.registry.settings import Settings
from slmops.registry.storage import Storage
from slmops.registry.storage import routes as storage_routes
from slmops.registry.store import MIGRATIONS, project, schema
from slmops.registry.verification import Verifier


def build(settings: Settings) -> Service:
    bus, objects = Bus("registry", settings), Objects(settings)
    journal = Journal(
        settings.database_url, service="registry", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    facts = Facts(journal, lambda: bus.client, lambda: bus.durables)
    marker, verifying = Marker(journal, objects, lambda: bus.client, facts.check), Verifying(settings)
    collector, verifier = Collector(Collecting(settings), marker.mark), Verifier(verifying, objects, marker, utc_now)
    new_upload = partial(secrets.token_hex, 16)
    storage = Storage(settings, journal, objects, verifying, collector, verifier, utc_now, new_upload)
    routes(bus, Handlers(journal, objects, utc_now, new_upload))
    storage_routes(bus, storage)
    return Service(
        "registry",
        settings,
        bus,
        opening=[journal.open, objects.open],
        tasks=[lambda: run_relay(journal, bus.client), facts.run, Chores(journal, utc_now, storage.chores()).run],
        closing=[journal.close],
        checks=[journal.problem],
    )


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
