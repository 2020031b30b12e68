"""Composition root of the packager."""

from __future__ import annotations

from slmops.contracts.commands import ExportPackage
from slmops.kit.bus.relay import run_relay
from slmops.kit.bus.service_bus import Bus
from slmops.kit.clock import utc_now
from slmops.kit.journal import Journal
from slmops.kit.main import errors_as_one_line
from slmops.kit.objects.store import Objects
from slmops.kit.service import Service
from slmops.kit.settings import load
from slmops.packager.assemble import Assembler
from slmops.packager.deltas import Bounds, DeltaPlanner
from slmops.packager.export import Exporter
from slmops.packager.handlers import Handlers, routes
from slmops.packager.settings import Settings
from slmops.packager.store import MIGRATIONS, project, schema
from slmops.packager.tuf_metadata import TufMetadata
from slmops.packager.web import serve


def build(settings: Settings) -> Service:
    bus, objects = Bus("packager", settings), Objects(settings)
    journal = Journal(
        settings.database_url, service="packager", metadata=schema(), migrations=MIGRATIONS, project=project
    )
    assembler = Assembler(objects, settings.data_dir / "work", settings.signing_key)
    bounds = Bounds(settings.delta_bases, settings.delta_saves, settings.delta_space_bytes)
    deltas = DeltaPlanner(journal, objects, settings.data_dir / "deltas", bounds, utc_now)
    trust = TufMetadata(journal, settings.trust_keys, settings.trust_metadata, utc_now, settings.trust_renew_every)
    routes(bus, Handlers(bus, journal, objects, assembler, deltas, trust, utc_now))
    bus.serve(ExportPackage, Exporter(journal, objects).export)
    return Service(
        "packager",
        settings,
        bus,
        opening=[assembler.open, deltas.open, journal.open, trust.open, objects.open],
        tasks=[lambda: run_relay(journal, bus.client), trust.run],
        closing=[journal.close],
        checks=[journal.problem],
        http=[("/tuf/", serve(trust, journal, objects))],
    )


def main() -> None:
    with errors_as_one_line():
        build(load(Settings)).run()


if __name__ == "__main__":
    main()
